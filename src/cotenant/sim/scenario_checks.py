"""What no run of a scenario could hold is refused, with the place and what would be right; every
check raises ConfigError."""

from __future__ import annotations

from cotenant.domain.device import DeviceSpec
from cotenant.domain.errors import ConfigError
from cotenant.domain.units import MS, format_bytes
from cotenant.domain.workload import (
    share_on,
)
from cotenant.policy.placing import why_not
from cotenant.sim.generates import Generates
from cotenant.sim.scenario import Scenario, SimDevice, SimService, as_facts, pool_bytes, sizes


def check_memory(scenario: Scenario) -> None:
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


def check_pools(scenario: Scenario) -> None:
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


def check_feasible(service: SimService, devices: tuple[SimDevice, ...], at: str) -> None:
    """Whether it fits anywhere, and requests that come one by one, on the best share allowed, make
    the objective: as many as it asks for, by the spread of their execution times."""
    facts = as_facts(service.spec)
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
