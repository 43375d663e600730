"""Admission: what cannot make its deadline is refused on arrival, with a time to retry.

The predicted finish of a newcomer is, on the least loaded of its service's partitions: what is
left of the batch under way, plus the predicted work queued there of its own priority class and
above, plus its own execution in the company that is expected to join its batch. While a
guaranteed share of a job is owed, admission also spends tokens that refill at the rate of what
is not guaranteed, so that gaps open for the job
(token bucket; Turner, IEEE Communications 1986): the debt is paid by serving less, never by
letting accepted requests wait.
"""

from __future__ import annotations

from math import isqrt

from weft.domain.request import Refusal, Request
from weft.domain.units import MS
from weft.policy.lending import note_headroom, starved
from weft.policy.queues import work_ns
from weft.policy.state import DispatcherState, PartitionState, ServiceState

BURST = 50 * MS
"""Inference that may be admitted at once while a share is owed (per compute unit)."""
RETRY_MIN = 1 * MS
TRY_AFTER = 200 * MS
"""Predictions are corrected by executions alone. A service that has had none for this long takes
one request however bad they look, lest a slow spell close it for ever."""
MARGIN = 8
"""A predicted wait is taken 1/MARGIN longer: its errors are not independent (the whole box gets
slower at times), so they do not average out over a queue."""


def refuse(
    state: DispatcherState, service: ServiceState, request: Request, now: int, total_units: int
) -> tuple[Refusal, int] | None:
    """(reason, retry-after ns) if ``request`` must be refused; None to admit it."""
    if state.draining:
        return Refusal.SHUTTING_DOWN, 0
    if service.workers == 0 or not service.partitions:
        return Refusal.UNAVAILABLE, 1000 * MS
    if service.queued >= service.max_queue:
        return Refusal.QUEUE_FULL, max(RETRY_MIN, _queued_work(service))
    budget = request.deadline - now
    wait, own, partition = _best_finish(state, service, request, now)
    wait += wait // MARGIN
    if wait + own > budget and _due_for_a_try(state, service, budget, now):
        return None
    if own > budget:
        return Refusal.DEADLINE, 0
    if wait + own > budget:
        note_headroom(partition, 1000)
        return Refusal.OVERLOADED, max(RETRY_MIN, wait + own - budget)
    if budget > 0:
        note_headroom(partition, (wait + own) * 1000 // budget - 1)
    if not service.strict:
        return _spend(state, own * len(partition.units), now, total_units)
    return None


def _due_for_a_try(state: DispatcherState, service: ServiceState, budget: int, now: int) -> bool:
    if budget < service.objective or service.queued or now - service.last_start < TRY_AFTER:
        return False
    return all(r.batch.service != service.name for r in state.running.values())


def _queued_work(service: ServiceState) -> int:
    return sum(service.cost) // max(1, len(service.partitions))


def _best_finish(
    state: DispatcherState, service: ServiceState, request: Request, now: int
) -> tuple[int, int, PartitionState]:
    """(wait, own execution, partition) on the partition where it would finish first."""
    best: tuple[int, int, PartitionState] | None = None
    idle_at = _worker_wait(state, service, now)
    for name in service.partitions:
        partition = state.partitions[name]
        wait = max(idle_at, _residual(state, partition, now))
        wait += _ahead(state, service, partition, request)
        wait += _company(service, request, len(partition.units), wait)
        own = _own(service, request, len(partition.units))
        if best is None or wait + own < best[0] + best[1]:
            best = wait, own, partition
    assert best is not None
    return best


def _worker_wait(state: DispatcherState, service: ServiceState, now: int) -> int:
    """Ns until some instance of the service is idle."""
    if any(service.idle.values()):
        return 0
    ends = [r.expected_end for r in state.running.values() if r.batch.service == service.name]
    return max(0, min(ends, default=now) - now)


def _residual(state: DispatcherState, partition: PartitionState, now: int) -> int:
    if not partition.batch:
        return partition.revoke_cost
    return max(0, state.running[partition.batch].expected_end - now)


def _ahead(
    state: DispatcherState, service: ServiceState, partition: PartitionState, request: Request
) -> int:
    """Predicted work before the newcomer, shared out over each service's partitions. Its own
    service's queue is counted with it included, less its own share of the last batch."""
    ahead = 0
    for name in partition.waiting:
        other = state.services[name]
        if other is service:
            continue
        ahead += sum(other.cost[: request.priority + 1]) // max(1, len(other.partitions))
    rows = sum(service.rows[: request.priority + 1])
    if rows:
        lanes = min(len(service.partitions), max(1, service.workers))
        own = _own(service, request, len(partition.units))
        total = work_ns(service, len(partition.units), rows // lanes + request.rows)
        ahead += max(0, total - own)
    return ahead


def _company(service: ServiceState, request: Request, units: int, wait: int) -> int:
    """Ns by which those who come meanwhile and join the newcomer's batch will lengthen it: as
    many as arrive on average, and one standard deviation (of a Poisson count) more.

    Left out, the first of a batch are admitted for a short one: then either they are late, or
    batches are cut short for them, which costs the throughput that the others count on.
    """
    if not wait or not service.gap:
        return 0
    lanes = min(len(service.partitions), max(1, service.workers))
    ahead = sum(service.rows[: request.priority + 1]) // lanes
    last = min(service.max_batch, ahead % service.max_batch + request.rows)
    joining = wait // (service.gap * lanes)
    grown = min(service.max_batch, last + joining + isqrt(joining))
    return max(0, service.exec.predict(units, grown) - service.exec.predict(units, last))


def _own(service: ServiceState, request: Request, units: int) -> int:
    return service.exec.predict(units, request.rows)


def _spend(
    state: DispatcherState, cost: int, now: int, total_units: int
) -> tuple[Refusal, int] | None:
    """Spend tokens while any job is owed its share; refill at the rate of the rest."""
    owed = starved(state, now, total_units)
    reserve = state.reserve
    if not owed:
        reserve.tokens, reserve.refilled = BURST * total_units, now
        return None
    free = max(0, 1_000_000 - owed)
    gained = (now - reserve.refilled) * total_units * free // 1_000_000
    reserve.tokens = min(BURST * total_units, reserve.tokens + gained)
    reserve.refilled = now
    if reserve.tokens < cost:
        rate = max(1, total_units * free)
        return Refusal.RESERVED, max(RETRY_MIN, (cost - reserve.tokens) * 1_000_000 // rate)
    reserve.tokens -= cost
    return None
