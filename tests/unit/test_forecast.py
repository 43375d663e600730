"""Rates with level and trend."""

from __future__ import annotations

import pytest

from weft.policy.forecast import Holt


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
    assert holt.ahead(10) == pytest.approx(50.0)


def test_a_rise_is_carried_ahead_but_not_to_infinity() -> None:
    holt = after(*(float(n) for n in range(50)))
    assert holt.trend > 0
    assert holt.level < holt.ahead(1) < holt.ahead(10) <= holt.level + 5 * holt.trend
    assert holt.ahead(1000) == pytest.approx(holt.level + 4 * holt.trend)


def test_a_fall_never_predicts_less_than_nothing() -> None:
    assert after(100.0, 10.0, 0.0, 0.0).ahead(100) >= 0.0


def test_a_trend_fades_when_the_rise_ends() -> None:
    holt = after(*(10.0 * n for n in range(20)), *[200.0] * 60)
    assert abs(holt.trend) < 0.5
