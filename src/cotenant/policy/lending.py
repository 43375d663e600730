"""Lending idle space to jobs: to whom, when, for how long, and what is owed.

* To whom: a job that is owed its guaranteed share first (most owed), else the least virtual
  time (start-time fair queueing; Goyal, Vin and Cheng, SIGCOMM 1996), by what the plan says that
  jobs are to hold, or by weight.
* When: as soon as it is idle. To hold it back for the next request brought nothing that could be
  measured (docs/design.md).
* How long: slices grow by a step while the objective has headroom, are halved when its tail comes
  near it, and are zero (nothing is lent) while it is missed.
"""

from __future__ import annotations

from typing import Final

from cotenant.domain.plan import Plan
from cotenant.domain.units import MS, S
from cotenant.policy.returning import note_silence
from cotenant.policy.state import DispatcherState, Hold, JobShare, PartitionState, ServiceState

ADJUST_EVERY: Final = 100 * MS
SLICE_STEP: Final = 5 * MS
NEAR: Final = 800
"""Permille of the objective at which slices are halved; at 1000 lending pauses."""
OWED: Final = 20
"""A job is in debt when it is owed more than 1/OWED of one window's guaranteed share."""
DEBT_WINDOW: Final = 2 * S
"""Over how long (ns) a guaranteed share is owed."""
REVOKE_WITHIN: Final = 2 * S
"""In what time (ns) a job must have left a partition that is taken back; then it is stopped."""
_SCALE: Final = 1_000_000


# --- accounts -------------------------------------------------------------------------------


def settle(job: JobShare, now: int, units: int, since: int) -> None:
    """Book ``units`` held from ``since`` until ``now``."""
    used = (now - since) * units
    job.received += used
    job.vtime += used * 1000 // job.pace


def _running(state: DispatcherState, job: JobShare, now: int) -> int:
    """Unit-ns of the grants under way, not booked yet."""
    held = (state.partitions[p] for p in job.held)
    return sum((now - p.held_since) * p.compute for p in held)


def debt(state: DispatcherState, job: JobShare, now: int, total_units: int) -> int:
    """Unit-ns owed to a job now (negative: it received more than its guarantee)."""
    if not job.guaranteed:
        return 0
    running = _running(state, job, now)
    due = (now - job.since) * total_units * job.guaranteed // _SCALE
    cap = DEBT_WINDOW * total_units * job.guaranteed // _SCALE
    return max(-cap, min(cap, job.carried + due - job.received - running))


def roll_window(state: DispatcherState, job: JobShare, now: int, total_units: int) -> None:
    """Start a new window once the old one is over, carrying its debt."""
    if job.guaranteed and now - job.since > DEBT_WINDOW:
        owed = debt(state, job, now, total_units)
        job.since, job.received, job.carried = now, -_running(state, job, now), owed


def in_debt(state: DispatcherState, job: JobShare, now: int, total_units: int) -> bool:
    """Whether a job is owed enough to act on."""
    if not job.guaranteed:
        return False
    threshold = DEBT_WINDOW * total_units * job.guaranteed // (_SCALE * OWED)
    return debt(state, job, now, total_units) > threshold


def starved(state: DispatcherState, kind: str, now: int, total_units: int) -> int:
    """Sum of the guaranteed shares (millionths) of jobs on a kind of device that are in debt."""
    return sum(
        j.guaranteed
        for j in state.jobs.values()
        if j.guaranteed and j.kind == kind and in_debt(state, j, now, total_units)
    )


def choose_job(
    state: DispatcherState, partition: PartitionState, now: int, total_units: int
) -> JobShare | None:
    """Who gets an idle partition; None if nobody may."""
    owners = [state.jobs[j] for j in partition.owners if j in state.jobs]
    candidates = owners or state.jobs.values()
    size = partition.compute
    best: JobShare | None = None
    best_key: tuple[int, int, str] | None = None
    for job in candidates:
        if job.kind != partition.kind or job.stopping or job.place not in ("", partition.id):
            continue
        if job.device not in ("", partition.device):
            continue
        if partition.services and partition.device in job.apart:
            continue
        if job.blocked_until > now or job.units + size > _room(state, job, partition):
            continue
        owed = debt(state, job, now, total_units) if in_debt(state, job, now, total_units) else 0
        key = (-owed, virtual_time(state, job, now), job.id)
        if best_key is None or key < best_key:
            best, best_key = job, key
    return best


