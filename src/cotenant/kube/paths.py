"""Where the driver's files lie on the host.

The container runtime, the kubelet and the hook see these paths too. A driver in a container has
them mounted at the same places.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from cotenant.domain.errors import EnvironmentProblem
from cotenant.kube.names import DRIVER
from cotenant.serving.control_client import PATH_BYTES


@dataclass(frozen=True)
class Paths:
    """``control`` is the node's socket. ``registry`` and ``plugin`` are the kubelet's folders for
    registration sockets and for this driver's own files, ``cdi`` the container runtime's for
    specs. ``boot_id`` has another content after each boot. ``python`` is the interpreter that runs
    the hook on the host: 3.8 or newer, nothing installed.
    """

    control: Path
    registry: Path = Path("/var/lib/kubelet/plugins_registry")
    plugin: Path = Path("/var/lib/kubelet/plugins") / DRIVER
    cdi: Path = Path("/var/run/cdi")
    boot_id: Path = Path("/proc/sys/kernel/random/boot_id")
    python: Path = Path(sys.executable)

    @property
    def registration_socket(self) -> Path:
        """Where the kubelet finds the driver."""
        return self.registry / f"{DRIVER}-reg.sock"

    @property
    def service_socket(self) -> Path:
        """Where the kubelet has claims prepared."""
        return self.plugin / "dra.sock"

    @property
    def checkpoint(self) -> Path:
        """The folder of what is promised, a file a claim."""
        return self.plugin / "claims"

    @property
    def hook(self) -> Path:
        """The program that container runtimes run; written at every start."""
        return self.plugin / "hook.py"

    @property
    def lock(self) -> Path:
        """Held as long as a driver runs."""
        return self.plugin / "lock"

    def check(self) -> None:
        """Raises EnvironmentProblem for paths that are relative or too long for sockets."""
        for path in (self.control, self.registration_socket, self.service_socket, self.cdi):
            if not path.is_absolute():
                raise EnvironmentProblem(f"{path} must be absolute: other processes use it too")
        for path in (self.registration_socket, self.service_socket):
            if len(os.fsencode(path)) > PATH_BYTES:
                raise EnvironmentProblem(
                    f"{path} is longer than the {PATH_BYTES} bytes that Linux allows for a socket;"
                    " choose a shorter folder"
                )

    def boot(self) -> str:
        """The id of this boot. Raises EnvironmentProblem if it cannot be read."""
        try:
            return self.boot_id.read_text().strip()
        except OSError as exc:
            raise EnvironmentProblem(f"cannot read {self.boot_id}: {exc.strerror}") from None
