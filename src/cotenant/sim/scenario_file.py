"""Reads a scenario from one YAML file; strict, with units. What is impossible is refused with the
place and what would be right: a trace that is out of order, guarantees that sum to more than the
device, an objective that no share of the device can meet.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from cotenant.domain import reading
from cotenant.domain.errors import ConfigError
from cotenant.domain.shares import promised
from cotenant.domain.units import MS, S, format_bytes
from cotenant.domain.workload import (
    BatchSpec,
    JobSpec,
    KvSpec,
    ServiceSpec,
    Slo,
)
from cotenant.sim.arrivals import Arrivals, Bursts, Diurnal, Poisson, Steps, read_trace
from cotenant.sim.costs import JobCost
from cotenant.sim.generates import read_generates
from cotenant.sim.scenario import Scenario, SimDevice, SimJob, SimService
from cotenant.sim.scenario_checks import check_feasible, check_memory, check_pools
from cotenant.sim.scenario_costs import others_of, profiles_of, variants_of
from cotenant.sim.scenario_devices import MAX_UNITS, read_devices
from cotenant.telemetry.monitor import DAY

MAX_GANG = 10.0


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
    devices = read_devices(root)
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
        check_feasible(service, devices, f"services[{index}]")
    found = Scenario(name, story, duration, devices, services, jobs, boxes, bandwidth, season)
    check_pools(found)
    check_memory(found)
    return found


def _with_move(device: SimDevice, jobs: tuple[SimJob, ...]) -> SimDevice:
    """The device with what moving a job costs there: the most that it costs any of these."""
    if not device.spec.pins_jobs:
        return device
    most = max((j.cost.move for j in jobs), default=0)
    return msgspec.structs.replace(device, spec=msgspec.structs.replace(device.spec, move_ns=most))


def _service(section: reading.Section, folder: Path, devices: tuple[SimDevice, ...]) -> SimService:
    name = section.take("name", reading.name)
    talks = section.section("generates")
    generates = read_generates(talks) if talks.names() else None
    profiles = profiles_of(section, folder, devices) if generates is None else {}
    costs, variants = variants_of(section, devices, generates is not None, profiles)
    loading = max((profile.load_ns for profile in profiles.values()), default=1 * S)
    slo = _slo(section.section("objective", required=True), generates is not None)
    batch = section.section("batch")
    batching = BatchSpec(
        max=batch.take("max", reading.integer(1, 4096), 8),
        max_queue_delay=batch.take("max_queue_delay", reading.duration_or_zero, 0),
    )
    batch.done()
    others = others_of(section, tuple(costs), variants)
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
        found = Poisson(section.take("rate", reading.not_negative))
    elif kind == "bursts":
        found = Bursts(
            rate=section.take("rate", reading.not_negative),
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


def _spell(value: object) -> int:
    found = reading.duration(value)
    if found < MS:
        raise ValueError(f"must be at least 1ms, got {reading.shown(value)}")
    return found


def _steps(value: object) -> tuple[tuple[float, float], ...]:
    if not isinstance(value, dict) or not value:
        raise ValueError("expected times and rates, such as {0s: 50, 60s: 150}")
    found = [(reading.duration_or_zero(k) / S, reading.not_negative(v)) for k, v in value.items()]
    if found != sorted(found) or found[0][0] != 0:
        raise ValueError("the times must ascend and start at 0s")
    if all(rate == 0 for _, rate in found):
        raise ValueError("at least one rate must be above 0")
    return tuple(found)
