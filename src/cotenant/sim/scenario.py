"""A scenario: device, services, jobs and arrivals, from one YAML file; strict, with units.

Impossible ones are refused with the place and what would be right: guarantees that sum to more
than the device, an objective that no share of the device can meet, a trace that is out of order.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import msgspec

from cotenant.domain import reading
from cotenant.domain.costs import COPYING, GATE_BOUND, SUBSET_SESSION, Copy, Eviction, drain
from cotenant.domain.device import DeviceSpec, PreemptLevel, even_sizes
from cotenant.domain.errors import ConfigError
from cotenant.domain.mig import table, tables
from cotenant.domain.profile import ModelProfile, read_profiles
from cotenant.domain.shares import promised
from cotenant.domain.snapshot import ServiceFacts
from cotenant.domain.units import MS, S, format_bytes
from cotenant.domain.workload import (
    ORIGINAL,
    BatchSpec,
    JobSpec,
    KvSpec,
    ServiceSpec,
    Slo,
    Variant,
    share_on,
)
from cotenant.policy.choosing import ladder
from cotenant.policy.layouts import MIB, mig_fixed
from cotenant.policy.placing import why_not
from cotenant.sim.arrivals import Arrivals, Bursts, Diurnal, Poisson, Steps, read_trace, share
from cotenant.sim.costs import DEVICES, DeviceCost, ExecCost, JobCost, Spread
from cotenant.sim.generates import Generates, read_generates
from cotenant.telemetry.monitor import DAY

MAX_UNITS = 1024
MAX_GANG = 10.0
SERVING = ("npu", "cpu", "sm")
"""Kinds of device that may be there to serve only."""


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
        facts = msgspec.structs.replace(_as_facts(self.spec), others=self.others)
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


def read_scenario(path: Path) -> Scenario:
    """The scenario of a file; traces are looked for beside it. Raises ConfigError."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read the scenario {path}: {why}") from None
    if not text.strip():
        raise ConfigError(f"the scenario {path} is empty")
    try:
        return parse_scenario(text, path.parent)
    except ConfigError as error:
        raise ConfigError(str(error), path.name) from None


def parse_scenario(text: str, folder: Path) -> Scenario:
    """As ``read_scenario``, from text; ``folder`` is where traces are."""
    root = reading.Section(reading.load(text), "")
    name = root.take("name", reading.name)
    story = root.take("story", reading.text, "")
    duration = root.take("duration", reading.duration)
    devices = _devices(root)
    services = tuple(_service(s, folder, devices) for s in root.sections("services"))
    jobs = tuple(_job(s) for s in root.sections("jobs"))
    devices = tuple(_with_move(d, jobs) for d in devices)
    boxes = root.take("boxes", reading.integer(1, 10_000), 1)
    bandwidth = root.take("shared_bandwidth", reading.share, 0.0)
    season = root.take("season", reading.duration, DAY)
    root.done()
    for kind, names in (
        ("devices", [d.spec.id for d in devices]),
        ("services", [s.spec.name for s in services]),
        ("jobs", [j.spec.id for j in jobs]),
    ):
        for twice in {n for n in names if names.count(n) > 1}:
            raise ConfigError(f"{twice!r} stands twice; names must differ", kind)
    if not services and not jobs:
        raise ConfigError("there is nothing to run; add services or jobs", "services")
    for kind in dict.fromkeys(d.spec.kind for d in devices if d.spec.trains):
        owed = promised([*(s.spec for s in services), *(j.spec for j in jobs)], kind)
        if owed > 1 + 1e-9:
            raise ConfigError(
                f"the guaranteed shares of {kind} sum to {owed:g}; at most 1 can be given",
                "services",
            )
    if jobs and not any(d.spec.trains for d in devices):
        raise ConfigError("no device can train; add one that does, or leave jobs out", "jobs")
    for index, service in enumerate(services):
        _check_feasible(service, devices, f"services[{index}]")
    found = Scenario(name, story, duration, devices, services, jobs, boxes, bandwidth, season)
    _check_pools(found)
    _check_memory(found)
    return found


