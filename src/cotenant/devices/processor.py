"""The processor of this machine, and what it can do as a device: found without changing anything.

``CpuDevice`` finds the same when a node opens it; that may make control groups, this never does.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from cotenant.devices import cpu, reclaim
from cotenant.devices.features import GATE, RECLAIM, Feature, Missing, Standing
from cotenant.domain.device import PreemptLevel


class ProcessorFacts(msgspec.Struct, frozen=True):
    """``cores`` are those that this process may use, of ``online`` in the machine; ``memory`` is
    the machine's, in bytes."""

    name: str
    cores: tuple[int, ...]
    online: int
    memory: int
    features: tuple[Feature, ...]


def look(proc: Path = Path("/proc"), cgroups: Path = reclaim.CGROUPS) -> ProcessorFacts:
    """What is there now. Tries real-time priority on this thread for a moment."""
    way, why = reclaim.way(proc, cgroups)
    return ProcessorFacts(
        name=cpu.model_name(proc),
        cores=tuple(sorted(os.sched_getaffinity(0))),
        online=os.sysconf("SC_NPROCESSORS_ONLN"),
        memory=cpu.physical_memory(),
        features=(gate(cpu.try_realtime()), memory(way, why)),
    )


def gate(realtime: bool) -> Feature:
    """How work of jobs is held back on cores, with and without the right to real-time priority."""
    if realtime:
        return Feature(GATE, Standing.TESTED, PreemptLevel.PRIORITY, "real-time priority")
    return Feature(
        GATE,
        Standing.TESTED,
        PreemptLevel.PAUSE,
        "jobs are moved and stopped",
        (
            Missing(
                "real-time priority is not allowed: to wake a model on a busy core takes longer",
                "grant CAP_SYS_NICE, or an rtprio limit of at least 20",
            ),
        ),
    )


def memory(way: str, why: str) -> Feature:
    """By which ``way`` memory is taken from jobs; without one, ``why``."""
    if way:
        return Feature(RECLAIM, Standing.UNTESTED, way=way)
    return Feature(
        RECLAIM,
        Standing.ABSENT,
        missing=(
            Missing(
                f"{why}: jobs give memory back only if they can be asked",
                "add swap, and delegate a control group (Delegate=yes) or grant CAP_SYS_NICE",
            ),
        ),
    )
