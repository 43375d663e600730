"""What was measured of one version of a model, kind by kind of device, and how it is kept: as JSON,
in the version's directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from cotenant.domain.config import AUTO
from cotenant.domain.errors import ConfigError

PROFILE_FILE: Final = ".profile.json"
"""Its name begins with a dot: hidden files are no part of what makes a version another one."""
FORMAT: Final = 2
AGAIN: Final = "measure again with: cotenant profile MODEL"


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
    """On one ``kind`` of device. ``device``: what sort it was (``DeviceSpec.model``), with so many
    ``units``. ``load_ns``: from the start of a worker until it could serve, its own trial of the
    model included. ``memory_loaded`` and ``memory_peak``: bytes that the worker had after that, and
    at most: of a GPU's memory as the driver says (0: it does not), elsewhere resident on the host.
    ``host_peak``: resident on the host at most. ``files``: path, size, time of change (ns) and
    inode of each file of the version. ``unjoined``: why rows are not joined; "" if they are.
    ``executed``: which operators the engine executed where, in words. ``size``: that of the rows
    that a warm-up takes; figures of other sizes were asked for. ``emulated``: no such device
    computed. ``subsets``: units are subsets of a GPU's multiprocessors, not GPUs. ``asked``: the
    ``engine`` of ``model.yaml`` or of the command, by which the engine was chosen."""

    model: str
    version: str
    kind: str
    device: str
    engine: str
    date: str
    units: int
    libraries: dict[str, str]
    files: tuple[tuple[str, int, int, int], ...]
    load_ns: int
    memory_loaded: int
    memory_peak: int
    host_peak: int
    unjoined: str
    figures: tuple[Figures, ...]
    executed: tuple[str, ...] = ()
    size: int = 1
    emulated: bool = False
    subsets: bool = False
    asked: str = AUTO

    def holds(self, engine: str) -> bool:
        """Whether it is of the engine that this ``engine`` of ``model.yaml`` stands for."""
        return engine in (self.asked, self.engine)

    @property
    def table(self) -> tuple[tuple[int, int, int], ...]:
        """``(units, rows, median ns)`` of each figure of the size of a warm-up."""
        return tuple((f.units, f.rows, f.median_ns) for f in self.figures if f.size == self.size)


class Profiles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file: one profile for each kind of device that was measured."""

    format: int
    profiles: tuple[ModelProfile, ...]


class _Format(msgspec.Struct):
    format: int


def read_profiles(data: bytes) -> tuple[ModelProfile, ...]:
    """The profiles of a file; raises ConfigError, which says what is wrong."""
    try:
        found = msgspec.json.decode(data, type=_Format).format
        if found != FORMAT:
            raise ConfigError(f"has the format {found}, this version reads {FORMAT}; {AGAIN}")
        profiles = msgspec.json.decode(data, type=Profiles).profiles
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"holds no whole profiles ({error}); {AGAIN}") from None
    kinds = {profile.kind for profile in profiles}
    if not profiles or len(kinds) < len(profiles) or not all(map(_is_possible, profiles)):
        raise ConfigError(f"holds no figures, or impossible ones; {AGAIN}")
    return profiles


def _is_possible(found: ModelProfile) -> bool:
    wrong = [f for f in found.figures if min(f.units, f.rows, f.median_ns, f.size) < 1 or f.cv < 0]
    return not wrong and bool(found.table) and found.load_ns >= 0


def with_profile(known: Sequence[ModelProfile], found: ModelProfile) -> Profiles:
    """What is to be kept once ``found`` was measured: it, and what is ``known`` of the same files
    on other kinds of device."""
    kept = [p for p in known if p.kind != found.kind and p.files == found.files]
    return Profiles(FORMAT, tuple(sorted((*kept, found), key=lambda p: p.kind)))
