"""Order and batching: which request is next, and which others go with it.

Order: priority class, then least slack. A request's key is ``deadline - predicted execution +
class × AGEING``, fixed while it can be in time: a low-class request that has waited ``AGEING``
longer than a high-class newcomer goes first, so no class starves and the heap never needs
re-sorting.

A request that cannot meet its deadline any more (the box stalled, its prediction was wrong) goes,
once, to where it would be had it come only then. Kept in its place it would make those behind it
late as well, one after the other: a single stall would cost all that is queued instead of as many
as it took the time of. For executions of one length no order of what is queued has fewer late
ones (Moore, Management Science 1968).

Batches: the largest whose predicted end meets the tightest deadline in it, a request that is late
anyway aside; unless that costs more than it saves. Two batches take longer than one: those left
for the second may be late for it, and so may as many more as come, or could be served in full
batches, in that time. The second is taken to wait for the first, also where another partition might
take it sooner.
"""

from __future__ import annotations

from collections.abc import Collection
from heapq import heapify, heappop, heappush, heapreplace
from math import isqrt
from typing import Final

from cotenant.domain.request import Request
from cotenant.domain.units import S
from cotenant.policy.estimate import size_class
from cotenant.policy.generation import first_lanes, fits, on_worker
from cotenant.policy.state import (
    DispatcherState,
    Lane,
    PartitionState,
    Running,
    ServiceState,
    WorkerState,
)

AGEING: Final = 1 * S
_FAR: Final = 1 << 62


def lane_key(request: Request) -> str:
    """Which lane of its service a request is queued in before its first turn."""
    return f"{request.version}|{request.shape}"


def _lane_of(state: DispatcherState, request: Request) -> str:
    resident = state.residents.get(request.id) if state.residents else None
    return lane_key(request) if resident is None else f"@{resident.worker}"


def enqueue(state: DispatcherState, service: ServiceState, request: Request) -> None:
    """Put an admitted request into its lane and note the load it brings."""
    state.queued[request.id] = request
    key = _lane_of(state, request)
    lane = service.lanes.get(key)
    if lane is None:
        lane = service.lanes[key] = Lane(request.version, size_class(request.size))
        if request.id in state.residents:
            lane.worker = state.residents[request.id].worker
            lane.version = state.workers[lane.worker].version
    rows, priority = request.rows, request.priority
    own = service.exec[service.home].predict(1, rows, lane.size)
    due = request.deadline + priority * AGEING - own
    heappush(lane.heap, (due, request.arrived, request.id))
    if request.expires and request.id not in state.residents:  # an answer that began goes on
        heappush(state.expiries, (request.expires, request.id))
    lane.live += 1
    service.queued += 1
    service.rows[priority] += rows
    lane.rows[priority] += rows
    if service.queued == 1:
        for partition in service.partitions:
            state.partitions[partition].waiting[service.name] = None


def withdraw(state: DispatcherState, request_id: int) -> Request | None:
    """Take a queued request out (cancelled, expired); None if it is not queued."""
    request = state.queued.pop(request_id, None)
    if request is None:
        return None
    service = state.services[request.service]
    key = _lane_of(state, request)
    lane = service.lanes[key]
    _left(state, service, key, lane, request)
    if len(lane.heap) > 64 and len(lane.heap) > 4 * lane.live:
        lane.heap = [entry for entry in lane.heap if entry[2] in state.queued]
        heapify(lane.heap)
    return request


def head(state: DispatcherState, lane: Lane) -> int:
    """Key of the lane's first live entry; a very large number if there is none."""
    heap, queued = lane.heap, state.queued
    while heap:
        if heap[0][2] in queued:
            return heap[0][0]
        heappop(heap)
    return _FAR


def idle_count(service: ServiceState, site: str) -> int:
    """Instances at a site that have nothing to do."""
    return sum(map(len, service.idle.get(site, {}).values()))


def has_worker(state: DispatcherState, service: ServiceState, lane: Lane, site: str) -> bool:
    """Whether an instance at a site that may run a lane has nothing to do."""
    if lane.worker:  # also one that is to take nothing new
        worker = state.workers[lane.worker]
        return worker.site == site and not worker.batch and not worker.stalled
    idle = service.idle.get(site, {}).get(lane.version or service.version)
    if not idle or not service.turns:
        return bool(idle)
    workers = [state.workers[name] for name in idle if not state.workers[name].stalled]
    return any(has_room(state, service, worker, lane) for worker in workers)


