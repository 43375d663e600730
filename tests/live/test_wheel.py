"""What one installs: a wheel with the compiled policy, and a pure one where there is no compiler.
The rest of the tests is of the package that ``make test`` installed; this one says what that is."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

from cotenant.runtime import nodes
from tests.live.conftest import scale_model

ROOT = Path(__file__).parents[2]
SCENARIO = ROOT / "examples" / "scenarios" / "camera-box.yaml"
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "native", "src")
MADE = shutil.ignore_patterns("__pycache__", "*.so*", "*.egg-info", "shim", "build")


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    """setup.py, which does not set anything up when it is imported by another name."""
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def installed() -> tuple[Distribution, Path]:
    """What is tested, and the wheel that it came from; skips where that is no wheel."""
    found = distribution("cotenant")
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    wheel = Path(unquote(urlsplit(origin.get("url", "")).path))
    if wheel.suffix != ".whl":
        pytest.skip("what is tested is no wheel but the sources (make dev); make test tests one")
    if not wheel.exists():
        pytest.skip("the wheel that is tested was removed since it was installed")
    return found, wheel


@pytest.fixture(scope="module")
def compiled_wheel(builder: ModuleType) -> Path:
    _, wheel = installed()
    if reason := builder.why_pure():
        pytest.skip(f"nothing was compiled: {reason}")
    return wheel


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, without a compiler on the path."""
    folder = tmp_path_factory.mktemp("pure")
    tree = folder / "tree"
    tree.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=MADE)
        else:
            shutil.copy(ROOT / name, tree)
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    said(sys.executable, "-c", code, str(folder), cwd=tree)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as unpacked:
        unpacked.extractall(folder, filter="data")
    tools = folder / "bin"
    tools.mkdir()
    source = folder / archive.name.removesuffix(".tar.gz")
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    env = {"PATH": str(tools), "HOME": str(folder)}
    pip = (sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder))
    said(*pip, str(source), env=env)
    (wheel,) = folder.glob("*.whl")
    return wheel


class Place:
    """A virtual environment with a wheel in it. What that needs is taken from this one."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.python = str(folder / "bin" / "python")
        self.command = str(folder / "bin" / "cotenant")
        said(sys.executable, "-m", "venv", "--without-pip", str(folder))
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", "--no-index")
        said(*pip, "--no-deps", "--disable-pip-version-check", str(wheel))
        (site,) = folder.glob("lib/python3*/site-packages")
        (site / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def cotenant(self, *words: str, cwd: Path) -> str:
        return said(self.command, *words, cwd=cwd)


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory, pure_wheel: Path) -> Place:
    return Place(tmp_path_factory.mktemp("pure-place"), pure_wheel)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, compiled_wheel: Path) -> Place:
    return Place(tmp_path_factory.mktemp("compiled-place"), compiled_wheel)


def said(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """What a command printed."""
    usual = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", nodes.DIRECTORY)}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=env or usual,
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def modules(wheel: Path) -> set[str]:
    return {name for name in names(wheel) if name.endswith(".py")}


# --- what is in them --------------------------------------------------------------------------


def test_what_is_tested_is_the_compiled_wheel(
    compiled_wheel: Path, builder: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    machine_code = {name.split(".")[0] for name in names(compiled_wheel) if name.endswith(".so")}
    wanted = {str(Path(m).relative_to("src").with_suffix("")) for m in builder.compiled_modules()}
    assert "cotenant/policy/dispatcher" in wanted and wanted <= machine_code
    for module in ("cotenant.policy.dispatcher", "cotenant.sim.world"):
        found = importlib.util.find_spec(module)
        assert found is not None and str(found.origin).endswith(".so"), found


def test_the_shim_is_in_it(compiled_wheel: Path, builder: ModuleType) -> None:
    if reason := builder.native().why_not():
        pytest.skip(reason)
    shim = {name for name in names(compiled_wheel) if "/shim/" in name}
    assert {Path(name).name for name in shim} == {"libcuda.so", "libcuda.so.1"}


def test_where_there_is_no_compiler_it_is_for_every_machine(pure_wheel: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names(pure_wheel) if ".so" in name]


def test_both_have_the_same_modules_and_nothing_else(
    compiled_wheel: Path, pure_wheel: Path
) -> None:
    assert modules(compiled_wheel) == modules(pure_wheel)
    sources = (ROOT / "src" / "cotenant").rglob("*.py")
    assert modules(pure_wheel) == {str(p.relative_to(ROOT / "src")) for p in sources}


# --- what they do -----------------------------------------------------------------------------


def test_both_decide_the_same(pure: Place, compiled: Place, tmp_path: Path) -> None:
    outcomes = []
    for place in (pure, compiled):
        out = tmp_path / f"{len(outcomes)}.json"
        options = ("--seeds", "1", "--policies", "cotenant", "--json", str(out))
        place.cotenant("simulate", str(SCENARIO), *options, cwd=tmp_path)
        outcomes.append(json.loads(out.read_text()))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("kind", ["pure", "compiled"])
def test_it_knows_what_it_is(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    place: Place = request.getfixturevalue(kind)
    code = "from cotenant.telemetry.compiled import policy_is_compiled as is_it; print(is_it())"
    assert said(place.python, "-P", "-c", code, cwd=tmp_path).strip() == str(kind == "compiled")


def test_the_pure_one_serves(pure: Place, tmp_path: Path) -> None:
    scale_model(tmp_path / "models" / "scale" / "1" / "model.onnx")
    pure.cotenant("init", str(tmp_path), cwd=tmp_path)
    config = tmp_path / "cotenant.yaml"
    config.write_text(config.read_text().replace(":8000", ":0").replace(":8001", ":0"))
    node = subprocess.Popen(
        [pure.command, "serve", str(config)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert node.stdout is not None
        heard: list[str] = []
        for line in node.stdout:
            heard.append(line)
            if "serving on" in line:
                break
        assert heard and "serving on" in heard[-1], "".join(heard)
        (tmp_path / "in.json").write_text('{"x": [1.0, 2.0, 3.0, 4.0]}')
        where = ("--state-dir", str(tmp_path / "cotenant-state"))
        answer = pure.cotenant("infer", "scale", "--input", "in.json", *where, cwd=tmp_path)
        assert "y" in answer
        pure.cotenant("stop", *where, cwd=tmp_path)
        assert node.wait(60) == 0
    finally:
        node.kill()
        node.wait()
