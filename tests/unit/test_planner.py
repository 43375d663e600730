"""Laws of the planner: the fewest cores that hold the objectives, changed late and for a reason."""

from __future__ import annotations

import random
import time
from itertools import pairwise
from typing import Any

import msgspec
import pytest

from cotenant.domain.device import DeviceSpec
from cotenant.domain.plan import EMPTY_PLAN, Plan
from cotenant.domain.snapshot import JobFacts, ServiceFacts, Snapshot
from cotenant.domain.units import MS, S
from cotenant.policy.estimate import ExecTable
from cotenant.policy.judging import judge
from cotenant.policy.layouts import unit_layout
from cotenant.policy.planner import Planner
from cotenant.policy.planstate import Tuning
from cotenant.policy.prospects import load
from cotenant.policy.views import View
from tests.builders import cpu

TIMES = {f"{units}x{rows}": 20 * MS * (3 + rows) // 4 for units in (1, 2) for rows in (1, 2, 4, 8)}
SLOW = {"cpu": TIMES}
"""20 ms a request on a core, cheaper in batches, no faster on two cores."""


def service(name: str = "s", rate: float = 0.0, **changes: Any) -> ServiceFacts:
    facts: dict[str, Any] = {
        "name": name, "objective": 100 * MS, "percentile": 99.0, "guaranteed": 0.0, "limit": 1.0,
        "max_batch": 8, "rate": rate, "rate_trend": 0.0, "p95": 0,
        "refused": 0, "answered": 0, "exec_ns": SLOW, "instances": 64,
    }  # fmt: skip
    return ServiceFacts(**facts | changes)


def job(name: str = "j", **changes: Any) -> JobFacts:
    facts: dict[str, Any] = {"weight": 1.0, "guaranteed": 0.0, "limit": 1.0, "rate": 0.0}
    return JobFacts(id=name, held_ns=0, **facts | changes)


class Planning:
    """A planner, its device and the time."""

    def __init__(self, cores: int = 8, **tuning: Any) -> None:
        self.planner = Planner(Tuning(**tuning))
        self.devices: tuple[DeviceSpec, ...] = (cpu(cores),)
        self.now = 100 * S
        self.present: Plan = EMPTY_PLAN

    def snapshot(self, *facts: ServiceFacts | JobFacts) -> Snapshot:
        services = tuple(f for f in facts if isinstance(f, ServiceFacts))
        jobs = tuple(f for f in facts if isinstance(f, JobFacts))
        return Snapshot(self.now, self.devices, self.present, services, jobs)

    def see(self, *facts: ServiceFacts | JobFacts, after: int = S) -> Plan | None:
        """Plan from these facts; every plan is feasible."""
        self.now += after
        plan = self.planner.plan(self.snapshot(*facts))
        if plan is not None:
            feasible(plan, *self.devices)
            self.present = plan
        return plan

    @property
    def service_cores(self) -> int:
        """Cores of the partitions that services may use."""
        mine = {p for ps in self.present.services.values() for p in ps} | set(self.present.lendable)
        return sum(p.compute for p in self.present.partitions if p.id in mine)


def feasible(plan: Plan, *devices: DeviceSpec) -> None:
    """No two partitions overlap, all exist, shapes are the device's, names are known."""
    for on in devices:
        mine = [p for p in plan.partitions if p.device == on.id]
        units = [u for p in mine for u in p.units]
        assert len(units) == len(set(units))
        assert set(units) == set(on.units), "a core is idle by plan"
        assert {p.compute for p in mine} <= set(on.shapes)
    known = {p.id for p in plan.partitions}
    assert len(known) == len(plan.partitions)
    for where in (*plan.services.values(), *plan.jobs.values(), plan.lendable):
        assert set(where) <= known
    assert all(plan.services.values()), "a service has no partition"
    assert plan.reasons, "a plan without a reason"


# --- how much -------------------------------------------------------------------------------


@pytest.mark.parametrize("cores", [1, 2, 4, 64])
def test_a_first_plan_uses_the_whole_device(cores: int) -> None:
    world = Planning(cores)
    plan = world.see(service(), job())
    assert plan is not None
    assert world.service_cores == cores


@pytest.mark.parametrize(("tuning", "instances", "cores"), [({}, 3, 3), ({"lend": False}, 3, 1)])
def test_services_start_with_what_their_instances_can_use_if_it_can_be_lent(
    tuning: dict[str, Any], instances: int, cores: int
) -> None:
    world = Planning(8, **tuning)
    world.see(service(instances=instances), job())
    assert world.service_cores == cores


def test_without_services_all_is_the_jobs() -> None:
    world = Planning(4)
    plan = world.see(job("a"), job("b"))
    assert plan is not None
    assert {j: len(ps) for j, ps in plan.jobs.items()} == {"a": 2, "b": 2}
    assert plan.lendable == ()


def test_an_idle_device_has_a_plan_too() -> None:
    plan = Planning(2).see()
    assert plan is not None
    assert plan.services == {}


def settled(rate: float, cores: int = 8, **tuning: Any) -> Planning:
    """A world that saw this rate long enough, and (if nothing else is said) cannot borrow what
    services do not need."""
    world = Planning(cores, **{"lend": False} | tuning)
    for _ in range(200):
        world.see(service(rate=rate), job())
    return world


@pytest.mark.parametrize("rate", [1.0, 100.0, 250.0])
def test_services_get_the_fewest_cores_that_hold_their_objectives(rate: float) -> None:
    world = settled(rate)
    view = View(world.now, world.devices[0], world.present, (service(rate=rate),), (job(),))
    layout = world.planner.state.devices["cpu"].layout
    assert layout is not None
    assert not judge(view, layout, 10.0).misses
    if layout.compute > 1:
        fewer = judge(view, unit_layout(world.devices[0], layout.compute - 1, 1), 10.0)
        assert fewer.misses or fewer.busiest > 0.6


def test_an_objective_that_no_layout_holds_gets_all_that_helps() -> None:
    assert settled(1500.0).service_cores == 8


def test_services_keep_what_can_be_lent() -> None:
    assert settled(500.0, lend=True).service_cores > settled(500.0, lend=False).service_cores


def test_more_load_takes_more_cores() -> None:
    sizes = [settled(rate).service_cores for rate in (1.0, 100.0, 250.0, 500.0)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert sizes[-1] > 4


def test_a_guaranteed_share_is_never_planned_away() -> None:
    world = Planning(8)
    for _ in range(60):
        world.see(service(guaranteed=0.5), job())
        assert world.service_cores >= 4


def test_a_service_gets_no_more_than_its_limit() -> None:
    world = Planning(8)
    for _ in range(60):
        world.see(service(rate=1000.0, limit=0.25), job())
    assert len(world.present.services["s"]) <= 2


def test_an_objective_that_cannot_be_held_is_said() -> None:
    world = Planning(1)
    plan = world.see(service(rate=1000.0))
    assert plan is not None
    held = Planning(1).see(service(rate=1.0))
    assert held is not None
    assert len(plan.reasons) > len(held.reasons)


def test_a_layout_is_not_left_for_what_a_warm_up_alone_has_measured() -> None:
    table = ExecTable()
    for units, rows, ns in ((1, 1, 2 * MS), (1, 8, 5 * MS), (2, 1, 2 * MS), (2, 8, 3 * MS)):
        table.profile(units, rows, ns)
    for _ in range(1000):
        table.observe(1, 8, 7 * MS)
    tiny = {"objective": 5 * S, "instances": 2, "guaranteed": 1.0}
    as_warm = {"1x1": 2 * MS, "1x8": 7 * MS, "2x1": 2 * MS, "2x8": 3 * MS}
    as_expected = {f"{u}x{n}": ns for u, ts in table.expected().items() for n, ns in ts.items()}
    assert _layouts(as_warm, **tiny) == {(1, 1), (2,)}
    assert _layouts(as_expected, **tiny) == {(1, 1)}


def _layouts(exec_ns: dict[str, int], **facts: Any) -> set[tuple[int, ...]]:
    """Which layouts two cores get from a light load on, through one beyond what they can do."""
    world, found = Planning(2), set()
    for second in range(30):
        rate = min(100.0 * second, 2000.0)
        world.see(service(rate=rate, exec_ns={"cpu": exec_ns}, **facts))
        found.add(tuple(sorted(p.compute for p in world.present.partitions)))
    return found


def view(cores: int, *services: ServiceFacts) -> View:
    return View(100 * S, cpu(cores), EMPTY_PLAN, services, (job(),))


def times(one_ns: int, on_two: float = 1.0) -> dict[str, dict[str, int]]:
    """Of executions that gain by a second core, and nothing by batching."""
    return {
        "cpu": {
            f"{units}x{rows}": int(rows * one_ns * (on_two if units == 2 else 1.0))
            for units in (1, 2)
            for rows in (1, 8)
        }
    }


def test_of_layouts_that_overload_the_one_that_loses_least_is_better() -> None:
    """A core for each spares the small service, at the cost of most of the large one's load."""
    large = service("large", rate=150.0, objective=20 * MS, exec_ns=times(14 * MS, 0.55))
    small = service("small", rate=5.0, objective=50 * MS, exec_ns=times(7 * MS))
    large, small = (msgspec.structs.replace(s, instances=1) for s in (large, small))
    here = view(2, large, small)
    together, apart = (judge(here, unit_layout(here.device, 2, size), 0.0) for size in (2, 1))
    assert together.misses and apart.misses
    assert together.overload < 0.8 * apart.overload


def test_what_is_lost_grows_with_the_load_and_is_all_where_executions_take_too_long() -> None:
    found = []
    for rate in (10.0, 40.0, 80.0, 160.0, 640.0):
        here = view(1, service(rate=rate, objective=40 * MS, exec_ns=times(20 * MS)))
        found.append(judge(here, unit_layout(here.device, 1, 1), 0.0).overload)
    assert found == sorted(found)
    assert found[0] < 0.2 and 0.9 < found[-1] < 1.0
    tight = []
    for objective in (30, 22, 21, 20, 10):
        here = view(1, service(rate=0.1, objective=objective * MS, exec_ns=times(20 * MS)))
        tight.append(judge(here, unit_layout(here.device, 1, 1), 0.0).overload)
    assert tight[0] < 0.01 < tight[1] < tight[2] < tight[3] == 1.0 < tight[4]


def test_a_service_has_as_many_partitions_as_it_needs_beside_another() -> None:
    busy = service("busy", rate=400.0, exec_ns=times(20 * MS))
    other = service("other", rate=20.0, exec_ns=times(20 * MS))
    here = view(8, busy, other)
    verdict = judge(here, unit_layout(here.device, 8, 1), 0.0)
    assert len(verdict.services["busy"]) == len(verdict.services["other"]) == 8
    assert max(verdict.rho) - min(verdict.rho) < 0.01


def test_services_of_no_load_keep_out_of_each_others_way() -> None:
    world = Planning(2, split=(2, 1))
    plan = world.see(service("a"), service("b"))
    assert plan is not None
    assert set(plan.services["a"]).isdisjoint(plan.services["b"])


# --- when -----------------------------------------------------------------------------------


def test_a_higher_rate_never_seems_less_load_nor_more_space_more() -> None:
    times = {"cpu": {f"{u}x{n}": 30 * MS * (4 + n) // 5 // u for u in (1, 2, 4) for n in (1, 8)}}
    loads = [
        [load("cpu", service(rate=float(rate), exec_ns=times), size, 0.0) for size in (4, 2, 1)]
        for rate in range(1, 400)
    ]
    for of_sizes in loads:
        assert of_sizes == sorted(of_sizes)
    for of_rates in zip(*loads, strict=True):
        assert list(of_rates) == sorted(of_rates)


def test_growth_waits_until_the_trend_has_held_and_takes_one_step() -> None:
    world = settled(1.0)
    began = world.now
    changes = [
        (world.now, world.service_cores)
        for _ in range(20)
        if world.see(service(rate=500.0), job(), after=S // 2)
    ]
    assert changes[0][0] >= began + 2 * S
    sizes = [1, *(cores for _, cores in changes)]
    assert all(later - before <= 1 for before, later in pairwise(sizes))
    times = [at for at, _ in changes]
    assert all(later - before >= 2 * S for before, later in pairwise(times))


def time_to_change(world: Planning, rate: float) -> int:
    began, before = world.now, world.service_cores
    while world.service_cores == before:
        world.see(service(rate=rate), job())
        assert world.now - began < 100 * S
    return world.now - began


def test_shrinking_is_slower_than_growing() -> None:
    world = settled(1.0)
    grew = time_to_change(world, 250.0)
    shrank = time_to_change(settled(500.0, memory=10 * S), 1.0)
    assert shrank > 2 * grew


def test_a_rise_that_does_not_last_changes_nothing() -> None:
    world = settled(1.0)
    for _ in range(10):
        assert world.see(service(rate=500.0), job()) is None
        assert world.see(service(rate=1.0), job()) is None


def test_cores_stay_while_the_recent_peak_would_need_them() -> None:
    world = settled(500.0)
    before = world.service_cores
    for _ in range(10):
        world.see(service(rate=1.0), job())
        world.see(service(rate=1.0), job())
        world.see(service(rate=500.0), job())
    assert world.service_cores == before
    for _ in range(2000):
        world.see(service(rate=1.0), job())
    assert world.service_cores == 1


@pytest.mark.parametrize("rate", [60.0, 130.0, 200.0, 300.0])
def test_a_noisy_rate_does_not_make_the_layout_flap(rate: float) -> None:
    world, noise = settled(rate), random.Random(1)
    changes = sum(
        world.see(service(rate=rate * noise.uniform(0.8, 1.2)), job()) is not None
        for _ in range(300)
    )
    assert changes <= 4


def test_nothing_new_is_no_new_plan() -> None:
    world = settled(100.0)
    assert world.see(service(rate=100.0), job()) is None


def named(facts: ServiceFacts | JobFacts) -> str:
    return facts.name if isinstance(facts, ServiceFacts) else facts.id


@pytest.mark.parametrize("new", [service("tess"), job("kim")], ids=["service", "job"])
def test_who_comes_or_goes_is_placed_at_once(new: ServiceFacts | JobFacts) -> None:
    world = settled(1.0)
    plan = world.see(service(rate=1.0), job(), new, after=0)
    assert plan is not None
    assert any(named(new) in reason for reason in plan.reasons)
    gone = world.see(service(rate=1.0), job(), after=0)
    assert gone is not None
    assert any(named(new) in reason for reason in gone.reasons)


def test_the_first_service_gets_its_core_at_once() -> None:
    world = Planning(4)
    world.see(job())
    assert world.service_cores == 0
    world.see(job(), service(instances=1), after=0)
    assert world.service_cores == 1


def test_a_fixed_split_never_changes() -> None:
    world = Planning(4, split=(2, 2))
    world.see(service(rate=1.0), job())
    for _ in range(60):
        assert world.see(service(rate=5000.0), job()) is None
    assert world.service_cores == 2
    assert [p.compute for p in world.present.partitions] == [2, 1, 1]


def test_a_change_names_the_service_that_asks_for_it() -> None:
    world = Planning(8, lend=False)
    for _ in range(60):
        world.see(service("calm", rate=1.0), service("tess", rate=1.0), job())
    began = world.present.version
    while world.present.version == began:
        world.see(service("calm", rate=1.0), service("tess", rate=900.0), job())
    assert any("tess" in reason for reason in world.present.reasons)


def test_versions_go_up() -> None:
    world = Planning(4)
    first = world.see(service())
    second = world.see(service(), job())
    assert first is not None
    assert second is not None
    assert second.version == first.version + 1


def test_without_lending_nothing_is_lendable() -> None:
    world = Planning(2, lend=False)
    plan = world.see(service(), job())
    assert plan is not None
    assert plan.lendable == ()


# --- large boxes ----------------------------------------------------------------------------


def test_a_hundred_services_are_placed() -> None:
    world = Planning(64)
    many = [service(f"s{i:03}", rate=5.0, guaranteed=0.005) for i in range(100)]
    plan = world.see(*many)
    assert plan is not None
    assert len(plan.services) == 100
    assert world.service_cores >= 32


def test_planning_a_large_box_takes_no_longer_per_partition_than_a_small_one() -> None:
    def spent(cores: int) -> float:
        world = Planning(cores)
        began = time.perf_counter()
        for _ in range(5):
            world.see(*(service(f"s{i}", rate=20.0) for i in range(cores)))
        return time.perf_counter() - began

    small, large = min(spent(4) for _ in range(3)), spent(64)
    assert large / small < 16**3


def test_jobs_share_what_is_left_and_more_jobs_than_cores_rotate() -> None:
    world = Planning(2)
    plan = world.see(service(), job("a"), job("b"), job("c"))
    assert plan is not None
    assert plan.jobs == {}, "free partitions are open to all jobs"


def test_the_same_snapshots_give_the_same_plans() -> None:
    def plans() -> list[Plan | None]:
        world, noise = Planning(8), random.Random(3)
        return [
            world.see(
                service("a", rate=noise.uniform(0, 300)), service("b", rate=50.0), job("x"), job()
            )
            for _ in range(100)
        ]

    assert plans() == plans()


def test_a_plan_that_was_refused_is_made_again() -> None:
    world = Planning(2)
    assert world.see(service(), job()) is not None
    world.present = EMPTY_PLAN
    assert world.see(service(), job()) is not None


@pytest.mark.parametrize("probed", ["a", "b"])
def test_trying_out_keeps_guarantees_and_limits(probed: str) -> None:
    world = Planning(8)
    world.see(job("a", weight=1.0, guaranteed=0.5), job("b", weight=0.01, limit=0.25))
    world.planner.state.trials.job = probed
    world.see(job("a", weight=1.0, guaranteed=0.5), job("b", weight=0.01, limit=0.25), job("c"))
    shares = {name: len(where) for name, where in world.present.jobs.items()}
    assert shares["a"] >= 4
    assert shares["b"] <= 2
    world.see(job("c"))
    assert world.planner.state.trials.job == ""
