"""What a job's processes occupy, seen often at little cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from cotenant.devices import proctree

SHARE_OF_CORE: Final = 0.02
"""That exact looks may take: milliseconds for each GiB."""
LATEST_S: Final = 5.0
"""And so long at most until one, since what a busy machine makes of a look says little."""


class Footprint:
    """Resident sets of several processes count what they share in each of them, so what they occupy
    together is measured exactly: now and then, and when processes come or go. In between what the
    resident sets have changed by since is added."""

    def __init__(self) -> None:
        self._pids: frozenset[int] = frozenset()
        self._exact = self._resident = 0
        self._due = self._allowed = 0.0

    def look(self, pids: Sequence[int]) -> int:
        """Bytes that these processes occupy."""
        resident = proctree.resident_bytes(pids)
        if len(pids) < 2:
            return resident
        began = time.monotonic()
        same = self._pids == frozenset(pids)
        if began >= (self._due if same else self._allowed):
            self._exact, self._resident = proctree.proportional_bytes(pids), resident
            self._pids = frozenset(pids)
            took = time.monotonic() - began
            self._allowed = began + min(took / SHARE_OF_CORE, LATEST_S)
            self._due = max(self._allowed, began + 1.0)
            return self._exact
        return max(0, self._exact + resident - self._resident) if same else self._exact
