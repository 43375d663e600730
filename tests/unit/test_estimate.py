"""What a batch will cost: learned from executions, never from one outlier."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.domain.units import MS
from cotenant.policy.estimate import ExecTable, Quantile

TIMES = st.integers(1, 10**9)


def table(*samples: tuple[int, int, int]) -> ExecTable:
    found = ExecTable()
    for units, rows, ns in samples:
        found.observe(units, rows, ns)
    return found


def test_nothing_measured_is_nothing_predicted() -> None:
    assert ExecTable().predict(1, 1) == 0


def test_a_prediction_lies_above_the_mean() -> None:
    assert table((1, 1, 8 * MS)).predict(1, 1) > 8 * MS


def test_steady_times_are_predicted_closely() -> None:
    steady = table(*[(1, 1, 8 * MS)] * 50)
    assert steady.predict(1, 1) == pytest.approx(8 * MS, rel=0.01)


def test_a_change_is_followed() -> None:
    found = table(*[(1, 1, 8 * MS)] * 50, *[(1, 1, 16 * MS)] * 50)
    assert found.predict(1, 1) == pytest.approx(16 * MS, rel=0.05)


def test_one_outlier_counts_as_a_few_times_the_mean() -> None:
    found = table(*[(1, 1, 8 * MS)] * 50, (1, 1, 10_000 * MS))
    assert found.predict(1, 1) < 5 * 8 * MS


def test_sizes_between_measured_ones_are_interpolated() -> None:
    found = table((1, 1, 8 * MS), (1, 4, 20 * MS))
    assert found.predict(1, 1) < found.predict(1, 2) < found.predict(1, 3) < found.predict(1, 4)


def test_sizes_beyond_measured_ones_are_extrapolated() -> None:
    found = table((1, 1, 8 * MS), (1, 4, 20 * MS))
    assert found.predict(1, 8) == found.predict(1, 4) + 16 * MS
    assert table((1, 2, 8 * MS)).predict(1, 4) == 20 * MS


def test_fewer_rows_than_measured_cost_no_more() -> None:
    assert table((1, 4, 20 * MS)).predict(1, 1) == table((1, 4, 20 * MS)).predict(1, 4)


def test_unknown_cores_fall_back_to_the_nearest_fewer() -> None:
    found = table((1, 1, 16 * MS), (4, 1, 4 * MS))
    assert found.predict(3, 1) == found.predict(1, 1)
    assert found.predict(8, 1) == found.predict(4, 1)
    assert table((4, 1, 4 * MS)).predict(2, 1) == table((4, 1, 4 * MS)).predict(4, 1)


@given(st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 16), TIMES), min_size=1))
def test_whatever_was_seen_a_prediction_is_above_zero(samples: list[tuple[int, int, int]]) -> None:
    found = table(*samples)
    assert all(found.predict(u, r) > 0 for u in (1, 3, 8) for r in (1, 5, 64))


@given(st.lists(TIMES, min_size=1, max_size=200))
def test_the_mean_stays_within_what_was_seen(times: list[int]) -> None:
    found = table(*[(1, 1, ns) for ns in times])
    assert min(times) <= found.mean[1][1] + len(times) and found.mean[1][1] <= max(times)


def warmed(*samples: tuple[int, int, int]) -> ExecTable:
    found = ExecTable()
    for units, rows, ns in samples:
        found.profile(units, rows, ns)
    return found


def test_more_units_than_have_served_are_expected_to_take_longer_than_in_the_warm_up() -> None:
    found = warmed((1, 1, 2 * MS), (1, 8, 6 * MS), (2, 8, 3 * MS))
    for _ in range(2000):
        found.observe(1, 8, 9 * MS)
    assert found.expected()[2][8] == pytest.approx(6 * MS, rel=0.01)
    assert found.expected()[1][8] == pytest.approx(9 * MS, rel=0.01)
    assert found.expected()[1][1] == 2 * MS


def test_once_they_have_served_they_are_expected_to_take_what_they_took() -> None:
    found = warmed((1, 1, 2 * MS), (2, 1, 1 * MS))
    for _ in range(2000):
        found.observe(1, 1, 4 * MS)
    for _ in range(100):
        found.observe(2, 1, 2 * MS)
    assert found.expected()[2][1] == pytest.approx(2 * MS, rel=0.01)


def test_a_few_samples_do_not_change_what_is_expected_of_the_rest() -> None:
    found = warmed((1, 1, 2 * MS), (2, 1, 1 * MS))
    for _ in range(8):
        found.observe(1, 1, 3 * MS)
    assert found.expected()[2][1] == pytest.approx(1 * MS, rel=0.05)


def test_until_something_was_executed_warm_ups_are_believed() -> None:
    assert warmed((1, 1, 2 * MS), (2, 1, 1 * MS)).expected() == {1: {1: 2 * MS}, 2: {1: 1 * MS}}
    assert table((1, 3, 2 * MS)).expected() == {1: {3: 2 * MS}}


def test_service_that_is_quicker_than_the_warm_up_promises_nothing() -> None:
    found = warmed((1, 1, 4 * MS), (2, 1, 2 * MS))
    for _ in range(2000):
        found.observe(1, 1, 1 * MS)
    assert found.expected()[2][1] == 2 * MS


def test_a_quantile_settles_where_the_share_of_samples_lies_below() -> None:
    quantile = Quantile(step=MS)
    for n in range(20_000):
        quantile.add(n * 7919 % 1000 * MS // 10)
    assert quantile.value == pytest.approx(95 * MS, rel=0.1)


@given(st.lists(st.integers(0, 10**12)))
def test_a_quantile_is_never_negative(samples: list[int]) -> None:
    quantile = Quantile(step=MS)
    for sample in samples:
        quantile.add(sample)
        assert quantile.value >= 0
