"""MIG, NPUs, chips with one memory, and several boxes, in virtual time."""

from __future__ import annotations

from concurrent.futures import Executor
from pathlib import Path

import msgspec
import pytest

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import Partition
from cotenant.domain.mig import table
from cotenant.domain.plan import EMPTY_PLAN, Plan
from cotenant.domain.snapshot import Snapshot
from cotenant.policy.planner import Planner
from cotenant.policy.planstate import Tuning
from cotenant.sim.outcome import Outcome
from cotenant.sim.physics import Place
from cotenant.sim.policies import Scheduled, simulate
from cotenant.sim.scenario import Scenario, one_box
from cotenant.sim.scenario_file import parse_scenario
from cotenant.sim.world import World
from tests.sim.test_scenario import MIG, NPU
from tests.unit.test_planner_mig import placements

SUBSETS = """
name: subsets
duration: 60s
device: {kind: sm, units: 16, trains: false}
services:
  - {name: a, objective: {latency: 50ms}, arrivals: {kind: poisson, rate: RATE},
     cost: {first: 80ms}, sm: {cost: {first: 80ms, parallel: 1.0}}}
  - {name: b, objective: {latency: 50ms}, arrivals: {kind: poisson, rate: 10},
     cost: {first: 80ms}, sm: {cost: {first: 80ms, parallel: 1.0}}}
"""
JOB = "jobs:\n  - {name: j, cost: {rate: 5, move: 2s}}\n"


def run(found: Scenario, tuning: Tuning | None = None) -> Outcome:
    return World(found, Planner(tuning), (0, 0)).run()


def mig(rate: float = 10, seconds: int = 60) -> Scenario:
    text = MIG.replace("rate: 10}", f"rate: {rate}}}").replace("20s", f"{seconds}s") + JOB
    return parse_scenario(text, Path())


class Checked:
    """Checks every plan against the GPU's tables."""

    plans = 0

    def decided(self, _: int, event: e.Event, __: list[a.Action]) -> None:
        if isinstance(event, e.Planned):
            self.plans += 1
            gpu = table("A100-SXM4-80GB")
            assert gpu.why_not(placements(event.plan)) is None
            assert all(len(where) == 1 for where in event.plan.jobs.values())

    def planned(self, _: int, __: Snapshot, ___: Plan | None) -> None:
        pass


class Last(Checked):
    """Keeps the last plan."""

    plan = EMPTY_PLAN

    def decided(self, _: int, event: e.Event, __: list[a.Action]) -> None:
        if isinstance(event, e.Planned):
            self.plan = event.plan


@pytest.mark.parametrize("rate", [5, 150, 600])
def test_a_gpu_in_mig_mode_only_ever_has_legal_layouts(rate: float) -> None:
    checked = Checked()
    outcome = World(mig(rate), Planner(), (0, 0), observer=checked).run()
    tally = outcome.services["a"]
    assert checked.plans >= 1
    assert tally.offered == tally.answered + sum(tally.refused.values()) + outcome.open
    assert outcome.figures()["attainment"] > (0.95 if rate < 600 else 0.1)


def test_models_that_are_bound_to_instances_serve_and_change_place_with_them() -> None:
    found = mig(150)
    gpu = found.devices[0]
    bound = msgspec.structs.replace(
        found,
        devices=(
            msgspec.structs.replace(gpu, spec=msgspec.structs.replace(gpu.spec, pins_workers=True)),
        ),
    )
    checked = Checked()
    first = World(bound, Planner(), (0, 0), observer=checked).run()
    tally = first.services["a"]
    assert tally.offered == tally.answered + sum(tally.refused.values()) + first.open
    assert tally.answered > tally.offered / 2
    assert World(bound, Planner(), (0, 0)).run().figures() == first.figures()


def test_instances_are_made_and_ended_in_their_time_and_moves_are_paid_for() -> None:
    slow = mig(200)
    outcome = run(slow)
    if outcome.repartitions:
        assert outcome.repartition_ns > 100e6 * outcome.repartitions
    still = run(slow, Tuning(instances=("3g.40gb",), lend=False))
    assert still.repartitions == 0
    assert still.jobs["j"].grants == 1


