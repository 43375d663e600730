"""The end of a job's log, as a page can show it."""

from __future__ import annotations

import os
import re
from typing import Final

from cotenant.serving.joblogs import opened

MOST_BYTES: Final = 16 * 1024
_TERMINAL: Final = re.compile(
    r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])"
)


def tail(path: str, most: int = MOST_BYTES) -> str:
    """At most ``most`` bytes of the end of a log (and of the older one, ``path.1``, where the newer
    is shorter), in whole lines; "" where there is none. Not on a loop: a disk may hang."""
    newest = _end_of(path, most)
    data = newest if len(newest) >= most else _end_of(f"{path}.1", most - len(newest)) + newest
    if len(data) >= most:
        data = data[data.find(b"\n") + 1 :]
    return readable(data.decode(errors="replace"))


def readable(text: str) -> str:
    """Without what only a terminal understands; of a line that was written over, what stands."""
    lines = _TERMINAL.sub("", text).replace("\r\n", "\n").split("\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)


def _end_of(path: str, most: int) -> bytes:
    with opened(path) as fd:
        if fd < 0:
            return b""
        try:
            return os.pread(fd, most, max(0, os.fstat(fd).st_size - most))
        except OSError:
            return b""
