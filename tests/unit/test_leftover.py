"""What a layout leaves for jobs."""

from __future__ import annotations

import math

import msgspec
import pytest

from cotenant.domain.snapshot import JobFacts
from cotenant.policy.judging import judge
from cotenant.policy.layouts import unit_layout
from cotenant.policy.leftover import pauses_of, worth
from cotenant.policy.views import View
from tests.unit.test_planner import Planning, job, service

STUCK = [0.0, 1.0, 1.9, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
"""Speeds of a job that makes nothing of more than two units."""


def worth_of(
    units: int,
    rate: float = 0.0,
    speeds: list[float] | None = None,
    lost: float = 0.0,
    jobs: tuple[JobFacts, ...] = (job(),),
) -> float:
    """Of a box of eight cores of which services have some."""
    world = Planning(8)
    names = [j.id for j in jobs]
    view = View(
        world.now,
        world.devices[0],
        world.present,
        (service(rate=rate),),
        jobs,
        {name: speeds for name in names if speeds is not None},
        dict.fromkeys(names, lost),
    )
    verdict = judge(view, unit_layout(world.devices[0], units, 1), 0.0)
    own = dict.fromkeys(names, (8 - units) // len(names))
    return math.exp(worth(view, verdict, own, 1.0))


def test_what_nobody_asks_for_is_worth_as_much_borrowed_as_owned() -> None:
    assert worth_of(8) == pytest.approx(worth_of(1)) == pytest.approx(9.0)


def test_what_is_used_is_not_lent() -> None:
    assert worth_of(8, rate=100.0) < 0.95 * worth_of(8)


def test_owning_saves_the_work_that_pauses_cost() -> None:
    assert worth_of(1, rate=50.0, lost=0.05) > 1.05 * worth_of(8, rate=50.0, lost=0.05)
    assert worth_of(1, rate=50.0) == pytest.approx(worth_of(8, rate=50.0), rel=0.02)


def test_a_job_that_does_not_scale_gains_nothing_from_borrowing_much() -> None:
    assert worth_of(8, speeds=STUCK) == pytest.approx(worth_of(6, speeds=STUCK))
    jobs = (job("a"), job("b"))
    assert worth_of(2, speeds=STUCK, jobs=jobs) > 1.2 * worth_of(8, speeds=STUCK, jobs=jobs)


def test_what_is_lent_counts_for_whom_it_goes_to() -> None:
    world, jobs = Planning(8), (job("a"), job("b"))
    speeds = {"a": STUCK, "b": [float(x) for x in range(9)]}
    view = View(world.now, world.devices[0], world.present, (service(rate=0.0),), jobs, speeds)
    verdict = judge(view, unit_layout(world.devices[0], 4, 1), 0.0)
    own = {"a": 2, "b": 2}
    to_b, to_both = (
        worth(msgspec.structs.replace(view, targets=targets), verdict, own, 0.0)
        for targets in ({"a": 2.0, "b": 6.0}, {"a": 4.0, "b": 4.0})
    )
    assert to_b == pytest.approx(math.log1p(2.0) + math.log1p(6.0), rel=0.02)
    assert to_b > 1.1 * to_both


def test_pauses_count_by_the_part_that_they_take() -> None:
    world = Planning(8)
    view = View(world.now, world.devices[0], world.present, (service(rate=40.0),), (job(),))
    verdict = judge(view, unit_layout(world.devices[0], 8, 1), 0.0)
    idle = 1 - verdict.busiest
    assert pauses_of(verdict, 8.0) == pytest.approx(40.0 * idle / 8)
    assert pauses_of(verdict, 0.0) == 0.0
