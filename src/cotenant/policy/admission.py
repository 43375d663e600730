"""Admission: what cannot make its deadline is refused on arrival, with a time to retry.

The predicted finish of a newcomer is, on the least loaded of its service's partitions: what is
left of the batch under way, plus the predicted work queued there of its own priority class and
above, plus its own execution in the company that is expected to join its batch. Waits are taken
longer than predicted by a margin that late answers widen.

While a guaranteed share of a job is owed, admission also spends tokens that refill at the rate of
what is not guaranteed, so that gaps open for the job (token bucket; Turner, IEEE Communications
1986): the debt is paid by serving less, never by letting accepted requests wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Final

from cotenant.domain.request import Refusal, Request
from cotenant.domain.units import MS
from cotenant.domain.workload import PRIORITY_CLASSES
from cotenant.policy import generation, returning
from cotenant.policy.estimate import size_class
from cotenant.policy.lending import back_in, starved
from cotenant.policy.queues import lane_key, queued_ns, work_ns
from cotenant.policy.state import DispatcherState, PartitionState, Reserve, Running, ServiceState
from cotenant.policy.tail import WHOLE

BURST: Final = 50 * MS
"""Inference that may be admitted at once while a share is owed (per compute unit)."""
RETRY_MIN: Final = 1 * MS
TRY_AFTER: Final = 200 * MS
"""Predictions are corrected by executions alone. A service that has had none for this long takes
one request however bad they look, lest a slow spell close it for ever."""
FIT: Final = 2
"""How many batches must fit into the objective for batches of their length to form: whoever comes
as one begins waits for it and for one's own. So many executions may also pass until an answer
where one alone is longer than the objective: such a service is late, not closed."""
_LATE: Final = 20_000
"""Ppm of the wait by which each request that waited and was answered late widens the margin. Each
that was in time narrows it by as much less as there may be more of them: so it settles where as
many answers are late as the percentile allows (stochastic approximation; Robbins and Monro,
1951)."""
_WIDEST: Final = 1_000_000


def refuse(
    state: DispatcherState,
    service: ServiceState,
    request: Request,
    now: int,
    compute: Mapping[str, int],
) -> tuple[Refusal, int] | None:
    """(reason, retry-after ns) if ``request`` must be refused; None to admit it. ``compute``: units
    of each kind of device that trains."""
    if state.draining:
        return Refusal.SHUTTING_DOWN, 0
    parts = state.partitions
    mine = [parts[name] for name in service.partitions if service.at.get(parts[name].site)]
    if not mine:
        return _until_loaded(state, service, request, now)
    if service.queued >= service.max_queue:
        return Refusal.QUEUE_FULL, max(RETRY_MIN, _queued_work(service, mine[0]))
    budget = request.deadline - now
    if service.turns:
        wait, own, partition, crowded = _best_turn(state, service, request, now, mine)
        if crowded:
            return Refusal.OVERLOADED, crowded
    else:
        wait, own, partition = _best_finish(state, service, request, now, mine)
    wait += wait * service.margin // WHOLE
    if wait + own > budget and _due_for_a_try(state, service, request, partition, now):
        return None
    if own > budget:
        if request.expires:
            return Refusal.DEADLINE, 0
        budget = aim(service, own)
    if wait + own > budget:
        return Refusal.OVERLOADED, max(RETRY_MIN, wait + own - budget)
    if not service.strict and partition.kind in compute:
        return _spend(state, partition, own, now, compute[partition.kind])
    return None


def _until_loaded(
    state: DispatcherState, service: ServiceState, request: Request, now: int
) -> tuple[Refusal, int] | None:
    """For a service without an instance: who can wait for one that is loaded again does."""
    wait = returning.loaded_in(state, service, now)
    if wait < 0 or not service.partitions:
        return Refusal.UNAVAILABLE, 1000 * MS
    if service.queued >= service.max_queue:
        return Refusal.QUEUE_FULL, max(RETRY_MIN, wait)
    partition = state.partitions[service.partitions[0]]
    table = service.exec[partition.kind]
    own = table.predict(partition.compute, request.rows, size_class(request.size))
    if wait + own <= request.deadline - now:
        return None
    return Refusal.UNAVAILABLE, max(RETRY_MIN, wait)


def aim(service: ServiceState, own: int) -> int:
    """The latency (ns) that a service can be held to where one execution takes ``own``: its
    objective or, if that is shorter, what a request and one before it take."""
    return service.objective if own <= service.objective else FIT * own


def busy_for(state: DispatcherState, partition: PartitionState, now: int) -> int:
    """Predicted ns until a busy partition's worker is done with what it has; negative if it
    should be already."""
    end = state.running[partition.batch].expected_end
    if not partition.at_hand:
        return end - now
    return max(end, now) + state.running[partition.at_hand].expected_end - end - now


def learn_margin(
    service: ServiceState, running: Running, answered: list[Request], now: int
) -> None:
    """Correct the margin by the requests of a batch that are ``answered`` now, or begin to be. Who
    is late without having waited says nothing of waits."""
    in_time = max(1, _LATE * service.missable // (WHOLE - service.missable))
    for request in answered:
        if now <= request.deadline:
            service.margin = max(0, service.margin - in_time)
        elif running.started > request.arrived:
            service.margin = min(_WIDEST, service.margin + _LATE)


def _due_for_a_try(
    state: DispatcherState,
    service: ServiceState,
    request: Request,
    partition: PartitionState,
    now: int,
) -> bool:
    """Whether a service that does nothing takes a request against what is predicted. Not if its
    client set a deadline that the shortest execution of its size ever would miss."""
    if service.queued or now - service.last_start < TRY_AFTER:
        return False
    least = service.exec[partition.kind].least(size_class(request.size))
    if request.expires and least > request.deadline - now:
        return False
    return all(r.batch.service != service.name for r in state.running.values())


def _queued_work(
    service: ServiceState, partition: PartitionState, priority: int = PRIORITY_CLASSES
) -> int:
    """Predicted ns of what the service has queued in this class and above, shared out over as
    many partitions like this one as it has."""
    return queued_ns(service, partition, priority) // max(1, len(service.partitions))


def _best_finish(
    state: DispatcherState,
    service: ServiceState,
    request: Request,
    now: int,
    mine: list[PartitionState],
) -> tuple[int, int, PartitionState]:
    """(wait, own execution, partition) on that of the service's partitions (``mine``) where it
    would finish first.

    Of partitions that are alike the one that is free first is it, so the queue is predicted once
    for each likeness.
    """
    soonest: list[tuple[int, PartitionState]] = []
    for partition in mine:
        wait = _free_in(state, service, partition, now)
        if partition.waiting:
            wait += _others_ahead(state, service, partition, request)
        for i, (known, other) in enumerate(soonest):
            if other.compute == partition.compute and other.kind == partition.kind:
                if wait < known:
                    soonest[i] = wait, partition
                break
        else:
            soonest.append((wait, partition))
    best: tuple[int, int, PartitionState] | None = None
    queued = sum(service.rows[: request.priority + 1])
    key, size = lane_key(request), size_class(request.size)
    lane = service.lanes.get(key)
    beside = sum(lane.rows[: request.priority + 1]) if lane is not None else 0
    lanes = float(min(max(1, service.workers), len(mine)))
    shared = _lanes(service, mine) if len(soonest) > 1 else {}
    for free_in, partition in soonest:
        lanes = shared.get(partition.id, lanes)
        ahead = int(beside / lanes)
        mean, dev = service.exec[partition.kind].moments(partition.compute, request.rows, size)
        own = mean + dev * service.caution // 1000
        queue = _ahead(service, partition, ahead + request.rows, size, own) if beside else 0
        if queued > beside:
            queue += int(queued_ns(service, partition, request.priority, key) / lanes)
        wait = free_in + queue
        if wait and service.gap:
            joining = int(wait / (service.gap * lanes))
            last = ahead % service.max_batch + request.rows
            queue += _company(service, partition, last, joining, size)
        wait = free_in + queue
        if queued or partition.batch:
            # Errors of executions that follow each other add up by the root of their squares, so
            # beside those of the wait half of its own is enough.
            own = mean + dev * service.caution // 2000
        if best is None or wait + own < best[0] + best[1]:
            best = wait, own, partition
    assert best is not None
    return best


def _best_turn(
    state: DispatcherState,
    service: ServiceState,
    request: Request,
    now: int,
    mine: list[PartitionState],
) -> tuple[int, int, PartitionState, int]:
    """(wait, own execution until the first piece, partition, ns until it is not crowded there)
    where its first piece would come first, of the service's partitions and instances."""
    best: tuple[int, int, PartitionState, int] | None = None
    workers = [w for w in state.workers.values() if w.service == service.name and w.up]
    ahead: dict[str, list[Request]] = {}
    for worker in workers:  # of a version's queue each instance gets its part
        if worker.version not in ahead:
            waiting = generation.queued(state, service, worker, request.priority)
            ahead[worker.version] = waiting[:: max(1, service.workers)]
    for partition in mine:
        free_in = back_in(partition, now)
        if partition.batch:
            free_in = max(0, busy_for(state, partition, now))
        free_in += _others_ahead(state, service, partition, request)
        for worker in workers:
            if worker.site != partition.site or worker.rests:
                continue
            others = ahead[worker.version]
            wait, own = generation.wait_and_own(state, service, partition, worker, others, request)
            crowded = generation.crowded(state, service, partition, worker, others, request)
            found = free_in + wait, own, partition, crowded
            if best is None or (crowded, found[0] + own) < (best[3], best[0] + best[1]):
                best = found
    assert best is not None
    return best


