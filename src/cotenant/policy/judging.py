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
from cotenant.policy.continuous import Expected
from cotenant.policy.prospects import RHO_MAX, Spread, asked_of, exec_ns, expect, load, turns_of
from cotenant.policy.queueing import HEADROOM, lost
from cotenant.policy.views import Layout, Verdict, View

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
    spread = Spread(sizes, placed, shares, rho, guests, slowest, times)
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
        asked = asked_of(view, service, spread, horizon_s)
        for index, rate in asked:
            verdict.asked[index] += rate
        if service.turns is not None:
            _judge_turns(view, service, verdict, spread, asked)
            continue
        found = expect(view, service, spread, asked)
        if not found.holds(service):
            verdict.misses[service.name] = _why(service, found.delay, found.busiest)
            queues = queues or _queues(view, spread)
            crowded = max((queues[i] for i in where), key=lambda q: sum(load for _, load in q))
            verdict.overload += _overload(
                service, found.longest, max(found.longest, found.other), crowded, len(where)
            )
    return verdict


def _judge_turns(
    view: View,
    service: ServiceFacts,
    verdict: Verdict,
    spread: Spread,
    asked: list[tuple[int, float]],
) -> None:
    """Of a service whose answers take turns: what it leaves idle, and whether it would miss its
    objective. ``asked``: its partitions, and requests per second that come to each."""
    share = spread.shares[service.name]
    busiest = spread.busiest(service)
    overload = 1.0 - RHO_MAX / busiest if busiest > RHO_MAX else 0.0
    worst, worst_stress = Expected(0.0, 0.0, 0.0), 0.0
    for turns, index, rate in turns_of(view, service, spread, asked):
        others = max(0.0, spread.rho[index] - share)
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


def _queues(view: View, spread: Spread) -> list[list[tuple[float, float]]]:
    """For each partition: how long (ns) the requests of each of its services can wait, and the
    utilization that it brings."""
    queues: list[list[tuple[float, float]]] = [[] for _ in spread.sizes]
    for service in view.services:
        for index in spread.placed[service.name]:
            patience = _patience(service, spread.times[service.name][spread.sizes[index]])
            queues[index].append((patience, spread.shares[service.name]))
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
