"""A job's log, read from where somebody has got to.

The node keeps a log as two files, ``log`` and the older ``log.1``, and moves the first over the
second when it is full. So a place in it is a file, by its inode, and an offset in that: ``"0"`` is
the oldest byte that is kept, ``"INODE-OFFSET"`` any other. Where a place is no longer kept, reading
goes on at the oldest byte, and says so.

A job can put what it likes where its log is, so links are not followed and nothing blocks. Not for
a loop all the same: a disk may hang.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from typing import Final

import msgspec

from cotenant.domain.errors import InvalidRequest

START: Final = "0"
PIECE_BYTES: Final = 256 * 1024
_PLACE: Final = re.compile(r"([0-9]{1,20})-([0-9]{1,18})")


class Piece(msgspec.Struct, frozen=True):
    """Some of a log. ``next``: where to go on. ``gap``: what was to come before it is gone."""

    data: bytes
    next: str
    gap: bool = False


@contextlib.contextmanager
def opened(path: str) -> Iterator[int]:
    """A file descriptor of a regular file, -1 where there is none that can be read."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags)
    except OSError:
        yield -1
        return
    try:
        yield fd if stat.S_ISREG(os.fstat(fd).st_mode) else -1
    finally:
        os.close(fd)


def read(path: str, place: str, most: int = PIECE_BYTES) -> Piece:
    """At most ``most`` bytes of a log, from ``place`` on; none if nothing more was written. Raises
    InvalidRequest for what is no place."""
    inode, offset = _parsed(place)
    with opened(path) as new, opened(f"{path}.1") as old:
        files = [(os.fstat(fd), fd) for fd in (old, new) if fd >= 0]
        if len(files) == 2 and files[0][0].st_ino == files[1][0].st_ino:
            del files[0]  # it was moved in between
        at = next((n for n, (s, _) in enumerate(files) if s.st_ino == inode), -1)
        gap = inode != 0 and (at < 0 or offset > files[at][0].st_size)
        if at < 0 or gap:
            at, offset = 0, 0
        if not files:
            return Piece(b"", START if gap else place, gap)
        data, reached = b"", place
        for found, fd in files[at:]:
            data += os.pread(fd, most - len(data), offset)
            reached = f"{found.st_ino}-{offset + len(data)}"
            if len(data) >= most or found is files[-1][0]:
                break
            if data:  # the newer file next time: offsets are of one file
                reached = f"{files[-1][0].st_ino}-0"
                break
            offset = 0
        return Piece(data, reached, gap)


def _parsed(place: str) -> tuple[int, int]:
    if place == START:
        return 0, 0
    match = _PLACE.fullmatch(place)
    if match is None:
        raise InvalidRequest(
            f"{place[:64]!r} is no place in a log: use 0, or what the last answer gave as the next"
        )
    return int(match[1]), int(match[2])
