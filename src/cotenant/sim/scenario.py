"""A scenario: devices, services, jobs and arrivals, as a run has them."""

from __future__ import annotations

import msgspec

from cotenant.domain.device import DeviceSpec
from cotenant.domain.mig import table
from cotenant.domain.snapshot import ServiceFacts
from cotenant.domain.workload import (
    JobSpec,
    ServiceSpec,
    Variant,
)
from cotenant.policy.choosing import ladder
from cotenant.sim.arrivals import Arrivals, share
from cotenant.sim.costs import DeviceCost, ExecCost, JobCost
from cotenant.sim.generates import Generates
from cotenant.telemetry.monitor import DAY


class SimDevice(msgspec.Struct, frozen=True):
    """A device and what it charges. ``layout`` is the split that its owner has now, if stated:
    (units, size) or MIG profiles. ``pools``: bytes that pools of keys and values share in equal
    parts, none of which is lent."""

    spec: DeviceSpec
    cost: DeviceCost
    layout: tuple[int, int] | tuple[str, ...] | None = None
    pools: int = 0


class SimService(msgspec.Struct, frozen=True):
    """A service, its execution times by kind of device, how long loading it takes (ns), and its
    arrivals. ``generates``: of a language model, which has no such times. ``others``: variants that
    may take the place of the original, by kind of device."""

    spec: ServiceSpec
    costs: dict[str, ExecCost]
    load: int
    arrivals: Arrivals
    generates: Generates | None = None
    others: dict[str, tuple[Variant, ...]] = {}

    def variant(self, kind: str, name: str) -> Variant:
        """One by its name, as it is on a kind of device."""
        there = {v.name: v for v in self.others.get(kind, ())}
        return there.get(name) or self.spec.variants.get(kind, Variant())

    def fastest(self, device: DeviceSpec) -> float:
        """How long an execution takes there, relative to the original, in the fastest variant that
        may serve."""
        facts = msgspec.structs.replace(as_facts(self.spec), others=self.others)
        return ladder(facts, device.kind, (device,))[-1].relative


class SimJob(msgspec.Struct, frozen=True):
    """A job and its progress."""

    spec: JobSpec
    cost: JobCost


class Scenario(msgspec.Struct, frozen=True):
    """All that a run needs but policy and seed. ``duration`` in ns. ``boxes`` of these devices
    share the arrivals. ``shared_bandwidth``: how much all devices of a box slow each other down,
    because they use one memory (0..1, as ``DeviceCost.contention``). ``season``: the period (ns)
    that demand is taken to have."""

    name: str
    story: str
    duration: int
    devices: tuple[SimDevice, ...]
    services: tuple[SimService, ...]
    jobs: tuple[SimJob, ...]
    boxes: int = 1
    shared_bandwidth: float = 0.0
    season: int = DAY

    @property
    def device(self) -> SimDevice:
        """The first device that trains, or the first."""
        return next((d for d in self.devices if d.spec.trains), self.devices[0])

    @property
    def compute(self) -> int:
        """Compute units of a box."""
        return sum(d.spec.compute for d in self.devices)


def pool_bytes(scenario: Scenario, service: SimService, device: SimDevice) -> int:
    """Bytes that the pool of an instance of a language model may have on a device at most."""
    if not device.pools:
        return service.spec.kv.limit
    pools = sum(s.spec.instances for s in scenario.services if s.generates is not None)
    return min(service.spec.kv.limit, device.pools // pools)


def split_pools(scenario: Scenario) -> Scenario:
    """The same memory for keys and values, in equal parts of which none is lent."""
    replace = msgspec.structs.replace
    devices = tuple(
        replace(d, spec=replace(d.spec, kv=0), pools=d.spec.kv) if d.spec.kv else d
        for d in scenario.devices
    )
    return replace(scenario, devices=devices)


def one_box(scenario: Scenario, box: int) -> Scenario:
    """The scenario of one of the boxes: an even share of the arrivals."""
    if scenario.boxes == 1:
        return scenario
    services = tuple(
        msgspec.structs.replace(s, arrivals=share(s.arrivals, box, scenario.boxes))
        for s in scenario.services
    )
    return msgspec.structs.replace(scenario, services=services, boxes=1)


def sizes(device: DeviceSpec) -> tuple[int, ...]:
    """Compute units that a partition of a device can have."""
    if device.mig:
        return tuple(sorted({p.compute for p in table(device.mig).profiles}))
    return device.shapes


def as_facts(spec: ServiceSpec) -> ServiceFacts:
    """What the planner knows of a service before it ran."""
    return ServiceFacts(
        name=spec.name,
        objective=spec.slo.latency,
        percentile=spec.slo.percentile,
        guaranteed=spec.guaranteed,
        limit=spec.limit,
        max_batch=spec.batch.max,
        rate=0.0,
        rate_trend=0.0,
        p95=0,
        refused=0,
        answered=0,
        exec_ns={},
        accuracy_floor=spec.accuracy_floor,
        variants=spec.variants,
    )
