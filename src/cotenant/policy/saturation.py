"""How near each service is to what it can bear where it is: its load.

The load of a service is its arrival rate over the highest at which its objective is predicted to
hold, on the partitions that the plan gives it, by the same prediction that the planner goes by
(``cotenant.policy.prospects``). Over 1 the objective is predicted to be missed.

Which rate is the highest depends on what else comes. All services on a device are taken to grow
and shrink alike, as they do when a box like this one is added or taken away: a load of 1.5 says
that a third of all traffic is too much. Where several devices carry a service, what they can bear
adds up. Rates count as much more as measured misses say (``cotenant.policy.pressure``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from cotenant.domain.device import DeviceSpec
from cotenant.domain.snapshot import ServiceFacts, Snapshot
from cotenant.policy.continuous import turning
from cotenant.policy.demand import scaled
from cotenant.policy.prospects import Spread, exec_ns, holds, load
from cotenant.policy.views import Parts, View

STEPS: Final = 32
"""For each doubling of the rate: loads are told that finely."""
LEAST, MOST = -8 * STEPS, 14 * STEPS
"""Rates are looked at from 1/256 of the present one to 16,384 times that."""


def loads(snapshot: Snapshot, parts: Parts, boosts: Mapping[str, float]) -> dict[str, float]:
    """The load of each service of which it can be told: that has partitions and known costs, and
    whose objective some rate would hold. ``parts``: where services are; ``boosts``: how much more
    their rates count."""
    bears: dict[str, float] = {}
    unknown: set[str] = set()
    for device in snapshot.devices:
        here = tuple(
            scaled(s, parts[s.name][device.id] * boosts.get(s.name, 1.0))
            for s in snapshot.services
            if parts.get(s.name, {}).get(device.id)
        )
        placed = _placed(snapshot, device, here)
        sizes = [p.compute for p in snapshot.plan.partitions if p.device == device.id]
        known = tuple(s for s in here if placed[s.name])
        unknown |= {s.name for s in known if not _costs(s, device, sizes, placed[s.name])}
        growth = _Growth(snapshot, device, known, sizes, placed)
        for index, service in enumerate(known):
            name = service.name
            if name in unknown:
                continue
            times = growth.bears(index) if service.rate > 0.0 else math.inf
            bears[name] = bears.get(name, 0.0) + parts[name][device.id] * times
    return {name: 1.0 / times for name, times in bears.items() if times and name not in unknown}


def _placed(
    snapshot: Snapshot, device: DeviceSpec, services: tuple[ServiceFacts, ...]
) -> dict[str, tuple[int, ...]]:
    """Which of a device's partitions each service has by the plan in force."""
    partitions = [p.id for p in snapshot.plan.partitions if p.device == device.id]
    return {
        s.name: tuple(
            index
            for index, name in enumerate(partitions)
            if name in snapshot.plan.services.get(s.name, ())
        )
        for s in services
    }


def _costs(
    service: ServiceFacts, device: DeviceSpec, sizes: list[int], where: tuple[int, ...]
) -> bool:
    """Whether it is known what executions take on all these partitions."""
    if service.turns is not None:
        return all(turning(device.kind, service, sizes[i]) is not None for i in where)
    return all(exec_ns(device.kind, service, sizes[i], 1) > 0 for i in where)


class _Growth:
    """The services of a device as all their rates grow alike."""

    def __init__(
        self,
        snapshot: Snapshot,
        device: DeviceSpec,
        services: tuple[ServiceFacts, ...],
        sizes: list[int],
        placed: dict[str, tuple[int, ...]],
    ) -> None:
        self._view = View(snapshot.now, device, snapshot.plan, services, ())
        self._sizes = sizes
        self._placed = placed
        self._times = {
            s.name: {size: exec_ns(device.kind, s, size, 1) for size in set(sizes)}
            for s in services
        }
        self._guests = [0] * len(sizes)
        self._slowest = [0] * len(sizes)
        for service in services:
            for index in placed[service.name]:
                self._guests[index] += 1
                if service.turns is None:
                    own = self._times[service.name][sizes[index]]
                    self._slowest[index] = max(self._slowest[index], own)
        self._seen: dict[int, tuple[View, Spread]] = {}

    def bears(self, index: int) -> float:
        """At how many times the present rates a service would still hold its objective; 0: at
        none."""
        low, high = LEAST - 1, MOST + 1
        while high - low > 1:
            middle = (low + high) // 2
            if self._holds(index, middle):
                low = middle
            else:
                high = middle
        return float(2.0 ** (low / STEPS)) if low >= LEAST else 0.0

    def _holds(self, index: int, step: int) -> bool:
        if step not in self._seen:
            self._seen[step] = self._at(float(2.0 ** (step / STEPS)))
        view, spread = self._seen[step]
        return holds(view, view.services[index], spread)

    def _at(self, times: float) -> tuple[View, Spread]:
        view = self._view
        services = tuple(scaled(s, times) for s in view.services)
        shares: dict[str, float] = {}
        rho = [0.0] * len(self._sizes)
        for service in services:
            where = self._placed[service.name]
            each = {
                size: max(1e-12, load(view.device.kind, service, size, 0.0))
                for size in {self._sizes[i] for i in where}
            }
            share = shares[service.name] = 1.0 / sum(1.0 / each[self._sizes[i]] for i in where)
            for index in where:
                rho[index] += share
        seen = View(view.now, view.device, view.plan, services, ())
        return seen, Spread(
            self._sizes, self._placed, shares, rho, self._guests, self._slowest, self._times
        )
