"""What this machine is: card, driver, versions. Everything is read, nothing set."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from cotenant import __version__

from driver import cu, free_bytes, open_device
from kernels import Kernels
from record import Record, Setting

PACKAGES = (
    *("cuda-bindings", "nvidia-ml-py", "torch", "triton", "cupy-cuda13x", "cupy-cuda12x"),
    *("jax", "jaxlib", "numpy", "matplotlib"),
)


def run(_: Setting, record: Record) -> None:
    """Without a device, the section has a reason and no figures of one."""
    record.figure("cotenant", __version__)
    record.figure("python", platform.python_version())
    record.figure("kernel", platform.release())
    record.figure("cores", len(os.sched_getaffinity(0)))
    record.figure("packages", {name: _version(name) for name in PACKAGES})
    with record.part("nvml"):
        record.figure("nvml", _nvml())
    with record.part("device"):
        device = open_device()
        found: dict[str, Any] = {
            "name": device.name,
            "capability": device.capability,
            "processors": device.processors,
            "memory_bytes": device.memory,
            "free_bytes": free_bytes(),
            "cuda": f"{device.driver // 1000}.{device.driver % 1000 // 10}",
            "count": int(cu("cuDeviceGetCount")),
        }
        record.figure("device", found)
        record.figure("standin", device.standin)
        Kernels(device).spin(1).launch(cu("cuStreamCreate", 1))
        cu("cuCtxSynchronize")
        record.figure("kernels", "compiled and run")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _nvml() -> dict[str, Any]:
    import pynvml as nvml

    nvml.nvmlInit()
    try:
        card = nvml.nvmlDeviceGetHandleByIndex(0)
        found: dict[str, Any] = {"driver": nvml.nvmlSystemGetDriverVersion()}
        asked = {
            "name": lambda: nvml.nvmlDeviceGetName(card),
            "mig": lambda: nvml.nvmlDeviceGetMigMode(card)[0],
            "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_MEM),
            "compute_mode": lambda: nvml.nvmlDeviceGetComputeMode(card),
            "processes": lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(card)),
        }
        for name, ask in asked.items():
            try:
                found[name] = ask()
            except (nvml.NVMLError, AttributeError) as error:
                found[name] = f"not read: {error}"
        return found
    finally:
        nvml.nvmlShutdown()