def has_room(
    state: DispatcherState, service: ServiceState, worker: WorkerState, lane: Lane
) -> bool:
    """Whether who is next in a lane may join what a worker has between its turns or in one."""
    if head(state, lane) == _FAR:
        return False
    beside = on_worker(state, service, worker)
    return fits(state, service, worker, beside, state.queued[lane.heap[0][2]])


def able_count(state: DispatcherState, service: ServiceState, site: str) -> int:
    """Instances at a site that could begin something that the service has queued."""
    found = idle_count(service, site)
    if state.residents:
        for lane in service.lanes.values():
            if lane.worker and state.workers[lane.worker].rests:
                found += has_worker(state, service, lane, site)
    return found


def put_off(
    state: DispatcherState,
    service: ServiceState,
    lane: Lane,
    partition: PartitionState,
    start: int,
) -> int:
    """Put off what would be late even if it started at ``start``; the key of the head then."""
    table, units, heap = service.exec[partition.kind], partition.compute, lane.heap
    while (key := head(state, lane)) != _FAR:
        request = state.queued[heap[0][2]]
        if start + table.predict(units, request.rows, lane.size, 0) <= request.deadline:
            return key
        aged = request.priority * AGEING
        was_put_off = key >= request.deadline + aged
        if was_put_off or any(service.rows[: request.priority]):
            return key  # (or its age has brought it before those of higher classes)
        behind = max(request.deadline, start + service.objective) + aged
        heapreplace(heap, (behind, request.arrived, request.id))
    return key


def choose_lane(
    state: DispatcherState, service: ServiceState, partition: PartitionState
) -> tuple[int, str]:
    """The most urgent lane that has an idle worker for a partition: (key of its head, lane key);
    ("" if none)."""
    best, chosen = _FAR, ""
    if not (service.idle.get(partition.site) or state.residents):
        return best, chosen
    for name, lane in service.lanes.items():
        if has_worker(state, service, lane, partition.site):
            key = put_off(state, service, lane, partition, state.now)
            # Who is first now may be another one, who finds no room.
            able = not service.turns or has_worker(state, service, lane, partition.site)
            if able and key < best:
                best, chosen = key, name
    return best, chosen


def choose_service(
    state: DispatcherState, partition: PartitionState, held: Collection[str] = ()
) -> tuple[str, str]:
    """The service (and lane) that should run next on a partition, those in ``held`` aside;
    ("", "") if none can."""
    best, chosen, lane_of = _FAR, "", ""
    for name in partition.waiting:
        if name in held:
            continue
        key, lane = choose_lane(state, state.services[name], partition)
        if key < best:
            best, chosen, lane_of = key, name, lane
    return chosen, lane_of


def full_lane(state: DispatcherState, service: ServiceState, before: Running, version: str) -> str:
    """The most urgent lane of a service, once the batch ``before`` is done, if instances of
    ``version`` run it and what it has queued fills a batch; else ""."""
    partition = state.partitions[before.partition]
    table = service.exec[partition.kind]
    took = table.predict(partition.compute, before.batch.rows, before.size, 0)
    start = before.started + took
    chosen = min(
        service.lanes,
        key=lambda key: put_off(state, service, service.lanes[key], partition, start),
        default="",
    )
    if not chosen:
        return ""
    lane = service.lanes[chosen]
    runs = not lane.worker and (lane.version or service.version) == version
    return chosen if runs and lane.live >= service.max_batch else ""


def take_batch(
    state: DispatcherState,
    service: ServiceState,
    key: str,
    partition: PartitionState,
    now: int,
) -> list[Request]:
    """Remove and return the requests of the next batch, to start at ``now``, of a lane that has
    a live entry."""
    lane = service.lanes[key]
    heap = lane.heap
    entries: list[tuple[int, int, int]] = []
    taken: list[Request] = []
    rows = 0
    while heap:
        request = state.queued.get(heap[0][2])
        if request is None:
            heappop(heap)
            continue
        if taken and rows + request.rows > service.max_batch:
            break
        entries.append(heappop(heap))
        taken.append(request)
        rows += request.rows
    count = _batch_count(service, partition, lane, taken, now)
    for entry in entries[count:]:
        heappush(heap, entry)
    taken = taken[:count]
    for request in taken:
        del state.queued[request.id]
        _left(state, service, key, lane, request)
    return taken


