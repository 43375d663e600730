"""A Debian package is built, installed in a root of its own, serves, and is taken away again.

The wheel is without compiled parts, and what Cotenant needs is taken from this environment by a
``.pth`` file: a package for this very Python, made in seconds. It is no package to hand out.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.live.conftest import Boxes, infer_body, until
from tests.live.test_service import Manager

ROOT = Path(__file__).parents[2]
UNIT = "usr/lib/systemd/system/cotenant.service"
CONFIG = "etc/cotenant/cotenant.yaml"
NEEDED = ("git", "dpkg", "dpkg-deb", "deb-systemd-helper", "systemd-sysusers", "systemctl")
pytestmark = pytest.mark.timeout(300)


def run(*command: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    check = kwargs.pop("check", True)
    kwargs = {"capture_output": True, "text": True, "timeout": 120, "check": False, **kwargs}
    done = subprocess.run(list(map(str, command)), **kwargs)  # noqa: PLW1510
    assert not (check and done.returncode), f"{command}: {done.stdout}{done.stderr}"
    return done


def plain() -> dict[str, str]:
    """An environment in which nothing of this one's packages is found."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pure one, in seconds."""
    if missing := [name for name in NEEDED if not shutil.which(name)]:
        pytest.skip(f"no package is built and installed: {', '.join(missing)} is not here")
    if not (ROOT / ".git").exists():
        pytest.skip("no package is built: what belongs to the source is not known without git")
    if os.geteuid():
        pytest.skip("no package is installed: files become root's, which takes root")
    work = tmp_path_factory.mktemp("wheel")
    (work / "source").mkdir()
    copy = 'git ls-files -z | xargs -0 cp --parents -t "$0"'
    run("sh", "-c", copy, work / "source", cwd=ROOT)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", work, work / "source", env={**plain(), "COTENANT_PURE": "1"})
    return next(work.glob("*.whl"))


