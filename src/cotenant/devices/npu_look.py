"""Which NPUs this machine has: what the kernel shows in ``/dev/accel``, and what OpenVINO says of
its device ``NPU``.

OpenVINO is asked in a process of its own (``python -m cotenant.devices.npu_look``): to load it
takes a while, and a driver that ends the process ends that one. Names of properties are those that
the NPU plugin of OpenVINO 2026.4 lists. **Untested on hardware.**
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from cotenant.devices.features import Missing
from cotenant.devices.nvidia.facts import Cause

NODES: Final = Path("/dev/accel")
KIND: Final = "NPU"
PATIENCE_S: Final = 60.0


class Npu(msgspec.Struct, frozen=True):
    """``id`` as OpenVINO lists it. ``memory`` and ``used`` in bytes (0: it does not say);
    ``computes``: its types, such as FP16; ``unread``: what it refused to say, and why."""

    id: str
    name: str = ""
    driver: str = ""
    compiler: str = ""
    memory: int = 0
    used: int = 0
    computes: tuple[str, ...] = ()
    unread: dict[str, str] = {}


class Npus(msgspec.Struct, frozen=True):
    """``nodes``: devices of the kernel. ``trouble``: why no NPU can be used, and its kind."""

    npus: tuple[Npu, ...] = ()
    nodes: tuple[str, ...] = ()
    trouble: Missing | None = None
    cause: Cause | None = None


def look(ask: Callable[[], tuple[Npu, ...]] | None = None, nodes: Path = NODES) -> Npus:
    """What there is. ``ask``: in place of a process that asks OpenVINO."""
    shown = tuple(sorted(map(str, nodes.glob("accel*"))))
    if not shown:
        what = f"no NPU: the kernel shows none in {nodes}"
        how = "one that Linux drives, as intel_vpu of 6.6 and later does"
        return Npus((), (), Missing(what, how), Cause.ABSENT)
    blocked = [node for node in shown if not os.access(node, os.R_OK | os.W_OK)]
    if len(blocked) == len(shown):
        how = "add the user to the group that owns it, often render"
        return Npus((), shown, Missing(f"{blocked[0]} may not be opened", how), Cause.ACCESS)
    try:
        found = (ask or _ask_apart)()
    except _NotAsked as error:
        return Npus((), shown, error.missing, error.cause)
    if not found:
        how = "install the user-space driver (linux-npu-driver) and its Level Zero loader"
        return Npus((), shown, Missing("OpenVINO lists no NPU", how), Cause.DRIVER)
    return Npus(found, shown)


class _NotAsked(Exception):
    def __init__(self, what: str, how: str = "", cause: Cause = Cause.DRIVER) -> None:
        super().__init__(what)
        self.missing = Missing(what, how)
        self.cause = cause


def _ask_apart() -> tuple[Npu, ...]:
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        raise _NotAsked(f"OpenVINO did not answer within {PATIENCE_S:.0f} s") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        if any("No module named 'openvino'" in line for line in said):
            how = "pip install 'cotenant[openvino]'"
            raise _NotAsked("OpenVINO is not installed", how, Cause.PACKAGE)
        raise _NotAsked(f"OpenVINO cannot be asked: {said[-1] if said else done.returncode}")
    return msgspec.json.decode(done.stdout, type=tuple[Npu, ...])


def read(core: Any) -> tuple[Npu, ...]:
    """The NPUs of an ``openvino.Core``."""
    return tuple(_read(core, id) for id in core.available_devices if id.partition(".")[0] == KIND)


def _read(core: Any, id: str) -> Npu:
    unread: dict[str, str] = {}

    def get(key: str, otherwise: Any) -> Any:
        try:
            return core.get_property(id, key)
        except Exception as error:  # OpenVINO raises whatever a driver brings about
            lines = str(error).strip().splitlines()
            unread[key] = lines[-1] if lines else type(error).__name__
            return otherwise

    return Npu(
        id=id,
        name=str(get("FULL_DEVICE_NAME", "")),
        driver=str(get("NPU_DRIVER_VERSION", "")),
        compiler=str(get("NPU_COMPILER_VERSION", "")),
        memory=int(get("NPU_DEVICE_TOTAL_MEM_SIZE", 0)),
        used=int(get("NPU_DEVICE_ALLOC_MEM_SIZE", 0)),
        computes=tuple(map(str, get("OPTIMIZATION_CAPABILITIES", ()))),
        unread=unread,
    )


def main() -> None:
    """Write what OpenVINO says, as JSON. It reports to its maker unless the module for that is
    absent."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    sys.stdout.buffer.write(msgspec.json.encode(read(openvino.Core())))


if __name__ == "__main__":
    main()
