"""What a job's processes occupy, seen often at little cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from cotenant.devices import proctree

SHARE_OF_CORE: Final = 0.01
"""That exact looks may take: milliseconds for each GiB."""


class Footprint:
    """Resident sets of several processes count what they share in each of them. What that makes is
    measured now and then, and taken off."""

    def __init__(self) -> None:
        self._shared = 0
        self._due = 0.0

    def look(self, pids: Sequence[int]) -> int:
        """Bytes that these processes occupy."""
        resident = proctree.resident_bytes(pids)
        if len(pids) < 2:
            return resident
        began = time.monotonic()
        if began >= self._due:
            self._shared = resident - proctree.proportional_bytes(pids)
            ended = time.monotonic()
            self._due = ended + (ended - began) / SHARE_OF_CORE
        return max(0, resident - self._shared)