def _room(state: DispatcherState, job: JobShare, partition: PartitionState) -> int:
    """Units that a job may hold if it has a partition: what is its own is kept free of its limit
    until it has that."""
    if not job.own or job.id in partition.owners:
        return job.limit
    held = (state.partitions[name] for name in job.held)
    own = sum(p.compute for p in held if job.id in p.owners)
    return job.limit - max(0, job.own - own)


def virtual_time(state: DispatcherState, job: JobShare, now: int) -> int:
    """A job's virtual time including what it holds right now."""
    running = _running(state, job, now)
    return job.vtime + running * 1000 // job.pace


def target(plan: Plan, job: str) -> int:
    """What the plan says that a job is to hold in all, in thousandths of a unit."""
    return round(1000 * plan.targets.get(job, 0.0))


def aim(state: DispatcherState) -> None:
    """Jobs are to hold what the plan now says."""
    for job in state.jobs.values():
        held = _running(state, job, state.now) * 1000
        before, job.target = job.pace, target(state.plan, job.id)
        job.vtime += held // before - held // job.pace


# --- what is learned ------------------------------------------------------------------------


def note_arrival(service: ServiceState, now: int) -> None:
    """Keep the mean gap between arrivals (gain 1/8), and the length of silences."""
    if service.unloads:
        note_silence(service, now)
    if service.last_arrival:
        gap = min(now - service.last_arrival, 10 * S)
        service.gap += (gap - service.gap) // 8 if service.gap else gap
    service.last_arrival = now


def note_revoked(partition: PartitionState, took_ns: int) -> None:
    """Learn what taking a partition back costs (gain 1/16; one that took long counts as four)."""
    old = partition.revoke_cost
    partition.revoke_cost = old + (min(took_ns, 4 * old) - old) // 16 if old else took_ns


# --- slices ---------------------------------------------------------------------------------


def note_headroom(partition: PartitionState, permille: int) -> None:
    """Note how near a service came to its objective (1000 = at it)."""
    if permille > partition.hot:
        partition.hot = permille


def adjust_slice(state: DispatcherState, partition: PartitionState, now: int) -> None:
    """Once per window: grow, halve or zero the slice by the worst headroom seen in it."""
    if now < partition.adjust_at:
        return
    plan = state.plan
    if partition.hot >= 1000:
        partition.slice_ns = 0
    elif partition.hot >= NEAR:
        if partition.slice_ns:
            partition.slice_ns = max(plan.slice_min, partition.slice_ns // 2)
    elif partition.slice_ns == 0:
        partition.slice_ns = plan.slice_min
    else:
        partition.slice_ns = min(plan.slice_max, partition.slice_ns + SLICE_STEP)
    partition.hot = 0
    partition.adjust_at = now + ADJUST_EVERY


def back_in(partition: PartitionState, now: int) -> int:
    """Ns until a partition is back from the job that has it. A revocation that has taken longer
    than they do is taken to take as long again."""
    if partition.hold in (Hold.NONE, Hold.GRANTING, Hold.HELD):
        return partition.revoke_cost if partition.hold else 0
    return max(partition.revoke_cost, now - partition.revoke_by + REVOKE_WITHIN)


def lendable_now(
    state: DispatcherState,
    partition: PartitionState,
    job: JobShare,
    total_units: int,
) -> bool:
    """Whether an idle partition may go to ``job``: one without services always, a service's
    while the slice is not zero or the job is owed its guarantee."""
    if not partition.services:
        return True
    if not partition.lendable:
        return False
    return partition.slice_ns > 0 or in_debt(state, job, state.now, total_units)
