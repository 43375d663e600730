"""One sentence each for what ``explain`` finds. Pure; nothing here decides anything."""

from __future__ import annotations

from collections.abc import Sequence

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import DeviceSpec
from cotenant.domain.request import Refusal, Request
from cotenant.domain.units import format_duration
from cotenant.policy.admission import RETRY_MIN, busy_for
from cotenant.policy.estimate import size_class
from cotenant.policy.lending import in_debt
from cotenant.policy.state import DispatcherState, PartitionState, ServiceState, WorkerState


def refusal(
    request: Request,
    now: int,
    action: a.Reject,
    event: e.Event,
    state: DispatcherState | None,
) -> str:
    """Why this request was refused, with the numbers behind it. ``state`` is that after the
    event, None if it is not known."""
    service = state.services.get(request.service) if state is not None else None
    left = request.deadline - now
    waited = format_duration(now - request.arrived)
    match action.refusal:
        case Refusal.OVERLOADED:
            # The time to retry is what was lacking, but never below its minimum.
            most = "up to " if action.retry_after <= RETRY_MIN else ""
            why = (
                f"came with {format_duration(left)} to its deadline; predicted {most}"
                f"{format_duration(left + action.retry_after)}{_load(state, service, request, now)}"
            )
        case Refusal.DEADLINE:
            why = (
                f"came with {format_duration(left)} to its deadline{_own(state, service, request)}"
            )
        case Refusal.QUEUE_FULL:
            queued = f"{service.queued} requests were" if service else "the bound was"
            why = f"{queued} queued already"
        case Refusal.RESERVED:
            why = f"capacity is owed to {_owed(state, now)}"
        case Refusal.WORKER_LOST:
            who = event.worker if isinstance(event, e.WorkerDown) else "its worker"
            why = f"{who} died while it executed the request, the second to do so"
        case Refusal.EXPIRED | Refusal.CANCELLED:
            why = f"{action.refusal.value}; it had waited {waited}"
        case _:
            why = action.refusal.value
    if isinstance(event, e.WorkerDown) and action.refusal is Refusal.UNAVAILABLE:
        why += f", since {event.worker} had gone after it waited {waited}"
    detail = f" ({action.detail})" if action.detail else ""
    retry = f"; told to retry after {format_duration(action.retry_after)}"
    return f"request {request.id}: {why}{detail}{retry if action.retry_after else ''}"


def _load(
    state: DispatcherState | None, service: ServiceState | None, request: Request, now: int
) -> str:
    """What was ahead of a newcomer."""
    if state is None or service is None:
        return ""
    parts = [f"executing it takes {format_duration(_own_ns(state, service, request))}"]
    if service.queued:
        parts.append(f"{service.queued} requests ({sum(service.rows)} rows) were queued")
    for name in service.partitions:
        partition = state.partitions[name]
        running = state.running.get(partition.batch)
        if running is not None:
            rest = format_duration(max(0, busy_for(state, partition, now)))
            what = f"batch {running.batch.id} of {running.batch.service}"
            parts.append(f"{what} had {name} for another {rest}")
        elif partition.job:
            cost = format_duration(partition.revoke_cost)
            parts.append(f"job {partition.job} had {name} (taken back in {cost})")
    return f": {', '.join(parts)}"


def _own(state: DispatcherState | None, service: ServiceState | None, request: Request) -> str:
    if state is None or service is None:
        return ""
    own = format_duration(_own_ns(state, service, request))
    rows = f"{request.rows} row" + "s" * (request.rows != 1)
    return f", but {rows} alone would take {own}"


def _own_ns(state: DispatcherState, service: ServiceState, request: Request) -> int:
    where = [state.partitions[p] for p in service.partitions]
    size = size_class(request.size)
    times = (service.exec[p.kind].predict(p.compute, request.rows, size) for p in where)
    return min(times, default=0)


def _owed(state: DispatcherState | None, now: int) -> str:
    if state is None:
        return "a job with a guaranteed share"
    total = sum(p.compute for p in state.partitions.values())
    owed = [j for j in state.jobs.values() if in_debt(state, j, now, total)]
    names = [f"job {j.id} (guaranteed {j.guaranteed / 1e4:.0f}%)" for j in owed]
    return ", ".join(names) or "a job with a guaranteed share"


def slow(request: Request, now: int, started: int, order: a.Dispatch, done: e.BatchDone) -> str:
    """Where the time of an answered request went."""
    count = len(order.batch.requests)
    company = f"in a batch of {count}" if count > 1 else "alone"
    taken = ", taken back from a job" if order.preempting else ""
    taken = " after the batch before it" if order.after else taken
    # Of a batch that was at hand when the journal's segment began only its start is known.
    started = min(started, now - done.start_ns - done.exec_ns)
    rest = now - started - done.start_ns - done.exec_ns
    parts = [
        f"waited {format_duration(max(0, started - request.arrived))}",
        f"{format_duration(done.start_ns)} to start on {order.partition}{taken}",
        f"executed {format_duration(done.exec_ns)} {company}",
    ]
    if rest > 1_000_000:
        parts.append(f"{format_duration(rest)} until the result was taken")
    late = now - request.deadline
    verdict = f"{format_duration(late)} too late" if late > 0 else "in time"
    return f"{', '.join(parts)}; {verdict}"


def worker_lost(
    event: e.WorkerDown,
    worker: WorkerState | None,
    actions: Sequence[a.Action],
    state: DispatcherState | None,
) -> str:
    """What was lost with a worker and what became of it. ``state`` is that before the event."""
    reason = event.reason or "no reason given"
    if worker is None or state is None:
        return f"lost: {reason}"
    lost = [r.batch for r in state.running.values() if r.worker == worker.id]
    text = f"instance of {worker.service} version {worker.version} lost: {reason}"
    if not lost:
        return f"{text}; it was idle"
    mine = {request for batch in lost for request in batch.requests}
    refused = sum(isinstance(x, a.Reject) and x.request in mine for x in actions)
    back = len(mine) - refused
    return f"{text}; of its {len(mine)} requests {back} went back to the queue, {refused} refused"


def device_changed(before: DeviceSpec | None, spec: DeviceSpec) -> str:
    """What is another now of how jobs yield on a device; "" if nothing of that is."""
    known = before.limits if before is not None else ()
    news = [limit for limit in spec.limits if limit not in known]
    news += [f"no longer: {limit}" for limit in known if limit not in spec.limits]
    if before is not None and before.preempt is not spec.preempt:
        news.insert(0, f"its level is {spec.preempt.name}, was {before.preempt.name}")
    return "; ".join(news)


def pause(state: DispatcherState, partition: PartitionState) -> str:
    """Why lending a partition paused. ``state`` is that after it did."""
    services = [state.services[name] for name in partition.services]
    if not services:
        return "it serves nobody"
    worst = max(services, key=lambda s: s.tail.value / s.objective)
    near, objective = format_duration(worst.tail.value), format_duration(worst.objective)
    return f"p{worst.tail.ppm / 10_000:g} of {worst.name} came to {near} against {objective}"
