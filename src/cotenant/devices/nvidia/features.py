"""What a GPU can do for Cotenant, judged from what was read of it. Pure.

Only the launch gate was tried, and the channels of processes if that was asked for. Any other
feature is ``UNTESTED`` at best, and ``ABSENT`` where
something that it cannot do without is missing.
"""

from __future__ import annotations

from typing import Final

import msgspec

from cotenant.devices.features import (
    CHANNELS,
    GATE,
    MIG,
    MPS,
    RECLAIM,
    SUBSETS,
    Feature,
    Missing,
    Standing,
)
from cotenant.devices.nvidia.facts import Driver, Gpu
from cotenant.devices.nvidia.mps import CONTROL, Mps
from cotenant.domain.device import PreemptLevel

GREEN_CONTEXTS_CUDA: Final = (12, 4)
"""The first CUDA with green contexts (drivers from 550 on)."""
MPS_PARTITIONS_CUDA: Final = (13, 1)
"""The first CUDA whose MPS gives clients multiprocessors of their own."""
MPS_PARTITIONS_CAPABILITY: Final = (8, 0)
"""It does so from Ampere on."""
MPS_CAPABILITY: Final = (7, 0)
"""From Volta on each client of MPS has an address space of its own."""
NOT_YET: Final = Missing("this version of Cotenant does not use it", "")
SERVICES_ONLY: Final = Missing(
    "a node divides a GPU so for services alone (subsets: true), where MPS runs without static "
    "partitions; jobs would not keep to it",
    "",
)
DIVIDED: Final = Missing("the GPU is divided: a node tries it on an instance", "")
NOT_TRIED: Final = Missing(
    "it was not tried",
    "cotenant devices --channels tries it; preempt: channel uses it where it works",
)


class Surroundings(msgspec.Struct, frozen=True):
    """What matters beside the GPU: whether this process is root, and what there is of MPS."""

    root: bool = False
    mps: Mps = Mps()


class Tried(msgspec.Struct, frozen=True):
    """What stood against the launch gate, and against stopping a kernel in its middle, when that
    was tried; None: it works."""

    gate: Missing | None = None
    channels: Missing | None = NOT_TRIED


def features(gpu: Gpu, driver: Driver, around: Surroundings, tried: Tried) -> tuple[Feature, ...]:
    """Every feature, in the order in which they are shown."""
    held = _gate(gpu, tried.gate)
    memory = Standing.UNTESTED if tried.gate is None else held.standing
    return (
        held,
        _channels(gpu, tried.channels),
        Feature(RECLAIM, memory, missing=held.missing),
        _mig(gpu, around),
        _subsets(gpu, driver, around.mps),
        _mps(gpu, around.mps),
    )


def _gate(gpu: Gpu, gate: Missing | None) -> Feature:
    if gpu.mig is not None and gpu.mig.on:
        return Feature(GATE, Standing.UNTESTED, missing=(DIVIDED,))
    if gate is not None:
        return Feature(GATE, Standing.ABSENT, missing=(gate,))
    return Feature(GATE, Standing.TESTED, PreemptLevel.GATE)


def _channels(gpu: Gpu, channels: Missing | None) -> Feature:
    if gpu.mig is not None and gpu.mig.on:
        return Feature(CHANNELS, Standing.UNTESTED, missing=(DIVIDED,))
    if channels is None:
        return Feature(CHANNELS, Standing.TESTED, PreemptLevel.PAUSE)
    standing = Standing.UNTESTED if channels == NOT_TRIED else Standing.ABSENT
    return Feature(CHANNELS, standing, missing=(channels,))


def _mig(gpu: Gpu, around: Surroundings) -> Feature:
    if "mig" in gpu.unread:
        refused = Missing("its state could not be read", gpu.unread["mig"])
        return Feature(MIG, Standing.UNTESTED, missing=(refused,))
    if gpu.mig is None:
        missing = Missing(
            "this GPU cannot be divided", "take one that can: A100, A30, H100, H200 or newer"
        )
        return Feature(MIG, Standing.ABSENT, missing=(missing,))
    found = []
    if not gpu.mig.on:
        how = f"as root, with nothing running on it: nvidia-smi -i {gpu.index} -mig 1"
        if gpu.mig.pending:
            how = f"reset the GPU: nvidia-smi -i {gpu.index} --gpu-reset"
        found.append(Missing("MIG is off", how))
    if not around.root:
        found.append(Missing("only root may make and remove instances", "run Cotenant as root"))
    return Feature(MIG, Standing.UNTESTED, missing=tuple(found))


def _subsets(gpu: Gpu, driver: Driver, mps: Mps) -> Feature:
    """Within a process by green contexts; across processes by partitions of MPS."""
    if driver.cuda < GREEN_CONTEXTS_CUDA:
        missing = Missing(
            f"driver {driver.version} has no green contexts", "install driver 550 or newer"
        )
        return Feature(SUBSETS, Standing.ABSENT, missing=(missing,))
    way, across = "green contexts, within a process", _no_partitions(gpu, driver, mps)
    if across is None:
        way = f"{way}; MPS partitions, across processes"
    found = (SERVICES_ONLY,) if across is None else (across, SERVICES_ONLY)
    return Feature(SUBSETS, Standing.UNTESTED, way=way, missing=found)


def _no_partitions(gpu: Gpu, driver: Driver, mps: Mps) -> Missing | None:
    """Why processes cannot each be kept to multiprocessors of their own; None if they can."""
    what = "processes cannot be kept to subsets"
    if gpu.capability < MPS_PARTITIONS_CAPABILITY:
        return Missing(f"{what}: this GPU is older than Ampere", "")
    if driver.cuda < MPS_PARTITIONS_CUDA:
        how = "install a driver for CUDA 13.1 or newer"
        return Missing(f"{what}: the MPS of driver {driver.version} has no partitions", how)
    if not mps.control:
        return Missing(f"{what}: {CONTROL} is not here", "install the driver's utilities")
    how = f"{mps.control} -d -S; Cotenant does not start it by itself"
    if not mps.runs:
        return Missing(f"{what}: MPS does not run", how)
    if not mps.static:
        return Missing(
            f"{what}: MPS runs without static partitions",
            f"end it, which ends all that computes through it, then {how}",
        )
    return None


def _mps(gpu: Gpu, mps: Mps) -> Feature:
    if gpu.capability < MPS_CAPABILITY:
        missing = Missing("this GPU is older than Volta", "take a GPU from 2017 or later")
        return Feature(MPS, Standing.ABSENT, missing=(missing,))
    if not mps.control and not mps.runs:
        missing = Missing(f"{CONTROL} is not here", "install the driver's utilities")
        return Feature(MPS, Standing.ABSENT, missing=(missing,))
    way = f"server {mps.server}" if mps.server else ""
    found = [] if mps.runs else [Missing("its daemon does not run", f"{mps.control} -d")]
    return Feature(MPS, Standing.UNTESTED, way=way, missing=(*found, NOT_YET))
