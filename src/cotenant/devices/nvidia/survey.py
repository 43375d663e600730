"""What there is of NVIDIA GPUs, and what keeps it from being used.

Changes nothing. A process of our own fills some memory of each GPU, to see whether the launch gate
holds it back; if that is asked for, another's kernel is stopped in its middle.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from cotenant.devices.features import Missing
from cotenant.devices.nvidia import host, mps
from cotenant.devices.nvidia.facts import Found, Gpu
from cotenant.devices.nvidia.features import NOT_TRIED, Surroundings, Tried, features
from cotenant.devices.nvidia.gates import Gates
from cotenant.devices.nvidia.nvml import Code, Nvml, NvmlError, NvmlGpu
from cotenant.devices.nvidia.selftest import NoGate, gates_for, run, run_channels
from cotenant.domain.errors import EnvironmentProblem

T = TypeVar("T")
CORES: Final = {
    (7, 0): 64,
    (7, 2): 64,
    (7, 5): 64,
    (8, 0): 64,
    (8, 6): 128,
    (8, 7): 128,
    (8, 9): 128,
    (9, 0): 128,
    (10, 0): 128,
    (10, 3): 128,
    (12, 0): 128,
    (12, 1): 128,
}
"""CUDA cores of a multiprocessor, by compute capability (CUDA C++ Programming Guide, "Compute
Capabilities")."""


def survey(machine: host.Host | None = None, channels: bool = False) -> Found:
    """Everything that the driver says; ``machine``: what the kernel shows (None: look).
    ``channels``: try to stop a kernel in its middle, too."""
    nvml = Nvml()
    try:
        nvml.open()
    except EnvironmentProblem:
        return Found(trouble=host.no_package(machine or host.look()))
    except NvmlError as error:
        return Found(trouble=host.no_driver(error, machine or host.look()))
    try:
        return _read(nvml, machine, channels)
    except NvmlError as error:
        return Found(trouble=host.no_driver(error, machine or host.look()))
    finally:
        nvml.close()


def _read(nvml: Nvml, machine: host.Host | None, channels: bool) -> Found:
    driver = nvml.driver()
    gpus: list[Gpu] = []
    errors: list[NvmlError] = []
    around = surroundings()
    for index in range(nvml.count()):
        try:
            gpu = read_gpu(nvml.gpu(index))
        except NvmlError as error:
            errors.append(error)
            continue
        found = features(gpu, driver, around, _try(gpu, channels))
        gpus.append(msgspec.structs.replace(gpu, features=found))
    trouble = host.too_old(driver)
    if not gpus and trouble is None:
        trouble = host.all_failed(errors) if errors else host.no_gpus(machine or host.look())
    return Found(driver, tuple(gpus), trouble, tuple(map(str, errors)) if gpus else ())


def read_gpu(gpu: NvmlGpu) -> Gpu:
    """One GPU. What it can do without may be refused; raises NvmlError for the rest."""
    unread: dict[str, str] = {}
    memory, used, reserved = gpu.memory()
    capability = gpu.capability()
    cores = _or_none("cores", gpu.cores, unread)
    per_sm = CORES.get(capability)
    return Gpu(
        index=gpu.index,
        uuid=gpu.uuid(),
        name=gpu.name(),
        pci=_or_none("pci", gpu.pci, unread) or "",
        memory=memory,
        used=used,
        reserved=reserved,
        capability=capability,
        sms=cores // per_sm if cores and per_sm else None,
        links=_or_none("links", gpu.links, unread),
        mig=_or_none("mig", gpu.mig, unread),
        processes=_or_none("processes", gpu.processes, unread),
        unread=unread,
    )


def _try(gpu: Gpu, channels: bool) -> Tried:
    """What came of trying, on a GPU that is not divided."""
    if gpu.mig is not None and gpu.mig.on:
        return Tried()
    try:
        gates = gates_for(f"survey {os.getpid()}")
        try:
            run(gates, gpu.uuid)
            return Tried(channels=_try_channels(gates, gpu) if channels else NOT_TRIED)
        finally:
            gates.close()
    except NoGate as error:
        against = Missing(error.what, error.how)
        return Tried(against, against)


def _try_channels(gates: Gates, gpu: Gpu) -> Missing | None:
    try:
        run_channels(gates, gpu.uuid)
    except NoGate as error:
        return Missing(error.what, error.how)
    return None


def surroundings() -> Surroundings:
    """Rights of this process, and MPS."""
    return Surroundings(root=os.geteuid() == 0, mps=mps.look())


def _or_none(what: str, ask: Callable[[], T], unread: dict[str, str]) -> T | None:
    """The answer, or None and a note of why there is none. A GPU that is gone is no matter of one
    question: its refusal is raised."""
    try:
        return ask()
    except NvmlError as error:
        if error.code is Code.GPU_IS_LOST:
            raise
        unread[what] = str(error)
        return None
