"""A job's log on the terminal: its end, and what is added to it. The node keeps a log as two
files, ``log`` and the older ``log.1``, and moves the first over the second when it is full."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_BLOCK = 64 * 1024


class JobLog:
    """Reads a log from some line on; a file that does not exist yet is an empty one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._begun = False

    def read(self, lines: int | None = None) -> Iterator[bytes]:
        """The last ``lines`` lines (None: all), then whatever was added since the last call
        (where ``lines`` no longer counts); ends when there is nothing more at present."""
        if not self._begun:
            self._begun = True
            yield from self._first(lines)
        while True:
            if self._fd >= 0:
                yield from _rest(self._fd)
            if not self._moved():
                return
            old, self._fd = self._fd, _open(self._path)
            if old >= 0:
                yield from _rest(old)  # what came between reading and the move
                os.close(old)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _first(self, lines: int | None) -> Iterator[bytes]:
        """Position the newer file, and read the older one first if its lines are wanted."""
        older = self._path.with_name(self._path.name + ".1")
        self._fd = _open(self._path)
        if self._fd >= 0 and lines is not None:
            start, found = _start_of_last(self._fd, lines)
            os.lseek(self._fd, start, os.SEEK_SET)
            lines = lines - found
        if lines != 0:
            with contextlib.suppress(FileNotFoundError), older.open("rb") as file:
                if lines is not None:
                    file.seek(_start_of_last(file.fileno(), lines)[0])
                yield from iter(lambda: file.read(_BLOCK), b"")

    def _moved(self) -> bool:
        """Whether the path leads to another file than the one that is open."""
        try:
            now = self._path.stat()
        except FileNotFoundError:
            return False
        return self._fd < 0 or now.st_ino != os.fstat(self._fd).st_ino


def _open(path: Path) -> int:
    """A file descriptor, -1 if there is no such file (at the moment)."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1


def _rest(fd: int) -> Iterator[bytes]:
    while data := os.read(fd, _BLOCK):
        yield data


def _start_of_last(fd: int, lines: int) -> tuple[int, int]:
    """(offset of the last ``lines`` lines of a file, how many of them there are)."""
    end = os.fstat(fd).st_size
    if end == 0 or lines <= 0:
        return end, 0
    found, at = 0, end
    while at > 0:
        size = min(_BLOCK, at)
        at -= size
        data = os.pread(fd, size, at)
        stop = len(data)
        if at + stop == end and data.endswith(b"\n"):
            stop -= 1  # the end of the last line begins none
        while (index := data.rfind(b"\n", 0, stop)) >= 0:
            found += 1
            if found == lines:
                return at + index + 1, lines
            stop = index
    return 0, found + 1
