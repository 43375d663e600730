"""The virtual-time shell: physics that a simulation must get right, and determinism."""

from __future__ import annotations

from concurrent.futures import Executor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from cotenant.domain.actions import Action
from cotenant.domain.events import Event
from cotenant.domain.plan import Plan
from cotenant.domain.snapshot import Snapshot
from cotenant.domain.units import MS, S
from cotenant.policy.planner import Planner
from cotenant.policy.planstate import Tuning
from cotenant.policy.utility import speed_up
from cotenant.sim.costs import ExecCost, JobCost
from cotenant.sim.outcome import Outcome
from cotenant.sim.policies import POLICIES, simulate
from cotenant.sim.scenario import Scenario
from cotenant.sim.scenario_file import parse_scenario
from cotenant.sim.world import World


def scenario(
    units: int = 4,
    rate: float = 20,
    first: str = "10ms",
    per_row: str = "3ms",
    jobs: str = "",
    seconds: int = 60,
    latency: str = "100ms",
    more: str = "",
    arrivals: str = "",
) -> Scenario:
    return parse_scenario(
        f"""
name: s
duration: {seconds}s
device: {{kind: cpu, units: {units}, contention: 0}}
services:
  - name: a
    objective: {{latency: {latency}}}
    cost: {{first: {first}, per_row: {per_row}, parallel: 0, cv: 0}}
    arrivals: {arrivals or f"{{kind: poisson, rate: {rate}}}"}
    {more}
jobs: [{jobs}]
""",
        Path(),
    )


def run(found: Scenario, tuning: Tuning | None = None, seed: int = 0) -> Outcome:
    return World(found, Planner(tuning), (seed, 0)).run()


def test_a_seed_fixes_a_run() -> None:
    found = scenario(jobs="{name: j, cost: {rate: 5}}", rate=80)
    first, again, other = run(found), run(found), run(found, seed=1)
    assert msgspec.json.encode(first) == msgspec.json.encode(again)
    assert first.figures() != other.figures()


@pytest.mark.parametrize("rate", [5, 80, 600])
def test_every_request_is_answered_refused_or_open(rate: float) -> None:
    found = run(scenario(rate=rate, jobs="{name: j, cost: {rate: 5}}"))
    tally = found.services["a"]
    assert tally.offered == tally.answered + sum(tally.refused.values()) + found.open
    assert sum(tally.buckets.values()) == tally.answered


def test_utilization_is_rate_times_execution_time() -> None:
    """Batches of one: served time is arrivals x (execution + start), whatever the policy."""
    found = scenario(units=1, rate=30, more="batch: {max: 1}", seconds=300)
    outcome = run(found, Tuning(split=(1, 1)))
    expected = outcome.services["a"].answered / 300 * (10.1 / 1000)
    assert outcome.figures()["utilization"] == pytest.approx(expected, rel=0.02)


def test_a_batch_at_hand_starts_when_the_one_before_it_ends() -> None:
    """An instance that never waits for work makes as many as fit; starts of 0.1 ms would cost
    it a tenth."""
    found = scenario(units=1, first="1ms", rate=2000, more="batch: {max: 1}", latency="1s")
    outcome = run(found, Tuning(split=(1, 1)))
    assert outcome.services["a"].answered / 60 == pytest.approx(1000, rel=0.01)
    assert outcome.served_ns <= 60 * S * 1.001


def test_waiting_is_that_of_a_queue_with_one_server() -> None:
    """M/D/1 at half load: the mean sojourn is E + E rho / (2 (1 - rho)), Pollaczek and Khinchine;
    its median lies between the execution time and that mean."""
    found = scenario(units=1, rate=50, more="batch: {max: 1}", seconds=400, latency="10s")
    median = run(found, Tuning(split=(1, 1))).services["a"].quantile_ns(0.5) / MS
    mean = 10.1 + 10.1 * 0.505 / (2 * 0.495)
    assert 10.1 <= median <= mean


def test_a_job_alone_runs_at_its_speed() -> None:
    found = scenario(rate=0, jobs="{name: j, cost: {rate: 5, parallel: 0.9, resume: 0ms}}")
    outcome = run(found)
    assert outcome.figures()["job_rate"] == pytest.approx(5 * speed_up(0.9, 0, 4), rel=0.01)
    assert outcome.figures()["utilization"] == pytest.approx(1, rel=0.01)


def test_lending_gives_a_job_what_a_service_leaves() -> None:
    found = scenario(rate=20, jobs="{name: j, cost: {rate: 5, parallel: 1}}")
    lent = run(found).figures()
    kept = run(found, Tuning(lend=False)).figures()
    assert lent["attainment"] > 0.99
    assert lent["attainment"] >= kept["attainment"] - 0.01
    assert lent["job_rate"] > 1.1 * kept["job_rate"]


def test_exclusive_use_leaves_a_job_nothing() -> None:
    found = scenario(jobs="{name: j, cost: {rate: 5}}")
    for setting in POLICIES["exclusive"].settings(found).values():
        outcome = simulate(found, setting, 0)
        assert outcome.jobs["j"].steps == 0
        assert outcome.figures()["attainment"] > 0.99


