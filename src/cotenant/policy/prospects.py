"""What to expect of services that are spread over the partitions of a device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, NamedTuple

from cotenant.domain.snapshot import ServiceFacts
from cotenant.policy.continuous import Turning, turning
from cotenant.policy.generation import AHEAD
from cotenant.policy.queueing import HEADROOM, batch_delay, wait_quantile
from cotenant.policy.views import View

RHO_MAX: Final = 0.85
"""Highest planned utilization of a service partition."""
BATCHING: Final = 0.5
"""Utilization by single requests from which on they find company in the queue."""


class Spread(NamedTuple):
    """Services on partitions of so many units (``sizes``): those of each (``placed``, by index),
    the utilization that it brings to each of them (``shares``), and what one row of it takes there
    (``times``, ns by units). Of each partition its utilization (``rho``), how many services were
    ``placed`` there for their load, and the ``slowest`` execution (ns) of those without turns."""

    sizes: list[int]
    placed: dict[str, tuple[int, ...]]
    shares: dict[str, float]
    rho: list[float]
    guests: list[int]
    slowest: list[int]
    times: dict[str, dict[int, int]]

    def busiest(self, service: ServiceFacts) -> float:
        """Utilization of the busiest partition that a service has."""
        return max(self.rho[index] for index in self.placed[service.name])


class Prospect(NamedTuple):
    """Of a service without turns: ns from arrival to answer at its percentile, the utilization of
    its busiest partition, and the ``longest`` execution of its own and of any ``other`` there."""

    delay: float
    busiest: float
    longest: int
    other: int

    def holds(self, service: ServiceFacts) -> bool:
        """Whether the objective is held, with something to spare."""
        return self.delay <= HEADROOM * service.objective and self.busiest <= RHO_MAX


def expect(
    view: View, service: ServiceFacts, spread: Spread, asked: list[tuple[int, float]]
) -> Prospect:
    """What to expect of a service without turns. ``asked``: its partitions, and the rows per second
    that come to each."""
    where = spread.placed[service.name]
    there = [spread.sizes[i] for i in where]
    busiest, other = spread.busiest(service), max(spread.slowest[i] for i in where)
    longest = max(spread.times[service.name][size] for size in there)
    wait = wait_quantile(max(longest, other), busiest, service.percentile, len(where))
    delay = longest + wait + _turn_ahead(view, service, spread)
    if all(spread.guests[i] == 1 for i in where):
        delay = min(delay, _batched(view, service, there, [rate for _, rate in asked]))
    return Prospect(delay, busiest, longest, other)


def turns_of(
    view: View, service: ServiceFacts, spread: Spread, asked: list[tuple[int, float]]
) -> Iterator[tuple[Turning, int, float]]:
    """Of a service whose answers take turns: what is known of them on each of its partitions to
    which requests come, with its index and their rate."""
    for index, rate in asked:
        beside = [
            s.objective
            for s in view.services
            if s is not service and index in spread.placed[s.name]
        ]
        within = min(beside, default=math.inf) / AHEAD
        turns = turning(view.device.kind, service, spread.sizes[index], within)
        if turns is not None and rate:
            yield turns, index, rate


def holds(view: View, service: ServiceFacts, spread: Spread) -> bool:
    """Whether the objective of a service is held, with something to spare."""
    asked = asked_of(view, service, spread, 0.0)
    if service.turns is None:
        return expect(view, service, spread, asked).holds(service)
    share = spread.shares[service.name]
    return spread.busiest(service) <= RHO_MAX and all(
        turns.holds(rate, max(0.0, spread.rho[index] - share))
        for turns, index, rate in turns_of(view, service, spread, asked)
    )


def asked_of(
    view: View, service: ServiceFacts, spread: Spread, horizon_s: float
) -> list[tuple[int, float]]:
    """The partitions of a service, and the rows per second that come to each."""
    where = spread.placed[service.name]
    rates = _rates(view, service, [spread.sizes[i] for i in where], horizon_s)
    return list(zip(where, rates, strict=True))


def _turn_ahead(view: View, service: ServiceFacts, spread: Spread) -> float:
    """Ns that the turn of another service may take which is under way when a request comes."""
    longest = 0.0
    for other in view.services:
        if other.turns is None:
            continue
        for index in set(spread.placed[other.name]).intersection(spread.placed[service.name]):
            turns = turning(view.device.kind, other, spread.sizes[index])
            if turns is not None:
                longest = max(longest, turns.longest(service.objective / AHEAD))
    return longest


def _rates(view: View, service: ServiceFacts, sizes: list[int], horizon_s: float) -> list[float]:
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
