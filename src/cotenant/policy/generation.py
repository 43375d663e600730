"""Requests that live through turns: who may join whom on a worker, and what a newcomer has to wait.

A sequence holds memory for its prompt and for each token that it has said, until it ends. So what
the sequences of a worker hold grows with every turn and falls as they end. If all go on at one
pace, the most that they hold at one time is reached when one of them ends: of the sequences in
order of what they have left, longest first, the first k hold then what each holds now and k times
what the k-th has left (Gong et al., "Past-Future Scheduler for LLM Serving under SLA Guarantees",
ASPLOS 2025). A newcomer joins if that fits the worker's room, with answers as long as they were
seen to be; who turns out longer has to make room (the engine puts sequences aside).

What a turn costs is fitted to what turns took (``cotenant.policy.iterations``).
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heapreplace
from typing import Final

from cotenant.domain.request import Lease, Request
from cotenant.domain.units import MS, S
from cotenant.domain.workload import PRIORITY_CLASSES
from cotenant.policy.iterations import IterationCosts, Load, load
from cotenant.policy.state import (
    DispatcherState,
    Lane,
    PartitionState,
    ServiceState,
    WorkerState,
)
from cotenant.policy.tail import WHOLE

LEASE_TURNS: Final = 64
LEASE_NS: Final = 1 * S
"""Bounds of a lease that nobody recalls. It spares the way to the dispatcher and back after each
turn."""
AHEAD: Final = 4
"""A turn may take this part of the objective of another service on the partition: who comes in its
midst waits for its end."""
LEAST_SHARE: Final = 8
"""So small a part (1/n) of a turn's budget is left for reading prompts at least, however many
answers go on."""
CHUNK: Final = 512
"""Tokens of prompts that an engine reads in a turn, where no budget says less."""


def peak(sequences: Sequence[tuple[int, int]]) -> int:
    """The most tokens that sequences of (tokens held, tokens left to say) hold at one time."""
    total = most = 0
    for count, (held, left) in enumerate(sorted(sequences, key=lambda s: -s[1]), start=1):
        total += held
        most = max(most, total + count * left)
    return most


def on_worker(state: DispatcherState, service: ServiceState, worker: WorkerState) -> list[Request]:
    """What a worker has: in its turn, or between two."""
    if worker.batch:
        return state.running[worker.batch].requests
    lane = service.lanes.get(f"@{worker.id}")
    if lane is None:
        return []
    return [state.queued[entry[2]] for entry in lane.heap if entry[2] in state.queued]


def first_lanes(service: ServiceState, worker: WorkerState) -> list[tuple[str, Lane]]:
    """The lanes, by key, of those who wait for their first turn and could have it on a worker."""
    return [
        (key, lane)
        for key, lane in service.lanes.items()
        if not lane.worker and (lane.version or service.version) == worker.version
    ]


def fits(
    state: DispatcherState,
    service: ServiceState,
    worker: WorkerState,
    beside: Sequence[Request],
    newcomer: Request,
) -> bool:
    """Whether a newcomer may join those ``beside`` it on a worker. Alone it always may."""
    if not beside:
        return True
    if sum([request.rows for request in beside]) + newcomer.rows > service.max_batch:
        return False
    if not worker.room:
        return True
    both = [_sequence(state, service, request) for request in (*beside, newcomer)]
    return peak(both) <= worker.room


def _sequence(state: DispatcherState, service: ServiceState, request: Request) -> tuple[int, int]:
    """(tokens held, tokens that it is expected to say yet)."""
    resident = state.residents.get(request.id)
    said = resident.said if resident is not None else 0
    expected = request.most * service.spoken // WHOLE
    left = expected - said if said < expected else request.most - said
    return request.prompt + said, max(1, left)


def learn_length(service: ServiceState, request: Request, said: int) -> None:
    """An answer ended after so many tokens: mean and deviation (Jacobson) of how much of what they
    may say answers do say."""
    if not request.most:
        return
    error = min(WHOLE, said * WHOLE // request.most) - service.spoken_mean
    service.spoken_mean += error // 8
    service.spoken_dev += (abs(error) - service.spoken_dev) // 4
    service.spoken = max(1, min(WHOLE, service.spoken_mean + 2 * service.spoken_dev))


def lease(
    state: DispatcherState, service: ServiceState, partition: PartitionState, batch: list[Request]
) -> Lease:
    """Of a batch that begins. Where another service waits it is one turn."""
    others = [name for name in partition.waiting if name != service.name]
    within = budget(state, service, partition, any(r.id in state.residents for r in batch))
    return Lease(1, 0, within) if others else Lease(LEASE_TURNS, LEASE_NS, within)


def budget(
    state: DispatcherState, service: ServiceState, partition: PartitionState, going_on: bool
) -> int:
    """About how long (ns) a turn may take; 0: any time. ``going_on``: whether answers that have
    begun are part of it."""
    others = [n for n in partition.services if n != service.name and n in state.services]
    bounds = [state.services[name].objective // AHEAD for name in others]
    if going_on and service.pace:
        bounds.append(service.pace)
    return min(bounds, default=0)


# --- what it costs --------------------------------------------------------------------------


def costs_of(service: ServiceState, partition: PartitionState) -> IterationCosts:
    """What turns cost on partitions such as this one."""
    return service.turn_costs.setdefault(f"{partition.kind}:{partition.compute}", IterationCosts())


def turn_ns(
    state: DispatcherState,
    service: ServiceState,
    partition: PartitionState,
    batch: Sequence[Request],
) -> int:
    """Predicted ns of a turn in which each of a batch says a token; 0 if nothing is known."""
    held = sum([_sequence(state, service, request)[0] for request in batch])
    return costs_of(service, partition).predict(Load(len(batch), held + len(batch)))


def wait_and_own(
    state: DispatcherState,
    service: ServiceState,
    partition: PartitionState,
    worker: WorkerState,
    ahead: list[Request],
    request: Request,
) -> tuple[int, int]:
    """Ns until a newcomer's prompt is begun, once the turn under way is over; and from then until
    its first token. ``ahead``: who waits for their first turn there, before it. A wait beyond its
    deadline is told as some such wait: how much longer it is would cost more to know."""
    beside = on_worker(state, service, worker)
    costs = costs_of(service, partition)
    decode = turn_ns(state, service, partition, beside)
    reading = [r for r in beside if not _has_spoken(state, r)]
    before = sum([_read_ns(costs, r.prompt) for r in (*reading, *ahead)])
    own = _read_ns(costs, request.prompt)
    within = budget(state, service, partition, going_on=len(reading) < len(beside))
    most = max(0, request.deadline - state.now) // max(1, decode)
    wait = _turns_until(state, service, worker, (beside, ahead, request), most) * max(1, decode)
    if within:  # a part of each turn goes to those who go on
        left = max(1, within // LEAST_SHARE, within - decode)
        before, own = before * within // left, own * within // left
    elif decode:
        before += decode * -(-sum([r.prompt for r in (*reading, *ahead)]) // CHUNK)
        own += decode * -(-request.prompt // CHUNK)
    return wait + before, own + round(costs.fixed + costs.step_of(request.prompt))


def crowded(
    state: DispatcherState,
    service: ServiceState,
    partition: PartitionState,
    worker: WorkerState,
    ahead: list[Request],
    request: Request,
) -> int:
    """Ns after which to try again, if with a newcomer the answers under way could not keep the pace
    of the objective; 0 if they can. Where one alone cannot, two turns' time is what they have."""
    beside = on_worker(state, service, worker)
    if not service.pace or not beside:
        return 0
    batch = [request, *beside, *ahead[: service.max_batch]]
    alone = turn_ns(state, service, partition, [request])
    together = turn_ns(state, service, partition, batch[: service.max_batch])
    if together <= max(service.pace, 2 * alone):
        return 0
    return max(1 * MS, min([_sequence(state, service, r)[1] for r in beside]) * together)


