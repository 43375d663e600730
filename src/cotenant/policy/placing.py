"""Which devices carry which service: first those that only serve (an NPU), for what fits there,
so that what trains is free for training; the others share the rest (``cotenant.policy.assigning``).

A service whose load is more than is left of a serving device is carried by both at once: the
dispatcher fills the serving device first, and what does not fit goes to the other. Only the
planner's estimate of who carries how much depends on the fractions here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from cotenant.domain.device import DeviceSpec
from cotenant.domain.snapshot import ServiceFacts
from cotenant.domain.units import format_bytes
from cotenant.policy import assigning
from cotenant.policy.assigning import LEAST_PART
from cotenant.policy.judging import memory_of
from cotenant.policy.prospects import RHO_MAX, exec_ns, load
from cotenant.policy.queueing import HEADROOM, highest_load
from cotenant.policy.views import Parts, Placing


def why_not(service: ServiceFacts, device: DeviceSpec, memory_left: int) -> str:
    """What keeps a service off a device, in words; empty if it can run there."""
    if service.kinds and device.kind not in service.kinds:
        return f"may run on {' or '.join(service.kinds)}, not on {device.kind}"
    if device.id in service.unfit:
        return f"{device.id} could not load it: {service.unfit[device.id]}"
    need = _need(service, device)
    left = device.memory if service.unloads else memory_left
    if device.memory and need > left:
        many = f" ({service.instances} instances)" if service.instances > 1 else ""
        free = format_bytes(max(0, left))
        return f"needs {format_bytes(need)}{many}, {device.id} has {free}"
    if not service.variants:
        return ""
    variant = service.variants.get(device.kind)
    if variant is None:
        return f"has no build for {device.kind}"
    missing = [op for op in variant.operators if device.operators and op not in device.operators]
    if missing:
        return f"{device.id} does not support {', '.join(missing)}"
    if variant.accuracy < service.accuracy_floor:
        return (
            f"accuracy {variant.accuracy:g} on {device.id} is below its floor"
            f" {service.accuracy_floor:g}"
        )
    return ""


def _need(service: ServiceFacts, device: DeviceSpec) -> int:
    """Bytes that all its instances need there."""
    return service.instances * memory_of(service, device)


def _keeps(service: ServiceFacts, device: DeviceSpec) -> int:
    """Bytes that others can never have: what may be unloaded while it idles leaves all."""
    return 0 if service.unloads else _need(service, device)


def place(
    services: Sequence[ServiceFacts],
    devices: Sequence[DeviceSpec],
    before: Parts,
    horizon_s: float,
    usual: Mapping[str, float] | None = None,
    improve: bool = True,
) -> Placing:
    """Parts of all services; one that can run nowhere has none. Deterministic.

    ``usual``: the rates by which devices that train share services, if not those of the moment.
    ``improve``: whether services that have a place may move between them.
    """
    placer = _Placer(services, devices, before, horizon_s, usual or {})
    serving = [d for d in devices if not d.trains]
    for index, device in enumerate(serving):
        placer.offload(device, serving[index + 1 :])
    uneven = placer.spread(before, improve)
    return Placing(placer.parts, tuple(placer.reasons), uneven, placer.nowhere)


class _Placer:
    """The state of one call of ``place``; ``left`` is the part of each service without a place."""

    def __init__(
        self,
        services: Sequence[ServiceFacts],
        devices: Sequence[DeviceSpec],
        before: Parts,
        horizon_s: float,
        usual: Mapping[str, float],
    ) -> None:
        self.parts: Parts = {s.name: {} for s in services}
        self.reasons: list[str] = []
        self.nowhere: dict[str, str] = {}
        self._left = {s.name: 1.0 for s in services}
        self._services = services
        self._before = before
        self._sharing = [d for d in devices if d.trains]
        self._horizon_s = horizon_s
        self._usual = usual

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
            memory -= _keeps(service, device)
            used += wanted * part

    def spread(self, before: Parts, improve: bool) -> bool:
        """Share what is left among the other devices; returns whether that is uneven."""
        fleet = self._fleet()
        mine = {
            name: {device: part for device, part in before.get(name, {}).items() if device in able}
            for name, able in fleet.demands.items()
        }
        shares = assigning.settle(fleet, mine)
        uneven = assigning.uneven(fleet, shares)
        if uneven and improve:
            shares = assigning.improve(fleet, shares)
        for name, homes in mine.items():
            shares[name] = shares[name] or homes  # rather too full than nowhere
        for name, parts in shares.items():
            if not parts and not self.parts[name]:
                self.nowhere[name] = self._why_nowhere(name)
                self.reasons.append(f"{name} can run nowhere: {self.nowhere[name]}")
            if len(parts) > 1:
                told = ", ".join(f"{part:.0%} on {device}" for device, part in parts.items())
                self.reasons.append(f"{name} is carried by several devices: {told}")
            for device, part in parts.items():
                self.parts[name][device] = self._left[name] * part
        return uneven

    def _fleet(self) -> assigning.Fleet:
        """The devices that train, and what is left for them."""
        demands: dict[str, dict[str, float]] = {}
        needs: dict[str, dict[str, int]] = {}
        for service in self._services:
            name = service.name
            if self._left[name] > 0.0:
                able = self._able(service)
                rate = self._usual.get(name)
                calm = service
                if rate is not None:
                    calm = msgspec.structs.replace(service, rate=rate, rate_trend=0.0)
                demands[name] = {d.id: self._demand(calm, d) * self._left[name] for d in able}
                needs[name] = {d.id: _keeps(service, d) for d in able}
        return assigning.Fleet(demands, needs, {d.id: d.memory for d in self._sharing})

    def _why_nowhere(self, name: str) -> str:
        service = next(s for s in self._services if s.name == name)
        whys = {why_not(service, d, d.memory) for d in self._sharing}
        whys = {why or "others fill the memory that it needs" for why in whys}
        return "; ".join(sorted(whys))

    def _able(self, service: ServiceFacts) -> list[DeviceSpec]:
        """The devices that train and could carry a service. Where it is it has its memory,
        however much others have come to occupy since."""
        homes = self._before.get(service.name, {})
        return [
            d
            for d in self._sharing
            if not why_not(service, d, _need(service, d) if d.id in homes else d.memory)
        ]

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
