"""What a variant may have lost at most: against brute force, by simulation, and at the edges."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from cotenant.optimize import bounds


def likelihood(lost: int, won: int, rows: int, drop: float, gained: float) -> float:
    """The multinomial's, but for what does not depend on ``gained``."""
    parts = ((lost, gained + drop), (won, gained), (rows - lost - won, 1 - 2 * gained - drop))
    if any(p < 0 or (p == 0 and n) for n, p in parts):
        return -math.inf
    return sum(n * math.log(p) for n, p in parts if n)


def by_search(lost: int, won: int, rows: int) -> float:
    """Tango's bound with the restricted likelihood maximized on a grid in place of his formula."""
    z = NormalDist().inv_cdf(0.95)
    for drop in np.arange((lost - won) / rows, 1, 0.0005):
        grid = np.linspace(0, (1 - max(drop, 0)) / 2, 4001)
        if drop < 0:
            grid = grid - drop
        found = max(grid, key=lambda g: likelihood(lost, won, rows, float(drop), float(g)))
        spread = rows * (2 * found + drop * (1 - drop))
        if spread > 0 and (lost - won - rows * drop) / math.sqrt(spread) <= -z:
            return float(drop)
    return 1.0


@pytest.mark.parametrize(("lost", "won", "rows"), [(0, 0, 60), (3, 0, 60), (5, 4, 80)])
def test_the_bound_is_where_the_score_test_rejects(lost: int, won: int, rows: int) -> None:
    assert bounds.paired(lost, won, rows) == pytest.approx(by_search(lost, won, rows), abs=0.002)


@pytest.mark.parametrize(
    ("rows", "lost", "won"), [(100, 0.05, 0.03), (400, 0.02, 0.01), (1000, 0.01, 0.01)]
)
def test_the_true_drop_is_seldom_above_the_bound(rows: int, lost: float, won: float) -> None:
    random = np.random.default_rng(1)
    seen = random.multinomial(rows, [lost, won, 1 - lost - won], 1500)
    held = [bounds.paired(int(a), int(b), rows) >= lost - won for a, b, _ in seen]
    assert np.mean(held) > 0.92


def test_more_rows_alike_say_more() -> None:
    assert bounds.paired(30, 20, 3000) < bounds.paired(3, 2, 300)


def test_rows_without_a_difference_still_leave_doubt() -> None:
    assert 0 < bounds.paired(0, 0, 200) < bounds.paired(0, 0, 50)
    same = np.ones(50)
    assert bounds.of_means(same, same) > 0


def test_as_many_rows_as_are_said_to_do_would() -> None:
    lost, won, rows, allowed = 6, 4, 400, 0.01
    wanted = bounds.rows_wanted(lost, won, rows, allowed)
    assert wanted > rows
    more = wanted / rows
    assert bounds.paired(lost * more, won * more, wanted) <= allowed + 1e-6
    assert bounds.rows_wanted(20, 0, 400, allowed) == 0


def test_the_bootstrap_is_the_same_each_time_and_above_what_was_lost() -> None:
    random = np.random.default_rng(2)
    labels = random.normal(size=300)
    before, after = (labels + random.normal(0, s, 300) for s in (0.1, 0.2))
    found = bounds.of_r2(before, after, labels)
    assert found == bounds.of_r2(before, after, labels)
    worse = ((after - labels) ** 2).sum() - ((before - labels) ** 2).sum()
    assert found > worse / ((labels - labels.mean()) ** 2).sum()