def test_a_job_on_a_gpu_in_mig_mode_runs_at_the_speed_of_its_one_instance() -> None:
    outcome = run(mig(0), Tuning(instances=("3g.40gb",), lend=False))
    cost = mig(0).jobs[0].cost
    # Beside 3g.40gb the largest that fits is 4g.40gb.
    assert outcome.figures()["job_rate"] == pytest.approx(cost.speed(4), rel=0.01)


def test_an_npu_serves_and_leaves_the_cores_to_training() -> None:
    found = parse_scenario(NPU + JOB, Path())
    with_npu, without = run(found), run(found, Tuning(offload=False))
    assert with_npu.figures()["attainment"] > 0.99
    assert with_npu.figures()["job_rate"] > without.figures()["job_rate"]
    assert with_npu.figures()["job_rate"] == pytest.approx(found.jobs[0].cost.speed(4), rel=0.01)


def test_what_the_npu_cannot_carry_goes_to_the_cores_too_once_it_is_loaded_there() -> None:
    text = NPU.replace("rate: 10}", "rate: 400}") + JOB
    found = parse_scenario(text.replace("20s", "30s"), Path())
    outcome = run(found)
    reasons = [r for _, rs in outcome.reasons for r in rs]
    assert any("npu -> cpu and npu" in r for r in reasons)
    later = outcome.services["a"]
    assert later.answered > 0.6 * later.offered


def test_devices_that_share_a_memory_slow_each_other_down() -> None:
    alone = parse_scenario(NPU + JOB, Path())
    shared = msgspec.structs.replace(alone, shared_bandwidth=0.5)
    assert run(shared).figures()["job_rate"] < 0.995 * run(alone).figures()["job_rate"]
    medians = [run(x).services["a"].quantile_ns(0.5) for x in (alone, shared)]
    assert medians[1] > 1.2 * medians[0]


def test_boxes_share_the_arrivals_and_their_figures_add_up() -> None:
    one = mig(40, seconds=20)
    four = msgspec.structs.replace(one, boxes=4)
    setting = Scheduled(Tuning(instances=("3g.40gb",), lend=False))
    both = simulate(four, setting, 0)
    assert both.units == 4 * 7
    offered = both.services["a"].offered
    assert offered == pytest.approx(simulate(one, setting, 0).services["a"].offered, rel=0.2)
    assert both.figures()["job_rate"] == pytest.approx(4 * one.jobs[0].cost.speed(4), rel=0.02)


@pytest.mark.parametrize(
    "arrivals",
    [
        "{kind: bursts, rate: 5, burst_rate: 50, mean_quiet: 2s, mean_burst: 1s}",
        "{kind: diurnal, rate: 40, swing: 0.5, period: 10s}",
        "{kind: steps, rates: {0s: 40, 10s: 80}}",
    ],
)
def test_every_kind_of_arrivals_can_be_shared(arrivals: str) -> None:
    text = MIG.replace("{kind: poisson, rate: 10}", arrivals)
    found = msgspec.structs.replace(parse_scenario(text, Path()), boxes=3)
    counts = [run(one_box(found, box)).services["a"].offered for box in range(3)]
    whole = run(msgspec.structs.replace(found, boxes=1)).services["a"].offered
    assert all(count > 0 for count in counts)
    assert 0.5 * whole < sum(counts) < 2 * whole


TWO_JOBS = """
name: two-jobs
duration: 2400s
device: {kind: cpu, units: 10}
services: []
jobs:
  - {name: scales, cost: {rate: 5, parallel: 0.99}}
  - {name: stalls, cost: {rate: 5, parallel: 0.9, saturates: 2}}
"""


def test_what_jobs_make_of_space_is_learned_and_pays_for_the_trying(cores: Executor) -> None:
    found = parse_scenario(TWO_JOBS, Path())
    plain = cores.submit(run, found, Tuning(learn=False))
    planner = Planner()
    outcome = World(found, planner, (0, 0)).run()
    for job in found.jobs:
        curve = planner.state.curves[job.spec.id]
        predicted = curve.rates()
        errors = [abs(predicted[x] / job.cost.speed(x) - 1) for x in range(2, 11)]
        assert sum(errors) / len(errors) < 0.1
    assert outcome.figures()["job_rate"] > 1.15 * plain.result().figures()["job_rate"]
    tried = sum("is tried out" in reason for _, rs in outcome.reasons for reason in rs)
    assert 1 <= tried <= 2400 / 90 * 0.3


