"""How well services would do on a layout.

A ``View`` is one device with the part of the load that it is to carry.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from typing import Final

from cotenant.domain.device import DeviceSpec, Partition
from cotenant.domain.snapshot import ServiceFacts
from cotenant.domain.units import format_bytes
from cotenant.domain.workload import share_on
from cotenant.policy.continuous import Expected, turning
from cotenant.policy.generation import AHEAD
from cotenant.policy.queueing import HEADROOM, batch_delay, lost, wait_quantile
from cotenant.policy.views import Layout, Verdict, View

RHO_MAX: Final = 0.85
"""Highest planned utilization of a service partition."""
BATCHING: Final = 0.5
"""Utilization by single requests from which on they find company in the queue."""
NO_PLACE: Final = 10.0
"""What a service that fits into no partition counts as overload."""


def judge(view: View, layout: Layout, horizon_s: float) -> Verdict:
    """Spread services over the partitions (largest load first, least loaded partition first)
    and predict each one's percentile at the load expected ``horizon_s`` seconds ahead. Among
    partitions that are equally loaded small ones are taken first."""
    kind, mine = view.device.kind, layout.mine
    sizes = [p.compute for p in mine]
    largest = max(sizes, default=1)
    crowd = _Crowd(mine)
    rho, guests = crowd.rho, crowd.guests
    slowest = [0] * len(mine)
    placed: dict[str, tuple[int, ...]] = {}
    shares: dict[str, float] = {}
    times: dict[str, dict[int, int]] = {}
    order = [(-load(kind, s, largest, horizon_s), s.name, s) for s in view.services]
    for _, name, service in sorted(order):
        own = times[name] = {size: exec_ns(kind, service, size, 1) for size in crowd.sizes}
        within = HEADROOM * service.objective
        emptiest = crowd.emptiest(memory_of(service, view.device), own, within)
        chosen, share = _take(view, service, mine, emptiest, rho, horizon_s)
        for index in chosen:
            guests[index] += 1
            rho[index] += share
            if service.turns is None:
                slowest[index] = max(slowest[index], own[sizes[index]])
        crowd.put_back()
        placed[name], shares[name] = chosen, share
    _fill(view, mine, placed, shares, rho, horizon_s)
    verdict = Verdict(layout, placed, rho, list(rho), [0.0] * len(mine), {})
    queues: list[list[tuple[float, float]]] = []
    for service in view.services:
        where = placed[service.name]
        if not where:
            need = memory_of(service, view.device)
            verdict.misses[service.name] = (
                f"needs {format_bytes(need)}, more than any partition for services has"
            )
            verdict.overload += NO_PLACE
            continue
        there = [sizes[i] for i in where]
        rates = _spread(view, service, there, horizon_s)
        for index, rate in zip(where, rates, strict=True):
            verdict.asked[index] += rate
        if service.turns is not None:
            _judge_turns(view, service, verdict, list(zip(where, rates, strict=True)), shares)
            continue
        busiest, other = max(rho[i] for i in where), max(slowest[i] for i in where)
        longest = max(times[service.name][size] for size in there)
        wait = wait_quantile(max(longest, other), busiest, service.percentile, len(where))
        expected = longest + wait + _turn_ahead(view, service, placed, sizes)
        if all(guests[i] == 1 for i in where):
            expected = min(expected, _batched(view, service, there, rates))
        if expected > HEADROOM * service.objective or busiest > RHO_MAX:
            verdict.misses[service.name] = _why(service, expected, busiest)
            queues = queues or _queues(view, placed, shares, times, sizes)
            crowded = max((queues[i] for i in where), key=lambda q: sum(load for _, load in q))
            verdict.overload += _overload(
                service, longest, max(longest, other), crowded, len(where)
            )
    return verdict


def _judge_turns(
    view: View,
    service: ServiceFacts,
    verdict: Verdict,
    asked: list[tuple[int, float]],
    shares: dict[str, float],
) -> None:
    """Of a service whose answers take turns: what it leaves idle, and whether it would miss its
    objective. ``asked``: its partitions, and requests per second that come to each."""
    kind, share, mine = view.device.kind, shares[service.name], verdict.layout.mine
    busiest = max(verdict.rho[index] for index, _ in asked)
    overload = 1.0 - RHO_MAX / busiest if busiest > RHO_MAX else 0.0
    worst, worst_stress = Expected(0.0, 0.0, 0.0), 0.0
    for index, rate in asked:
        beside = [
            s.objective
            for s in view.services
            if s is not service and index in verdict.services[s.name]
        ]
        within = min(beside, default=math.inf) / AHEAD
        turns = turning(kind, service, mine[index].compute, within)
        if turns is None or not rate:
            continue
        others = max(0.0, verdict.rho[index] - share)
        expected = turns.expect(rate, others)
        verdict.busy[index] += max(0.0, expected.busy - share)
        stress = turns.stress(expected)
        if stress > worst_stress:
            worst, worst_stress = expected, stress
        if stress > HEADROOM:
            overload = max(overload, turns.overload(rate, others))
    if worst_stress > HEADROOM or busiest > RHO_MAX:
        verdict.misses[service.name] = _why_turns(service, worst, busiest)
        verdict.overload += overload


def _turn_ahead(
    view: View, service: ServiceFacts, placed: dict[str, tuple[int, ...]], sizes: list[int]
) -> float:
    """Ns that the turn of another service may take which is under way when a request comes."""
    longest = 0.0
    for other in view.services:
        if other.turns is None:
            continue
        for index in set(placed[other.name]).intersection(placed[service.name]):
            turns = turning(view.device.kind, other, sizes[index])
            if turns is not None:
                longest = max(longest, turns.longest(service.objective / AHEAD))
    return longest


def _queues(
    view: View,
    placed: dict[str, tuple[int, ...]],
    shares: dict[str, float],
    times: dict[str, dict[int, int]],
    sizes: list[int],
) -> list[list[tuple[float, float]]]:
    """For each partition: how long (ns) the requests of each of its services can wait, and the
    utilization that it brings."""
    queues: list[list[tuple[float, float]]] = [[] for _ in sizes]
    for service in view.services:
        for index in placed[service.name]:
            patience = _patience(service, times[service.name][sizes[index]])
            queues[index].append((patience, shares[service.name]))
    return queues


def _patience(service: ServiceFacts, exec_ns: int) -> float:
    return HEADROOM * service.objective - exec_ns


def _overload(
    service: ServiceFacts,
    longest: int,
    slowest: int,
    queue: list[tuple[float, float]],
    servers: int,
) -> float:
    """The part of a service's load (0..1) that could not be answered in time, be it that its queue
    is too long, its partitions too busy or that executions alone (of ``longest`` ns) take too
    long; over 1 where they do so on average."""
    alone = longest / service.objective
    if alone >= 1.0:
        return 2.0 - 1.0 / alone
    patience = _patience(service, longest)
    busy = sum(load for limit, load in queue if limit >= patience)
    refused = max(lost(slowest, queue, patience, servers), 1.0 - RHO_MAX / busy if busy else 0.0)
    tight = max(0.0, alone - HEADROOM) / (1.0 - HEADROOM)
    return refused + (1.0 - refused) * tight


class _Crowd:
    """Partitions by how crowded they are: heaps of (utilization, guests, index), one for those of
    one size and memory. ``rho`` and ``guests`` are for the user to change before ``put_back``."""

    def __init__(self, mine: Sequence[Partition]) -> None:
        self.rho = [0.0] * len(mine)
        self.guests = [0] * len(mine)
        self.sizes = {p.compute for p in mine}
        self._heaps: dict[tuple[int, int], list[tuple[float, int, int]]] = {}
        for index, p in enumerate(mine):
            self._heaps.setdefault((p.compute, p.memory), []).append((0.0, 0, index))
        self._out: list[tuple[int, list[tuple[float, int, int]]]] = []

    def emptiest(self, need: int, times: dict[int, int], within: float) -> Iterator[int]:
        """Take out those with ``need`` bytes of memory one by one: first where an execution takes
        not too long, then the least loaded. Where loads are equal (nothing measured yet), services
        keep out of each other's way."""
        fitting = [
            (times[size] > within, size, heap)
            for (size, memory), heap in self._heaps.items()
            if not memory or need <= memory
        ]
        while True:
            heads = [
                (slow, *heap[0][:2], size, heap[0][2], heap) for slow, size, heap in fitting if heap
            ]
            if not heads:
                return
            heap = min(heads)[-1]
            index = heappop(heap)[2]
            self._out.append((index, heap))
            yield index

    def put_back(self) -> None:
        """Put back what was taken out, as crowded as it now is."""
        for index, heap in self._out:
            heappush(heap, (self.rho[index], self.guests[index], index))
        self._out.clear()


