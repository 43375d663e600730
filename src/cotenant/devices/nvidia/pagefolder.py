"""The folder of a node's control pages, and what killed nodes left of theirs.

* It has a name that the next node of the same state directory finds, and is locked as long as its
  node lives.
* Who opens one removes the pages that no process has; likewise, with their folders, those of other
  nodes of this user that live no more.
* Who locks a folder sees to it that what is locked is what has the name: another node may just have
  removed it, and its owner made it anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from pathlib import Path
from typing import Final

from cotenant.devices import proctree
from cotenant.devices.nvidia.page import VARIABLE
from cotenant.domain.errors import DeviceError

log = logging.getLogger("cotenant.devices")

PREFIX: Final = "cotenant-gates-"
SETTLED_S: Final = 60.0
"""The folder of another node is left alone for so long after a change: its jobs may be starting."""
TAKE_WITHIN_S: Final = 5.0
"""How long another node may look at our folder."""
_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class PageFolder:
    """``base``: a ``tmpfs``; ``name``: of the node, as a file name."""

    def __init__(self, base: Path, name: str) -> None:
        self.path = base / f"{PREFIX}{name}"
        self._fd = -1

    def open(self) -> None:
        """Make and lock it, and remove what nobody has any more. Raises DeviceError."""
        try:
            self._take()
            _prune(self.path)
        except OSError as error:
            self._let_go()
            raise DeviceError(f"no place for control pages: {self.path}: {error}") from error
        for other in self.path.parent.glob(f"{PREFIX}*"):
            if other != self.path:
                _remove(other)

    def close(self) -> None:
        """Remove it, unless pages are kept in it, and let go of it."""
        with contextlib.suppress(OSError):
            self.path.rmdir()
        self._let_go()

    def _take(self) -> None:
        end = time.monotonic() + TAKE_WITHIN_S
        while True:
            self.path.mkdir(mode=0o700, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self._fd = os.open(self.path, _FLAGS)
            if self._fd >= 0 and _locked(self._fd) and _is_at(self._fd, self.path):
                break
            self._let_go()
            if time.monotonic() > end:
                raise DeviceError(f"{self.path} is in use by another node")
            time.sleep(0.01)
        about = os.fstat(self._fd)
        if about.st_uid != os.geteuid() or about.st_mode & 0o077:
            self._let_go()
            raise DeviceError(f"{self.path} is not this user's alone; remove it")

    def _let_go(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _locked(fd: int) -> bool:
    """Whether the lock is ours now; else another node has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: Path) -> bool:
    try:
        ours, there = os.fstat(fd), path.stat()
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


def _prune(folder: Path) -> bool:
    """Remove the pages that no process has; whether others are left."""
    left = False
    for page in folder.iterdir():
        if proctree.marked(VARIABLE, str(page)):
            left = True
        else:
            page.unlink()
    return left


def _remove(folder: Path) -> None:
    """Remove the folder of another node of this user, unless that lives, or processes have its
    pages."""
    fd = -1
    try:
        about = folder.lstat()
        if about.st_uid != os.geteuid() or time.time() - about.st_mtime < SETTLED_S:
            return
        fd = os.open(folder, _FLAGS)
        if _locked(fd) and _is_at(fd, folder) and not _prune(folder):
            folder.rmdir()
    except FileNotFoundError:
        pass  # somebody else has done it
    except OSError as error:
        log.warning("pages of a node that is gone stay", extra={"at": folder, "why": str(error)})
    finally:
        if fd >= 0:
            os.close(fd)
