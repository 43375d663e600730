"""Unscheduled devices: what must hold of them by arithmetic."""

from __future__ import annotations

import msgspec
import pytest

from cotenant.domain.units import MS
from cotenant.policy.utility import speed_up
from cotenant.sim.outcome import Outcome
from cotenant.sim.policies import POLICIES, simulate
from cotenant.sim.scenario import Scenario
from cotenant.sim.sharing import SharedWorld, Unscheduled
from tests.sim.test_devices import mig
from tests.sim.test_world import scenario

MODES = [Unscheduled(), Unscheduled(quantum=2 * MS)]
JOB = "{name: j, cost: {rate: 5, parallel: 0.9, resume: 0ms}}"


def run(found: Scenario, how: Unscheduled) -> Outcome:
    return SharedWorld(found, how, (0, 0)).run()


@pytest.mark.parametrize("how", MODES, ids=["shared", "sliced"])
@pytest.mark.parametrize("rate", [20, 2000])
def test_every_request_is_answered_refused_or_open(how: Unscheduled, rate: float) -> None:
    outcome = run(scenario(rate=rate, jobs=JOB, seconds=20), how)
    tally = outcome.services["a"]
    assert tally.offered == tally.answered + sum(tally.refused.values()) + outcome.open
    assert 0 < outcome.figures()["utilization"] <= 1.001
    assert msgspec.json.encode(outcome) == msgspec.json.encode(
        run(scenario(rate=rate, jobs=JOB, seconds=20), how)
    )


def test_a_job_alone_runs_at_its_speed_when_shared() -> None:
    outcome = run(scenario(rate=0, jobs=JOB), Unscheduled())
    assert outcome.figures()["job_rate"] == pytest.approx(5 * speed_up(0.9, 0, 4), rel=0.01)


def test_two_equal_jobs_get_half_of_the_slices_each() -> None:
    jobs = f"{JOB}, {JOB.replace('name: j', 'name: k')}"
    outcome = run(scenario(rate=0, jobs=jobs), Unscheduled(quantum=2 * MS))
    held = [job.held_ns for job in outcome.jobs.values()]
    assert held[0] == pytest.approx(held[1], rel=0.01)
    lost = 2 / 2.1
    assert outcome.figures()["job_rate"] == pytest.approx(5 * speed_up(0.9, 0, 4) * lost, rel=0.02)


def test_a_service_beside_a_job_takes_twice_as_long_in_turns() -> None:
    """Slices much shorter than the execution: the service has every other one."""
    alone = run(scenario(rate=1, first="40ms"), Unscheduled(quantum=MS))
    beside = run(scenario(rate=1, first="40ms", jobs=JOB), Unscheduled(quantum=MS))
    medians = [o.services["a"].quantile_ns(0.5) for o in (alone, beside)]
    assert medians[1] == pytest.approx(2.1 * medians[0], rel=0.1)


def test_who_shares_a_whole_gpu_without_isolation_is_slowed_down_even_if_it_could_do_mig() -> None:
    found = mig(rate=20)
    (service,) = found.services
    cost = msgspec.structs.replace(service.costs["mig"], saturates=2)
    small = msgspec.structs.replace(service, costs={"mig": cost})
    found = msgspec.structs.replace(found, services=(small,))
    without = msgspec.structs.replace(found, jobs=())
    alone, beside = (run(s, Unscheduled(beside=True)) for s in (without, found))
    medians = [o.services["a"].quantile_ns(0.5) for o in (alone, beside)]
    assert medians[1] > 1.05 * medians[0]


def test_every_policy_runs() -> None:
    found = scenario(units=2, rate=20, jobs=JOB, seconds=5)
    for policy in POLICIES.values():
        if policy.name == "fixed":
            continue  # it needs a scenario that states a layout
        for setting in policy.settings(found).values():
            assert simulate(found, setting, 0).services["a"].offered > 50