@pytest.mark.parametrize("rate", [150, 300, 500, 1500])
def test_what_is_taken_is_in_time_however_many_come(rate: float) -> None:
    """Batches of 8 take 31 ms: whoever is taken for a short batch must survive a full one."""
    tally = run(scenario(units=1, rate=rate, latency="50ms", seconds=20)).services["a"]
    assert tally.attained >= 0.98 * tally.answered
    assert tally.answered / 20 >= min(0.9 * rate, 200)


@pytest.mark.parametrize(("rate", "latency"), [(50, "40ms"), (60, "60ms"), (70, "80ms")])
def test_a_box_that_has_time_left_refuses_next_to_nothing(rate: float, latency: str) -> None:
    """Batches of such rows save little, and at this rate nobody needs them."""
    found = scenario(units=1, rate=rate, per_row="8ms", latency=latency, seconds=60)
    tally = run(found, Tuning(split=(1, 1))).services["a"]
    assert tally.attained >= 0.99 * tally.offered


@pytest.mark.parametrize("latency", ["40ms", "60ms", "80ms"])
def test_under_overload_a_partition_does_not_idle(latency: str) -> None:
    """At one request each 10 ms it answers 100 a second, in batches more."""
    found = scenario(units=1, rate=400, per_row="8ms", latency=latency, seconds=30)
    tally = run(found, Tuning(split=(1, 1))).services["a"]
    assert tally.attained >= 100 * 30


def test_spans_show_each_unit_held_once() -> None:
    found = scenario(rate=60, jobs="{name: j, cost: {rate: 5}}", seconds=20)
    spans = World(found, Planner(), (0, 0), record=True).run().spans
    assert {s.who for s in spans} == {"a", "j"}
    served = [s for s in spans if s.who == "a"]
    for unit in range(4):
        mine = sorted((s.start, s.end) for s in served if unit in s.units)
        assert all(a[1] <= b[0] for a, b in pairwise(mine))


def test_costs_bend_and_a_measured_profile_goes_first() -> None:
    cost = ExecCost(first=10 * MS, per_row=4 * MS, parallel=0.8, saturates=4)
    times = [cost.mean(units, 1) for units in (1, 2, 4, 8)]
    assert times[0] == 10 * MS
    assert times[0] > times[1] > times[2] == times[3]
    assert cost.mean(1, 3) == 18 * MS
    assert cost.source == "analytic"
    measured = ExecCost(first=1, per_row=1, profile=((1, 1, 7 * MS), (1, 8, 21 * MS)))
    assert measured.mean(1, 1) == 7 * MS
    assert 7 * MS < measured.mean(1, 4) < 21 * MS
    assert measured.source == "measured profile"
    assert JobCost(rate=4).speed(0) == 0


class Learned(NamedTuple):
    """Of a run: how much a job has for itself in the end, whether idle space is lent to it, and
    whether it would be to another one."""

    outcome: Outcome
    own: int
    lent: bool
    lent_to_another: bool


def learn(found: Scenario, tuning: Tuning | None = None) -> Learned:
    planner, snapshots = Planner(tuning), _Snapshots()
    outcome = World(found, planner, (0, 0), observer=snapshots).run()
    layout, last = planner.state.devices["cpu"].layout, snapshots.last
    assert layout is not None
    other = msgspec.structs.replace(last.jobs[0], id="other")
    plan = planner.plan(msgspec.structs.replace(last, jobs=(other,)))
    lent_to_another = plan is not None and bool(plan.lendable)
    return Learned(outcome, layout.compute, bool(last.plan.lendable), lent_to_another)


class _Snapshots:
    """Keeps the last snapshot that the planner was shown."""

    last: Snapshot

    def decided(self, now: int, event: Event, actions: list[Action]) -> None:
        pass

    def planned(self, now: int, snapshot: Snapshot, plan: Plan | None) -> None:
        self.last = snapshot


def test_what_borrowing_costs_jobs_is_tried_and_what_costs_too_much_they_get_for_themselves(
    cores: Executor,
) -> None:
    def borrowing(resume: str) -> Scenario:
        job = f"{{name: j, cost: {{rate: 5, parallel: 0.9, resume: {resume}}}}}"
        return scenario(units=8, rate=60, jobs=job, seconds=600, more="instances: 8")

    cheap, dear = cores.map(learn, map(borrowing, ("0ms", "20ms")))
    assert cheap.own == 8
    assert 1 <= dear.own <= 2
    for outcome in (cheap.outcome, dear.outcome):
        reasons = [why for _, each in outcome.reasons for why in each]
        assert sum("is not known; it is tried" in why for why in reasons) == 1
        assert outcome.figures()["attainment"] > 0.99


