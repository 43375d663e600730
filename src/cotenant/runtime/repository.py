"""Model directories: ``models/NAME/VERSION/model.onnx``, optionally ``models/NAME/model.yaml``
and ``models/NAME/VERSION/check.npz``. Versions are whole numbers; the largest is the newest.
``models/NAME/VERSION/variants/VARIANT`` holds the version in another build (``domain.variant``).

What else lies about is skipped: hidden entries, files, names that are no text. An entry that
cannot be looked at is skipped too, and said once. A version's stamp covers all its files, since
a model file may name others that hold its weights; its variants have their own.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cotenant.domain import reading
from cotenant.domain.config import ModelSettings, parse_model_settings
from cotenant.domain.errors import ConfigError, CotenantError, ModelError, NotFound
from cotenant.domain.profile import PROFILE_FILE, ModelProfile, read_profiles
from cotenant.domain.variant import (
    VARIANT_FILE,
    VARIANTS_DIR,
    VariantRecord,
    VariantState,
    read_variant,
)
from cotenant.domain.workload import ORIGINAL
from cotenant.engines.registry import suffixes

log = logging.getLogger("cotenant.models")

CHECK_FILE = "check.npz"
SETTINGS_FILE = "model.yaml"
LISTED_FOR_S = 0.25
STAMPED_ENTRIES = 4096
"""Entries of a version's directory that its stamp covers; what is beyond changes unnoticed."""


class Stamp(msgspec.Struct, frozen=True):
    """What shows that one of a version's files was replaced or is still being written: path,
    size, time of change (ns) and inode of each."""

    files: tuple[tuple[str, int, int, int], ...]


class ModelFiles(msgspec.Struct, frozen=True):
    """One version of a model on disk."""

    name: str
    version: str
    path: Path
    check: Path | None
    stamp: Stamp


class VariantFiles(msgspec.Struct, frozen=True):
    """A variant of a version on disk. ``path``: its model file, None where there is none.
    ``record``: None where it cannot be read. ``problem``: why it cannot serve; "" if it can."""

    name: str
    path: Path | None
    record: VariantRecord | None
    stamp: Stamp
    problem: str = ""


