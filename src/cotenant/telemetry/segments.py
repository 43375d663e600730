"""The files of a journal as the writer sees them: start one, write blocks, delete the oldest."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from cotenant.telemetry.records import MAGIC, SUFFIX, segments


class SegmentFiles:
    """At most ``keep`` segments in ``directory``, the one being written included.

    All methods but ``close`` raise OSError. What was written is safe from a death of the
    process at once; it is not synced to the disk, so a power failure may cost the newest.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory
        self._keep = max(1, keep)
        self._fd = -1
        self._path = directory
        self._written = 0

    def start(self) -> None:
        """End the present segment and begin a new one, deleting the oldest beyond ``keep``."""
        self.close()
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        old = segments(self._directory)
        for path in old[: max(0, len(old) - self._keep + 1)]:
            path.unlink(missing_ok=True)
        self._path = self._directory / _next_name(old)
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._written = 0
        self.write(MAGIC)

    def write(self, data: bytes | bytearray) -> None:
        """Append; on failure the segment is cut back to what it held before."""
        with memoryview(data) as view:
            done = 0
            try:
                while done < len(view):
                    done += os.write(self._fd, view[done:])
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self._written)
                raise
        self._written += done

    def close(self) -> None:
        """End the present segment, if there is one; an empty one is deleted."""
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):
            os.close(self._fd)
            if self._written <= len(MAGIC):
                self._path.unlink()
        self._fd = -1


def _next_name(old: list[Path]) -> str:
    """Numbered, so that names sort by time even if the clock was set back."""
    numbers = [path.name.split("-")[0] for path in old]
    number = max((int(n) for n in numbers if n.isdigit()), default=0) + 1
    return f"{number:08d}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}{SUFFIX}"
