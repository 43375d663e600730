"""What a layout leaves for jobs, and what that is worth to them.

A partition of a service is lent while it is idle. What a job makes of lent time is its speed-up
there less the work that each pause costs it, both as far as they were learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from cotenant.policy.reserved import own_instances
from cotenant.policy.utility import DEAR, LOST
from cotenant.policy.views import Verdict, View

STAY: Final = 1.2
"""A job is bound to another partition only if it would gain this much there."""


def share_out(
    view: View, verdict: Verdict, lend: bool, present: Mapping[str, str], stay: float = STAY
) -> tuple[float, dict[str, str]]:
    """For a device whose jobs cannot move: which partition each job is bound to, and the sum of
    their utilities, ``weight x log(1 + speed-up)``, of which it gets in a service's partition
    what the service leaves, less what each request that finds it idle costs; where that is not
    known it is taken to be much, because to find out it would have to move. Heavier jobs choose
    first; several may share one. A job stays where it is (``present``) if it would not gain more
    than ``stay`` times. One that is apart here gets a partition without services, or none.
    Reservations have their own, which nobody shares."""
    layout = verdict.layout
    bound = own_instances(view, layout)
    taken = set(bound.values())
    own = {p.id: (p.compute, 1.0, 0.0) for p in layout.free if p.id not in taken}
    slots = dict(own)
    if lend:
        for partition, used, asked in zip(layout.mine, verdict.busy, verdict.asked, strict=True):
            slots[partition.id] = partition.compute, max(0.0, 1.0 - used), asked
    if not slots:
        return 0.0, bound
    weights = dict.fromkeys(slots, 0.0)
    total = 0.0
    free = (j for j in view.jobs if not j.own)
    for job in sorted(free, key=lambda j: (-j.weight, j.id)):
        speeds, lost = view.speed_ups.get(job.id), view.lost.get(job.id, DEAR)
        values = {
            name: (speeds[compute] if speeds else compute)
            * left
            * max(0.0, 1.0 - lost * asked)
            * job.weight
            / (weights[name] + job.weight)
            for name, (compute, left, asked) in (
                own if view.device.id in job.apart else slots
            ).items()
        }
        if not values:
            continue
        best = max(values, key=lambda name: (values[name], name))
        there = present.get(job.id, "")
        if there in values and (values[there] * stay >= values[best] or math.isinf(stay)):
            best = there
        weights[best] += job.weight
        bound[job.id] = best
        total += job.weight * math.log1p(values[best])
    return total, bound


def worth(view: View, verdict: Verdict, own: Mapping[str, int], pauses: float) -> float:
    """Sum of the utilities of jobs that can move: each has its ``own`` units and, in turn, what
    services leave, so that it comes to hold its target; without ``own`` units, or targets, they
    take turns by weight. ``pauses``: how many there are, of those that there would be if each
    request that finds a partition idle took it back."""
    aims = view.targets if own else {}
    claims = {j.id: max(0.0, aims[j.id] - own[j.id]) if aims else j.weight for j in view.jobs}
    total = sum(claims.values())
    chances = _idle_units(verdict)
    idle = sum(k * chance for k, chance in enumerate(chances))
    found = 0.0
    for job in view.jobs:
        mine = own.get(job.id, 0) if own else len(verdict.layout.free)
        turn = claims[job.id] / total if total else 1.0 / len(view.jobs)
        lent = sum(chance * _speed(view, job.id, mine + k) for k, chance in enumerate(chances))
        lost = view.lost.get(job.id, LOST) * pauses * pauses_of(verdict, mine + idle)
        value = turn * lent * max(0.0, 1.0 - lost)
        if own:
            value += (1.0 - turn) * _speed(view, job.id, mine)
        found += job.weight * math.log1p(value)
    return found


def pauses_of(verdict: Verdict, held: float) -> float:
    """Pauses per second of a job that holds so many units and all that services leave, if each
    request that finds a partition idle took it back; each counts for the part of what it holds
    that it loses."""
    lost = sum(
        asked * max(0.0, 1.0 - used) * partition.compute
        for partition, used, asked in zip(
            verdict.layout.mine, verdict.busy, verdict.asked, strict=True
        )
    )
    return lost / held if held else 0.0


def _idle_units(verdict: Verdict) -> list[float]:
    """Chance that 0, 1, 2 … units of services are idle, each partition being so by itself."""
    chances = [1.0]
    for partition, used in zip(verdict.layout.mine, verdict.busy, strict=True):
        idle = max(0.0, 1.0 - used)
        found = [0.0] * (len(chances) + partition.compute)
        for units, chance in enumerate(chances):
            found[units] += chance * (1.0 - idle)
            found[units + partition.compute] += chance * idle
        chances = found
    return chances


def _speed(view: View, job: str, units: int) -> float:
    """Relative to one unit; as much as there are units where nothing was learned."""
    speeds = view.speed_ups.get(job)
    return speeds[min(units, len(speeds) - 1)] if speeds else float(units)
