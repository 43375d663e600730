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
) -> dict[str, int]:
    """Whole units for each job, summing to at most ``units``.

    ``guaranteed`` and ``limit`` of a job are shares of ``device_units``. Guarantees are rounded
    down (what is missing is a debt that time sharing pays); ties go to the smaller id.
    ``speed_ups`` of jobs, by units, are at least that long.
    """
    known = speed_ups or {}
    shares = {job.id: 0 for job in jobs}
    left = units
    for job in sorted(jobs, key=lambda j: (-j.guaranteed, j.id)):
        given = min(left, int(job.guaranteed * device_units + 1e-9))
        shares[job.id] = given
        left -= given
    for _ in range(left):
        best = max(
            (j for j in jobs if shares[j.id] + 1 <= max(1, int(j.limit * device_units + 1e-9))),
            key=lambda j: (gain(j.weight, shares[j.id], known.get(j.id)), _reversed(j.id)),
            default=None,
        )
        if best is None:
            break
        shares[best.id] += 1
    return shares


def gain(weight: float, units: int, speed_ups: Sequence[float] | None = None) -> float:
    """Marginal utility of one more unit."""
    if speed_ups is None:
        return weight * (math.log(2 + units) - math.log(1 + units))
    return weight * (math.log1p(speed_ups[units + 1]) - math.log1p(speed_ups[units]))


def _reversed(name: str) -> tuple[int, ...]:
    return tuple(-ord(c) for c in name)
