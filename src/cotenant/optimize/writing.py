"""Variants on the disk: each appears whole or not at all, and what a killed run left is removed.

A variant is made in a hidden directory beside its place and renamed. ``VERSION/.optimize`` holds
the lock, what is being worked on, and the last run's table and picture.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from cotenant.domain.errors import EnvironmentProblem, InvalidRequest
from cotenant.domain.variant import VARIANT_FILE, VARIANTS_DIR, VariantRecord, write_variant

FOLDER: Final = ".optimize"
"""Of a version: what ``cotenant optimize`` keeps there."""
_NEW: Final = ".new-"
_OLD: Final = ".old-"
_WORK: Final = "work-"


@contextlib.contextmanager
def workplace(version: Path) -> Iterator[Path]:
    """A directory to work in, while nobody else makes or changes variants of this version. What
    others left is removed first. Raises InvalidRequest if somebody is at it, EnvironmentProblem if
    nothing can be written there."""
    folder = version / FOLDER
    with _writing(folder):
        folder.mkdir(exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidRequest(
                f"variants of {version.parent.name} version {version.name} are being made or "
                "changed by another process; wait until it is done, or stop it"
            ) from None
        _tidy(version)
        with _writing(folder):
            work = Path(tempfile.mkdtemp(prefix=_WORK, dir=folder))
        try:
            yield work
        except OSError as error:
            raise EnvironmentProblem(
                f"{error.filename or work} cannot be used: {error.strerror or error}; no variant "
                "is half there. Run it again"
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(lock)


def _tidy(version: Path) -> None:
    """Remove what killed runs left, and put back what one had moved away and not replaced."""
    for left in (version / FOLDER).glob(f"{_WORK}*"):
        shutil.rmtree(left, ignore_errors=True)
    for left in (version / VARIANTS_DIR).glob(f"{_OLD}*"):
        place = left.with_name(left.name.removeprefix(_OLD))
        if not place.exists():
            left.rename(place)
    for kind in (_NEW, _OLD):
        for left in (version / VARIANTS_DIR).glob(f"{kind}*"):
            shutil.rmtree(left, ignore_errors=True)


def put(version: Path, name: str, record: VariantRecord, files: Sequence[Path]) -> Path:
    """Make ``variants/NAME`` of these files and the record, in place of one that is there. Raises
    EnvironmentProblem, and leaves all as it was."""
    variants = version / VARIANTS_DIR
    new, place, old = variants / f"{_NEW}{name}", variants / name, variants / f"{_OLD}{name}"
    with _writing(place):
        variants.mkdir(exist_ok=True)
        try:
            new.mkdir()
            for path in files:
                shutil.copyfile(path, new / path.name)
                _flush(new / path.name)
            (new / VARIANT_FILE).write_text(write_variant(record))
            _flush(new / VARIANT_FILE)
            if place.exists():
                place.rename(old)
            new.rename(place)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            if old.exists() and not place.exists():
                old.rename(place)
            raise
        shutil.rmtree(old, ignore_errors=True)
    return place


def rewrite(directory: Path, record: VariantRecord) -> None:
    """Replace the ``variant.yaml`` of a variant. Raises EnvironmentProblem."""
    write_whole(directory / VARIANT_FILE, write_variant(record).encode())


def remove(directory: Path) -> None:
    """Remove a variant: at once for whoever looks. Raises EnvironmentProblem."""
    gone = directory.with_name(f"{_NEW}{directory.name}")
    with _writing(directory):
        directory.rename(gone)
        shutil.rmtree(gone)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all. Raises EnvironmentProblem."""
    with _writing(path):
        number, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
        try:
            with os.fdopen(number, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _flush(path: Path) -> None:
    """Have it on the disk before it is named."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EnvironmentProblem(
            f"{path} cannot be written: {error.strerror}; nothing was changed there"
        ) from error
