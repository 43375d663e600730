"""Dividing compute units among jobs by utility.

A job's utility of ``x`` units is ``weight × log(1 + s(x))``, ``s`` being its speed-up (``x`` itself
where nothing is known of it): concave, so giving each unit to the
job with the largest marginal gain maximises the sum (greedy is exact for separable concave
utilities; Fox, Operations Research 1966), and equal weights get equal shares (proportional
fairness; Kelly, 1997). Guaranteed units are given first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from weft.domain.snapshot import JobFacts


def divide(
    units: int,
    jobs: Sequence[JobFacts],
    device_units: int,
    speed_ups: Mapping[str, Sequence[float]] | None = None,
    parts: int = 1,
) -> dict[str, int]:
    """Whole units for each job, summing to at most ``units``; or, with ``parts``, so many of them
    to a unit, speed-ups being linear in between.

    ``guaranteed`` and ``limit`` of a job are shares of ``device_units``. Guarantees are rounded
    down (what is missing is a debt that time sharing pays); ties go to the smaller id.
    ``speed_ups`` of jobs, by units, are at least that long.
    """
    known = speed_ups or {}
    shares = {job.id: 0 for job in jobs}
    left = units * parts
    most = {j.id: max(parts, int(j.limit * device_units * parts + 1e-9)) for j in jobs}
    for job in sorted(jobs, key=lambda j: (-j.guaranteed, j.id)):
        given = min(left, int(job.guaranteed * device_units * parts + 1e-9))
        shares[job.id] = given
        left -= given
    for _ in range(left):
        best = max(
            (j for j in jobs if shares[j.id] < most[j.id]),
            key=lambda j: (gain(j.weight, shares[j.id], known.get(j.id), parts), _reversed(j.id)),
            default=None,
        )
        if best is None:
            break
        shares[best.id] += 1
    return shares


def gain(
    weight: float, have: int, speed_ups: Sequence[float] | None = None, parts: int = 1
) -> float:
    """Marginal utility of one more part of a unit, to who has so many."""
    before, after = _speed(have, speed_ups, parts), _speed(have + 1, speed_ups, parts)
    return weight * (math.log1p(after) - math.log1p(before))


def _speed(have: int, speed_ups: Sequence[float] | None, parts: int) -> float:
    if speed_ups is None:
        return have / parts
    units, rest = divmod(have, parts)
    if not rest:
        return speed_ups[units]
    return speed_ups[units] + (speed_ups[units + 1] - speed_ups[units]) * rest / parts


def _reversed(name: str) -> tuple[int, ...]:
    return tuple(-ord(c) for c in name)
