"""Policies to compare, each with the settings a careful user of it would try.

Those that schedule run through the live node's dispatcher and differ in what the planner may do;
those that leave it to the device are in ``cotenant.sim.sharing``. Where there are several settings,
all are run and the best is shown: the one that attains most, to half a percent, and among those
the one that trains most.

The published systems are modelled by what distinguishes them, from their papers:

* ``reactive``: measured latency against two thresholds moves space, as autoscalers do.
* ``orion`` (Strati et al., EuroSys 2024): best-effort work runs beside inference where profiles
  say that both get along, in what inference leaves.
* ``tgs`` (Wu et al., NSDI 2023): best-effort work runs beside it at a rate that is raised until
  the protected work slows down.
* ``reef`` (Han et al., OSDI 2022): inference kills what best-effort work has under way and has
  the whole device at once; the killed kernels run again.
* ``quotas`` (BLESS, EuroSys 2025; LithOS, SOSP 2025): every tenant owns a share; what its owner
  leaves idle others use until it is wanted back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from cotenant.domain.device import DeviceSpec
from cotenant.domain.errors import ConfigError
from cotenant.domain.units import MS
from cotenant.domain.workload import share_on
from cotenant.policy.layouts import mig_fixed, service_profiles
from cotenant.policy.planner import Planner
from cotenant.policy.planstate import Tuning
from cotenant.sim.outcome import JobTally, Outcome, merge
from cotenant.sim.reactive import ReactivePlanner
from cotenant.sim.scenario import Scenario, one_box, split_pools
from cotenant.sim.sharing import SharedWorld, Unscheduled
from cotenant.sim.world import World

MOST_SPLITS = 32
"""Up to so many units every split is tried; beyond, about as many numbers of units."""
KILLED = 5 * MS
"""Work that a job loses when the kernels it has under way are killed: half of a queue of ten
kernels of 1 ms."""


class Scheduled(msgspec.Struct, frozen=True):
    """A run through the dispatcher. ``alone``: jobs are on another box. ``guaranteed`` (if not
    0) is divided among the jobs as their guaranteed share; ``lost`` ns of work are lost by a job
    whenever it is preempted. ``split``: memory for keys and values is in equal parts."""

    tuning: Tuning = Tuning()
    reactive: bool = False
    alone: bool = False
    guaranteed: float = 0.0
    lost: int = 0
    split: bool = False

    def planner(self) -> Planner:
        """The planner of this setting."""
        return ReactivePlanner(self.tuning) if self.reactive else Planner(self.tuning)

    def apply(self, scenario: Scenario) -> Scenario:
        """The scenario as this setting has it."""
        replace = msgspec.structs.replace
        if self.split:
            scenario = split_pools(scenario)
        if self.alone:
            return replace(scenario, jobs=())
        jobs = scenario.jobs
        if self.guaranteed:
            share = self.guaranteed / max(1, len(jobs))
            jobs = tuple(replace(j, spec=replace(j.spec, guaranteed=share)) for j in jobs)
        if self.lost:
            jobs = tuple(
                replace(j, cost=replace(j.cost, resume=j.cost.resume + self.lost)) for j in jobs
            )
        return replace(scenario, jobs=jobs)


Setting = Scheduled | Unscheduled


class Policy(msgspec.Struct, frozen=True):
    """``settings`` gives what to try on a scenario, by name; nothing where it is not modelled."""

    name: str
    what: str
    settings: Callable[[Scenario], dict[str, Setting]]


def simulate(scenario: Scenario, setting: Setting, seed: int, record: bool = False) -> Outcome:
    """One run of all boxes. ``record`` keeps who held what (of scheduled runs)."""
    boxes = range(scenario.boxes)
    return merge([simulate_box(scenario, setting, seed, box, record and not box) for box in boxes])


def simulate_box(
    scenario: Scenario, setting: Setting, seed: int, box: int, record: bool = False
) -> Outcome:
    """One run of one box."""
    here = one_box(scenario, box)
    if isinstance(setting, Unscheduled):
        return SharedWorld(here, setting, (seed, box)).run()
    world = World(setting.apply(here), setting.planner(), (seed, box), record)
    outcome = world.run()
    for job in scenario.jobs:
        outcome.jobs.setdefault(job.spec.id, JobTally())
    return outcome


def _only(setting: Setting) -> Callable[[Scenario], dict[str, Setting]]:
    return lambda _: {"": setting}


def _tuned(**changes: object) -> Callable[[Scenario], dict[str, Setting]]:
    return _only(Scheduled(Tuning(**changes)))  # type: ignore[arg-type]


def _driver(settings: dict[str, Setting]) -> Callable[[Scenario], dict[str, Setting]]:
    """What is left to the driver of the one device that trains. Who would spread services over
    several is not modelled, and no language model."""

    def found(scenario: Scenario) -> dict[str, Setting]:
        several = sum(d.spec.trains for d in scenario.devices) > 1
        return {} if several or any(s.generates for s in scenario.services) else settings

    return found


def _split(scenario: Scenario) -> dict[str, Setting]:
    return {"": Scheduled(split=True)} if any(d.spec.kv for d in scenario.devices) else {}


def _splits(device: DeviceSpec, whole: bool, lend: bool = True) -> dict[str, Tuning]:
    """Every split of a device between services and jobs; if ``whole``, those that give services
    all of it."""
    found: dict[str, Tuning] = {}
    if device.mig:
        for profiles in service_profiles(device.mig):
            if not whole or any(not x.free for x in mig_fixed(device, profiles)):
                found["+".join(profiles)] = Tuning(instances=profiles, lend=lend)
    elif device.trains:
        count = len(device.units)
        step = max(1, count // MOST_SPLITS)
        for units in [count] if whole else sorted({1, *range(step, count, step), count}):
            for size in _sizes(units, device):
                found[f"{units}/{size}"] = Tuning(split=(units, size), lend=lend)
    return found or {"": Tuning(lend=lend)}


def _sizes(units: int, device: DeviceSpec) -> list[int]:
    """Sizes that so many units can be divided into: all of them, or on large devices doublings."""
    sizes = [size for size in device.shapes if units % size == 0]
    if len(device.units) <= MOST_SPLITS:
        return sizes
    return [size for size in sizes if size == units or not size & (size - 1)]


def _static(scenario: Scenario) -> dict[str, Setting]:
    """Those splits that leave jobs what they are guaranteed."""
    device = scenario.device.spec
    owed = sum(share_on(j.spec.guaranteed, device.kind) for j in scenario.jobs) * device.compute
    splits = _splits(device, whole=False, lend=False)
    kept = {
        name: Scheduled(tuning)
        for name, tuning in splits.items()
        if device.compute - _given(tuning) >= owed - 1e-9
    }
    return dict(kept or {name: Scheduled(tuning) for name, tuning in splits.items()})


def _given(tuning: Tuning) -> int:
    """Compute that a fixed split gives to services."""
    if tuning.instances is not None:
        return _compute(tuning.instances)
    return tuning.split[0] if tuning.split is not None else 0


def _stated(scenario: Scenario) -> dict[str, Setting]:
    layout = scenario.device.layout
    if layout is None:
        raise ConfigError("states no layout; add one for the policy 'fixed'", "device.layout")
    if scenario.device.spec.mig:
        profiles = tuple(str(name) for name in layout)
        return {"+".join(profiles): Scheduled(Tuning(instances=profiles, lend=False))}
    units, size = (int(n) for n in layout)
    return {f"{units}/{size}": Scheduled(Tuning(split=(units, size), lend=False))}


def _exclusive(scenario: Scenario) -> dict[str, Setting]:
    splits = _splits(scenario.device.spec, whole=True, lend=False)
    return {name: Scheduled(tuning, alone=True) for name, tuning in splits.items()}


def _undivided(scenario: Scenario) -> dict[str, Tuning]:
    """No partitions between services and jobs: services have all of it, what is idle is lent."""
    device = scenario.device.spec
    if device.mig:
        whole = max(service_profiles(device.mig), key=lambda p: (len(p) == 1, _compute(p)))
        return {"+".join(whole): Tuning(instances=whole)}
    return _splits(device, whole=True)


def _compute(profiles: Sequence[str]) -> int:
    return sum(int(name.partition("g")[0]) for name in profiles)


def _temporal(scenario: Scenario) -> dict[str, Setting]:
    return {name: Scheduled(tuning) for name, tuning in _undivided(scenario).items()}


def _reef(scenario: Scenario) -> dict[str, Setting]:
    splits = _undivided(scenario)
    return {name: Scheduled(tuning, lost=KILLED) for name, tuning in splits.items()}


def _quotas(scenario: Scenario) -> dict[str, Setting]:
    return {
        f"{name} {share:.0%}".strip(): Scheduled(tuning, guaranteed=share)
        for name, tuning in _undivided(scenario).items()
        for share in (0.25, 0.5, 0.75)
    }


_SLICES: dict[str, Setting] = {f"{ms}ms": Unscheduled(quantum=ms * MS) for ms in (1, 2, 5, 20)}
_TOLERANCES: dict[str, Setting] = {
    f"{tolerance:.0%}": Unscheduled(tolerance=tolerance) for tolerance in (0.05, 0.2, 0.5, 1.0)
}


POLICIES: dict[str, Policy] = {
    p.name: p
    for p in (
        Policy("cotenant", "space and time together", _tuned()),
        Policy("static", "the best fixed split, found by search over the whole run", _static),
        Policy("fixed", "the split that the scenario states", _stated),
        Policy("exclusive", "the device serves and nothing else runs on it", _exclusive),
        Policy("spatial", "adaptive partitions, nothing is lent", _tuned(lend=False)),
        Policy("temporal", "no partitions: what services leave idle is lent", _temporal),
        Policy(
            "shared", "everything at once, without isolation (MPS)", _driver({"": Unscheduled()})
        ),
        Policy("sliced", "time slicing with equal slices", _driver(_SLICES)),
        Policy("reactive", "thresholds on measured latency", _only(Scheduled(reactive=True))),
        Policy("orion", "co-running by profile", _driver({"": Unscheduled(beside=True)})),
        Policy("tgs", "co-running at a controlled rate", _driver(_TOLERANCES)),
        Policy("reef", "preemption by killing and running again", _reef),
        Policy("quotas", "shares, and stolen idle time", _quotas),
        Policy(
            "no_hysteresis",
            "cotenant that changes at the first wish",
            _tuned(grow_after=0, shrink_after=0),
        ),
        Policy("no_memory", "cotenant that shrinks by the present rate alone", _tuned(memory=0)),
        Policy("no_trend", "cotenant without forecast of a rise", _tuned(trend=False)),
        Policy("no_moves", "cotenant whose services stay on their device", _tuned(move=False)),
        Policy("no_season", "cotenant that does not know what usually comes", _tuned(season=False)),
        Policy("no_learning", "cotenant that takes jobs to scale without end", _tuned(learn=False)),
        Policy("no_feedback", "cotenant that trusts its predictions", _tuned(feedback=False)),
        Policy("split_kv", "cotenant whose memory for keys and values is not lent", _split),
        Policy("no_variants", "cotenant that serves the most accurate alone", _tuned(vary=False)),
        Policy("no_npu", "cotenant that leaves serving devices idle", _tuned(offload=False)),
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
