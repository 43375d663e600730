"""A scenario: device, services, jobs and arrivals, from one YAML file; strict, with units.

Impossible ones are refused with the place and what would be right: guarantees that sum to more
than the device, an objective that no share of the device can meet, a trace that is out of order.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from weft.domain import reading
from weft.domain.device import DeviceSpec, PreemptLevel
from weft.domain.errors import ConfigError
from weft.domain.units import MS, S
from weft.domain.workload import BatchSpec, JobSpec, ServiceSpec, Slo
from weft.sim.arrivals import Arrivals, Bursts, Diurnal, Poisson, Steps, read_trace
from weft.sim.costs import DEVICES, DeviceCost, ExecCost, JobCost

MAX_UNITS = 1024


class SimDevice(msgspec.Struct, frozen=True):
    """A device and what it charges."""

    spec: DeviceSpec
    cost: DeviceCost


class SimService(msgspec.Struct, frozen=True):
    """A service, its execution times and its arrivals."""

    spec: ServiceSpec
    cost: ExecCost
    arrivals: Arrivals


class SimJob(msgspec.Struct, frozen=True):
    """A job and its progress."""

    spec: JobSpec
    cost: JobCost


class Scenario(msgspec.Struct, frozen=True):
    """All that a run needs but policy and seed. ``duration`` in ns."""

    name: str
    story: str
    duration: int
    device: SimDevice
    services: tuple[SimService, ...]
    jobs: tuple[SimJob, ...]


def read_scenario(path: Path) -> Scenario:
    """The scenario of a file; traces are looked for beside it. Raises ConfigError."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read the scenario {path}: {why}") from None
    return parse_scenario(text, path.parent)


def parse_scenario(text: str, folder: Path) -> Scenario:
    """As ``read_scenario``, from text; ``folder`` is where traces are."""
    root = reading.Section(reading.load(text), "")
    name = root.take("name", reading.name)
    story = root.take("story", reading.text, "")
    duration = root.take("duration", reading.duration)
    device = _device(root.section("device", required=True))
    services = tuple(_service(s, folder) for s in root.sections("services"))
    jobs = tuple(_job(s) for s in root.sections("jobs"))
    root.done()
    for kind, names in (
        ("services", [s.spec.name for s in services]),
        ("jobs", [j.spec.id for j in jobs]),
    ):
        for twice in {n for n in names if names.count(n) > 1}:
            raise ConfigError(f"{twice!r} stands twice; names must differ", kind)
    if not services and not jobs:
        raise ConfigError("there is nothing to run; add services or jobs", "services")
    owed = sum(s.spec.guaranteed for s in services) + sum(j.spec.guaranteed for j in jobs)
    if owed > 1 + 1e-9:
        raise ConfigError(
            f"the guaranteed shares of services and jobs sum to {owed:g}; at most 1 can be given",
            "services",
        )
    scenario = Scenario(name, story, duration, device, services, jobs)
    for index, service in enumerate(services):
        _check_feasible(service, device.spec, f"services[{index}].objective")
    return scenario


def _check_feasible(service: SimService, device: DeviceSpec, at: str) -> None:
    """Whether one request alone, on the best share allowed, makes the objective."""
    most = max(1, int(service.spec.limit * len(device.units) + 1e-9))
    best = min(service.cost.mean(units, 1) for units in device.shapes if units <= most)
    if best > service.spec.slo.latency:
        raise ConfigError(
            f"infeasible: a single request takes {best / MS:.3g} ms on the best share of "
            f"{device.kind} it may have, the objective is {service.spec.slo.latency / MS:g} ms; "
            f"the smallest change that would do is latency: {best / MS * 1.01:.3g}ms",
            at,
        )


def _device(section: reading.Section) -> SimDevice:
    kind = section.take("kind", reading.one_of(sorted(DEVICES)))
    count = section.take("units", reading.integer(1, MAX_UNITS))
    preempt = section.take("preempt", reading.one_of([p.name.lower() for p in PreemptLevel]), None)
    cost = DEVICES[kind]
    contention = section.take("contention", reading.share, cost.contention)
    section.done()
    cost = msgspec.structs.replace(cost, contention=contention)
    spec = DeviceSpec(
        id=kind,
        kind=kind,
        units=tuple(range(count)),
        memory=0,
        shapes=tuple(range(1, count + 1)),
        preempt=PreemptLevel[preempt.upper()] if preempt else PreemptLevel.PRIORITY,
        resizes_live=True,
        revoke_ns=cost.revoke.mean,
        repartition_ns=cost.repartition.mean,
    )
    return SimDevice(spec, cost)


def _service(section: reading.Section, folder: Path) -> SimService:
    name = section.take("name", reading.name)
    objective = section.section("objective", required=True)
    slo = Slo(
        latency=objective.take("latency", reading.duration),
        percentile=objective.take("percentile", reading.percentile, 99.0),
    )
    objective.done()
    batch = section.section("batch")
    batching = BatchSpec(
        max=batch.take("max", reading.integer(1, 4096), 8),
        max_queue_delay=batch.take("max_queue_delay", reading.duration_or_zero, 0),
    )
    batch.done()
    service = SimService(
        spec=ServiceSpec(
            name=name,
            model=name,
            slo=slo,
            batch=batching,
            guaranteed=section.take("guaranteed", reading.share, 0.0),
            limit=section.take("limit", reading.positive_share, 1.0),
            max_queue=section.take("max_queue", reading.integer(1, 1_000_000), 1024),
            strict=section.take("strict", reading.boolean, False),
            instances=section.take("instances", reading.integer(1, 256), 1),
        ),
        cost=_exec(section.section("cost", required=True)),
        arrivals=_arrivals(section.section("arrivals", required=True), folder),
    )
    section.done()
    return service


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
        guaranteed=section.take("guaranteed", reading.share, 0.0),
        limit=section.take("limit", reading.positive_share, 1.0),
    )
    cost = section.section("cost", required=True)
    job = SimJob(
        spec,
        JobCost(
            rate=cost.take("rate", reading.positive),
            parallel=cost.take("parallel", reading.share, 0.9),
            saturates=cost.take("saturates", reading.integer(1, MAX_UNITS), 0),
            resume=cost.take("resume", reading.duration_or_zero, 1 * MS),
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
            mean_quiet=section.take("mean_quiet", reading.duration) / S,
            mean_burst=section.take("mean_burst", reading.duration) / S,
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


def _not_negative(value: object) -> float:
    found = reading.number(value)
    if found < 0:
        raise ValueError(f"must not be negative, got {found:g}")
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
