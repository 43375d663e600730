"""Wrong tokens, counted: too many in a while, and no more are looked at for as long."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

MOST_FAILURES: Final = 10
FAILURES_S: Final = 60.0


class Failures:
    """See the module's text."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=MOST_FAILURES)

    @property
    def too_many(self) -> bool:
        """Whether there were so many in the last ``FAILURES_S``."""
        full = len(self._times) == MOST_FAILURES
        return full and self._clock() - self._times[0] < FAILURES_S

    def note(self) -> None:
        """One more."""
        self._times.append(self._clock())
