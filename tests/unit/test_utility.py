"""Learning what jobs make of space."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.policy.utility import LOST, Curve, speed_up


def learned(parallel: float, cap: int, tried: tuple[int, ...], noise: float = 0.05) -> Curve:
    source, curve = random.Random(1), Curve(8)
    for _ in range(30):
        for units in tried:
            rate = 7.0 * speed_up(parallel, cap, units) * source.gauss(1.0, noise)
            curve.observe({units: 1.0}, rate)
    return curve


def test_before_anything_is_seen_more_space_is_expected_to_help() -> None:
    expected = Curve(8).speed_ups()
    assert expected[0] == 0.0
    assert expected == sorted(expected)
    assert expected[8] > 3.0


@pytest.mark.parametrize("cap", [2, 4, 8])
@pytest.mark.parametrize("parallel", [0.5, 0.9, 0.97])
def test_a_curve_is_learned_to_within_a_tenth(parallel: float, cap: int) -> None:
    curve = learned(parallel, cap, (1, 2, 4, 8))
    found = curve.speed_ups()
    errors = [abs(found[x] / speed_up(parallel, cap, x) - 1) for x in range(1, 9)]
    assert sum(errors) / len(errors) < 0.1
    assert curve.rates()[1] == pytest.approx(7.0, rel=0.1)


def test_what_was_not_tried_stays_unsure_and_what_was_does_not() -> None:
    curve = learned(0.9, 2, (4,))
    assert curve.unsure(8) or curve.unsure(1)
    both = learned(0.9, 2, (1, 2, 4, 8))
    assert not any(both.unsure(x) for x in (1, 2, 4, 8))


def test_time_shared_between_sizes_counts_for_both() -> None:
    curve, source = Curve(4), random.Random(2)
    for _ in range(60):
        part = source.random()
        rate = 3.0 * (part * speed_up(0.9, 4, 4) + (1 - part) * speed_up(0.9, 4, 1))
        curve.observe({4: part, 1: 1 - part}, rate)
    assert curve.speed_ups()[4] == pytest.approx(speed_up(0.9, 4, 4), rel=0.1)


def test_a_job_that_changes_is_learned_anew() -> None:
    curve = learned(0.97, 8, (1, 4, 8))
    for _ in range(300):
        for units in (1, 4, 8):
            curve.observe({units: 1.0}, 7.0 * speed_up(0.9, 2, units))
    assert curve.speed_ups()[8] == pytest.approx(speed_up(0.9, 2, 8), rel=0.15)


def test_a_gang_that_waits_for_itself_is_told_from_one_that_does_not() -> None:
    source = random.Random(4)
    for gain in (1.0, 1.3, 1.7):
        curve = Curve(4)
        for _ in range(30):
            for units in (1, 2, 4):
                true = speed_up(1.0, 2, units, gain)
                curve.observe({units: 1.0}, 30.0 * true * source.gauss(1.0, 0.03))
        assert curve.speed_ups()[2] == pytest.approx(2.0 * gain, rel=0.1)
        assert curve.rates()[1] == pytest.approx(30.0, rel=0.1)


@pytest.mark.parametrize(("threads", "gain"), [(3, 1.5), (4, 1.5)])
def test_a_gang_between_those_that_are_looked_for_is_found_nearly(
    threads: int, gain: float
) -> None:
    """Its speeds are spelled out: the formula is that of the family."""
    true = {1: 10.0, 2: 20.0, 3: 10.0 * (3 * gain if threads == 3 else 3), 4: 10.0 * threads * gain}
    curve = Curve(4)
    for _ in range(30):
        for units, rate in true.items():
            curve.observe({units: 1.0}, rate)
    assert curve.rates()[1:] == pytest.approx(list(true.values()), rel=0.2)


@pytest.mark.parametrize("cost", [0.0005, 0.005, 0.02])
def test_what_a_pause_costs_is_learned_beside_the_speed(cost: float) -> None:
    curve, source = Curve(4), random.Random(3)
    for _ in range(60):
        units, pauses = source.choice([1, 2, 4]), source.choice([0.0, 10.0, 30.0])
        held = source.uniform(0.5, 1.0)
        made = 3.0 * speed_up(0.9, 4, units) * (held - cost * pauses) * source.gauss(1.0, 0.02)
        curve.observe({0: 1 - held, units: held}, max(0.0, made), pauses)
    assert curve.lost() == pytest.approx(cost, rel=0.3, abs=0.0005)
    assert curve.speed_ups()[4] == pytest.approx(speed_up(0.9, 4, 4), rel=0.1)
    assert curve.rates()[1] == pytest.approx(3.0, rel=0.1)


def test_a_pause_costs_what_was_assumed_until_it_is_seen() -> None:
    assert learned(0.9, 4, (1, 2, 4)).lost() == pytest.approx(LOST, rel=0.1)
    assert Curve(4).lost() == LOST


@given(st.lists(st.tuples(st.integers(1, 8), st.floats(0.0, 1e6)), max_size=20))
def test_whatever_is_seen_curves_rise_and_weights_are_shares(seen: list[tuple[int, float]]) -> None:
    curve = Curve(8)
    for units, rate in seen:
        curve.observe({units: 1.0}, rate)
    assert sum(curve.weights()) == pytest.approx(1.0)
    found = curve.speed_ups()
    assert all(b >= a - 1e-9 for a, b in pairwise(found))
    assert curve.rates()[1] >= 0.0
