"""What a run keeps if a picture is to be drawn: who held what, and how it went over time."""

from __future__ import annotations

import msgspec

from cotenant.domain.units import S

SPANS = 2 * S
MOMENTS = 400


class Span(msgspec.Struct, frozen=True):
    """Somebody held these units from ``start`` to ``end`` (ns)."""

    who: str
    units: tuple[int, ...]
    start: int
    end: int


class Moment(msgspec.Struct, frozen=True):
    """A stretch of a run that ends at ``at`` (ns). ``p95``: of each service, relative to its
    objective (0 if nothing was answered); ``share``: of all compute, held by each workload."""

    at: int
    p95: dict[str, float]
    share: dict[str, float]
