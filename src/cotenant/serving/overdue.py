"""One timer for many waits of the same length.

A timer per request would cost more than decoding it. Entries are kept in the order in which
they fall due (they all wait equally long, and dicts keep their order), so a single timer, set
for the oldest, is enough; entering and leaving are dict operations.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable


class Overdue:
    """Calls back for each entry that has not left ``delay_s`` seconds after it entered.

    To be used on one event loop. An entry's callback runs once, from the loop.
    """

    def __init__(self, delay_s: float) -> None:
        self._delay = delay_s
        self._entries: dict[Hashable, tuple[float, Callable[[], None]]] = {}
        self._timer: asyncio.Handle | None = None

    def enter(self, key: Hashable, callback: Callable[[], None]) -> None:
        """Start waiting; ``key`` must not have entered already."""
        loop = asyncio.get_running_loop()
        when = loop.time() + self._delay
        self._entries[key] = (when, callback)
        if self._timer is None:
            self._timer = loop.call_at(when, self._sweep)

    def leave(self, key: Hashable) -> None:
        """Stop waiting; nothing happens if the entry's callback has run."""
        self._entries.pop(key, None)

    def __contains__(self, key: Hashable) -> bool:
        """Whether an entry is waiting."""
        return key in self._entries

    def _sweep(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        while self._entries:
            key, (when, callback) = next(iter(self._entries.items()))
            if when > loop.time():
                self._timer = loop.call_at(when, self._sweep)
                return
            del self._entries[key]
            try:
                callback()
            except BaseException:  # the loop logs it; the others' turn still comes
                if self._entries and self._timer is None:
                    self._timer = loop.call_soon(self._sweep)
                raise
