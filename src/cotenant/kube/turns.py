"""One call at a time works on a claim; calls for different claims do not wait for each other."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from cotenant.domain.errors import NotReady


class Turn:
    """A claim's lock, as long as somebody wants it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.wanted = 0
        self.leaving = 0
        """Calls that want it unprepared: who waits for its readiness gives up."""


class Turns:
    """Lets one call at a time work on a claim."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._turns: dict[str, Turn] = {}

    @contextlib.contextmanager
    def of(self, uid: str, deadline: float, leaving: bool = False) -> Iterator[Turn]:
        """Raises NotReady if another call still works on the claim at ``deadline`` (monotonic
        seconds)."""
        with self._guard:
            turn = self._turns.setdefault(uid, Turn())
            turn.wanted += 1
            turn.leaving += leaving
        try:
            if not turn.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                raise NotReady(f"claim {uid} is still being worked on by an earlier call")
            try:
                yield turn
            finally:
                turn.lock.release()
        finally:
            with self._guard:
                turn.wanted -= 1
                turn.leaving -= leaving
                if not turn.wanted:
                    del self._turns[uid]
