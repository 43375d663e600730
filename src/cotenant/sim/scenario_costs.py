"""How long executions of a scenario's services take: as its file says, or as a profile measured, of
the original and of its variants."""

from __future__ import annotations

import statistics
from pathlib import Path

from cotenant.domain import reading
from cotenant.domain.errors import ConfigError
from cotenant.domain.profile import ModelProfile, read_profiles
from cotenant.domain.workload import (
    ORIGINAL,
    Variant,
)
from cotenant.sim.costs import ExecCost
from cotenant.sim.scenario import SimDevice
from cotenant.sim.scenario_devices import MAX_UNITS, SERVING


def profiles_of(
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


def variants_of(
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
            operators=own.take("operators", reading.texts, ()),
        )
        own.done()
    return costs, variants


def others_of(
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
        operators = own.take("operators", reading.texts, ())
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
        cv=section.take("cv", reading.not_negative, 0.05),
    )
    section.done()
    return cost
