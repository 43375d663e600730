"""What devices charge for changing hands: one table, for those that say what they cost before
anything was measured, and for the simulator.

Each figure says where it is from. None was measured on a GPU by this project yet.
"""

from __future__ import annotations

from typing import Final

import msgspec

from cotenant.domain.units import MS, US, S

GATE_BOUND: Final = 2 * MS
"""Ns of a job's work that may be in flight behind a launch gate, if nothing else is said."""
GATE_LOOK: Final = 500 * US
"""How long (ns) a node waits at most between two looks whether a gate has drained
(``devices.nvidia.page``, which is to be had without this package's dependencies)."""
MIG_MAKE: Final = 119 * MS
MIG_UNMAKE: Final = 163 * MS
"""Of one instance on an A100, means (gpuless thesis)."""
SUBSET_SESSION: Final = 2 * S
"""What it costs services to have other multiprocessors of a GPU in subsets: the first batch there
waits for a session of its model. Assumed."""

ASKED: Final = 1 * S
"""So long (ns) a job that is to give memory has to do so by itself before it is taken from."""
AWAY: Final = 5 * S
"""So long (ns) what was taken from a job on a GPU stays away at least: who waits for it takes it
meanwhile."""


class Span(msgspec.Struct, frozen=True):
    """A time in ns: on average, and at most."""

    mean: int
    most: int


def drain(bound: int) -> Span:
    """From closing a launch gate until it is seen to have drained, where kernels are shorter than
    ``bound`` ns: what is in flight lies anywhere between nothing and the bound, as does the moment
    between two looks."""
    return Span((bound + GATE_LOOK) // 2, bound + GATE_LOOK)


class Copy(msgspec.Struct, frozen=True):
    """Moving memory of a job: ``each`` ns for an allocation, ``byte`` ns for a byte."""

    each: int
    byte: float

    def ns(self, size: int, allocations: int = 1) -> int:
        """For so many bytes, in so many allocations. 0 for none."""
        return round(self.each * allocations + self.byte * size) if size else 0

    def seen(self, size: int, ns: int) -> Copy:
        """As it is once so many bytes were seen to take so long: a quarter of what is new counts
        for a byte. Little of it tells nothing: then it is as it was."""
        if size < LEAST_SEEN or ns <= 0:
            return self
        byte = max(0, ns - self.each) / size
        return Copy(self.each, self.byte + (byte - self.byte) / 4)


LEAST_SEEN: Final = 16 * 2**20
"""Bytes that must move for their time to tell how fast they do."""


class Eviction(msgspec.Struct, frozen=True):
    """What it costs to take memory from a job: it goes ``out``, stays ``away`` for so many ns at
    least, and comes ``back``. Meanwhile the job rests, where it does at all."""

    out: Copy = Copy(0, 0.0)
    back: Copy = Copy(0, 0.0)
    away: int = 0

    @property
    def rest(self) -> int:
        """Ns of the job's time that taking anything costs, however little."""
        return self.out.each + self.away + self.back.each

    def price(self, size: int) -> int:
        """Ns of the job's time that taking so many bytes costs."""
        return self.out.ns(size) + self.away + self.back.ns(size) if size else 0


PAGING: Final = Eviction(Copy(0, 1.0), Copy(0, 1.0))
"""By the kernel, to swap: a disk of about 1 GB/s, assumed. The job goes on meanwhile."""
COPYING: Final = Eviction(Copy(100 * US, 1 / 12), Copy(100 * US, 1 / 12), AWAY)
"""By the shim, between a GPU and pinned memory of its host (native/move.c). 12 GB/s is what NVIDIA
says that such copies attain over 16 lanes of PCIe 3.0 (CUDA C++ Best Practices Guide, Pinned
Memory); what mapping an allocation takes is assumed."""
