"""Candidate layouts of a core-set device, and how well services would do on each.

A layout is ``cores`` for services, cut into partitions of ``size`` cores; the other cores are
single-core partitions for jobs. Larger partitions make one execution faster, more partitions
run more of them at once: which of the two a service needs follows from its measured times.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from weft.domain.device import DeviceSpec, Partition
from weft.domain.snapshot import ServiceFacts, Snapshot
from weft.policy.queueing import wait_quantile

RHO_MAX = 0.85
"""Highest planned utilization of a service partition."""
HEADROOM = 0.9
"""Share of the objective that the predicted percentile may use."""


class Layout(NamedTuple):
    """``cores`` cores for services in partitions of ``size``."""

    cores: int
    size: int


class Verdict(msgspec.Struct):
    """A layout judged: the partitions of each service, the utilization of each partition, and
    for each service that would miss its objective why, and by how much in all (each 0..1)."""

    layout: Layout
    services: dict[str, tuple[int, ...]]
    rho: list[float]
    misses: dict[str, str]
    shortfall: float = 0.0

    @property
    def overload(self) -> float:
        """How badly it falls short, to compare infeasible layouts."""
        return sum(max(0.0, r - RHO_MAX) for r in self.rho) + self.shortfall


def partition_cores(device: DeviceSpec, layout: Layout) -> list[tuple[int, ...]]:
    """Cores of the service partitions of a layout, lowest cores first."""
    cores = device.units[: layout.cores]
    return [tuple(cores[i : i + layout.size]) for i in range(0, layout.cores, layout.size)]


def make_partition(device: DeviceSpec, units: tuple[int, ...]) -> Partition:
    """The partition of these units; its id says which they are."""
    first, last = units[0], units[-1]
    span = f"{first}" if first == last else f"{first}-{last}"
    if units != tuple(range(first, last + 1)):
        span = "+".join(map(str, units))
    return Partition(f"{device.id}:{span}", device.id, units)


def candidates(device: DeviceSpec, cores: int) -> list[Layout]:
    """Layouts that give ``cores`` cores to services."""
    shapes = [s for s in device.shapes if s <= cores and cores % s == 0]
    return [Layout(cores, size) for size in sorted(shapes)]


def judge(snapshot: Snapshot, layout: Layout, horizon_s: float) -> Verdict:
    """Spread services over the partitions (largest load first, least loaded partition first)
    and predict each one's percentile at the load expected ``horizon_s`` seconds ahead."""
    count = layout.cores // layout.size
    rho = [0.0] * count
    guests = [0] * count
    slowest = [0.0] * count
    placed: dict[str, tuple[int, ...]] = {}
    loads = {s.name: load(s, layout.size, horizon_s) for s in snapshot.services}
    for service in sorted(snapshot.services, key=lambda s: (-loads[s.name], s.name)):
        wanted = max(1, math.ceil(loads[service.name] / RHO_MAX - 1e-9))
        most = max(1, int(service.limit * len(snapshot.device.units) / layout.size + 1e-9))
        wanted = min(wanted, count, service.instances, most)
        # Where loads are equal (nothing measured yet), services keep out of each other's way.
        chosen = sorted(range(count), key=lambda i: (rho[i], guests[i], i))[:wanted]
        for index in chosen:
            guests[index] += 1
            rho[index] += loads[service.name] / wanted
            slowest[index] = max(slowest[index], float(exec_ns(service, layout.size, 1)))
        placed[service.name] = tuple(sorted(chosen))
    _fill(snapshot, layout, placed, rho, loads)
    verdict = Verdict(layout, placed, rho, {})
    for service in snapshot.services:
        where = placed[service.name]
        busiest, other = max(rho[i] for i in where), max(slowest[i] for i in where)
        own = exec_ns(service, layout.size, 1)
        expected = own + wait_quantile(max(own, other), busiest, service.percentile)
        if expected > HEADROOM * service.objective or busiest > RHO_MAX:
            verdict.misses[service.name] = _why(service, expected, busiest)
            verdict.shortfall += max(0.0, 1.0 - HEADROOM * service.objective / expected)
    return verdict


def _fill(
    snapshot: Snapshot,
    layout: Layout,
    placed: dict[str, tuple[int, ...]],
    rho: list[float],
    loads: dict[str, float],
) -> None:
    """Partitions that no load calls for go to services that have instances to use them."""
    units = len(snapshot.device.units)
    for index in range(len(rho)):
        if any(index in chosen for chosen in placed.values()):
            continue
        able = [
            s
            for s in snapshot.services
            if len(placed[s.name]) < min(s.instances, max(1, int(s.limit * units / layout.size)))
        ]
        if not able:
            return
        busiest = max(able, key=lambda s: (loads[s.name] / len(placed[s.name]), s.name))
        had = placed[busiest.name]
        for old in had:
            rho[old] -= loads[busiest.name] / len(had)
        placed[busiest.name] = tuple(sorted((*had, index)))
        for new in placed[busiest.name]:
            rho[new] += loads[busiest.name] / len(placed[busiest.name])


def utilization(snapshot: Snapshot, size: int, horizon_s: float) -> float:
    """Of the busiest partition, with services where the present plan has them."""
    rho: dict[str, float] = {}
    for service in snapshot.services:
        where = snapshot.plan.services.get(service.name, ())
        for partition in where:
            share = load(service, size, horizon_s) / len(where)
            rho[partition] = rho.get(partition, 0.0) + share
    return max(rho.values(), default=0.0)


def load(service: ServiceFacts, size: int, horizon_s: float) -> float:
    """Partitions of ``size`` cores that the service would keep busy: rate x time per row at
    the batch size that its load calls for."""
    rate = max(0.0, service.rate + max(0.0, service.rate_trend) * horizon_s)
    single = rate * exec_ns(service, size, 1) / 1e9
    if single < 0.5:
        return single
    return rate * exec_ns(service, size, service.max_batch) / service.max_batch / 1e9


def exec_ns(service: ServiceFacts, size: int, rows: int) -> int:
    """Measured time of ``rows`` rows on ``size`` cores, else the nearest guess; 0 if none."""
    exact = service.exec_time(size, rows)
    if exact is not None:
        return exact
    single = service.exec_time(size, 1) or service.exec_time(1, rows) or service.exec_time(1, 1)
    return single or 0


def _why(service: ServiceFacts, expected: float, busiest: float) -> str:
    shown = "over saturation" if math.isinf(expected) else f"{expected / 1e6:.1f} ms"
    return (
        f"predicted p{service.percentile:g} {shown} against {service.objective / 1e6:g} ms "
        f"at utilization {busiest:.2f}"
    )