def _has_spoken(state: DispatcherState, request: Request) -> bool:
    resident = state.residents.get(request.id)
    return resident is not None and resident.said > 0


def _read_ns(costs: IterationCosts, prompt: int) -> int:
    work = load(0, prompt)
    return round(costs.token * work.tokens + costs.pair * work.pairs)


def queued(
    state: DispatcherState,
    service: ServiceState,
    worker: WorkerState,
    priority: int = PRIORITY_CLASSES,
) -> list[Request]:
    """Who waits for their first turn, in this class and above, and could have it there."""
    return [
        state.queued[entry[2]]
        for _, lane in first_lanes(service, worker)
        for entry in lane.heap
        if entry[2] in state.queued and state.queued[entry[2]].priority <= priority
    ]


def _turns_until(
    state: DispatcherState,
    service: ServiceState,
    worker: WorkerState,
    company: tuple[list[Request], list[Request], Request],
    most: int,
) -> int:
    """After how many turns there are a place and memory for a newcomer; memory that others lend on
    demand is there. ``company``: who is beside it, who is ahead of it and gets theirs first, and
    the newcomer. It is not looked beyond ``most`` turns."""
    beside, ahead, request = company
    ends = [_sequence(state, service, r)[1] for r in beside]
    until = 0
    heapify(ends)
    for each in (*ahead, request):
        left = _sequence(state, service, each)[1]
        if len(ends) < service.max_batch:
            ends.append(left)
            heapify(ends)
        else:
            until = ends[0]
            if until > most:
                return until
            heapreplace(ends, until + left)
    if not worker.room:
        return until
    room = max(worker.room, worker.reach)
    own = _sequence(state, service, request)
    going = sorted([_sequence(state, service, r) for r in beside], key=lambda s: s[1])
    while going and until <= most:
        passed = until
        later = [(held + passed, left - passed) for held, left in going if left > passed]
        if peak([*later, own]) <= room:
            break
        until = max(until, going[0][1])
        going = going[1:]
    return until
