"""What devices charge: memory of jobs by bytes and bandwidth, as assumed, then as it was seen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.domain.costs import COPYING, PAGING, Copy, Eviction
from cotenant.domain.units import MS, S

GIB = 2**30
sizes = st.integers(1, 512 * GIB)


@pytest.mark.parametrize("cost", [COPYING, PAGING])
@given(a=sizes, b=sizes)
def test_taking_costs_a_job_at_least_what_the_bytes_take_both_ways(
    cost: Eviction, a: int, b: int
) -> None:
    assert cost.price(a) >= round((cost.out.byte + cost.back.byte) * a) - 1
    assert cost.price(a) <= cost.price(a + b) <= cost.price(a) + cost.price(b)
    assert cost.price(0) == cost.out.ns(0) == 0


def test_each_allocation_costs_something() -> None:
    copy = Copy(1 * MS, 0.5)
    assert copy.ns(2000, 3) == 3 * MS + 1000


@given(rate=st.floats(0.01, 10.0), size=st.integers(GIB, 64 * GIB))
def test_what_is_seen_again_and_again_is_believed(rate: float, size: int) -> None:
    copy = COPYING.out
    for _ in range(40):
        copy = copy.seen(size, copy.each + round(rate * size))
    assert copy.byte == pytest.approx(rate, rel=0.01)


def test_little_tells_nothing() -> None:
    assert COPYING.out.seen(4096, 1 * S) == COPYING.out
    assert COPYING.out.seen(0, 1 * S) == COPYING.out
    assert COPYING.out.seen(GIB, 0) == COPYING.out
