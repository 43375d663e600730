"""The planner's nouns: one device as it sees it, ways to divide it, and how good each would be."""

from __future__ import annotations

import msgspec

from cotenant.domain.device import DeviceSpec, Partition
from cotenant.domain.plan import Plan
from cotenant.domain.snapshot import JobFacts, ServiceFacts

Parts = dict[str, dict[str, float]]
"""Service to device to the part of its load (0..1) that the device is to carry."""


class Layout(msgspec.Struct, frozen=True):
    """``mine``: the partitions for services. ``free``: what is left, for jobs."""

    mine: tuple[Partition, ...] = ()
    free: tuple[Partition, ...] = ()

    @property
    def compute(self) -> int:
        """Compute units of the services' partitions."""
        return sum(p.compute for p in self.mine)


class View(msgspec.Struct, frozen=True):
    """One device: the services that it carries, each at its part of the rate, and the jobs that
    can run there."""

    now: int
    device: DeviceSpec
    plan: Plan
    services: tuple[ServiceFacts, ...]
    jobs: tuple[JobFacts, ...]
    speed_ups: dict[str, list[float]] = {}
    """What is known of jobs: speed on 0, 1, 2 … units relative to one."""
    lost: dict[str, float] = {}
    """And the work (s) that a pause costs each, where that is known."""
    targets: dict[str, float] = {}
    """Units that each is to hold in all, its own and lent; none: they take turns by weight."""


class Verdict(msgspec.Struct):
    """A layout judged: the partitions of each service, the utilization of each partition and the
    rows per second that come to it, and for each service that would miss its objective why.
    ``busy`` is the share of time in which a partition executes: where answers take turns more than
    its utilization, for a turn is as long, or nearly, with few of them as with many. ``overload``
    says how badly objectives are missed, to compare infeasible layouts: the parts of their load
    (each 0..1) that those services could not answer in time."""

    layout: Layout
    services: dict[str, tuple[int, ...]]
    rho: list[float]
    busy: list[float]
    asked: list[float]
    misses: dict[str, str]
    overload: float = 0.0

    @property
    def busiest(self) -> float:
        """Utilization of the busiest partition."""
        return max(self.rho, default=0.0)


class Placing(msgspec.Struct, frozen=True):
    """``parts``, and why services are not where one might expect them. ``uneven``: whether they
    might be better among the devices that train."""

    parts: Parts
    reasons: tuple[str, ...] = ()
    uneven: bool = False
    nowhere: dict[str, str] = {}
    """Services that no device can carry, and why."""

    def homes(self) -> dict[str, frozenset[str]]:
        """The devices of each service."""
        return {name: frozenset(parts) for name, parts in self.parts.items()}