@pytest.fixture(scope="module")
def idle(cores: Executor) -> dict[tuple[str, str], Learned]:
    """By what a pause costs the job, and by policy."""

    def leaving(resume: str) -> Scenario:
        job = f"{{name: j, cost: {{rate: 10, parallel: 0.9, resume: {resume}}}}}"
        return scenario(
            rate=60, first="4ms", latency="50ms", jobs=job, seconds=400, more="instances: 3"
        )

    kinds = {
        ("0ms", "usual"): Tuning(),
        ("0ms", "kept"): Tuning(lend=False),
        ("20ms", "usual"): Tuning(),
        ("20ms", "unlearned"): Tuning(learn=False),
    }
    runs = cores.map(learn, [leaving(resume) for resume, _ in kinds], kinds.values())
    return dict(zip(kinds, runs, strict=True))


@pytest.mark.parametrize(
    ("resume", "lent", "otherwise"), [("0ms", True, "kept"), ("20ms", False, "unlearned")]
)
def test_idle_space_is_lent_only_where_jobs_gain_by_it(
    idle: dict[tuple[str, str], Learned], resume: str, lent: bool, otherwise: str
) -> None:
    outcome = idle[resume, "usual"].outcome
    ended = any("idle space is not lent:" in why for _, each in outcome.reasons for why in each)
    assert ended != lent
    other = idle[resume, otherwise].outcome
    assert outcome.figures()["job_rate"] > 1.1 * other.figures()["job_rate"]


def test_a_new_job_is_lent_idle_space_until_more_is_known(
    idle: dict[tuple[str, str], Learned],
) -> None:
    learned = idle["20ms", "usual"]
    assert not learned.lent
    assert learned.lent_to_another


@pytest.mark.parametrize("rate", [60, 150, 300])
def test_what_cannot_be_held_is_served_about_as_well_as_by_the_best_fixed_split(
    cores: Executor, rate: int
) -> None:
    example = Path(__file__).parents[2] / "examples" / "scenarios" / "too-much.yaml"
    text = example.read_text().replace("rate: 150", f"rate: {rate}")
    found = parse_scenario(text, Path())
    splits = [Tuning(split=split, lend=False) for split in ((1, 1), (2, 1), (2, 2))]
    outcomes = cores.map(run, [found] * 4, [Tuning(), *splits])
    usual, *fixed = [outcome.figures()["attainment"] for outcome in outcomes]
    assert usual > 0.96 * max(fixed)


def test_a_gang_is_lent_idle_space_though_its_pauses_may_look_dear(cores: Executor) -> None:
    """It makes little on the core that is left to it, which is not known while it has more."""
    job = "{name: j, cost: {rate: 37, parallel: 1, saturates: 2, gang: 1.3, resume: 5ms}}"
    rates = ", ".join(["0s: 30", *(f"{8 * i}s: {95 + 95 * (i % 2)}" for i in range(3, 30))])
    steps = f"{{kind: steps, rates: {{{rates}}}}}"
    found = scenario(units=2, first="2700us", latency="40ms", jobs=job, seconds=240, arrivals=steps)
    tunings = [Tuning(learn=False), Tuning(lend=False), Tuning(), Tuning(), Tuning()]
    outcomes = cores.map(run, [found] * 5, tunings, (0, 0, 0, 1, 2))
    lent, kept, *usual = [outcome.figures()["job_rate"] for outcome in outcomes]
    assert lent > 1.3 * kept
    assert min(usual) > 0.92 * lent


@pytest.mark.parametrize("resume", ["200ms", "10s"])
def test_a_job_loses_no_more_than_it_makes(resume: str) -> None:
    job = f"{{name: j, cost: {{rate: 5, resume: {resume}}}}}"
    outcome = run(scenario(rate=100, jobs=job, more="instances: 4"), Tuning(learn=False))
    assert 0.0 <= outcome.figures()["job_rate"] < 5.0


def test_the_first_request_of_a_run_finds_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("at\n0\n1\n2\n")
    text = """
name: s
duration: 5s
device: {kind: cpu, units: 2}
services:
  - name: a
    objective: {latency: 100ms}
    cost: {first: 10ms}
    arrivals: {kind: trace, file: t.csv, column: at}
"""
    outcome = run(parse_scenario(text, tmp_path))
    assert outcome.services["a"].attained == 3


def test_bursts_that_one_instance_cannot_carry_do_not_make_the_layout_swing(
    cores: Executor,
) -> None:
    """Overloaded, it gets the one partition that is largest, not two of which it uses one."""
    bursts = """{kind: bursts, rate: 20, burst_rate: 300, mean_quiet: 20s, mean_burst: 5s}"""
    found = parse_scenario(
        f"""
name: s
duration: 600s
device: {{kind: cpu, units: 2}}
services:
  - name: a
    objective: {{latency: 50ms}}
    batch: {{max: 8}}
    cost: {{first: 5ms, per_row: 3ms, parallel: 0.9}}
    arrivals: {bursts}
jobs: [{{name: j, cost: {{rate: 5}}}}]
""",
        Path(),
    )
    outcome, fixed = cores.map(run, [found] * 2, [Tuning(), Tuning(split=(2, 2))])
    assert outcome.repartitions <= 4
    assert outcome.figures()["attainment"] > fixed.figures()["attainment"] - 0.02