def take_turn(state: DispatcherState, service: ServiceState, worker: WorkerState) -> list[Request]:
    """Remove and return the requests of a worker's next turn: all that it has between turns, and of
    those who wait for their first one as many as it has room for."""
    taken: list[Request] = []
    own = f"@{worker.id}"
    while own in service.lanes:
        taken.append(_take_first(state, service, own))
    while not worker.rests:
        heads = [(head(state, lane), key) for key, lane in first_lanes(service, worker)]
        first, key = min(heads, default=(_FAR, ""))
        if first == _FAR:
            break
        newcomer = state.queued[service.lanes[key].heap[0][2]]
        if not fits(state, service, worker, taken, newcomer):
            break
        taken.append(_take_first(state, service, key))
    return taken


def _take_first(state: DispatcherState, service: ServiceState, key: str) -> Request:
    lane = service.lanes[key]
    head(state, lane)
    request = state.queued.pop(heappop(lane.heap)[2])
    _left(state, service, key, lane, request)
    return request


def _batch_count(
    service: ServiceState,
    partition: PartitionState,
    lane: Lane,
    requests: list[Request],
    now: int,
) -> int:
    """How many of a lane's first requests make the batch that starts ``now``."""
    table, units, size = service.exec[partition.kind], partition.compute, lane.size
    rows = sum([request.rows for request in requests])
    end = now + table.predict(units, rows, size)
    if end <= min([request.deadline for request in requests]):
        return len(requests)
    count, first, tightest = 0, 0, _FAR
    for request in requests:
        if now + table.predict(units, request.rows, size) <= request.deadline < tightest:
            tightest = request.deadline
        if count and now + table.predict(units, first + request.rows, size) > tightest:
            break
        first += request.rows
        count += 1
    if count == len(requests):
        return count
    first_end = now + table.predict(units, first, size)
    second_end = first_end + table.predict(units, rows - first, size)
    saved = 0
    for i, request in enumerate(requests):
        in_time = (first_end if i < count else second_end) <= request.deadline
        saved += in_time - (end <= request.deadline)
    served = table.predict(units, service.max_batch, size) // service.max_batch
    comes = service.gap * len(service.partitions)
    cost = (second_end - end) // max(1, served, comes)
    return count if saved >= cost else len(requests)


def hold_until(
    state: DispatcherState, service: ServiceState, key: str, partition: PartitionState
) -> int:
    """Until when (ns) a batch may be held back for company; 0 if it should go now."""
    if not service.max_queue_delay:
        return 0
    lane = service.lanes[key]
    head(state, lane)
    rows = sum(state.queued[e[2]].rows for e in lane.heap if e[2] in state.queued)
    enough = min(service.preferred, default=service.max_batch)
    if rows >= enough:
        return 0
    first = state.queued[lane.heap[0][2]]
    table = service.exec[partition.kind]
    latest_start = first.deadline - table.predict(partition.compute, enough, lane.size)
    return max(0, min(first.arrived + service.max_queue_delay, latest_start))


def _left(
    state: DispatcherState, service: ServiceState, key: str, lane: Lane, request: Request
) -> None:
    lane.live -= 1
    service.queued -= 1
    service.rows[request.priority] -= request.rows
    lane.rows[request.priority] -= request.rows
    if lane.live == 0:
        del service.lanes[key]
    if service.queued == 0:
        for partition in service.partitions:
            state.partitions[partition].waiting.pop(service.name, None)


def work_ns(service: ServiceState, partition: PartitionState, rows: int, size: int) -> int:
    """Predicted ns to execute ``rows`` rows of a class of size in the largest batches allowed.

    The means of the batches add up, their deviations like those of independent samples (by the
    root of the sum of squares).
    """
    costs, units = service.exec[partition.kind], partition.compute
    if rows <= service.max_batch:
        mean, dev = costs.moments(units, rows, size) if rows else (0, 0)
        return mean + dev * service.caution // 1000
    full, rest = divmod(rows, service.max_batch)
    mean, dev = costs.moments(units, service.max_batch, size)
    ns = full * mean
    if rest:
        ns += costs.predict(units, rest, size, 0)
        full += 1
    return ns + isqrt(full * dev * dev) * service.caution // 1000


def queued_ns(
    service: ServiceState, partition: PartitionState, priority: int, but: str = ""
) -> int:
    """Predicted ns, on such a partition, of what a service has queued in this class and above, the
    lane ``but`` aside. Lanes do not share batches."""
    total = 0
    for key, lane in service.lanes.items():
        if key != but:
            rows = sum(lane.rows[: priority + 1])
            total += work_ns(service, partition, rows, lane.size)
    return total