def _spread(view: View, service: ServiceFacts, sizes: list[int], horizon_s: float) -> list[float]:
    """Rows per second that come to each of its partitions: in proportion to their speed."""
    kind, rate = view.device.kind, _rate(service, horizon_s)
    if len(set(sizes)) == 1:
        return [rate / len(sizes)] * len(sizes)
    speeds = [1.0 / max(1e-12, load(kind, service, size, horizon_s)) for size in sizes]
    total = sum(speeds)
    return [rate * speed / total for speed in speeds]


def _batched(view: View, service: ServiceFacts, sizes: list[int], rates: list[float]) -> float:
    """Ns from arrival to answer if it batches, on the slowest of the partitions that it has to
    itself; infinity if batches fill up, or if their times are not known."""
    largest = service.max_batch
    known = service.exec_ns.get(view.device.kind, {})
    slowest = 0.0
    for size, rate in zip(sizes, rates, strict=True):
        single, full = known.get(f"{size}x1"), known.get(f"{size}x{largest}")
        if not single or not full:
            return math.inf
        slowest = max(slowest, batch_delay(single, full, largest, rate, service.percentile))
    return slowest


def _rate(service: ServiceFacts, horizon_s: float) -> float:
    """Rows per second expected ``horizon_s`` seconds ahead."""
    return max(0.0, service.rate + max(0.0, service.rate_trend) * horizon_s)


