"""A job's memory limit: what its process tree occupies, seen often at little cost.

The job shim imports this file, so it imports next to nothing.
"""

from __future__ import annotations

import time

from cotenant.devices import proctree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LOOK_EVERY_S = 0.1
SHARE_OF_CORE = 0.02
"""Looks are dear on a machine with thousands of processes, exact ones with much memory too."""


class MemoryLimit:
    """Looks whether a process tree occupies more than ``limit`` bytes.

    Resident sets are added up at each look; where the sum is above the limit, shared pages may
    be what makes it so, and the proportional sets decide. The next exact look comes once the
    resident sets have grown by what was then left, or enough time has passed for its cost.
    """

    def __init__(self, limit: int, tree: Callable[[], list[int]]) -> None:
        self.due = 0.0
        """When to look again, on the monotonic clock."""
        self._limit = limit
        self._tree = tree
        self._cleared = limit
        """Resident sets up to this sum need no exact look until ``_exact_due``."""
        self._exact_due = float("inf")
        self._was_over = False

    def look(self) -> int:
        """Bytes occupied if that is too much, seen twice in a row; else 0.

        Twice, because processes that end while they are added up leave their part of what is
        shared to those that are counted after them.
        """
        began = time.monotonic()
        tree = self._tree()
        resident = proctree.resident_bytes(tree)
        self.due = began + max(LOOK_EVERY_S, (time.monotonic() - began) / SHARE_OF_CORE)
        if resident <= self._limit:
            self._cleared, self._was_over = self._limit, False
            return 0
        if resident <= self._cleared and began < self._exact_due:
            return 0
        occupied = proctree.proportional_bytes(tree)
        ended = time.monotonic()
        if occupied <= self._limit:
            self._cleared = resident + self._limit - occupied
            self._exact_due = ended + (ended - began) / SHARE_OF_CORE
            self._was_over = False
            return 0
        self._cleared, self.due = 0, ended + LOOK_EVERY_S
        if self._was_over:
            return occupied
        self._was_over = True
        return 0
