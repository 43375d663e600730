"""What a GPU can do for Cotenant, judged from what was read of it. Pure.

Nothing here was tried. So a feature is ``UNTESTED`` at best, and ``ABSENT`` where something that it
cannot do without is missing.
"""

from __future__ import annotations

from typing import Final

import msgspec

from cotenant.devices.features import (
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

GREEN_CONTEXTS_CUDA: Final = (12, 4)
"""The first CUDA with green contexts (drivers from 550 on)."""
MPS_CAPABILITY: Final = (7, 0)
"""From Volta on each client of MPS has an address space of its own."""
NOT_YET: Final = Missing("this version of Cotenant does not use it", "")


class Surroundings(msgspec.Struct, frozen=True):
    """What matters beside the GPU: whether this process is root, where the control program of MPS
    is ("" if nowhere), and whether its daemon runs."""

    root: bool = False
    mps: str = ""
    mps_runs: bool = False


def features(gpu: Gpu, driver: Driver, around: Surroundings) -> tuple[Feature, ...]:
    """Every feature, in the order in which they are shown."""
    return (
        Feature(GATE, Standing.UNTESTED, missing=(NOT_YET,)),
        Feature(RECLAIM, Standing.UNTESTED, missing=(NOT_YET,)),
        _mig(gpu, around),
        _subsets(driver),
        _mps(gpu, around),
    )


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


def _subsets(driver: Driver) -> Feature:
    if driver.cuda < GREEN_CONTEXTS_CUDA:
        missing = Missing(
            f"driver {driver.version} has no green contexts", "install driver 550 or newer"
        )
        return Feature(SUBSETS, Standing.ABSENT, missing=(missing,))
    return Feature(SUBSETS, Standing.UNTESTED, way="green contexts", missing=(NOT_YET,))


def _mps(gpu: Gpu, around: Surroundings) -> Feature:
    if gpu.capability < MPS_CAPABILITY:
        missing = Missing("this GPU is older than Volta", "take a GPU from 2017 or later")
        return Feature(MPS, Standing.ABSENT, missing=(missing,))
    if not around.mps:
        missing = Missing(
            "nvidia-cuda-mps-control is not here",
            "install the driver's utilities",
        )
        return Feature(MPS, Standing.ABSENT, missing=(missing,))
    found = [] if around.mps_runs else [Missing("its daemon does not run", f"{around.mps} -d")]
    return Feature(MPS, Standing.UNTESTED, missing=(*found, NOT_YET))
