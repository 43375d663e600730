"""Which candidates are kept, and that each other one is refused with a reason."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.domain.variant import Compared
from cotenant.optimize.choosing import Marks, dominated, inaccurate, slow

MARKS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 3)), max_size=7
).map(lambda found: [Marks(str(i), *map(float, m[:2]), m[2]) for i, m in enumerate(found)])


def compared(value: float, bound: float, measure: str = "argmax") -> Compared:
    return Compared(
        measure=measure,
        rows=1000,
        original=0.9,
        value=value,
        lost=10,
        won=5,
        drop=0.9 - value,
        bound=bound,
    )


def no_worse(one: Marks, other: Marks) -> bool:
    return one.drop <= other.drop and one.ratio <= other.ratio and one.size <= other.size


@given(MARKS)
def test_what_stays_beats_what_goes_and_not_one_another(marks: list[Marks]) -> None:
    beaten = dominated(marks)
    stay = [m for m in marks if m.name not in beaten]
    assert bool(stay) == bool(marks)
    for m in marks:
        others = [s for s in stay if s is not m]
        assert (m.name in beaten) == any(no_worse(s, m) for s in others)


@given(MARKS)
def test_whoever_is_named_stays(marks: list[Marks]) -> None:
    beaten = dominated(marks)
    assert not set(beaten.values()) & set(beaten)


def test_the_bound_decides_not_what_was_lost() -> None:
    assert not inaccurate(compared(0.899, 0.008), 0.01, 0.0)
    assert inaccurate(compared(0.899, 0.02), 0.01, 0.0)
    assert inaccurate(compared(0.8, 0.12), 0.01, 0.0)


def test_the_floor_counts_where_there_are_labels() -> None:
    assert inaccurate(compared(0.899, 0.005), 0.01, 0.95)
    assert not inaccurate(compared(0.899, 0.005, "agreement"), 0.01, 0.95)


@pytest.mark.parametrize(("ratio", "surely"), [(1.2, 1.3), (1.0, 1.1), (0.5, 1.5)])
def test_what_is_not_surely_faster_is_refused(ratio: float, surely: float) -> None:
    assert slow(ratio, surely)
    assert not slow(0.5, 0.6)
