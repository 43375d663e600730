"""What the machine says of NVIDIA GPUs where NVML does not work, and from it: why it does not.

The kernel shows the hardware, the driver's module and its device files; which of them is missing
says whether there is no GPU, no driver, or a container that was started without GPUs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from cotenant.devices.nvidia.facts import Cause, Driver, Trouble
from cotenant.devices.nvidia.nvml import Code, NvmlError

VENDOR: Final = "0x10de"
DISPLAY: Final = "0x03"
"""What the PCI class of a GPU begins with."""
OLDEST_CUDA: Final = (12, 0)
"""CUDA libraries of version 12 run on drivers from 525 on, and on none before."""
WITH_GPUS: Final = "start the container with them: docker run --gpus all (NVIDIA Container Toolkit)"
INSTALL: Final = "install NVIDIA's driver, of version 525 or newer"


class Host(msgspec.Struct, frozen=True):
    """``pci``: addresses of NVIDIA GPUs. ``module``: version of the loaded kernel module, "" if
    none is. ``nodes``: the driver's device files; this user may not open those ``closed``."""

    pci: tuple[str, ...] = ()
    module: str = ""
    nodes: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()


def look(sys: Path = Path("/sys"), proc: Path = Path("/proc"), dev: Path = Path("/dev")) -> Host:
    """What the kernel shows to this process."""
    found = sorted((sys / "bus/pci/devices").glob("*"))
    nodes = sorted([*dev.glob("nvidiactl"), *dev.glob("nvidia[0-9]*")])
    return Host(
        pci=tuple(path.name for path in found if _is_gpu(path)),
        module=_module(proc / "driver/nvidia/version"),
        nodes=tuple(map(str, nodes)),
        closed=tuple(str(node) for node in nodes if not os.access(node, os.R_OK | os.W_OK)),
    )


def _is_gpu(path: Path) -> bool:
    try:
        vendor, kind = (path / "vendor").read_text(), (path / "class").read_text()
    except OSError:
        return False
    return vendor.strip() == VENDOR and kind.startswith(DISPLAY)


def _module(path: Path) -> str:
    try:
        text = path.read_text()
    except OSError:
        return ""
    version = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return version[0] if version else "unknown"


def no_package(host: Host) -> Trouble:
    """Why nothing is known without ``pynvml``: there may be no GPU anyway."""
    if not (host.pci or host.module or host.nodes):
        return absent()
    return Trouble(
        Cause.PACKAGE,
        "the Python package nvidia-ml-py is not installed, without which no GPU can be read",
        "pip install 'cotenant[nvidia]'",
    )


def no_driver(error: NvmlError, host: Host) -> Trouble:
    """Why the session with the driver did not begin."""
    match error.code:
        case Code.LIBRARY_NOT_FOUND if host.module:
            return Trouble(
                Cause.ACCESS,
                f"driver {host.module} runs, but its library libnvidia-ml.so.1 is not here",
                f"{WITH_GPUS}; outside a container, install the driver's libraries",
            )
        case Code.LIBRARY_NOT_FOUND | Code.DRIVER_NOT_LOADED if not host.pci and not host.module:
            return absent()
        case Code.LIBRARY_NOT_FOUND:
            return Trouble(
                Cause.DRIVER, f"there is a GPU ({', '.join(host.pci)}) and no driver", INSTALL
            )
        case Code.DRIVER_NOT_LOADED if host.module:
            return unreachable(host)
        case Code.DRIVER_NOT_LOADED:
            return Trouble(
                Cause.DRIVER,
                f"there is a GPU ({', '.join(host.pci)}), and the driver is not loaded",
                "load it: modprobe nvidia; if that fails, the kernel's log says why (dmesg)",
            )
        case Code.NO_PERMISSION:
            return unreachable(host)
    return Trouble(Cause.DRIVER, str(error), "nvidia-smi should say the same: mend the driver")


def no_gpus(host: Host) -> Trouble:
    """Why a driver that works shows no GPU."""
    return unreachable(host) if host.pci or host.module else absent()


def unreachable(host: Host) -> Trouble:
    """The driver runs, and this process does not get at its GPUs."""
    if host.closed:
        return Trouble(
            Cause.ACCESS,
            f"this user may not open {', '.join(host.closed)}",
            "give the user's group access to these files (often video or render), or run as root",
        )
    what = "the driver shows no GPU to this process"
    if not any(node[-1].isdigit() for node in host.nodes):
        what = "a driver runs, and its device files (/dev/nvidia*) are not here"
    return Trouble(Cause.ACCESS, what, WITH_GPUS)


def absent() -> Trouble:
    """There is no GPU."""
    return Trouble(Cause.ABSENT, "there is no NVIDIA GPU in this machine", "")


def too_old(driver: Driver) -> Trouble | None:
    """What is wrong with a driver that works, if anything."""
    if driver.cuda >= OLDEST_CUDA:
        return None
    return Trouble(
        Cause.DRIVER,
        f"driver {driver.version} is too old: it runs CUDA up to {_dotted(driver.cuda)}, and "
        f"{_dotted(OLDEST_CUDA)} is needed",
        INSTALL,
    )


def all_failed(errors: Iterable[NvmlError]) -> Trouble:
    """Every GPU that the driver shows refused to be read."""
    found = list(errors)
    closed = all(error.code is Code.NO_PERMISSION for error in found)
    return Trouble(
        Cause.ACCESS if closed else Cause.DRIVER,
        "; ".join(map(str, found)),
        "run as root, or have the rights to /dev/nvidia* changed"
        if closed
        else "see whether nvidia-smi lists the GPU; if not, reset it or restart the machine",
    )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
