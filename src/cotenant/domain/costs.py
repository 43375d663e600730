"""What GPUs charge for changing hands: one table, for devices that say what they cost before
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
"""How often (ns) a node looks whether a gate has drained."""
MIG_MAKE: Final = 119 * MS
MIG_UNMAKE: Final = 163 * MS
"""Of one instance on an A100, means (gpuless thesis)."""
PINNED_COPY: Final = 20 * 10**9
"""Bytes/s between pinned host memory and a GPU: PCIe 4.0 x16 carries 32 · 10⁹ in each direction, of
which well-made copies get two thirds. Assumed."""
EVICT_START: Final = 2 * MS
"""What moving memory away or back costs (ns) beside the copy: mapping, and a look. Assumed."""


class Span(msgspec.Struct, frozen=True):
    """A time in ns: on average, and at most where that is known (0: it is not)."""

    mean: int
    most: int = 0


def drain(bound: int) -> Span:
    """From closing a launch gate until it is seen to have drained, where kernels are shorter than
    ``bound`` ns: what is in flight lies anywhere between nothing and the bound, as does the moment
    between two looks."""
    return Span((bound + GATE_LOOK) // 2, bound + GATE_LOOK)


def moved(size: int, rate: int = PINNED_COPY) -> int:
    """Ns to copy so many bytes of a job's device memory out, or back, at ``rate`` bytes/s."""
    return EVICT_START + size * S // rate if size else 0
