"""Space that reservations have of their own: which layouts leave it, and who has what of it.

On devices whose units can be had together it is so many of those that are free; where jobs are
bound to instances it is one that is large enough, for each reservation.
"""

from __future__ import annotations

from cotenant.domain.device import Partition
from cotenant.domain.snapshot import JobFacts
from cotenant.policy.views import Layout, View


def most_for_services(view: View) -> int:
    """Compute that services can have beside what is reserved."""
    return view.device.compute - sum(job.own for job in view.jobs)


def leaves(view: View, layout: Layout) -> bool:
    """Whether a layout leaves reservations what is their own."""
    if view.device.pins_jobs:
        return len(own_instances(view, layout)) == sum(job.own > 0 for job in view.jobs)
    return sum(job.own for job in view.jobs) <= len(layout.free)


def own_units(view: View, layout: Layout) -> dict[str, int]:
    """Of the free units of a layout, how many each reservation has; those that came later have
    less where there are not enough."""
    left, found = len(layout.free), {}
    for job in view.jobs:
        if job.own:
            found[job.id] = min(job.own, left)
            left -= found[job.id]
    return found


def own_instances(view: View, layout: Layout) -> dict[str, str]:
    """Of the free instances of a layout, which each reservation has: the smallest that is large
    enough, largest needs first, where it is now if that is as good. Who finds none is left out."""
    free = list(layout.free)
    found: dict[str, str] = {}
    for job in sorted((j for j in view.jobs if j.own), key=lambda j: (-j.own, -j.memory, j.id)):
        able = [p for p in free if p.compute >= job.own and p.memory >= job.memory]
        if able:
            best = min(able, key=lambda p: _rank(view, job, p))
            found[job.id] = best.id
            free.remove(best)
    return found


def _rank(view: View, job: JobFacts, partition: Partition) -> tuple[int, int, bool, str]:
    here = partition.id in view.plan.jobs.get(job.id, ())
    return partition.compute, partition.memory, not here, partition.id
