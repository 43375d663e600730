"""Keys as they are pressed, from a terminal."""

from __future__ import annotations

import os
import select
import termios
import tty
from types import TracebackType
from typing import Any, Final

from cotenant.cli.top.state import DOWN, ENTER, ERASE, ESCAPE, UP

_NAMED: Final = {"\r": ENTER, "\n": ENTER, "\x7f": ERASE, "\b": ERASE}
_SEQUENCES: Final = {"A": UP, "B": DOWN}
"""What follows ``ESC [`` or ``ESC O``."""


class Keyboard:
    """While it is entered, the terminal hands over each key at once, and does not show it; Ctrl-C
    still interrupts."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._before: list[Any] = []

    def __enter__(self) -> Keyboard:
        self._before = termios.tcgetattr(self._fd)
        tty.setcbreak(self._fd)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def read(self, within_s: float) -> list[str]:
        """The keys that come before ``within_s``, as soon as there is one. Raises EOFError if the
        terminal is gone."""
        if not select.select([self._fd], [], [], within_s)[0]:
            return []
        data = os.read(self._fd, 1024)
        if not data:
            raise EOFError
        return keys_in(data.decode(errors="ignore"))


def keys_in(text: str) -> list[str]:
    """The keys that a terminal means; sequences of other keys are left out."""
    found, at = [], 0
    while at < len(text):
        if text[at] != "\x1b":
            found.append(_NAMED.get(text[at], text[at]))
            at += 1
        elif text[at + 1 : at + 2] in ("[", "O"):
            end = at + 2
            while end < len(text) and not text[end].isalpha() and text[end] != "~":
                end += 1
            if text[end : end + 1] in _SEQUENCES:
                found.append(_SEQUENCES[text[end]])
            at = end + 1
        else:
            found.append(ESCAPE)
            at += 1
    return found