def memory_of(service: ServiceFacts, device: DeviceSpec) -> int:
    """Bytes that one instance needs there; 0 if not known."""
    variant = service.variants.get(device.kind)
    return max(service.memory.get(device.kind, 0), variant.memory if variant is not None else 0)


def _limit(service: ServiceFacts, device: DeviceSpec) -> float:
    """Units of a device that may be planned for a service."""
    return share_on(service.limit, device.kind) * device.compute + 1e-9


def _take(
    view: View,
    service: ServiceFacts,
    mine: Sequence[Partition],
    order: Iterable[int],
    rho: list[float],
    horizon_s: float,
) -> tuple[tuple[int, ...], float]:
    """As many partitions, in this order, as the service's load calls for beside what they have
    (``rho``), and the utilization that it brings to each: work goes to whoever is free, so it is
    the same for all."""
    most = max(1.0, _limit(service, view.device))
    chosen: list[int] = []
    capacity, units, share, had = 0.0, 0, 0.0, 0.0
    for index in order:
        size = mine[index].compute
        if chosen and (len(chosen) == service.instances or units + size > most):
            break
        here = load(view.device.kind, service, size, horizon_s)
        chosen.append(index)
        units += size
        capacity += 1.0 / max(here, 1e-12)
        share, had = 1.0 / capacity, max(had, rho[index])
        if share + had <= RHO_MAX + 1e-9:
            break
    return tuple(sorted(chosen)), share