def test_a_serving_device_that_nobody_uses_asks_for_no_plans() -> None:
    text = NPU[: NPU.index("    npu:")] + NPU[NPU.index("\n", NPU.index("    npu:")) + 1 :]
    outcome = run(parse_scenario(text, Path()))
    assert len(outcome.reasons) <= 2


def test_two_devices_that_train_are_divided_each_for_itself() -> None:
    text = """
name: s
duration: 200s
devices:
  - {kind: cpu, name: a, units: 8}
  - {kind: cpu, name: b, units: 4}
services:
  - name: s
    objective: {latency: 100ms}
    cost: {first: 10ms}
    arrivals: {kind: poisson, rate: 5}
jobs: [{name: j, cost: {rate: 5}}, {name: k, cost: {rate: 5, parallel: 0.5}}]
"""
    outcome = run(parse_scenario(text, Path()))
    assert len(outcome.reasons) <= 6


GPUS = """
name: gpus
story: a test
duration: 60s
devices:
  - {kind: sm, name: g0, units: 4, memory: 8GiB, contention: 0.3}
  - {kind: sm, name: g1, units: 4, memory: 8GiB, contention: 0.3}
jobs:
  - {name: j, cost: {rate: 5}}
services:
""" + "".join(
    f"""
  - name: {name}
    objective: {{latency: 50ms}}
    batch: {{max: 4}}
    instances: 4
    memory: {memory}
    cost: {{first: 8ms, per_row: 5ms, saturates: 1}}
    arrivals: {{kind: steps, rates: {{0s: {rate}, 15s: {later}}}}}
"""
    for name, memory, rate, later in (
        ("a", "1GiB", 50, 330),
        ("b", "768MiB", 20, 20),
        ("c", "725MiB", 50, 330),
        ("d", "512MiB", 20, 20),
    )
)


class Homes:
    """Where each service is, plan by plan."""

    def __init__(self) -> None:
        self.seen: list[dict[str, set[str]]] = []

    def decided(self, _: int, event: e.Event, __: list[a.Action]) -> None:
        if isinstance(event, e.Planned):
            of = {p.id: p.device for p in event.plan.partitions}
            self.seen.append({s: {of[p] for p in ps} for s, ps in event.plan.services.items()})

    def planned(self, _: int, __: Snapshot, ___: Plan | None) -> None:
        pass


def test_services_move_between_devices_when_one_has_too_much(cores: Executor) -> None:
    homes = Homes()
    found = parse_scenario(GPUS, Path())
    stays = cores.submit(run, found, Tuning(move=False))
    outcome = World(found, Planner(), (0, 0), observer=homes).run()
    assert homes.seen[0]["a"] == homes.seen[0]["c"]
    assert homes.seen[-1]["a"] != homes.seen[-1]["c"]
    assert outcome.figures()["attainment"] > stays.result().figures()["attainment"] + 0.05


def test_a_job_is_slowed_down_by_the_neighbours_on_its_own_device_only() -> None:
    world = World(parse_scenario(GPUS, Path()), Planner(), (0, 0))
    job = world._jobs["j"]
    world._places = {
        name: Place(Partition(name, name, (0,)), world._devices[name], 0) for name in ("g0", "g1")
    }
    world._served["g1"] = 4  # all of it; nothing is served on the other
    for held, slow in (({"g0": 1}, 0.0), ({"g1": 1}, 0.3), ({"g0": 1, "g1": 1}, 0.15)):
        job.held = held
        world._slow_jobs()
        assert job.slowed == pytest.approx(1 - 1 / (1 + slow))


def test_a_gpu_in_subsets_is_divided_among_services_and_anew_where_that_answers_more() -> None:
    found: dict[int, tuple[list[int], Outcome]] = {}
    for rate in (10, 110):
        scenario = parse_scenario(SUBSETS.replace("RATE", str(rate)), Path())
        last = Last()
        outcome = World(scenario, Planner(), (0, 0), observer=last).run()
        found[rate] = sorted(p.compute for p in last.plan.partitions), outcome
    sizes, calm = found[10]
    assert sizes == [8, 8] and calm.figures()["worst_attainment"] > 0.95
    sizes, loaded = found[110]
    assert sizes != [8, 8] and loaded.repartitions > calm.repartitions
    assert loaded.figures()["worst_attainment"] > 0.5
