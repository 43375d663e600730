"""Planning a GPU in MIG mode: what the tables allow, one instance at a time, worth the move."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cotenant.domain.device import DeviceSpec, PreemptLevel
from cotenant.domain.mig import Placement, table, tables
from cotenant.domain.plan import EMPTY_PLAN, Plan
from cotenant.domain.snapshot import JobFacts, ServiceFacts, Snapshot
from cotenant.domain.units import MS, S
from cotenant.domain.workload import Variant
from cotenant.policy.layouts import mig_fixed, mig_layouts, service_profiles
from cotenant.policy.planner import Planner
from cotenant.policy.planstate import Tuning
from tests.unit.test_planner import job, service

GPU = "A100-SXM4-80GB"
GIB = 2**30


def gpu(model: str = GPU) -> DeviceSpec:
    known = table(model)
    return DeviceSpec(
        id="gpu0", kind="mig", units=tuple(range(known.memory_slices)), memory=0, shapes=(),
        preempt=PreemptLevel.GATE, revoke_ns=MS, repartition_ns=282 * MS,
        mig=model, slices=known.compute_slices, pins_jobs=True, move_ns=10 * S,
    )  # fmt: skip


def times(ms: float, saturates: int) -> dict[str, dict[str, int]]:
    """Execution that scales up to so many slices; eight rows cost four times one."""
    return {
        "mig": {
            f"{units}x{rows}": int(ms * MS * (4 + rows) / 5 / min(units, saturates))
            for units in (1, 2, 3, 4, 7)
            for rows in (1, 8)
        }
    }


def model(
    name: str = "s", rate: float = 0.0, ms: float = 20, saturates: int = 2, **changes: Any
) -> ServiceFacts:
    return service(name, rate, exec_ns=times(ms, saturates), **changes)


class Planning:
    def __init__(self, device: DeviceSpec | None = None, **tuning: Any) -> None:
        self.device = device or gpu()
        self.planner, self.now, self.present = Planner(Tuning(**tuning)), 100 * S, EMPTY_PLAN

    def see(self, *facts: ServiceFacts | JobFacts) -> Plan | None:
        self.now += S
        services = tuple(f for f in facts if isinstance(f, ServiceFacts))
        jobs = tuple(f for f in facts if isinstance(f, JobFacts))
        plan = self.planner.plan(Snapshot(self.now, (self.device,), self.present, services, jobs))
        if plan is not None:
            feasible(plan, self.device)
            self.present = plan
        return plan

    def settle(self, *facts: ServiceFacts | JobFacts, seconds: int = 120) -> Plan:
        for _ in range(seconds):
            self.see(*facts)
        return self.present

    def instances(self) -> list[str]:
        return sorted(map(profile, self.present.lendable))


def profile(partition: str) -> str:
    return partition.split(":")[1].split("@", maxsplit=1)[0]


def placements(plan: Plan) -> list[Placement]:
    return [Placement(p.units[0], profile(p.id)) for p in plan.partitions]


def feasible(plan: Plan, device: DeviceSpec) -> None:
    """The tables allow it, it wastes nothing, and each job is bound to one instance."""
    known = table(device.mig)
    assert known.why_not(placements(plan)) is None
    for partition in plan.partitions:
        found = known.profile(profile(partition.id))
        assert (partition.compute, len(partition.units)) == (found.compute, found.size)
    names = {p.id for p in plan.partitions}
    for where in (*plan.services.values(), *plan.jobs.values()):
        assert set(where) <= names
    assert all(len(where) == 1 for where in plan.jobs.values())
    assert plan.reasons


@pytest.mark.parametrize("name", sorted(tables()))
def test_every_layout_offered_is_legal_and_can_take_no_further_instance(name: str) -> None:
    known, device = table(name), gpu(name)
    offered = mig_layouts(device, None)
    assert {tuple(sorted(profile(p.id) for p in x.mine)) for x in offered} == set(
        service_profiles(name)
    )
    for layout in offered:
        placed = [Placement(p.units[0], profile(p.id)) for p in (*layout.mine, *layout.free)]
        assert known.why_not(placed) is None
        more = [
            Placement(start, p.name)
            for p in known.profiles
            if not p.media_extensions
            for start in p.starts
        ]
        assert all(known.why_not([*placed, one]) is not None for one in more)


def test_a_choice_that_cannot_be_placed_has_no_layout() -> None:
    assert mig_fixed(gpu(), ("4g.40gb", "4g.40gb")) == []
    assert mig_fixed(gpu(), ("3g.40gb", "3g.40gb"))


def test_an_idle_gpu_is_lent_whole() -> None:
    world = Planning()
    plan = world.see(model(), job())
    assert plan is not None
    assert world.instances() == ["7g.80gb"]
    assert plan.jobs["j"] == plan.services["s"]
    assert plan.lendable == plan.services["s"]


def test_a_steady_load_gets_an_instance_that_suits_it_and_the_job_the_rest() -> None:
    world = Planning()
    plan = world.settle(model(rate=70.0, max_batch=1), job())
    mine = set(plan.services["s"])
    assert set(plan.jobs["j"]).isdisjoint(mine)
    largest = max(p.compute for p in plan.partitions if p.id not in mine)
    assert {p.compute for p in plan.partitions if p.id in plan.jobs["j"]} == {largest}
    assert largest >= 3


def test_a_job_stays_where_it_is_unless_moving_gains_much() -> None:
    world = Planning()
    before = world.settle(model(rate=70.0, max_batch=1), job()).jobs["j"]
    moves = 0
    noise = random.Random(1)
    for _ in range(300):
        plan = world.see(model(rate=70.0 * noise.uniform(0.8, 1.2), max_batch=1), job())
        if plan is not None and plan.jobs["j"] != before:
            before, moves = plan.jobs["j"], moves + 1
    assert moves <= 1


def one_step(before: list[str], after: list[str]) -> bool:
    gone, come = list(before), list(after)
    for name in before:
        if name in come:
            come.remove(name)
            gone.remove(name)
    if len(gone) <= 1 and len(come) <= 1:
        return True
    one, two = sorted((gone, come), key=len)
    slices = [sum(int(name[0]) for name in names) for names in (one, two)]
    return (len(one), len(two)) == (1, 2) and slices[1] <= slices[0]


def test_layouts_change_by_one_instance_of_services_at_a_time_or_by_a_split() -> None:
    world, seen = Planning(), [["7g.80gb"]]
    for rate in (5.0, 60.0, 150.0, 20.0):
        both = (model(rate=rate, saturates=1), model("t", rate / 2, saturates=1), job())
        seen += [world.instances() for _ in range(60) if world.see(*both) is not None]
    assert len(seen) > 2
    for before, after in pairwise(seen):
        assert one_step(before, after)


@pytest.mark.parametrize("name", sorted(tables()))
def test_all_layouts_one_step_away_are_offered_and_no_others(name: str) -> None:
    device = gpu(name)
    every = {tuple(sorted(profile(p.id) for p in x.mine)): x for x in mig_layouts(device, None)}
    for here, layout in every.items():
        offered = {
            tuple(sorted(profile(p.id) for p in x.mine)) for x in mig_layouts(device, layout)
        }
        assert offered == {there for there in every if one_step(list(here), list(there))}


def two(rate: float, **changes: Any) -> tuple[ServiceFacts, ServiceFacts]:
    return model(rate=rate, **changes), model("t", rate, **changes)


def test_an_instance_is_split_in_one_step_where_it_takes_both_parts() -> None:
    """With one of the parts alone the objectives would not hold, so it would never come to both."""
    world, busy = Planning(gpu("A30-24GB")), two(25.0, max_batch=1)
    world.settle(*two(0.0, max_batch=1), job(), seconds=3)
    assert world.instances() == ["4g.24gb"]
    world.settle(*busy, job(), seconds=30)
    assert world.instances() == ["2g.12gb", "2g.12gb"]


def test_the_more_is_lost_the_sooner_jobs_are_moved_for_it() -> None:
    waited = []
    for rate in (120.0, 150.0, 300.0):
        world = Planning()
        world.settle(model(rate=70.0, max_batch=1), job())
        changes = [i for i in range(30) if world.see(model(rate=rate, max_batch=1), job())]
        waited.append(changes[0])
    slight, saturated, twice = waited
    assert slight > saturated > twice


def test_jobs_are_not_moved_for_a_slight_loss_that_passes() -> None:
    world = Planning()
    world.settle(model(rate=70.0, max_batch=1), job())
    for _ in range(5):
        for rate in (120.0,) * 5 + (70.0,) * 5:
            assert world.see(model(rate=rate, max_batch=1), job()) is None


CONSTANT = st.tuples(
    st.sampled_from([1.0, 5.0, 20.0, 30.0, 60.0, 80.0, 120.0]),
    st.sampled_from([5, 10, 20, 30, 40]),
    st.integers(1, 4),
    st.sampled_from([1, 8]),
)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(["A30-24GB", GPU]), st.lists(CONSTANT, min_size=1, max_size=3))
@example("A30-24GB", [(30.0, 30, 2, 8), (30.0, 30, 2, 8)])
@example(GPU, [(120.0, 5, 1, 8), (20.0, 20, 4, 1), (5.0, 40, 2, 1)])
@example(GPU, [(5.0, 10, 1, 1), (80.0, 20, 1, 1)])
@example("A30-24GB", [(30.0, 10, 2, 1), (30.0, 10, 2, 1), (120.0, 10, 2, 1)])
def test_a_constant_load_keeps_its_layout_for_ever(
    name: str, loads: list[tuple[float, int, int, int]]
) -> None:
    world = Planning(gpu(name))
    services = [
        model(f"s{i}", rate, ms, saturates, max_batch=rows)
        for i, (rate, ms, saturates, rows) in enumerate(loads)
    ]
    idle = [msgspec.structs.replace(s, rate=0.0) for s in services]
    world.settle(*idle, job(), seconds=3)
    world.settle(*services, job())
    for _ in range(60):
        assert world.see(*services, job()) is None


def bound(name: str = GPU) -> DeviceSpec:
    return msgspec.structs.replace(gpu(name), pins_workers=True)


def test_what_is_slow_to_load_stays_where_jobs_alone_would_gain() -> None:
    def spared(load_ns: int) -> bool:
        world = Planning(bound())
        world.see(model(load_ns=load_ns), job())
        plan = world.settle(model(rate=50.0, max_batch=1, load_ns=load_ns), job())
        return not set(plan.jobs["j"]) <= set(plan.services["s"])

    assert spared(0)
    assert not spared(120 * S)


def test_a_service_that_is_overloaded_changes_instances_however_slowly_it_loads() -> None:
    world = Planning(bound())
    slow = {"ms": 300.0, "saturates": 1, "load_ns": 60 * S, "objective": 900 * MS}
    world.settle(model(rate=1.0, **slow), job(), seconds=30)
    before = world.instances()
    world.settle(model(rate=12.0, max_batch=1, **slow), job())
    assert len(world.instances()) > len(before)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(("A30-24GB", GPU)))
def test_the_longer_models_load_the_fewer_layouts_there_are(seed: int, name: str) -> None:
    """All of them legal (``Planning.see``), whatever the loads do."""

    def layouts(load_ns: int) -> int:
        world, noise = Planning(bound(name)), random.Random(seed)
        found: set[int] = set()
        for step in range(240):
            if step % 60 == 0:
                rates = [noise.choice((0.0, 10.0, 60.0, 150.0)) for _ in range(2)]
            world.see(
                *(model(f"s{i}", rate, load_ns=load_ns) for i, rate in enumerate(rates)), job()
            )
            found.add(hash(tuple(p.id for p in world.present.partitions)))
        return len(found)

    assert layouts(200 * S) <= layouts(0)


def test_a_model_goes_only_where_its_memory_fits() -> None:
    world = Planning()
    big = model(rate=20.0, variants={"mig": Variant(memory=30 * GIB)})
    plan = world.settle(big, job())
    sizes = {p.id: p.memory for p in plan.partitions}
    assert all(sizes[p] >= 30 * GIB for p in plan.services["s"])


def test_a_fixed_choice_never_changes() -> None:
    world = Planning(instances=("2g.20gb", "3g.40gb"), lend=False)
    world.see(model(rate=1.0), job())
    for rate in (500.0, 1.0):
        for _ in range(30):
            assert world.see(model(rate=rate), job()) is None
    layout = world.planner.state.devices["gpu0"].layout
    assert layout is not None
    mine = sorted(profile(p.id) for p in layout.mine)
    assert mine == ["2g.20gb", "3g.40gb"]
    assert world.present.lendable == ()


def test_a_fixed_choice_stands_even_if_services_are_owed_more() -> None:
    world = Planning(instances=("1g.10gb",), lend=False)
    world.see(model(rate=1.0, guaranteed=0.5), job())
    assert sum(p.id in world.present.services["s"] for p in world.present.partitions) == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(sorted(tables())))
def test_plans_stay_feasible_whatever_the_load_does(seed: int, name: str) -> None:
    source, world = random.Random(seed), Planning(gpu(name))
    for _ in range(40):
        services = [
            model(n, source.choice([0.0, 5.0, 50.0, 500.0]), source.choice([2, 20, 90]))
            for n in ("s", "t", "u")[: source.randint(0, 3)]
        ]
        jobs = [
            job(n, weight=source.choice([1.0, 3.0])) for n in ("j", "k")[: source.randint(0, 2)]
        ]
        world.see(*services, *jobs)


def test_the_state_survives_being_encoded() -> None:
    world = Planning()
    world.settle(model(rate=40.0), job(), seconds=20)
    state = world.planner.state
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=type(state))
    assert again == state
