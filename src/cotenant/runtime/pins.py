"""Which services were rolled back, and to which version: a small file that outlives the node."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from cotenant.domain.errors import EnvironmentProblem

log = logging.getLogger("cotenant.models")


class Pins:
    """Versions by service. Without a path they last as long as this object."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._versions: dict[str, str] = {}
        if path is not None:
            try:
                self._versions = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
            except FileNotFoundError:
                pass
            except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
                log.warning(
                    "rollbacks are forgotten: the file that says them cannot be read",
                    extra={"path": str(path), "why": str(error)},
                )

    def version(self, service: str) -> str:
        """The version that a service is kept at; empty: it follows the newest."""
        return self._versions.get(service, "")

    def put(self, service: str, version: str) -> None:
        """Keep a service at a version, or with "" at none; on the disk by the return. Raises
        EnvironmentProblem, and then nothing has changed."""
        if self.version(service) == version:
            return
        versions = {**self._versions, service: version}
        if not version:
            del versions[service]
        if self._path is not None:
            new = self._path.with_suffix(".new")
            try:
                new.write_bytes(msgspec.json.encode(versions))
                new.rename(self._path)
            except OSError as error:
                raise EnvironmentProblem(
                    f"{self._path} cannot be written: {error.strerror}; make room or give rights, "
                    "then try again"
                ) from error
        self._versions = versions
