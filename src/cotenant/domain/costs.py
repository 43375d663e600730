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
"""How long (ns) a node waits at most between two looks whether a gate has drained
(``devices.nvidia.page``, which is to be had without this package's dependencies)."""
MIG_MAKE: Final = 119 * MS
MIG_UNMAKE: Final = 163 * MS
"""Of one instance on an A100, means (gpuless thesis)."""
SUBSET_SESSION: Final = 2 * S
"""What it costs services to have other multiprocessors of a GPU in subsets: the first batch there
waits for a session of its model. Assumed."""


class Span(msgspec.Struct, frozen=True):
    """A time in ns: on average, and at most."""

    mean: int
    most: int


def drain(bound: int) -> Span:
    """From closing a launch gate until it is seen to have drained, where kernels are shorter than
    ``bound`` ns: what is in flight lies anywhere between nothing and the bound, as does the moment
    between two looks."""
    return Span((bound + GATE_LOOK) // 2, bound + GATE_LOOK)
