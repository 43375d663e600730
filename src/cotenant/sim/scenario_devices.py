"""The devices of a scenario's file: what they have, and what they charge."""

from __future__ import annotations

import msgspec

from cotenant.domain import reading
from cotenant.domain.costs import COPYING, GATE_BOUND, SUBSET_SESSION, Copy, Eviction, drain
from cotenant.domain.device import DeviceSpec, PreemptLevel, even_sizes
from cotenant.domain.errors import ConfigError
from cotenant.domain.mig import table, tables
from cotenant.domain.units import S
from cotenant.policy.layouts import MIB, mig_fixed
from cotenant.sim.costs import DEVICES, DeviceCost, Spread
from cotenant.sim.scenario import SimDevice

MAX_UNITS = 1024
SERVING = ("npu", "cpu", "sm")
"""Kinds of device that may be there to serve only."""


def read_devices(root: reading.Section) -> tuple[SimDevice, ...]:
    several = root.sections("devices")
    one = root.section("device")
    if bool(several) == bool(one.names()):
        said = "both are given" if several else "is required"
        raise ConfigError(f"{said}; give device for one, devices for several", "device")
    return tuple(_device(section) for section in several or [one])


def _device(section: reading.Section) -> SimDevice:
    kind = section.take("kind", reading.one_of(sorted(DEVICES)))
    cost = DEVICES[kind]
    contention = section.take("contention", reading.share, cost.contention)
    cost = msgspec.structs.replace(cost, contention=contention)
    name = section.take("name", reading.name, kind)
    preempt = section.take("preempt", reading.one_of([p.name.lower() for p in PreemptLevel]), None)
    if kind == "mig":
        gpu = table(section.take("gpu", reading.one_of(sorted(tables()))))
        spec = _spec(name, kind, cost, range(gpu.memory_slices), PreemptLevel.GATE)
        spec = msgspec.structs.replace(
            spec,
            shapes=(),
            slices=gpu.compute_slices,
            mig=gpu.gpu,
            pins_jobs=True,
            pins_workers=section.take("binds_models", reading.boolean, False),
            memory=max(p.memory_mib or 0 for p in gpu.profiles) * MIB,
        )
    elif kind == "npu":
        spec = msgspec.structs.replace(
            _spec(name, kind, cost, range(1), PreemptLevel.NONE),
            trains=False,
            memory=section.take("memory", reading.size, 0),
            operators=section.take("operators", reading.texts, ()),
        )
    elif kind == "cuda":
        bound = section.take("bound", reading.duration, GATE_BOUND)
        cost = msgspec.structs.replace(cost, revoke=Spread(drain(bound).mean, cost.revoke.cv))
        spec = _spec(name, kind, cost, range(1), PreemptLevel.GATE)
        spec = msgspec.structs.replace(
            spec,
            revoke_ns=drain(bound).most,
            memory=section.take("memory", reading.size, 0),
            evicts=True,
            eviction=_eviction(section.take("bandwidth", reading.size, 0)),
        )
    else:
        units = section.take("units", reading.integer(1, MAX_UNITS))
        trains = section.take("trains", reading.boolean, True)
        shapes = tuple(range(1, units + 1)) if trains else (units,)
        if kind == "sm" and not trains:  # as a GPU in subsets on a node
            shapes = even_sizes(units)
            cost = msgspec.structs.replace(cost, repartition=Spread(SUBSET_SESSION, 0.2))
        spec = _spec(name, kind, cost, range(units), PreemptLevel.PRIORITY)
        memory = section.take("memory", reading.size, 0)
        spec = msgspec.structs.replace(spec, trains=trains, shapes=shapes, memory=memory)
    if preempt:
        spec = msgspec.structs.replace(spec, preempt=PreemptLevel[preempt.upper()])
    budget, split = _pools(section)
    spec = msgspec.structs.replace(spec, kv=0 if split else budget)
    layout = section.take("layout", lambda value: _layout(value, spec), None)
    section.done()
    return SimDevice(spec, cost, layout, budget if split else 0)


def _eviction(bandwidth: int) -> Eviction:
    """``bandwidth``: bytes a second between the GPU and its host; 0: as is assumed."""
    if not bandwidth:
        return COPYING
    out, back = (Copy(copy.each, S / bandwidth) for copy in (COPYING.out, COPYING.back))
    return Eviction(out, back, COPYING.away)


def _pools(section: reading.Section) -> tuple[int, bool]:
    """Bytes for keys and values, and whether each pool has its equal part of them for good."""
    value = section.raw("kv", None)
    if value is None:
        return 0, False
    kv = reading.Section(value if isinstance(value, dict) else {"budget": value}, section.at("kv"))
    budget = kv.take("budget", reading.size)
    if not budget:
        raise ConfigError("must be more than nothing; leave kv out", kv.at("budget"))
    split = kv.take("split", reading.one_of(("elastic", "fixed")), "elastic")
    kv.done()
    return budget, split == "fixed"


def _spec(
    name: str, kind: str, cost: DeviceCost, units: range, preempt: PreemptLevel
) -> DeviceSpec:
    return DeviceSpec(
        id=name,
        kind=kind,
        units=tuple(units),
        memory=0,
        shapes=tuple(range(1, len(units) + 1)),
        preempt=preempt,
        revoke_ns=cost.revoke.mean,
        repartition_ns=cost.repartition.mean + cost.make.mean + cost.unmake.mean,
    )


def _layout(value: object, spec: DeviceSpec) -> tuple[int, int] | tuple[str, ...]:
    """A split that the device can form; raises ValueError naming what it cannot."""
    if not spec.trains:
        raise ValueError(f"{spec.id} is one partition; leave layout out")
    if not spec.mig:
        found = reading.integers(value)
        units, size = found if len(found) == 2 else (0, 1)
        if not 0 < units <= len(spec.units) or size not in spec.shapes or units % size:
            raise ValueError(
                f"expected [units for services, size of a partition] of {len(spec.units)} units, "
                f"got {reading.shown(value)}"
            )
        return units, size
    names = reading.texts(value)
    gpu = table(spec.mig)
    known = sorted(p.name for p in gpu.profiles)
    for name in names:
        if name not in known:
            raise ValueError(f"{spec.mig} has no profile {name!r}; it has {', '.join(known)}")
    if not mig_fixed(spec, names):
        raise ValueError(
            f"{spec.mig} cannot form {', '.join(names)} together: no placement of them is free of"
            " overlap"
        )
    return names