def _check_memory(scenario: Scenario) -> None:
    """Memory of jobs is that of the one GPU that trains, and what they are guaranteed fits."""
    owed = 0
    for index, job in enumerate(scenario.jobs):
        spec, at = job.spec, f"jobs[{index}].memory"
        if not spec.memory:
            continue
        trains = [d.spec for d in scenario.devices if d.spec.trains]
        if len(trains) != 1 or not trains[0].evicts or not trains[0].memory:
            raise ConfigError(
                "is known of a job where one device trains, a cuda one with memory; leave it out",
                at,
            )
        owed += spec.memory if spec.memory_guaranteed is None else spec.memory_guaranteed
        have = trains[0].memory
        if spec.memory > have or owed > have:
            raise ConfigError(
                f"the device has {format_bytes(have)}: a job can have that at most, and be "
                f"guaranteed what others leave of it, not {format_bytes(max(owed, spec.memory))}",
                at,
            )


def _check_pools(scenario: Scenario) -> None:
    """Each language model's longest answer fits into its pool, and all guarantees into memory."""
    models = [(f"services[{i}]", s) for i, s in enumerate(scenario.services) if s.generates]
    promised_bytes = sum(s.spec.instances * s.spec.kv.guaranteed for _, s in models)
    for device in scenario.devices:
        budget = device.spec.kv or device.pools
        if budget and promised_bytes > budget:
            raise ConfigError(
                f"the services are guaranteed {format_bytes(promised_bytes)} for keys and values; "
                f"{device.spec.id} has {format_bytes(budget)}",
                "services",
            )
        for at, service in models:
            assert service.generates is not None
            need = service.generates.longest * service.generates.block
            have = pool_bytes(scenario, service, device)
            have = min(have, device.spec.kv) if device.spec.kv else have
            if need > have:
                raise ConfigError(
                    f"infeasible: the longest prompt and answer take {format_bytes(need)} of keys "
                    f"and values; on {device.spec.id} there are {format_bytes(have)}",
                    f"{at}.generates",
                )


def _with_move(device: SimDevice, jobs: tuple[SimJob, ...]) -> SimDevice:
    """The device with what moving a job costs there: the most that it costs any of these."""
    if not device.spec.pins_jobs:
        return device
    most = max((j.cost.move for j in jobs), default=0)
    return msgspec.structs.replace(device, spec=msgspec.structs.replace(device.spec, move_ns=most))


def _check_feasible(service: SimService, devices: tuple[SimDevice, ...], at: str) -> None:
    """Whether it fits anywhere, and requests that come one by one, on the best share allowed, make
    the objective: as many as it asks for, by the spread of their execution times."""
    facts = _as_facts(service.spec)
    able = [d.spec for d in devices if not why_not(facts, d.spec, d.spec.memory)]
    if not able:
        whys = "; ".join(why_not(facts, d.spec, d.spec.memory) for d in devices)
        raise ConfigError(f"infeasible: it can run on none of the devices: {whys}", at)
    if service.generates is not None:
        _check_pace(service, service.generates, [d for d in able if d.trains], at)
        return
    percentile = service.spec.slo.percentile
    best, where = min(
        (service.fastest(d) * service.costs[d.kind].quantile(units, 1, percentile / 100), d.id)
        for d in able
        for units in sizes(d)
        if not d.trains
        or units <= max(1, int(share_on(service.spec.limit, d.kind) * d.compute + 1e-9))
    )
    if best > service.spec.slo.latency:
        raise ConfigError(
            f"infeasible: {percentile:g} % of single requests take up to {best / MS:.3g} ms on the "
            f"best share of {where} it may have, the objective is "
            f"{service.spec.slo.latency / MS:g} ms; "
            f"the smallest change that would do is latency: {best / MS * 1.01:.3g}ms",
            f"{at}.objective",
        )


