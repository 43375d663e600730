"""Rates with level and trend."""

from __future__ import annotations

import pytest

from cotenant.domain.units import S
from cotenant.policy.forecast import MOST, Holt, Season


def after(*values: float) -> Holt:
    holt = Holt()
    for value in values:
        holt.add(value)
    return holt


def test_the_first_value_is_the_level() -> None:
    assert (after(7.0).level, after(7.0).trend) == (7.0, 0.0)


def test_a_constant_rate_has_no_trend() -> None:
    holt = after(*[50.0] * 100)
    assert holt.level == pytest.approx(50.0)
    assert holt.trend == pytest.approx(0.0)


def test_a_rise_is_a_trend_and_less_than_it_was() -> None:
    holt = after(*(float(n) for n in range(50)))
    assert 0.0 < holt.trend < 1.0


def test_a_fall_is_never_below_nothing() -> None:
    assert after(100.0, 10.0, 0.0, 0.0).level >= 0.0


def test_a_trend_fades_when_the_rise_ends() -> None:
    holt = after(*(10.0 * n for n in range(20)), *[200.0] * 60)
    assert abs(holt.trend) < 0.5


def seasoned(days: int, *rates: float) -> Season:
    """A day of as many seconds as there are rates, in slots of one."""
    season = Season.of(len(rates) * S, len(rates))
    for second in range(days * len(rates) + 1):
        season.add(second * S, rates[second % len(rates)])
    return season


def test_on_the_first_day_nothing_is_usual() -> None:
    season = Season.of(4 * S, 4)
    for second in range(3):
        season.add(second * S, 10.0)
        assert season.factor(second * S, (second + 1) * S) == 1.0


def test_what_comes_is_to_what_is_as_their_slots_are_to_each_other() -> None:
    season = seasoned(3, 10.0, 10.0, 30.0, 10.0)
    assert season.factor(1 * S, 2 * S) == pytest.approx(3.0, rel=0.15)
    assert season.factor(2 * S, 3 * S) == pytest.approx(1 / 3, rel=0.15)
    assert season.factor(0, 1 * S) == pytest.approx(1.0)


def test_a_factor_is_bounded_even_from_nothing() -> None:
    season = seasoned(3, 0.0, 1000.0)
    assert season.factor(0, 1 * S) == MOST
    assert season.factor(1 * S, 2 * S) == 1 / MOST


def test_a_habit_changes_over_days() -> None:
    season = seasoned(3, 10.0, 30.0)
    for second in range(6, 40):
        season.add(second * S, 10.0)
    assert season.factor(0, 1 * S) == pytest.approx(1.0, rel=0.05)
