"""The load that the planner tells, against what a simulated box then does."""

from __future__ import annotations

from statistics import fmean

import pytest

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.plan import Plan
from cotenant.domain.snapshot import Snapshot
from cotenant.domain.units import S
from cotenant.policy.planner import Planner
from cotenant.policy.planstate import Tuning
from cotenant.sim.world import World
from tests.sim.test_world import scenario

RATES = (5.0, 20.0, 60.0, 120.0, 180.0, 240.0, 400.0)


class _Watch:
    """Takes the load of a service each time that the planner looks."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self.loads: list[float] = []

    def decided(self, now: int, event: e.Event, actions: list[a.Action]) -> None:
        """Of no interest."""

    def planned(self, now: int, snapshot: Snapshot, plan: Plan | None) -> None:
        if now > 20 * S and "a" in self._planner.loads:
            self.loads.append(self._planner.loads["a"])


def run(rate: float, cores: int = 1) -> tuple[float, float]:
    """The mean load, and the attainment, of a service on so many cores at a rate."""
    planner = Planner(Tuning(split=(cores, 1), feedback=False))
    watch = _Watch(planner)
    found = scenario(units=cores, rate=rate, more="instances: 4")
    outcome = World(found, planner, (0, 0), observer=watch).run()
    return fmean(watch.loads), outcome.services["a"].attainment


@pytest.fixture(scope="module")
def runs() -> list[tuple[float, float]]:
    return [run(rate) for rate in RATES]


def test_load_rises_with_the_rate(runs: list[tuple[float, float]]) -> None:
    loads = [load for load, _ in runs]
    assert loads == sorted(loads)
    assert loads[0] < 1.0 < loads[-1]


def test_up_to_a_load_of_one_the_objective_is_held(runs: list[tuple[float, float]]) -> None:
    held = [attained for load, attained in runs if load <= 1.0]
    assert all(attained >= 0.99 for attained in held), "its percentile is 99"


def test_far_over_it_the_objective_is_missed_by_the_more_the_higher_it_is(
    runs: list[tuple[float, float]],
) -> None:
    missed = [attained for load, attained in runs if attained < 0.99]
    assert missed, "some rate is too much"
    assert all(load > 1.0 for load, attained in runs if attained < 0.99)
    assert missed == sorted(missed, reverse=True)


def test_twice_the_cores_bear_the_same_rate_at_less_load() -> None:
    assert run(120.0, cores=2)[0] < run(120.0, cores=1)[0]
