"""Threads for calls that may block, and may never return.

Not ``concurrent.futures``: the interpreter would wait for its threads at the end of the process,
and so for ever for a driver that hangs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue


class Lane:
    """Carries out work in the order it came, on ``threads`` threads. Work must not raise."""

    def __init__(self, name: str, threads: int = 1) -> None:
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=name, daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], None]) -> None:
        """Do it as soon as a thread is free."""
        self._work.put(work)

    def close(self) -> None:
        """End the threads once they have done what was submitted."""
        for _ in self._threads:
            self._work.put(None)

    def join(self, within_s: float) -> bool:
        """Wait for the threads of a closed lane; whether they have all ended."""
        end = time.monotonic() + within_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
