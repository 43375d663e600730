"""Dividing units among jobs: the greedy choice is the best there is."""

from __future__ import annotations

import math
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from cotenant.domain.snapshot import JobFacts
from cotenant.policy.sharing import divide

JOBS = st.lists(
    st.tuples(
        st.sampled_from([0.5, 1.0, 2.0, 7.0]),
        st.sampled_from([0.0, 0.1, 0.3]),
        st.sampled_from([0.25, 0.5, 1.0]),
    ),
    min_size=1,
    max_size=3,
)


def jobs(*facts: tuple[float, float, float]) -> list[JobFacts]:
    return [
        JobFacts(f"j{i}", weight, guaranteed, limit, 0.0, 0)
        for i, (weight, guaranteed, limit) in enumerate(facts)
    ]


def most(job: JobFacts, units: int) -> int:
    return max(1, int(job.limit * units + 1e-9))


def utility(shares: dict[str, int], of: list[JobFacts]) -> float:
    return sum(job.weight * math.log(1 + shares[job.id]) for job in of)


@given(JOBS, st.integers(0, 8))
def test_no_other_division_is_worth_more(
    facts: list[tuple[float, float, float]], units: int
) -> None:
    found = jobs(*facts)
    least = divide(0, found, 8) | {j.id: 0 for j in found}
    given_first = units
    for job in sorted(found, key=lambda j: (-j.guaranteed, j.id)):
        least[job.id] = min(given_first, int(job.guaranteed * 8 + 1e-9))
        given_first -= least[job.id]
    best = max(
        (
            utility(shares, found)
            for choice in product(range(units + 1), repeat=len(found))
            if sum(choice) <= units
            for shares in [{j.id: n for j, n in zip(found, choice, strict=True)}]
            if all(least[j.id] <= shares[j.id] <= max(least[j.id], most(j, 8)) for j in found)
        ),
        default=0.0,
    )
    assert math.isclose(utility(divide(units, found, 8), found), best, abs_tol=1e-9)


@given(JOBS, st.integers(0, 16))
def test_never_more_than_there_is_nor_than_a_limit_allows(
    facts: list[tuple[float, float, float]], units: int
) -> None:
    found = jobs(*facts)
    shares = divide(units, found, 16)
    assert sum(shares.values()) <= units
    for job in found:
        assert shares[job.id] <= max(most(job, 16), int(job.guaranteed * 16 + 1e-9))


def test_equal_weights_get_equal_shares() -> None:
    assert divide(6, jobs((1, 0, 1), (1, 0, 1), (1, 0, 1)), 8) == {"j0": 2, "j1": 2, "j2": 2}


def test_weights_count() -> None:
    shares = divide(8, jobs((3, 0, 1), (1, 0, 1)), 8)
    assert shares["j0"] > shares["j1"] > 0


@given(JOBS, st.integers(0, 8), st.integers(1, 16))
def test_parts_of_units_are_divided_as_units_are(
    facts: list[tuple[float, float, float]], units: int, parts: int
) -> None:
    found = jobs(*facts)
    shares = divide(units, found, 8, parts=parts)
    assert sum(shares.values()) <= units * parts
    whole = divide(units, found, 8)
    finer = sum(j.weight * math.log1p(shares[j.id] / parts) for j in found)
    if not any(j.guaranteed for j in found):
        assert finer >= utility(whole, found) - 1e-9


def test_three_units_are_one_and_a_half_for_each_of_two() -> None:
    assert divide(3, jobs((1, 0, 1), (1, 0, 1)), 4, parts=16) == {"j0": 24, "j1": 24}


def test_who_does_not_scale_gets_no_part_that_is_of_no_use_to_it() -> None:
    curves = {"j0": [0.0, 1.0, 1.8, 1.8, 1.8], "j1": [0.0, 1.0, 2.0, 3.0, 4.0]}
    shares = divide(4, jobs((1, 0, 1), (1, 0, 1)), 4, curves, parts=4)
    assert shares["j0"] <= 2 * 4 <= shares["j1"]
    assert sum(shares.values()) == 4 * 4


def test_guarantees_come_first() -> None:
    assert divide(4, jobs((9, 0, 1), (1, 0.5, 1)), 8) == {"j0": 0, "j1": 4}


def test_without_jobs_nothing_is_divided() -> None:
    assert divide(8, [], 8) == {}
