"""What a device is to the policy: a set of compute units, memory, and levels of capability."""

from __future__ import annotations

import enum

import msgspec


class PreemptLevel(enum.IntEnum):
    """How work of a job on a device can be made to yield, weakest first."""

    NONE = 0
    """Runs to completion."""
    GATE = 1
    """Submission stops; what is in flight drains (bounded)."""
    PAUSE = 2
    """Stopped in the middle, state kept."""
    PRIORITY = 3
    """The hardware or kernel puts urgent work first by itself: an urgent batch may start
    before the job's revocation is acknowledged."""


class Partition(msgspec.Struct, frozen=True):
    """A piece of a device's space; the only thing that work runs on.

    ``units`` are the device's own unit numbers (cores, SM groups, MIG slices), so two
    partitions of one device overlap exactly when their units intersect.
    """

    id: str
    device: str
    units: tuple[int, ...]
    memory: int = 0

    @property
    def compute(self) -> int:
        """Number of compute units."""
        return len(self.units)


class DeviceSpec(msgspec.Struct, frozen=True):
    """A device as the planner sees it.

    ``shapes`` lists partition sizes (in compute units) that the device can form;
    ``resizes_live`` says whether a partition may change while work runs on others;
    ``revoke_ns`` is a first guess at the cost of taking a partition back from a job, replaced
    by measurements; ``repartition_ns`` likewise for a change of layout.
    """

    id: str
    kind: str
    units: tuple[int, ...]
    memory: int
    shapes: tuple[int, ...]
    preempt: PreemptLevel
    resizes_live: bool
    revoke_ns: int
    repartition_ns: int
    limits: tuple[str, ...] = ()
    """What this device does without on this machine, in words (shown by ``weft status``)."""
