"""Policies to compare, each with the settings a careful user of it would try.

Those that schedule run through the live node's dispatcher and planner and differ in what the
planner may do; those that leave it to the device are in ``weft.sim.sharing``. Where there are
several settings, all are run and the best is shown: the one that attains most, to half a
percent, and among those the one that trains most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from weft.domain.device import DeviceSpec
from weft.domain.errors import ConfigError
from weft.domain.units import MS
from weft.policy.planner import Tuning
from weft.sim.outcome import JobTally, Outcome
from weft.sim.scenario import Scenario
from weft.sim.sharing import SharedWorld, Unscheduled
from weft.sim.world import World


class Exclusive(msgspec.Struct, frozen=True):
    """The services alone under ``tuning``: jobs are on another box."""

    tuning: Tuning


Setting = Tuning | Exclusive | Unscheduled


class Policy(msgspec.Struct, frozen=True):
    """``settings`` gives what to try on a device, by name."""

    name: str
    what: str
    settings: Callable[[DeviceSpec], dict[str, Setting]]


def simulate(scenario: Scenario, setting: Setting, seed: int, record: bool = False) -> Outcome:
    """One run. ``record`` keeps who held what (of scheduled runs)."""
    if isinstance(setting, Unscheduled):
        return SharedWorld(scenario, setting, seed).run()
    if isinstance(setting, Exclusive):
        alone = msgspec.structs.replace(scenario, jobs=())
        outcome = World(alone, setting.tuning, seed, record).run()
        outcome.jobs = {job.spec.id: JobTally() for job in scenario.jobs}
        return outcome
    return World(scenario, setting, seed, record).run()


def _only(setting: Setting) -> Callable[[DeviceSpec], dict[str, Setting]]:
    return lambda _: {"": setting}


def _slices(_: DeviceSpec) -> dict[str, Setting]:
    return {f"{ms}ms": Unscheduled(quantum=ms * MS) for ms in (1, 2, 5, 20)}


def _splits(device: DeviceSpec, lend: bool, least: int) -> dict[str, Tuning]:
    """Every split into equal partitions that gives services ``least`` units or more."""
    return {
        f"{cores}/{size}": Tuning(split=(cores, size), lend=lend)
        for cores in range(least, len(device.units) + 1)
        for size in device.shapes
        if cores % size == 0
    }


def _static(device: DeviceSpec) -> dict[str, Setting]:
    return {**_splits(device, lend=False, least=1)}


def _exclusive(device: DeviceSpec) -> dict[str, Setting]:
    whole = _splits(device, lend=False, least=len(device.units))
    return {name: Exclusive(tuning) for name, tuning in whole.items()}


def _temporal(device: DeviceSpec) -> dict[str, Setting]:
    return {**_splits(device, lend=True, least=len(device.units))}


POLICIES: dict[str, Policy] = {
    p.name: p
    for p in (
        Policy("weft", "space and time together", _only(Tuning())),
        Policy(
            "static",
            "the best fixed split, found by search over the whole run",
            _static,
        ),
        Policy(
            "exclusive",
            "the device serves and nothing else runs on it",
            _exclusive,
        ),
        Policy("spatial", "adaptive partitions, nothing is lent", _only(Tuning(lend=False))),
        Policy(
            "temporal",
            "no partitions: services have all of it and what is idle is lent",
            _temporal,
        ),
        Policy("shared", "everything at once, without isolation (MPS)", _only(Unscheduled())),
        Policy("sliced", "time slicing with equal slices", _slices),
        Policy("no_linger", "weft that lends at once", _only(Tuning(linger_max=0))),
        Policy(
            "no_hysteresis",
            "weft that changes its layout at the first wish",
            _only(Tuning(grow_after=0, shrink_after=0)),
        ),
        Policy("no_memory", "weft that shrinks by the present rate alone", _only(Tuning(memory=0))),
    )
}


def choose(names: Sequence[str]) -> list[Policy]:
    """Policies by name; raises ConfigError, with the names there are, for another."""
    for name in names:
        if name not in POLICIES:
            raise ConfigError(f"no policy {name!r}; there are {', '.join(POLICIES)}", "--policies")
    return [POLICIES[name] for name in names]


def better(one: dict[str, float], other: dict[str, float]) -> bool:
    """Whether figures ``one`` are those of the better setting (see the module's docstring)."""
    gain = one["attainment"] - other["attainment"]
    if abs(gain) > 0.005:
        return gain > 0
    return one["job_rate"] > other["job_rate"]
