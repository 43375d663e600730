"""Small files that are whole or not there, whenever the machine stops."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from cotenant.domain.errors import EnvironmentProblem

_PART = ".part"
_REASONS = {
    errno.ENOSPC: "its disk is full; make room",
    errno.EDQUOT: "its quota is used up; make room",
    errno.EROFS: "it is on a read-only file system; mount it writable",
    errno.EACCES: "this user may not write there; run the driver as root",
    errno.EPERM: "this user may not write there; run the driver as root",
}


def problem(path: Path, exc: OSError) -> EnvironmentProblem:
    """The error for what the operating system refused, with what to do about it."""
    return EnvironmentProblem(
        f"cannot write {path}: {_REASONS.get(exc.errno or 0, exc.strerror or str(exc))}"
    )


def make_folder(path: Path, mode: int = 0o755) -> None:
    """Make a folder, if it is not there. Raises EnvironmentProblem."""
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as exc:
        raise problem(path, exc) from None


def clean(folder: Path, prefix: str = "") -> None:
    """Drop what interrupted writes of files of these names have left. Nobody may be writing them.
    Raises EnvironmentProblem."""
    try:
        for part in folder.glob(f".{prefix}*{_PART}"):
            part.unlink(missing_ok=True)
    except OSError as exc:
        raise problem(folder, exc) from None


def write(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Put ``data`` where ``path`` is, at once. It is on the disk when this returns. Raises
    EnvironmentProblem; the old content is then still there."""
    part = path.with_name(f".{path.name}{_PART}")
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync(path.parent)
    except OSError as exc:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise problem(path, exc) from None


def remove(path: Path) -> None:
    """Remove a file, if it is there, for good. Raises EnvironmentProblem."""
    try:
        path.unlink()
        _sync(path.parent)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise problem(path, exc) from None


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
