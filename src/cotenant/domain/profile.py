"""What was measured of one version of a model on one processor, and how it is kept: as JSON, in
the version's directory.
"""

from __future__ import annotations

from typing import Final

import msgspec

from cotenant.domain.errors import ConfigError

PROFILE_FILE: Final = ".profile.json"
"""Its name begins with a dot: hidden files are no part of what makes a version another one."""
FORMAT: Final = 1


class Figures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Executions of ``rows`` rows on ``units`` units: how many ``runs``, median and 95th
    percentile in ns, and ``cv``, their standard deviation as a part of their mean. ``size``: of a
    row, where axes are free (``engines.base.size_of``)."""

    units: int
    rows: int
    runs: int
    median_ns: int
    p95_ns: int
    cv: float
    size: int = 1


class ModelProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``load_ns``: from the start of a worker until it could serve, its own trial of the model
    included. ``memory_loaded`` and ``memory_peak``: resident bytes of the worker after that, and at
    most. ``files``: path, size, time of change (ns) and inode of each file of the version.
    ``cores``: as many could be used. ``unjoined``: why rows are not joined; "" if they are.
    ``executed``: which operators the engine executed where, in words. ``size``: that of the rows
    that a warm-up takes; figures of other sizes were asked for."""

    format: int
    model: str
    version: str
    kind: str
    engine: str
    date: str
    processor: str
    cores: int
    libraries: dict[str, str]
    files: tuple[tuple[str, int, int, int], ...]
    load_ns: int
    memory_loaded: int
    memory_peak: int
    unjoined: str
    figures: tuple[Figures, ...]
    executed: tuple[str, ...] = ()
    size: int = 1

    @property
    def table(self) -> tuple[tuple[int, int, int], ...]:
        """``(units, rows, median ns)`` of each figure of the size of a warm-up."""
        return tuple((f.units, f.rows, f.median_ns) for f in self.figures if f.size == self.size)


def read_profile(data: bytes) -> ModelProfile:
    """A profile from the bytes of its file; raises ConfigError, which says what is wrong."""
    again = "measure again with: cotenant profile MODEL"
    try:
        found = msgspec.json.decode(data, type=ModelProfile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"is no whole profile ({error}); {again}") from None
    if found.format != FORMAT:
        raise ConfigError(f"has the format {found.format}, this version reads {FORMAT}; {again}")
    wrong = [f for f in found.figures if min(f.units, f.rows, f.median_ns, f.size) < 1 or f.cv < 0]
    if wrong or not found.table or found.load_ns < 0:
        raise ConfigError(f"holds no figures, or impossible ones; {again}")
    return found
