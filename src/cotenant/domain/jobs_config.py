"""``node.jobs_api``: where jobs can be submitted from other machines, and on whose word."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from cotenant.domain import reading
from cotenant.domain.errors import ConfigError

UPLOAD_BYTES: Final = 256 * 2**20


class JobsApiConfig(msgspec.Struct, frozen=True):
    """``tokens``, ``certificate`` and ``key`` name files; without the last two there is no TLS.
    ``upload``: most bytes of an archive of files."""

    address: str
    tokens: str
    certificate: str | None = None
    key: str | None = None
    upload: int = UPLOAD_BYTES


def read_jobs_api(value: Any, path: str) -> JobsApiConfig | None:
    """The section; None where there is none. Raises ConfigError naming the key."""
    if value is None:
        return None
    section = reading.Section(value, path)
    config = JobsApiConfig(
        address=section.take("address", reading.address),
        tokens=section.take("tokens", reading.text),
        certificate=section.take("certificate", reading.optional(reading.text), None),
        key=section.take("key", reading.optional(reading.text), None),
        upload=section.take("upload", reading.size, UPLOAD_BYTES),
    )
    section.done()
    for given, missing in (("certificate", "key"), ("key", "certificate")):
        if getattr(config, given) and not getattr(config, missing):
            raise ConfigError(
                f"is needed with {section.at(given)}; without both there is no TLS",
                section.at(missing),
            )
    return config
