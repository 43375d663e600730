"""Dividing compute units among jobs by utility.

A job's utility of ``x`` units is ``weight × log(1 + s(x))``, ``s`` being its speed-up (``x`` itself
where nothing is known of it): concave, so giving each unit to the
job with the largest marginal gain maximises the sum (greedy is exact for separable concave
utilities; Fox, Operations Research 1966), and equal weights get equal shares (proportional
fairness; Kelly, 1997). A gang of threads leaps at as many units as it has threads: there the sum
may miss the best, for nobody looks beyond the next unit. Guaranteed units are given first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heapreplace

from cotenant.domain.snapshot import JobFacts


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
    for each in sorted(jobs, key=lambda j: (-j.guaranteed, j.id)):
        given = min(left, int(each.guaranteed * device_units * parts + 1e-9))
        shares[each.id] = given
        left -= given
    weights = {j.id: j.weight for j in jobs}
    offers = [
        (-gain(weights[job], have, known.get(job), parts), job)
        for job, have in shares.items()
        if have < most[job]
    ]
    heapify(offers)
    while left and offers:
        job = offers[0][1]
        shares[job] += 1
        left -= 1
        if shares[job] < most[job]:
            value = gain(weights[job], shares[job], known.get(job), parts)
            heapreplace(offers, (-value, job))
        else:
            heappop(offers)
    return shares


def gain(
    weight: float, have: int, speed_ups: Sequence[float] | None = None, parts: int = 1
) -> float:
    """Marginal utility of one more part of a unit, to who has so many."""
    before, after = have / parts, (have + 1) / parts
    if speed_ups is not None:
        before, after = speed_at(speed_ups, before), speed_at(speed_ups, after)
    return weight * (math.log1p(after) - math.log1p(before))


def speed_at(speed_ups: Sequence[float], units: float) -> float:
    """Speed on so many units, which need not be whole."""
    below = min(int(units), len(speed_ups) - 2)
    return speed_ups[below] + (speed_ups[below + 1] - speed_ups[below]) * (units - below)