def build(wheel: Path, out: Path, revision: int) -> Path:
    base = sys._base_executable  # type: ignore[attr-defined]
    options = ("--wheel", wheel, "--python", base, "--no-deps", "--revision", revision)
    done = run(sys.executable, ROOT / "deploy/debian/build.py", "--out", out, *options, env=plain())
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def package(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(wheel, tmp_path_factory.mktemp("first"), 1)


class System:
    """A root directory with a database of dpkg's, and nothing else."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("updates", "info"):
            (root / "var/lib/dpkg" / name).mkdir(parents=True)
        (root / "var/lib/dpkg/status").touch()
        (root / "etc").mkdir()

    def dpkg(self, *arguments: object) -> str:
        options = ("--log=/dev/null", "--force-script-chrootless", "--force-depends")
        return run("dpkg", f"--root={self.root}", *options, *arguments).stdout

    def install(self, package: Path) -> None:
        self.dpkg("--install", package)
        (site,) = self.root.glob("usr/lib/cotenant/lib/python3.*/site-packages")
        (site / "needs.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    def say(self, *command: str, check: bool = True) -> str:
        """What an installed command prints."""
        path = self.root / "usr/bin" / command[0]
        done = run(path, *command[1:], env=plain(), cwd=self.root, check=check)
        return done.stdout

    def files(self) -> set[Path]:
        return {path for path in self.root.rglob("*") if path.name != "needs.pth"}


@pytest.fixture
def system(directory: Path) -> System:
    return System(directory / "root")


@pytest.fixture
def installed(system: System, package: Path) -> System:
    system.install(package)
    return system


def test_the_same_wheel_gives_the_same_package(wheel: Path, package: Path, tmp_path: Path) -> None:
    assert build(wheel, tmp_path, 1).read_bytes() == package.read_bytes()


def test_files_are_roots_and_only_its_to_write(package: Path) -> None:
    for line in run("dpkg-deb", "--contents", package).stdout.splitlines():
        mode, owner = line.split()[:2]
        assert owner == "root/root", line
        assert mode[0] == "l" or mode[1:] in ("rwxr-xr-x", "rw-r--r--"), line
        if mode.startswith("-") and "x" in mode:
            assert "./usr/bin/" in line


def test_it_names_the_python_that_it_is_for_and_its_configuration(package: Path) -> None:
    needs = run("dpkg-deb", "--field", package, "Depends").stdout
    assert f"python3.{sys.version_info.minor}" in needs
    held = run("dpkg-deb", "--info", package, "conffiles").stdout
    assert held.split() == [f"/{CONFIG}"]


def test_commands_run_from_where_they_are_and_leave_nothing_behind(installed: System) -> None:
    before = installed.files()
    assert installed.say("cotenant", "--version").startswith("cotenant ")
    found = json.loads(
        installed.say("cotenant", "doctor", str(installed.root / CONFIG), "--json", check=False)
    )
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["packages"]["state"] == "ok"
    assert checks["configuration"]["state"] == "ok"
    assert installed.files() == before, "byte code came along, so none is written"
    listed = run("dpkg", f"--root={installed.root}", "--verify", "cotenant").stdout
    assert not listed


def test_the_driver_for_kubernetes_comes_along(installed: System) -> None:
    pytest.importorskip("lightkube")
    pytest.importorskip("grpc")
    assert "kubelet" in installed.say("cotenant-dra", "--help")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def manager(directory: Path) -> Iterator[Manager]:
    manager = Manager(directory / "notify")
    yield manager
    manager.close()


def test_it_serves_with_its_configuration(
    installed: System, manager: Manager, boxes: Boxes
) -> None:
    """Of which only directories and ports are others, and a service is added."""
    state, port = installed.root / "var/lib/cotenant", free_port()
    config = installed.root / CONFIG
    text = config.read_text().replace("/var/lib/cotenant", str(state))
    text = text.replace(":8000", f":{port}").replace(":8001", ":0")
    config.write_text(text + "services: [{name: double, objective: {latency: 2s}}]\n")
    written = boxes(directory=state)
    written.model("scale", "double")
    process = written.process = subprocess.Popen(
        [installed.root / "usr/bin/cotenant", "serve", config],
        env={**plain(), **manager.environment, "COTENANT_TEST_BOX": written.mark},
        stdout=subprocess.DEVNULL,
    )
    written.port = port
    until(lambda: manager.said("READY") or process.poll() is not None)
    (ready,) = manager.said("READY")
    assert ready["MAINPID"] == str(process.pid)
    until(lambda: written.ask("GET", "/v2/health/ready").status == 200)
    x = np.ones((1, 4), np.float32)
    assert written.post("/v2/models/double/infer", infer_body(x=x)).status == 200
    for pid in written.workers():
        assert Path(f"/proc/{pid}/cmdline").read_text().startswith(str(installed.root))
    assert written.stop(signal.SIGTERM) == 0
    assert manager.said("STOPPING")


def enabled(system: System) -> list[Path]:
    return list((system.root / "etc/systemd/system").glob("*.wants/*.service"))


def test_an_upgrade_keeps_what_the_user_wrote_and_chose(
    installed: System, wheel: Path, tmp_path: Path
) -> None:
    assert not enabled(installed), "starting it is the user's choice"
    config = installed.root / CONFIG
    config.write_text(f"# mine\n{config.read_text()}")
    mine = config.read_text()
    second, third = (build(wheel, tmp_path, revision) for revision in (2, 3))
    installed.dpkg("--install", second)
    assert not enabled(installed)
    assert config.read_text() == mine
    run("systemctl", f"--root={installed.root}", "enable", "cotenant.service")
    installed.dpkg("--install", third)
    assert enabled(installed)
    assert installed.say("cotenant", "--version")


def test_its_state_goes_with_the_purge_alone(installed: System) -> None:
    job = installed.root / "var/lib/cotenant/state/jobs.sqlite"
    job.parent.mkdir(parents=True)
    job.touch()
    run("systemctl", f"--root={installed.root}", "enable", "cotenant.service")
    installed.dpkg("--remove", "cotenant")
    assert not (installed.root / "usr/bin/cotenant").exists()
    assert job.exists()
    assert (installed.root / CONFIG).exists()
    installed.dpkg("--purge", "cotenant")
    assert not job.parent.parent.exists()
    assert not (installed.root / CONFIG).exists()
    assert not enabled(installed)


def test_what_is_done_twice_changes_nothing(installed: System, package: Path) -> None:
    before, users = installed.files(), (installed.root / "etc/passwd").read_text()
    installed.dpkg("--install", package)
    assert installed.files() == before
    assert (installed.root / "etc/passwd").read_text() == users


# --- the unit


def verify(root: Path) -> subprocess.CompletedProcess[str]:
    """Only the unit itself: there is no other below this root."""
    command = ("systemd-analyze", "verify", f"--root={root}", "--man=no", "--recursive-errors=no")
    return run(*command, "cotenant.service", check=False)


@pytest.fixture
def unit(installed: System) -> System:
    if not shutil.which("systemd-analyze"):
        pytest.skip("the unit is not verified: there is no systemd-analyze")
    return installed


def test_systemd_finds_nothing_wrong_with_the_unit(unit: System) -> None:
    done = verify(unit.root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_systemd_would_find_a_key_misspelt_or_the_command_missing(unit: System) -> None:
    file = unit.root / UNIT
    file.write_text(file.read_text().replace("WatchdogSec", "WatchdogSecs"))
    assert verify(unit.root).returncode
    file.write_text(file.read_text().replace("WatchdogSecs", "WatchdogSec"))
    (unit.root / "usr/bin/cotenant").unlink()
    assert verify(unit.root).returncode