def _lanes(service: ServiceState, mine: list[PartitionState]) -> dict[str, float]:
    """For each of a service's partitions: among how many like it the queue is shared out.

    Work goes to whoever is free, so a partition's part of the queue is in proportion to its
    speed: sum of all speeds / its own. Where all are equal that is their number.
    """
    most = max(1, service.workers)
    speeds = {}
    for partition in mine:
        table = service.exec[partition.kind]
        took = table.predict(partition.compute, service.max_batch, deviations=0)
        speeds[partition.id] = 1.0 / max(1, took)
    total = sum(speeds.values())
    return {name: min(most, total / speed) for name, speed in speeds.items()}


def _free_in(
    state: DispatcherState, service: ServiceState, partition: PartitionState, now: int
) -> int:
    """Ns until a partition is free, and an instance of the service that can run there."""
    wait = back_in(partition, now)
    if partition.batch:
        wait = max(0, busy_for(state, partition, now))
        if state.running[partition.batch].batch.service == service.name:
            return wait  # its instance is idle then
    return max(wait, _worker_wait(state, service, partition.site, now))


def _worker_wait(state: DispatcherState, service: ServiceState, site: str, now: int) -> int:
    """Ns until some instance of the service at a site is idle."""
    for names in service.idle.get(site, {}).values():
        if names:
            return 0
    soonest = -1
    for running in state.running.values():
        partition = state.partitions[running.partition]
        if partition.site == site and running.batch.service == service.name:
            wait = max(0, busy_for(state, partition, now))
            if wait < soonest or soonest < 0:
                soonest = wait
    return max(0, soonest)


