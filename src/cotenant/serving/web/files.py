"""The few files that pages need, under names that say what is in them."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Final, NamedTuple

MOUNT: Final = "/dashboard/static/"
_TYPES: Final = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_NAMES: Final = ("dashboard.css", "dashboard.js", "icon.svg", "uplot.min.css", "uplot.min.js")


class File(NamedTuple):
    """A file and its media type."""

    body: bytes
    media_type: str


class Files:
    """All of them, in memory. ``url`` changes with the content, so it can be cached for ever."""

    def __init__(self) -> None:
        self._files: dict[str, File] = {}
        self._urls: dict[str, str] = {}
        folder = files("cotenant.serving.web").joinpath("static")
        for name in _NAMES:
            body = folder.joinpath(name).read_bytes()
            stem, _, ending = name.rpartition(".")
            full = f"{stem}.{hashlib.sha256(body).hexdigest()[:12]}.{ending}"
            self._files[full] = File(body, _TYPES[ending])
            self._urls[name] = MOUNT + full

    def url(self, name: str) -> str:
        """Where a file is."""
        return self._urls[name]

    def get(self, full: str) -> File | None:
        """A file by the last part of its URL."""
        return self._files.get(full)

    @property
    def nbytes(self) -> int:
        """Of all together."""
        return sum(len(file.body) for file in self._files.values())
