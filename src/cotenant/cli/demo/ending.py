"""How the demo ends from outside: signals become exceptions, but not while something is being
made or removed."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

_ENDING: Final = (signal.SIGTERM, signal.SIGHUP)


class Ended(BaseException):
    """Somebody wants this process to end. ``number``: the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


class Signals:
    """While it is entered, SIGTERM and SIGHUP raise Ended, SIGINT KeyboardInterrupt, and SIGCHLD
    calls ``look``, which may raise. Belongs to the main thread."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        self._holds = 0
        self._waiting: list[int] = []

    def __enter__(self) -> Signals:
        for number in (*_ENDING, signal.SIGINT, signal.SIGCHLD):
            ignored = signal.getsignal(number) == signal.SIG_IGN  # by nohup, say
            if number not in _ENDING or not ignored:
                signal.signal(number, self._came)
        return self

    def __exit__(self, *_: object) -> None:
        """They stay as they are: this process has nothing left to do but to end."""

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait until this is left."""
        self.hold()
        try:
            yield
        finally:
            self._holds -= 1
        while self._waiting and not self._holds:
            self._act(self._waiting.pop(0))

    def hold(self) -> None:
        """Signals wait for good."""
        self._holds += 1

    def _came(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._holds:
            self._waiting.append(number)
        else:
            self._act(number)

    def _act(self, number: int) -> None:
        if number == signal.SIGCHLD:
            self._look()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise Ended(number)