def _others_ahead(
    state: DispatcherState, service: ServiceState, partition: PartitionState, request: Request
) -> int:
    """Predicted work of other services before the newcomer, shared out over their partitions."""
    ahead = 0
    for name in partition.waiting:
        other = state.services[name]
        if other is not service:
            ahead += _queued_work(other, partition, request.priority)
    return ahead


def _ahead(service: ServiceState, partition: PartitionState, rows: int, size: int, own: int) -> int:
    """Predicted work in its own lane before the newcomer: the queue with it included (``rows``),
    less its own share of the last batch."""
    return max(0, work_ns(service, partition, rows, size) - own)


def _company(
    service: ServiceState, partition: PartitionState, last: int, joining: int, size: int
) -> int:
    """Ns by which those who come meanwhile and join the newcomer's batch, the ``last``, will
    lengthen it: as many as arrive on average (``joining``), and one standard deviation (of a
    Poisson count) more; but up to a batch that fits ``FIT`` times into the objective, since longer
    ones do not form.

    Left out, the first of a batch are admitted for a short one: then either they are late, or
    batches are cut short for them, which costs the throughput that the others count on.
    """
    table, units = service.exec[partition.kind], partition.compute
    last = min(service.max_batch, last)
    for grown in range(min(service.max_batch, last + joining + isqrt(joining)), last, -1):
        longer = table.predict(units, grown, size)
        if FIT * longer <= service.objective:
            return max(0, longer - table.predict(units, last, size))
    return 0


def _spend(
    state: DispatcherState, partition: PartitionState, own: int, now: int, total_units: int
) -> tuple[Refusal, int] | None:
    """Spend tokens while any job is owed its share; refill at the rate of the rest."""
    kind, cost = partition.kind, own * partition.compute
    owed = starved(state, kind, now, total_units)
    reserve = state.reserves.get(kind)
    if reserve is None:
        reserve = state.reserves[kind] = Reserve()
    if not owed:
        reserve.tokens, reserve.refilled = BURST * total_units, now
        return None
    cost = min(cost, BURST * total_units)  # there never are more tokens
    free = max(0, 1_000_000 - owed)
    gained = (now - reserve.refilled) * total_units * free // 1_000_000
    reserve.tokens = min(BURST * total_units, reserve.tokens + gained)
    reserve.refilled = now
    if reserve.tokens < cost:
        rate = max(1, total_units * free)
        return Refusal.RESERVED, max(RETRY_MIN, (cost - reserve.tokens) * 1_000_000 // rate)
    reserve.tokens -= cost
    return None
