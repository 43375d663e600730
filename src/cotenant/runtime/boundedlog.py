"""A job's log: what its command writes, bounded, on a disk that may be full.

The job shim imports this file, so it imports next to nothing.
"""

# pathlib would cost more to import than everything else here.
# ruff: noqa: PTH104

from __future__ import annotations

import os


class BoundedLog:
    """``path`` and ``path.1``, together at most ``limit`` bytes, the newest kept."""

    def __init__(self, path: str, limit: int) -> None:
        self.dropped = 0
        self._path = path
        self._half = max(limit // 2, 1024)
        self._fd = -1
        self._size = 0
        self._gap = 0

    def write(self, data: bytes) -> None:
        """Append; what the disk does not take is dropped and counted."""
        data = data[-self._half :]
        taken = 0
        try:
            if self._fd < 0:
                self._open()
            if self._size + len(data) > self._half and self._size:
                self._rotate()
            if self._gap:
                note = b"\n[cotenant: %d bytes of log were lost: disk full]\n" % self._gap
                self._size += os.write(self._fd, note)
                self._gap = 0
            while taken < len(data):
                taken += os.write(self._fd, memoryview(data)[taken:])
        except OSError:
            self._gap += len(data) - taken
            self.dropped += len(data) - taken
        self._size += taken

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(self._path, flags, 0o600)
        self._size = os.fstat(self._fd).st_size

    def _rotate(self) -> None:
        os.close(self._fd)
        self._fd = -1
        os.rename(self._path, self._path + ".1")
        self._open()
