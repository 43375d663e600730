"""A service's percentile reaches the rules: the stricter it is, the more careful they are."""

from __future__ import annotations

import random

import pytest

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.units import MS
from cotenant.policy.estimate import Quantile
from cotenant.policy.tail import WHOLE, caution, missable, watched
from tests.builders import World, one, only

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9, 99.99)


def test_stricter_percentiles_leave_less_to_miss_and_are_predicted_with_more_caution() -> None:
    allowed = [missable(p) for p in PERCENTILES]
    assert allowed == sorted(allowed, reverse=True) and min(allowed) > 0
    for rule in (watched, caution):
        found = [rule(p) for p in PERCENTILES]
        assert found == sorted(found) and found[0] < found[-1]


@pytest.mark.parametrize("percentile", PERCENTILES)
def test_what_lending_watches_lies_below_the_percentile_and_is_a_quantile(percentile) -> None:
    assert watched(percentile) <= WHOLE - missable(percentile)
    found, rng = Quantile(step=MS // 4, ppm=watched(percentile)), random.Random(1)
    above = 0
    for i in range(60_000):
        sample = rng.randrange(100 * MS)
        above += i >= 30_000 and sample > found.value
        found.add(sample)
    assert above / 30_000 == pytest.approx(1 - watched(percentile) / WHOLE, abs=0.01)


def admitted_at_once(percentile: float) -> int:
    """Of a service whose executions vary in length."""
    world = World(units=1).service(objective=50 * MS, max_batch=1, percentile=percentile).worker()
    world.planned({"s": (0,)})
    for i in range(50):
        batch, took = one(world.arrive(), a.Dispatch).batch.id, (2 + 4 * (i % 2)) * MS
        world.send(e.BatchDone(batch, took), after=took)
    admitted = 0
    while not only(world.arrive(), a.Reject):
        admitted += 1
    return admitted


def test_a_service_that_may_miss_less_admits_less_at_once() -> None:
    admitted = [admitted_at_once(p) for p in (50.0, 99.0, 99.99)]
    assert admitted == sorted(admitted, reverse=True) and admitted[0] > admitted[-1]


def waits_taken_longer(percentile: float) -> int:
    """The margin of a service after one late answer in fifty."""
    world = World(units=1).service(objective=50 * MS, max_batch=1, percentile=percentile)
    world.worker(exec_ns=5 * MS)
    world.planned({"s": (0,)})
    for i in range(500):
        first = one(world.arrive(), a.Dispatch).batch.id
        world.arrive()
        took = (60 if i % 50 == 0 else 5) * MS
        for second in only(world.send(e.BatchDone(first, 5 * MS), after=5 * MS), a.Dispatch):
            world.send(e.BatchDone(second.batch.id, 5 * MS), after=took)
    return world.d.state.services["s"].margin


def test_what_is_late_more_often_than_allowed_widens_the_margin() -> None:
    assert waits_taken_longer(90.0) < waits_taken_longer(99.9)
