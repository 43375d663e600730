"""Waiting for what does not answer: longer each time, up to a bound, and not all at once."""

from __future__ import annotations

import random
import threading
from typing import Final

FIRST: Final = 0.5
LONGEST: Final = 60.0


class Backoff:
    """Seconds to wait before trying again. Nothing here reads a clock that can be set."""

    def __init__(self, first: float = FIRST, longest: float = LONGEST) -> None:
        self._first = first
        self._longest = longest
        self._next = first

    def reset(self) -> None:
        """It answered."""
        self._next = self._first

    def take(self) -> float:
        """How long to wait now: up to a half less than the bound, which doubles."""
        bound = self._next
        self._next = min(2 * bound, self._longest)
        return bound * random.uniform(0.5, 1.0)

    def wait(self, stop: threading.Event) -> bool:
        """Wait, but not longer than until ``stop`` is set; whether it is."""
        return stop.wait(self.take())
