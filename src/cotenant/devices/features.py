"""What a device can do for Cotenant on this machine, and what is missing for more: pure data.

The same nouns for every kind of device; ``cotenant devices`` shows them.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

from cotenant.domain.device import PreemptLevel


class Standing(enum.Enum):
    """How well it is known whether a feature works here."""

    TESTED = "tested"
    """It was tried on this machine, and works at the level that is named."""
    UNTESTED = "not tested"
    """Nothing is known to stand against it, and nobody tried."""
    ABSENT = "no"
    """It cannot work here as things stand; what is missing is named."""


class Missing(msgspec.Struct, frozen=True):
    """What stands against a feature, or against more of it, and how to change that ("": not at
    all on this machine)."""

    what: str
    how: str


class Feature(msgspec.Struct, frozen=True):
    """``level`` is set where it was tested; ``way`` says by what it works, where there are several.
    ``missing`` may stand beside a feature that works: it would then do more."""

    name: str
    standing: Standing
    level: PreemptLevel | None = None
    way: str = ""
    missing: tuple[Missing, ...] = ()


GATE: Final = "gate"
"""Work of jobs can be held back."""
CHANNELS: Final = "kernels stopped"
"""Work of jobs that is under way can be stopped in its middle."""
RECLAIM: Final = "memory of jobs taken back"
MIG: Final = "MIG"
"""The GPU can be divided into instances with memory of their own."""
SUBSETS: Final = "SM subsets"
"""A process can be kept to some of the multiprocessors."""
MPS: Final = "MPS"
"""Processes can compute on the GPU at once."""