def _check_pace(service: SimService, generates: Generates, able: list[DeviceSpec], at: str) -> None:
    """Whether a language model that has one prompt of mean length makes the objective on the best
    share allowed."""
    slo, limit = service.spec.slo, service.spec.limit
    if not able:
        raise ConfigError("infeasible: a language model needs a device that trains", at)
    units = {
        d.id: max(
            [u for u in sizes(d) if u <= max(1, int(share_on(limit, d.kind) * d.compute + 1e-9))]
        )
        for d in able
    }
    for key, bound, took in (
        ("ttft", slo.latency, min(generates.first_token(u) for u in units.values())),
        ("tpot", slo.pace, min(generates.next_token(u) for u in units.values())),
    ):
        if 0 < bound < took:
            raise ConfigError(
                f"infeasible: alone, on the best share that it may have, it takes {took / MS:.3g} "
                f"ms, the objective is {bound / MS:g} ms; the smallest change that would do is "
                f"{key}: {took / MS * 1.01:.3g}ms",
                f"{at}.objective",
            )


def sizes(device: DeviceSpec) -> tuple[int, ...]:
    """Compute units that a partition of a device can have."""
    if device.mig:
        return tuple(sorted({p.compute for p in table(device.mig).profiles}))
    return device.shapes


def _as_facts(spec: ServiceSpec) -> ServiceFacts:
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


def _devices(root: reading.Section) -> tuple[SimDevice, ...]:
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
            operators=section.take("operators", _words, ()),
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
    names = _words(value)
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


