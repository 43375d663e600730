"""Latency at a load: what any queue must satisfy, and what simulation of one shows."""

from __future__ import annotations

import math
import random
from bisect import bisect_right

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.domain.units import MS
from cotenant.policy.queueing import batch_delay, lost, wait_quantile


def test_an_idle_server_makes_nobody_wait() -> None:
    assert wait_quantile(5 * MS, 0.0, 99.0) == 0.0
    assert wait_quantile(5 * MS, 0.009, 99.0) == 0.0


@pytest.mark.parametrize("rho", [1.0, 1.5])
def test_a_saturated_one_makes_all_wait_for_ever(rho: float) -> None:
    assert math.isinf(wait_quantile(5 * MS, rho, 50.0))


@given(st.floats(0.02, 0.97), st.floats(0.001, 0.02), st.floats(50, 99.9))
def test_more_load_and_a_higher_percentile_never_wait_less(
    rho: float, more: float, percentile: float
) -> None:
    wait = wait_quantile(5 * MS, rho, percentile)
    assert wait_quantile(5 * MS, rho + more, percentile) >= wait
    assert wait_quantile(5 * MS, rho, min(99.99, percentile + 0.05)) >= wait
    assert wait_quantile(10 * MS, rho, percentile) >= wait


@pytest.mark.parametrize("servers", [1, 2, 8])
@pytest.mark.parametrize("rho", [0.3, 0.6, 0.8])
def test_the_prediction_is_on_the_safe_side_of_poisson_arrivals(rho: float, servers: int) -> None:
    source, now, waits = random.Random(1), 0.0, []
    free = [0.0] * servers
    for _ in range(50_000):
        now += source.expovariate(rho * servers)
        first = min(range(servers), key=free.__getitem__)
        waits.append(max(0.0, free[first] - now))
        free[first] = max(now, free[first]) + 1.0
    seen = sorted(waits)[int(0.99 * len(waits))]
    predicted = wait_quantile(1.0, rho, 99.0, servers)
    assert seen <= predicted <= (4 * seen if servers == 1 else max(4 * seen, 0.4))


def test_more_servers_at_the_same_utilization_wait_less() -> None:
    waits = [wait_quantile(MS, 0.7, 99.0, servers) for servers in (1, 2, 4, 8)]
    assert waits == sorted(waits, reverse=True)


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.5, 3.0])
@pytest.mark.parametrize("per_row", [0.05, 0.15, 0.3])
def test_what_batching_makes_of_the_wait_is_on_the_safe_side(rate: float, per_row: float) -> None:
    predicted = batch_delay(1e9, (1 + 15 * per_row) * 1e9, 16, rate, 99.0) / 1e9
    source, now, arrivals = random.Random(1), 0.0, []
    for _ in range(30_000):
        now += source.expovariate(rate)
        arrivals.append(now)
    latencies, first, now = [], 0, 0.0
    while first < len(arrivals):
        now = max(now, arrivals[first])
        waiting = bisect_right(arrivals, now, first, min(len(arrivals), first + 16))
        now += 1 + per_row * (waiting - first - 1)
        latencies += [now - at for at in arrivals[first:waiting]]
        first = waiting
    assert predicted >= sorted(latencies)[int(0.99 * len(latencies))]
    assert rate * per_row > 0.3 or predicted < 6


def test_batches_that_fill_up_are_not_predicted() -> None:
    assert math.isinf(batch_delay(1e9, 2e9, 8, 100.0, 99.0))
    assert math.isinf(batch_delay(1e9, 16e9, 16, 1.0, 99.0))
    assert math.isinf(batch_delay(1e9, 1e9, 1, 0.1, 99.0))


def refused(loads: list[tuple[float, float]], servers: int) -> list[float]:
    """For each class of (patience, load): the share that comes when the work before it would take
    longer than it waits, of Poisson arrivals at servers that take 1 for each."""
    source, now = random.Random(1), 0.0
    free, gone, came = [0.0] * servers, [0] * len(loads), [0] * len(loads)
    total = sum(load for _, load in loads)
    for _ in range(60_000):
        now += source.expovariate(total * servers)
        (index,) = source.choices(range(len(loads)), [load for _, load in loads])
        first = min(range(servers), key=free.__getitem__)
        came[index] += 1
        if free[first] - now > loads[index][0]:
            gone[index] += 1
        else:
            free[first] = max(now, free[first]) + 1.0
    return [out / n for out, n in zip(gone, came, strict=True)]


@pytest.mark.parametrize("servers", [1, 4])
@pytest.mark.parametrize("patience", [0.5, 3.0, 20.0])
@pytest.mark.parametrize("rho", [0.4, 0.8, 1.0, 1.2, 2.5])
def test_the_part_that_is_lost_is_about_that_of_a_queue_with_refusals(
    rho: float, patience: float, servers: int
) -> None:
    (seen,) = refused([(patience, rho)], servers)
    assert lost(1.0, [(patience, rho)], patience, servers) == pytest.approx(seen, abs=0.05)


@pytest.mark.parametrize("rho", [0.8, 1.2, 2.0])
def test_those_who_can_wait_longer_lose_less(rho: float) -> None:
    loads = [(2.0, rho), (8.0, 0.2)]
    hasty, patient = refused(loads, 1)
    assert lost(1.0, loads, 2.0) == pytest.approx(hasty, abs=0.06)
    assert lost(1.0, loads, 8.0) == pytest.approx(patient, abs=0.02)
    assert lost(1.0, loads, 8.0) < 0.1 * lost(1.0, loads, 2.0)


@given(st.floats(0.0, 5.0), st.floats(0.0, 50.0), st.floats(0.01, 3.0), st.integers(1, 8))
def test_more_load_and_less_patience_never_lose_less(
    rho: float, patience: float, more: float, servers: int
) -> None:
    share = lost(1.0, [(patience, rho)], patience, servers)
    assert 0.0 <= share <= 1.0
    assert lost(1.0, [(patience, rho + more)], patience, servers) >= share - 1e-6
    assert lost(1.0, [(patience + more, rho)], patience + more, servers) <= share + 1e-6


def test_what_is_lost_over_saturation_goes_to_what_cannot_be_served() -> None:
    assert lost(1.0, [(1e4, 2.0)], 1e4) == pytest.approx(0.5)
    assert lost(1.0, [(1e4, 0.9)], 1e4) == pytest.approx(0.0, abs=1e-6)
