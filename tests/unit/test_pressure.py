"""What measurement says against prediction."""

from __future__ import annotations

from itertools import pairwise

from cotenant.domain.snapshot import ServiceFacts
from cotenant.domain.units import S
from cotenant.policy.pressure import MOST, Pressure, note_pressure
from tests.unit.test_planner import Planning, job, service


class Counting:
    """A service whose counters go up second by second."""

    def __init__(self) -> None:
        self.pressure, self.now, self.answered, self.pressed = Pressure(), S, 0, 0

    def facts(self, **changes: float) -> ServiceFacts:
        return service(answered=self.answered, refused=0, pressed=self.pressed, **changes)

    def second(self, requests: int, pressed: int, foreseen: bool = False) -> float:
        self.now += S
        self.answered += requests
        self.pressed += pressed
        return note_pressure(self.pressure, self.facts(), self.now, 2 * S, 60 * S, foreseen)


def test_what_happened_before_it_was_watched_does_not_count() -> None:
    world = Counting()
    world.answered, world.pressed = 1000, 1000
    assert world.second(0, 0) == 1.0


def test_misses_within_the_percentile_are_allowed() -> None:
    world = Counting()
    assert max(world.second(1000, 9) for _ in range(60)) == 1.0


def test_more_than_that_weighs_on_the_load_again_and_again_up_to_a_bound() -> None:
    world = Counting()
    boosts = [world.second(100, 20) for _ in range(60)]
    assert boosts[0] == 1.0
    assert boosts[2] > 1.0
    assert boosts == sorted(boosts) or max(boosts) <= MOST
    assert MOST * 0.9 < max(boosts) <= MOST


def test_misses_that_were_foreseen_are_noted_and_weigh_nothing() -> None:
    world = Counting()
    assert max(world.second(100, 20, foreseen=True) for _ in range(60)) == 1.0
    assert world.pressure.foreseen_at and not world.pressure.raised_at


def test_a_handful_of_misses_says_nothing() -> None:
    world = Counting()
    assert max(world.second(1, int(second < 4)) for second in range(60)) == 1.0


def test_the_correction_fades() -> None:
    world = Counting()
    for _ in range(20):
        raised = world.second(100, 20)
    later = [world.second(100, 0) for _ in range(600)]
    assert all(after <= before for before, after in pairwise(later))
    assert later[-1] < 1 + (raised - 1) / 5


def test_a_service_that_misses_its_objective_gets_more_though_its_rate_is_low() -> None:
    def cores(pressed: int) -> int:
        world, counts = Planning(8, lend=False), 0
        for _ in range(120):
            counts += 60
            late = counts * pressed // 60
            facts = service(rate=60.0, answered=counts, pressed=late, instances=4)
            world.see(facts, job())
        return world.service_cores

    assert cores(pressed=5) > cores(pressed=0)
