"""Real containers, for tests of what a driver describes to a container runtime.

podman and runc come from the distribution, as does the static busybox that is all there is in a
container (``.ci/run`` installs them). Where they are not, or cannot start any container, the tests
are skipped and say why.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

SPECS = Path("/var/run/cdi")
"""The only place that podman 4 looks into and that a reboot empties."""
NEEDED = ("podman", "runc", "busybox")


class Podman:
    def __init__(self, folder: Path) -> None:
        self.root = folder / "rootfs"
        (self.root / "bin").mkdir(parents=True)
        busybox = shutil.which("busybox")
        assert busybox is not None
        shutil.copy(busybox, self.root / "bin" / "busybox")
        (self.root / "bin" / "sh").symlink_to("busybox")
        conf = folder / "containers.conf"
        # A sandbox may not raise the limits that podman would by default.
        conf.write_text("[containers]\ndefault_ulimits = []\n")
        self._environment = {**os.environ, "CONTAINERS_CONF": str(conf)}
        # vfs mounts nothing over its folder, so nothing is left when that is removed.
        storage = ["--storage-driver", "vfs", "--root", str(folder / "s"), "--runroot"]
        runtime = ["--runtime", "runc", "--cgroup-manager", "cgroupfs"]
        self._command = ["podman", *storage, str(folder / "run"), *runtime]

    def run(self, script: str, *devices: str) -> subprocess.CompletedProcess[str]:
        options = [word for name in devices for word in ("--device", name)]
        run = ["run", "--rm", "--network=none", *options, "--rootfs", str(self.root)]
        return subprocess.run(
            [*self._command, *run, "/bin/sh", "-c", script],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@contextmanager
def shown(folder: Path, uid: str) -> Iterator[None]:
    """A claim's spec in ``folder`` is known to podman, too."""
    (ours,) = folder.glob(f"*{uid}*")
    SPECS.mkdir(parents=True, exist_ok=True)
    there = SPECS / ours.name
    shutil.copy(ours, there)
    try:
        yield
    finally:
        there.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("only root may describe devices to podman")
    # podman takes a short path alone.
    with TemporaryDirectory(prefix="podman-", ignore_cleanup_errors=True) as folder:
        found = Podman(Path(folder))
        tried = found.run("echo works")
        if tried.stdout.strip() != "works":
            pytest.skip(f"podman starts no container here: {tried.stderr.strip()[-300:]}")
        yield found
