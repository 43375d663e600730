"""Which devices carry which service: first those that only serve (an NPU), for what fits there,
so that what trains is free for training; the others share the rest by load.

A service whose load is more than is left of a serving device is carried by both at once: the
dispatcher fills the serving device first, and what does not fit goes to the other. Only the
planner's estimate of who carries how much depends on the fractions here.
"""

from __future__ import annotations

from collections.abc import Sequence

from weft.domain.device import DeviceSpec
from weft.domain.snapshot import ServiceFacts
from weft.domain.units import format_bytes
from weft.policy.judging import HEADROOM, RHO_MAX, exec_ns, load, memory_of
from weft.policy.queueing import highest_load
from weft.policy.views import Parts, Placing

LEAST_PART = 0.1
"""A device is not used for less than this part of a service."""
STICK = 0.2
"""A service stays on its device while others are not emptier by this much utilization."""


def why_not(service: ServiceFacts, device: DeviceSpec, memory_left: int) -> str:
    """What keeps a service off a device, in words; empty if it can run there."""
    if not service.variants:
        return ""
    variant = service.variants.get(device.kind)
    if variant is None:
        return f"has no build for {device.kind}"
    missing = [op for op in variant.operators if device.operators and op not in device.operators]
    if missing:
        return f"{device.id} does not support {', '.join(missing)}"
    if device.memory and variant.memory > memory_left:
        return f"needs {format_bytes(variant.memory)}, {device.id} has {format_bytes(memory_left)}"
    if variant.accuracy < service.accuracy_floor:
        return (
            f"accuracy {variant.accuracy:g} on {device.id} is below its floor"
            f" {service.accuracy_floor:g}"
        )
    return ""


def place(
    services: Sequence[ServiceFacts],
    devices: Sequence[DeviceSpec],
    before: Parts,
    horizon_s: float,
) -> Placing:
    """Parts of all services; one that can run nowhere has none. Deterministic."""
    placer = _Placer(services, devices, horizon_s)
    serving = [d for d in devices if not d.trains]
    for index, device in enumerate(serving):
        placer.offload(device, serving[index + 1 :])
    placer.spread(before)
    return Placing(placer.parts, tuple(placer.reasons))


class _Placer:
    """The state of one call of ``place``; ``left`` is the part of each service without a place."""

    def __init__(
        self, services: Sequence[ServiceFacts], devices: Sequence[DeviceSpec], horizon_s: float
    ) -> None:
        self.parts: Parts = {s.name: {} for s in services}
        self.reasons: list[str] = []
        self._left = {s.name: 1.0 for s in services}
        self._services = services
        self._sharing = [d for d in devices if d.trains]
        self._horizon_s = horizon_s

    def offload(self, device: DeviceSpec, later: Sequence[DeviceSpec]) -> None:
        """Fill a serving device with the services that relieve the others most for their time
        on it. ``later``: serving devices that are filled after it."""
        memory, used, most = device.memory, 0.0, RHO_MAX
        loads = {
            s.name: load(device.kind, s, device.compute, self._horizon_s) for s in self._services
        }
        for service in sorted(
            self._services, key=lambda s: (-self._relief(s, loads[s.name]), s.name)
        ):
            name = service.name
            if self._left[name] <= 0.0:
                continue
            why = why_not(service, device, memory) or _too_slow(service, device)
            if why:
                self.reasons.append(f"{name} is not on {device.id}: {why}")
                continue
            wanted = loads[name] * self._left[name]
            limit = min(most, _bearable(service, device))
            room = max(0.0, limit - used)
            elsewhere = self._able(service) or any(not why_not(service, d, d.memory) for d in later)
            part = room / wanted if elsewhere and wanted > room else 1.0
            if part < LEAST_PART:
                self.reasons.append(f"{name} is not on {device.id}: it is full")
                continue
            most = limit
            if part < 1.0:
                self.reasons.append(f"{name}: {device.id} can carry {part:.0%} of it")
            self.parts[name][device.id] = self._left[name] * part
            self._left[name] *= 1.0 - part
            memory -= memory_of(service, device)
            used += wanted * part

    def spread(self, before: Parts) -> None:
        """Share what is left among the other devices, largest load first."""
        used = {d.id: 0.0 for d in self._sharing}
        demands = {
            s.name: {d.id: self._demand(s, d) * self._left[s.name] for d in self._sharing}
            for s in self._services
        }
        for service in sorted(
            self._services, key=lambda s: (-max(demands[s.name].values(), default=0.0), s.name)
        ):
            name = service.name
            if self._left[name] <= 0.0:
                continue
            able = self._able(service)
            if not able:
                if not self.parts[name]:
                    whys = sorted({why_not(service, d, d.memory) for d in self._sharing})
                    self.reasons.append(f"{name} can run nowhere: {'; '.join(whys)}")
                continue
            best = min(able, key=lambda d: (used[d.id] + demands[name][d.id], d.id))
            stay = next((d for d in able if d.id in before.get(name, {})), best)
            if used[stay.id] <= used[best.id] + STICK:
                best = stay
            used[best.id] += demands[name][best.id]
            self.parts[name][best.id] = self._left[name]

    def _able(self, service: ServiceFacts) -> list[DeviceSpec]:
        return [d for d in self._sharing if not why_not(service, d, d.memory)]

    def _relief(self, service: ServiceFacts, here: float) -> float:
        elsewhere = max((self._demand(service, d) for d in self._sharing), default=0.0)
        return (elsewhere + 1e-9) / (here + 1e-9)

    def _demand(self, service: ServiceFacts, device: DeviceSpec) -> float:
        """Part of a shared device that the service would keep busy, in partitions of one unit."""
        return load(device.kind, service, 1, self._horizon_s) / device.compute


def _bearable(service: ServiceFacts, device: DeviceSpec) -> float:
    """How busy a serving device may be for this service to make its objective there."""
    own = exec_ns(device.kind, service, device.compute, 1)
    budget = HEADROOM * service.objective - own
    return highest_load(own, budget, service.percentile, RHO_MAX)


def _too_slow(service: ServiceFacts, device: DeviceSpec) -> str:
    own = exec_ns(device.kind, service, device.compute, 1)
    if own <= HEADROOM * service.objective:
        return ""
    return (
        f"one request takes {own / 1e6:.1f} ms there,"
        f" the objective is {service.objective / 1e6:g} ms"
    )