def _words(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("expected a list of names")
    return tuple(reading.text(item) for item in value)


def _service(section: reading.Section, folder: Path, devices: tuple[SimDevice, ...]) -> SimService:
    name = section.take("name", reading.name)
    talks = section.section("generates")
    generates = read_generates(talks) if talks.names() else None
    profiles = _profiles(section, folder, devices) if generates is None else {}
    costs, variants = _variants(section, devices, generates is not None, profiles)
    loading = max((profile.load_ns for profile in profiles.values()), default=1 * S)
    slo = _slo(section.section("objective", required=True), generates is not None)
    batch = section.section("batch")
    batching = BatchSpec(
        max=batch.take("max", reading.integer(1, 4096), 8),
        max_queue_delay=batch.take("max_queue_delay", reading.duration_or_zero, 0),
    )
    batch.done()
    others = _others(section, tuple(costs), variants)
    service = SimService(
        others=others,
        spec=ServiceSpec(
            name=name,
            model=name,
            slo=slo,
            batch=batching,
            guaranteed=section.take("guaranteed", reading.shares, 0.0),
            limit=section.take("limit", reading.positive_shares, 1.0),
            max_queue=section.take("max_queue", reading.integer(1, 1_000_000), 1024),
            strict=section.take("strict", reading.boolean, False),
            instances=section.take("instances", reading.integer(1, 256), 1),
            accuracy_floor=section.take("accuracy_floor", reading.share, 0.0),
            kv=_kv(section) if generates is not None else KvSpec(),
            variants=variants,
        ),
        costs=costs,
        load=section.take("load", reading.duration_or_zero, loading),
        arrivals=_arrivals(section.section("arrivals", required=True), folder),
        generates=generates,
    )
    section.done()
    return service


def _slo(section: reading.Section, pieces: bool) -> Slo:
    """Of answers in pieces the time to the first token, and for each further one."""
    slo = Slo(
        latency=section.take("ttft" if pieces else "latency", reading.duration),
        percentile=section.take("percentile", reading.percentile, 99.0),
        pace=section.take("tpot", reading.duration, 0) if pieces else 0,
    )
    section.done()
    return slo


def _kv(section: reading.Section) -> KvSpec:
    kv = section.section("kv", required=True)
    found = KvSpec(kv.take("guaranteed", reading.size, 0), kv.take("limit", reading.size))
    if found.guaranteed > found.limit:
        raise ConfigError(
            f"{format_bytes(found.guaranteed)} are guaranteed, the limit is "
            f"{format_bytes(found.limit)}",
            kv.at("guaranteed"),
        )
    kv.done()
    return found


def _profiles(
    section: reading.Section, folder: Path, devices: tuple[SimDevice, ...]
) -> dict[str, ModelProfile]:
    """What ``cotenant profile`` measured, by kind of device, if that stands in place of ``cost``:
    of each that trains, and of those that only serve what there is."""
    name = section.take("profile", reading.text, "")
    if not name:
        return {}
    at, path = section.at("profile"), folder / name
    if section.section("cost").names():
        raise ConfigError("says what cost says too; leave one of them out", at)
    try:
        known = read_profiles(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", at) from None
    except ConfigError as error:
        raise ConfigError(f"{path} {error}", at) from None
    found = {_kind_here(profile): profile for profile in known}
    here = {d.spec.kind for d in devices}
    needed = {d.spec.kind for d in devices if d.spec.trains} or here
    if others := sorted(needed - found.keys()):
        raise ConfigError(
            f"was measured on devices of the kinds {', '.join(found)}; here are "
            f"{', '.join(others)}: measure there too (cotenant profile --device), or state the "
            "times under cost",
            at,
        )
    return {kind: profile for kind, profile in found.items() if kind in here}


def _kind_here(profile: ModelProfile) -> str:
    """The kind of device of a scenario on which a profile holds."""
    return "sm" if profile.subsets else profile.kind


def _variants(
    section: reading.Section,
    devices: tuple[SimDevice, ...],
    generates: bool,
    profiles: dict[str, ModelProfile],
) -> tuple[dict[str, ExecCost], dict[str, Variant]]:
    """Execution times and builds by kind of device. Those that train share ``cost``; one that
    only serves has a section of its own, named by its kind, without which, and without a profile,
    there is no build for it. A language model has no ``cost``: its turns have. ``profiles`` stand
    for ``cost`` and ``memory``, kind by kind."""
    costs = {kind: _measured(profile) for kind, profile in profiles.items()}
    able = [d.spec.kind for d in devices if d.spec.trains]
    if not profiles and not generates:
        costs = dict.fromkeys(able, _exec(section.section("cost", required=True)))
    stated = section.take("memory", reading.size, None)
    accuracy = section.take("accuracy", reading.share, 1.0)

    def memory(kind: str) -> int:
        there = [profiles[kind]] if kind in profiles else profiles.values()
        peak = max((profile.memory_peak for profile in there), default=0)
        return peak if stated is None else stated

    variants = {kind: Variant(memory(kind), accuracy) for kind in (*able, *profiles)}
    for kind in () if generates else SERVING:
        own = section.section(kind)
        if not own.names():
            continue
        cost = own.section("cost", required=kind not in profiles)
        if cost.names():
            costs[kind] = _exec(cost)
        variants[kind] = Variant(
            memory=own.take("memory", reading.size, memory(kind)),
            accuracy=own.take("accuracy", reading.share, accuracy),
            operators=own.take("operators", _words, ()),
        )
        own.done()
    return costs, variants


def _others(
    section: reading.Section, kinds: tuple[str, ...], originals: dict[str, Variant]
) -> dict[str, tuple[Variant, ...]]:
    """Further variants of a model, by kind of device: on each of its own, or on those named."""
    named = section.section("variants")
    found: dict[str, tuple[Variant, ...]] = {}
    for name in named.names():
        own = named.section(name)
        if name == ORIGINAL:
            raise ConfigError(f"{ORIGINAL} is what the service itself states", named.at(name))
        there = own.take("kinds", reading.names, kinds)
        for kind in there:
            if kind not in kinds:
                raise ConfigError(
                    f"the service has no times on {kind}; it has on {', '.join(kinds) or 'none'}",
                    own.at("kinds"),
                )
        relative = own.take("relative", reading.positive)
        accuracy = own.take("accuracy", reading.share)
        memory = own.take("memory", reading.size, 0)
        operators = own.take("operators", _words, ())
        own.done()
        for kind in there:
            size = memory or originals[kind].memory
            variant = Variant(size, accuracy, operators, name, relative)
            found[kind] = (*found.get(kind, ()), variant)
    named.done()
    return found


def _measured(profile: ModelProfile) -> ExecCost:
    """Medians by size, and the spread that is the median of all sizes'."""
    first = profile.table[0][2]
    cv = statistics.median(f.cv for f in profile.figures)
    return ExecCost(first=first, per_row=first, cv=cv, profile=profile.table)


def _exec(section: reading.Section) -> ExecCost:
    first = section.take("first", reading.duration)
    cost = ExecCost(
        first=first,
        per_row=section.take("per_row", reading.duration_or_zero, first),
        parallel=section.take("parallel", reading.share, 0.9),
        saturates=section.take("saturates", reading.integer(1, MAX_UNITS), 0),
        cv=section.take("cv", _not_negative, 0.05),
    )
    section.done()
    return cost


def _job(section: reading.Section) -> SimJob:
    name = section.take("name", reading.name)
    spec = JobSpec(
        id=name,
        name=name,
        command=(name,),
        weight=section.take("weight", reading.positive, 1.0),
        guaranteed=section.take("guaranteed", reading.shares, 0.0),
        limit=section.take("limit", reading.positive_shares, 1.0),
        memory=section.take("memory", reading.size, 0),
        memory_guaranteed=section.take("memory_guaranteed", reading.size, None),
    )
    if (spec.memory_guaranteed or 0) > spec.memory:
        raise ConfigError("must be at most memory", section.at("memory_guaranteed"))
    cost = section.section("cost", required=True)
    saturates = cost.take("saturates", reading.integer(1, MAX_UNITS), 0)
    gang = cost.take("gang", _gang, 1.0)
    if gang > 1.0 and not saturates:
        raise ConfigError("needs saturates: how many threads it has", cost.at("gang"))
    job = SimJob(
        spec,
        JobCost(
            rate=cost.take("rate", reading.positive),
            parallel=cost.take("parallel", reading.share, 0.9),
            saturates=saturates,
            gang=gang,
            resume=cost.take("resume", reading.duration_or_zero, 1 * MS),
            move=cost.take("move", reading.duration_or_zero, 10 * S),
        ),
    )
    cost.done()
    section.done()
    return job


def _arrivals(section: reading.Section, folder: Path) -> Arrivals:
    kind = section.take("kind", reading.one_of(("poisson", "bursts", "diurnal", "steps", "trace")))
    found: Arrivals
    if kind == "poisson":
        found = Poisson(section.take("rate", _not_negative))
    elif kind == "bursts":
        found = Bursts(
            rate=section.take("rate", _not_negative),
            burst_rate=section.take("burst_rate", reading.positive),
            mean_quiet=section.take("mean_quiet", _spell) / S,
            mean_burst=section.take("mean_burst", _spell) / S,
        )
    elif kind == "diurnal":
        found = Diurnal(
            rate=section.take("rate", reading.positive),
            swing=section.take("swing", reading.share),
            period=section.take("period", reading.duration) / S,
        )
    elif kind == "steps":
        found = Steps(section.take("rates", _steps))
    else:
        found = read_trace(
            folder / section.take("file", reading.text),
            section.take("column", reading.text, "TIMESTAMP"),
            section.take("rate", reading.positive, None),
            section.take("duplicates", reading.boolean, False),
        )
    section.done()
    return found


def _gang(value: object) -> float:
    found = reading.number(value)
    if not 1 <= found <= MAX_GANG:
        raise ValueError(f"must be between 1 and {MAX_GANG:g}, got {found:g}")
    return found


def _not_negative(value: object) -> float:
    found = reading.number(value)
    if found < 0:
        raise ValueError(f"must not be negative, got {found:g}")
    return found


def _spell(value: object) -> int:
    found = reading.duration(value)
    if found < MS:
        raise ValueError(f"must be at least 1ms, got {reading.shown(value)}")
    return found


def _steps(value: object) -> tuple[tuple[float, float], ...]:
    if not isinstance(value, dict) or not value:
        raise ValueError("expected times and rates, such as {0s: 50, 60s: 150}")
    found = [(reading.duration_or_zero(k) / S, _not_negative(v)) for k, v in value.items()]
    if found != sorted(found) or found[0][0] != 0:
        raise ValueError("the times must ascend and start at 0s")
    if all(rate == 0 for _, rate in found):
        raise ValueError("at least one rate must be above 0")
    return tuple(found)
