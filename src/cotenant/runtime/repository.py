"""Model directories: ``models/NAME/VERSION/model.onnx``, optionally ``models/NAME/model.yaml``
and ``models/NAME/VERSION/check.npz``. Versions are whole numbers; the largest is the newest.

What else lies about is skipped: hidden entries, files, names that are no text. An entry that
cannot be looked at is skipped too, and said once. A version's stamp covers all its files, since
a model file may name others that hold its weights.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cotenant.domain.config import ModelSettings, parse_model_settings
from cotenant.domain.errors import ConfigError, CotenantError, ModelError, NotFound
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
            for suffix in suffixes():
                path = directory / f"model{suffix}"
                if path.is_file():
                    check = directory / CHECK_FILE
                    checked = check if check.is_file() else None
                    return ModelFiles(name, version, path, checked, stamp(path))
        except OSError as error:
            raise ModelError(
                f"model {name} version {version} cannot be read: {error.strerror}"
            ) from error
        wanted = " or ".join(f"model{s}" for s in suffixes())
        raise ModelError(f"model {name} version {version} holds no {wanted}")

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
    """Of every file in a directory and those below it; links to directories are not followed."""
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
                    below.append(Path(entry.path))
                    continue
                found = entry.stat()
            except OSError:  # a link that leads nowhere: what it names is not there yet
                continue
            name = os.path.relpath(entry.path, directory)
            yield name, found.st_size, found.st_mtime_ns, found.st_ino