def _fill(
    view: View,
    mine: Sequence[Partition],
    placed: dict[str, tuple[int, ...]],
    shares: dict[str, float],
    rho: list[float],
    horizon_s: float,
) -> None:
    """Partitions that no load calls for go to services that have instances to use them."""
    used = {index for chosen in placed.values() for index in chosen}
    if len(used) == len(mine):
        return
    sizes = [p.compute for p in mine]
    limits = {s.name: _limit(s, view.device) for s in view.services}
    for index, partition in enumerate(mine):
        if index in used:
            continue
        able = [
            s
            for s in view.services
            if 0 < len(placed[s.name]) < s.instances
            and (not partition.memory or memory_of(s, view.device) <= partition.memory)
            and sum(sizes[i] for i in placed[s.name]) + sizes[index] <= limits[s.name]
        ]
        if not able:
            continue
        busiest = max(able, key=lambda s: (shares[s.name], s.name))
        had = placed[busiest.name]
        for old in had:
            rho[old] -= shares[busiest.name]
        now = tuple(sorted((*had, index)))
        loads = [max(1e-12, load(view.device.kind, busiest, sizes[i], horizon_s)) for i in now]
        placed[busiest.name] = now
        shares[busiest.name] = 1.0 / sum(1.0 / each for each in loads)
        for new in now:
            rho[new] += shares[busiest.name]


def utilization(view: View, layout: Layout, horizon_s: float) -> float:
    """Of the busiest partition, with services where the present plan has them."""
    rho: dict[str, float] = {}
    sizes = {p.id: p.compute for p in layout.mine}
    for service in view.services:
        where = [p for p in view.plan.services.get(service.name, ()) if p in sizes]
        loads = [max(1e-12, load(view.device.kind, service, sizes[p], horizon_s)) for p in where]
        share = 1.0 / sum(1.0 / each for each in loads) if loads else 0.0
        for partition in where:
            rho[partition] = rho.get(partition, 0.0) + share
    return max(rho.values(), default=0.0)


def load(kind: str, service: ServiceFacts, size: int, horizon_s: float) -> float:
    """Partitions of ``size`` units that the service would keep busy: rate x time per row, of single
    requests up to half of one, of full batches beyond. Never less for a higher rate or a smaller
    size: else a layout that is too small at one rate would seem to do at a higher one. Of answers
    in turns what they ask for where as many as can be share each turn."""
    rate = _rate(service, horizon_s)
    if service.turns is not None:
        turns = turning(kind, service, size)
        return rate * turns.demand / 1e9 if turns is not None else 0.0
    single = rate * exec_ns(kind, service, size, 1) / 1e9
    if single < BATCHING:
        return single
    full = rate * exec_ns(kind, service, size, service.max_batch) / service.max_batch / 1e9
    return max(BATCHING, full)


def exec_ns(kind: str, service: ServiceFacts, size: int, rows: int) -> int:
    """Measured time of ``rows`` rows on ``size`` units, else the nearest guess; 0 if none. Of
    answers in turns that until the first token of one alone."""
    turns = turning(kind, service, size) if service.turns is not None else None
    if turns is not None:
        return round(turns.alone.first)
    known = service.exec_ns.get(kind)
    if not known:
        return 0
    exact = known.get(f"{size}x{rows}")
    if exact is not None:
        return exact
    return known.get(f"{size}x1") or known.get(f"1x{rows}") or known.get("1x1") or 0


def _why(service: ServiceFacts, expected: float, busiest: float) -> str:
    return (
        f"predicted p{service.percentile:g} {_shown(expected)} against "
        f"{service.objective / 1e6:g} ms at utilization {busiest:.2f}"
    )


def _why_turns(service: ServiceFacts, expected: Expected, busiest: float) -> str:
    assert service.turns is not None
    due = (service.turns.pace or service.objective) / 1e6
    return (
        f"predicted p{service.percentile:g} of the first token {_shown(expected.first)} against "
        f"{service.objective / 1e6:g} ms, of further ones {_shown(expected.further)} against "
        f"{due:g} ms at utilization {busiest:.2f}"
    )


def _shown(expected: float) -> str:
    return "over saturation" if math.isinf(expected) else f"{expected / 1e6:.1f} ms"
