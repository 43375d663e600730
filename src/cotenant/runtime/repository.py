"""Model directories: ``models/NAME/VERSION/model.onnx``, optionally ``models/NAME/model.yaml``
and ``models/NAME/VERSION/check.npz``. Versions are whole numbers; the largest is the newest.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import msgspec

from cotenant.domain.config import ModelSettings, parse_model_settings
from cotenant.domain.errors import ConfigError, ModelError, NotFound
from cotenant.engines.base import SUFFIXES

CHECK_FILE = "check.npz"
SETTINGS_FILE = "model.yaml"


class Stamp(msgspec.Struct, frozen=True):
    """What shows that a file was replaced or is still being written."""

    size: int
    mtime_ns: int
    inode: int


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

    def names(self) -> list[str]:
        """All model names, sorted; empty if the directory is not there."""
        try:
            return sorted(d.name for d in os.scandir(self.root) if d.is_dir())
        except FileNotFoundError:
            return []

    def versions(self, name: str) -> list[str]:
        """Versions of a model, oldest first. Directories whose name is no number are ignored."""
        try:
            found = [d.name for d in os.scandir(self._directory(name)) if d.is_dir()]
        except FileNotFoundError:
            return []
        return sorted((v for v in found if v.isascii() and v.isdigit()), key=int)

    def files(self, name: str, version: str) -> ModelFiles:
        """The files of one version. Raises NotFound, or ModelError without a model file."""
        directory = self._directory(name) / version
        if not directory.is_dir():
            raise NotFound(f"model {name} has no version {version} in {self.root}")
        for suffix in SUFFIXES:
            path = directory / f"model{suffix}"
            if path.is_file():
                check = directory / CHECK_FILE
                return ModelFiles(
                    name, version, path, check if check.is_file() else None, stamp(path)
                )
        wanted = " or ".join(f"model{s}" for s in SUFFIXES)
        raise ModelError(f"model {name} version {version} holds no {wanted}")

    def newest(self, name: str) -> ModelFiles:
        """The newest version. Raises NotFound with near names, or ModelError."""
        versions = self.versions(name)
        if versions:
            return self.files(name, versions[-1])
        if name in self.names():
            raise ModelError(
                f"model {name} has no versions; expected {name}/1/model{SUFFIXES[0]} in {self.root}"
            )
        near = difflib.get_close_matches(name, self.names(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise NotFound(f"no model named {name!r} in {self.root}{hint}")

    def settings(self, name: str) -> ModelSettings:
        """``model.yaml`` of a model, defaults without one; raises ModelError if it is wrong."""
        path = self._directory(name) / SETTINGS_FILE
        try:
            return parse_model_settings(path.read_text())
        except FileNotFoundError:
            return ModelSettings()
        except (ConfigError, UnicodeDecodeError) as error:
            raise ModelError(f"{name}/{SETTINGS_FILE}: {error}") from error

    def _directory(self, name: str) -> Path:
        # A name comes from a URL: it must not lead out of the repository.
        if not name or "/" in name or "\0" in name or name in (".", ".."):
            raise NotFound(f"{name!r} is no model name")
        return self.root / name


def stamp(path: Path) -> Stamp:
    """The present stamp of a file; raises ModelError if it is gone."""
    try:
        found = path.stat()
    except OSError as error:
        raise ModelError(f"{path.name}: {error.strerror}") from error
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ino)