class Repository:
    """Reads a directory of models; holds nothing open and loads nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._skipped: dict[str, str] = {}
        """Entries that cannot be looked at, and why: what was said already."""
        self._listing: dict[str, str] = {}
        self._listed_at = -math.inf

    def names(self) -> list[str]:
        """All model names, sorted; empty if the directory is not there or cannot be read."""
        try:
            return sorted(self._directories(self.root))
        except ModelError as error:
            self._skip(self.root, str(error))
            return []

    def versions(self, name: str) -> list[str]:
        """Versions of a model, oldest first. Directories whose name is no number are ignored.

        Raises ModelError if the model's directory cannot be read.
        """
        found = self._directories(self._directory(name))
        return sorted((v for v in found if v.isascii() and v.isdigit()), key=int)

    def listing(self) -> dict[str, str]:
        """The newest version of every model, "" where it has none; unreadable ones skipped.

        As it was at most ``LISTED_FOR_S`` ago: a flood of questions must not become one of disk
        accesses.
        """
        now = time.monotonic()
        if now - self._listed_at > LISTED_FOR_S:
            self._listing, self._listed_at = self._list(), now
        return self._listing

    def _list(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in self.names():
            try:
                versions = self.versions(name)
            except ModelError as error:
                self._skip(self.root / name, str(error))
                continue
            found[name] = versions[-1] if versions else ""
        return found

    def files(self, name: str, version: str) -> ModelFiles:
        """The files of one version. Raises NotFound, or ModelError without a model file."""
        directory = self._directory(name) / version
        try:
            if not directory.is_dir():
                raise NotFound(f"model {name} has no version {version} in {self.root}")
            path = _model_in(directory)
            if path is not None:
                check = directory / CHECK_FILE
                checked = check if check.is_file() else None
                return ModelFiles(name, version, path, checked, stamp(path))
        except OSError as error:
            raise ModelError(
                f"model {name} version {version} cannot be read: {error.strerror}"
            ) from error
        wanted = " or ".join(f"model{s}" for s in suffixes())
        raise ModelError(f"model {name} version {version} holds no {wanted}")

    def variants(self, files: ModelFiles) -> list[VariantFiles]:
        """All variants of a version, by name, those that cannot serve too."""
        directory = files.path.parent / VARIANTS_DIR
        try:
            names = sorted(self._directories(directory))
        except ModelError as error:
            self._skip(directory, str(error))
            return []
        return [_variant(files, directory / name) for name in names]

    def profiles(self, files: ModelFiles) -> tuple[ModelProfile, ...]:
        """What ``cotenant profile`` measured of a version, by kind of device; nothing if that is
        not there, cannot be read (which is said once), or is of other files."""
        path = files.path.parent / PROFILE_FILE
        try:
            found = read_profiles(path.read_bytes())
        except FileNotFoundError:
            return ()
        except (OSError, ConfigError) as error:
            self._skip(path, str(error))
            return ()
        return tuple(profile for profile in found if profile.files == files.stamp.files)

    def there(self, name: str) -> Iterator[ModelFiles]:
        """The versions that hold a model, newest first.

        Where none does, raises NotFound with near names, or ModelError saying what is wrong with
        the newest.
        """
        found = False
        wrong: ModelError | None = None
        for version in reversed(self.versions(name)):
            try:
                files = self.files(name, version)
            except NotFound:  # gone since it was listed
                continue
            except ModelError as error:
                wrong = wrong or error
                continue
            found = True
            yield files
        if not found:
            raise wrong or self._nothing(name)

    def newest(self, name: str) -> ModelFiles:
        """The newest version that holds a model; raises as ``there``."""
        return next(self.there(name))

    def settings(self, name: str) -> ModelSettings:
        """``model.yaml`` of a model, defaults without one; raises ModelError if it is wrong."""
        path = self._directory(name) / SETTINGS_FILE
        try:
            return parse_model_settings(path.read_text())
        except FileNotFoundError:
            return ModelSettings()
        except (ConfigError, UnicodeDecodeError, OSError) as error:
            raise ModelError(f"{name}/{SETTINGS_FILE}: {error}") from error

    def _nothing(self, name: str) -> CotenantError:
        if self._directory(name).is_dir():
            wanted = f"{name}/1/model{suffixes()[0]}"
            return ModelError(f"model {name} has no versions; expected {wanted} in {self.root}")
        near = difflib.get_close_matches(name, self.listing(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return NotFound(f"no model named {name!r} in {self.root}{hint}")

    def _directory(self, name: str) -> Path:
        # A name comes from a URL: it must not lead out of the repository.
        if not name or name.startswith(".") or "/" in name or "\0" in name:
            raise NotFound(f"{name!r} is no model name")
        return self.root / name

    def _directories(self, path: Path) -> Iterator[str]:
        """Names of the directories in ``path``, none if it is not there; raises ModelError."""
        try:
            entries = list(os.scandir(path))
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from error
        except UnicodeEncodeError:  # no file system has such a name
            return
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                entry.name.encode()
                wanted = entry.is_dir()
            except OSError as error:
                self._skip(path / entry.name, error.strerror or str(error))
                continue
            except UnicodeEncodeError:
                self._skip(path / entry.name, "its name is not UTF-8")
                continue
            if wanted:
                yield entry.name

    def _skip(self, path: Path, why: str) -> None:
        shown = str(path).encode(errors="backslashreplace").decode()
        if self._skipped.get(shown) != why:
            self._skipped[shown] = why
            log.warning("model directory entry skipped", extra={"path": shown, "why": why})


def _model_in(directory: Path) -> Path | None:
    """The model file of a directory, if there is one."""
    paths = (directory / f"model{suffix}" for suffix in suffixes())
    return next((path for path in paths if path.is_file()), None)


def _variant(files: ModelFiles, directory: Path) -> VariantFiles:
    """What a directory of a variant holds, and whether that can serve."""
    path: Path | None = None
    record: VariantRecord | None = None
    found = Stamp(())
    try:
        path = _model_in(directory)
        found = Stamp(tuple(sorted(_stamps(directory))))
        record = read_variant((directory / VARIANT_FILE).read_text())
        problem = _problem(files, directory.name, path, record)
    except FileNotFoundError:
        problem = f"has no {VARIANT_FILE}"
    except (ConfigError, UnicodeDecodeError) as error:
        problem = f"its {VARIANT_FILE}: {error}"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except ModelError as error:
        problem = str(error)
    return VariantFiles(directory.name, path, record, found, problem)


def _problem(files: ModelFiles, name: str, path: Path | None, record: VariantRecord) -> str:
    """Why a variant cannot serve; "" if it can."""
    try:
        reading.name(name)
    except ValueError as error:
        return str(error)
    if name == ORIGINAL:
        return f"{ORIGINAL!r} is what the version itself is called; give it another name"
    if record.state is VariantState.REFUSED:
        return record.why or "it was refused"
    if path is None:
        return "has no model file"
    if record.parent != digest(files):
        return "was made from other files than this version has now; make it again"
    return ""


def digest(files: ModelFiles) -> str:
    """``sha256:…`` of what a version computes with: its files but for ``check.npz``, variants and
    hidden ones, with their names. Raises ModelError."""
    return _digest(files.path.parent, files.stamp)


@functools.lru_cache(maxsize=256)
def _digest(directory: Path, found: Stamp) -> str:
    total = hashlib.sha256()
    try:
        for name, *_ in found.files:
            if name != CHECK_FILE:
                with (directory / name).open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").digest()
                total.update(name.encode() + b"\0" + content)
    except OSError as error:
        raise ModelError(f"{directory} cannot be read: {error.strerror}") from error
    return f"sha256:{total.hexdigest()}"


def stamp(path: Path) -> Stamp:
    """The present stamp of the version that holds the model file ``path``; raises ModelError if
    that is gone."""
    try:
        if not path.is_file():
            raise ModelError(f"{path.name} is gone")
        return Stamp(tuple(sorted(_stamps(path.parent))))
    except OSError as error:
        raise ModelError(f"{path.name}: {error.strerror}") from error


def _stamps(directory: Path) -> Iterator[tuple[str, int, int, int]]:
    """Of every file in a directory and those below it, variants aside; links to directories are
    not followed."""
    left, below = STAMPED_ENTRIES, [directory]
    while below:
        for entry in sorted(os.scandir(below.pop()), key=lambda found: found.name):
            left -= 1
            if left < 0:
                return
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir(follow_symlinks=False):
                    if Path(entry.path) != directory / VARIANTS_DIR:
                        below.append(Path(entry.path))
                    continue
                found = entry.stat()
            except OSError:  # a link that leads nowhere: what it names is not there yet
                continue
            name = os.path.relpath(entry.path, directory)
            yield name, found.st_size, found.st_mtime_ns, found.st_ino
