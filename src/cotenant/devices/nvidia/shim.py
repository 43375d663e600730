"""Where the shim of the launch gate is, and the driver that it stands in front of."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from cotenant.devices.nvidia.page import DRIVER_VARIABLE, VARIABLE

SHIM: Final = Path(__file__).parent / "shim" / "libcuda.so.1"
DRIVER: Final = "libcuda.so.1"
_TAIL: Final = "/cotenant/devices/nvidia/shim"
_LISTS: Final = {
    "LD_PRELOAD": (f"{_TAIL}/{DRIVER}", "[: ]"),
    "LD_LIBRARY_PATH": (_TAIL, "[:;]"),
}
"""How entries of ours end, of whichever Cotenant, and what separates entries."""
_MARK: Final = b"cotenant_gate_shim"
"""A symbol that ours has and no driver does."""
_FOLDERS: Final = (
    "/usr/lib/x86_64-linux-gnu",
    "/lib/x86_64-linux-gnu",
    "/usr/lib64",
    "/lib64",
    "/usr/lib",
    "/usr/local/nvidia/lib64",
    "/usr/lib/wsl/lib",
    "/run/opengl-driver/lib",
)
"""Where distributions and containers keep the driver, beside what the loader's cache says."""


def shim() -> Path | None:
    """The shim; None where it was not built."""
    return SHIM if SHIM.is_file() else None


def driver() -> Path | None:
    """The driver's own library as the loader would find it, never a shim; None without any."""
    for path in (
        *_in(os.environ.get("LD_LIBRARY_PATH", "").split(":")),
        *_cached(),
        *_in(_FOLDERS),
    ):
        if path.is_file() and not _is_shim(path):
            return path.absolute()
    return None


def without_gate(env: Mapping[str, str]) -> dict[str, str]:
    """An environment without what the launch gate of the job that it comes from put into it."""
    found = {name: v for name, v in env.items() if name not in (VARIABLE, DRIVER_VARIABLE)}
    for name, (end, separator) in _LISTS.items():
        entries = re.split(separator, found.get(name, ""))
        kept = [entry for entry in entries if not entry.rstrip("/").endswith(end)]
        if not kept:
            del found[name]
        elif kept != entries:
            found[name] = ":".join(kept)
    return found


def _in(folders: Iterable[str]) -> tuple[Path, ...]:
    return tuple(Path(folder) / DRIVER for folder in folders if folder)


def _cached() -> tuple[Path, ...]:
    """What the loader's cache says; nothing where it cannot be asked."""
    try:
        text = subprocess.run(
            ["/sbin/ldconfig", "-p"], capture_output=True, text=True, timeout=5, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    lines = (line.strip() for line in text.splitlines())
    found = (line.rpartition("=> ")[2] for line in lines if line.startswith(f"{DRIVER} (libc6,x86"))
    return tuple(map(Path, found))


def _is_shim(path: Path) -> bool:
    """Whether it is ours, wherever it was copied to: by a symbol, without loading it."""
    if path.stat().st_size > 1 << 20:
        return False  # drivers have some tens of MiB
    return _MARK in path.read_bytes()
