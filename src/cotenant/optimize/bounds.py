"""How much a variant may have lost at most, given the rows on which it was compared.

All bounds are one-sided: with the confidence named the true drop is no larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Final

import numpy as np

from cotenant.engines.accuracy import r2
from cotenant.engines.base import Array

RESAMPLES: Final = 2000
MOST_ROWS: Final = 10_000_000
_SEED: Final = 20
_STEPS: Final = 60


def paired(lost: float, won: float, rows: float, confidence: float = 0.95) -> float:
    """Upper bound of the drop of a share, from ``rows`` rows of which ``lost`` went from right to
    wrong and ``won`` the other way round.

    The score interval for paired proportions: T. Tango, "Equivalence test and confidence interval
    for the difference in proportions for the paired-sample design", Statistics in Medicine 17
    (1998), 891-908, equations 7 to 9. Without discordant rows it is not 0.
    """
    wanted = -NormalDist().inv_cdf(confidence)
    low, high = (lost - won) / rows, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if _score(lost, won, rows, middle) > wanted:
            low = middle
        else:
            high = middle
    return high


def _score(lost: float, won: float, rows: float, drop: float) -> float:
    """Tango's statistic for the hypothesis that the drop is ``drop``."""
    linear = -lost - won + (2 * rows - lost + won) * drop
    constant = -won * drop * (1 - drop)
    root = math.sqrt(max(0.0, linear**2 - 8 * rows * constant))
    gained = (root - linear) / (4 * rows)  # the likeliest share of rows won
    spread = rows * (2 * gained + drop * (1 - drop))
    difference = lost - won - rows * drop
    if spread <= 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / math.sqrt(spread)


def rows_wanted(lost: int, won: int, rows: int, allowed: float) -> int:
    """About how many rows would show that the drop is within ``allowed``, if all are as these; 0 if
    no number would."""
    if (lost - won) / rows >= allowed:
        return 0
    few, many = float(rows), float(rows)
    while paired(lost * many / rows, won * many / rows, many) > allowed:
        few, many = many, 2 * many
        if many > MOST_ROWS:
            return 0
    while many - few > 1:
        middle = (few + many) // 2
        if paired(lost * middle / rows, won * middle / rows, middle) > allowed:
            few = middle
        else:
            many = middle
    return math.ceil(many)


def of_means(before: Array, after: Array, confidence: float = 0.95) -> float:
    """Upper bound of the drop of a mean over rows, each of which is right in parts: (rows,) shares
    from 0 to 1. The percentile bootstrap over rows (B. Efron, R. Tibshirani, "An Introduction to
    the Bootstrap", 1993, chapter 13) with a fixed seed; where no row differs, as ``paired``."""
    lost = before - after
    if not lost.any():
        return paired(0, 0, len(lost), confidence)
    return _bootstrap(len(lost), confidence, lambda picked: float(lost[picked].mean()))


def of_r2(before: Array, after: Array, labels: Array, confidence: float = 0.95) -> float:
    """Upper bound of the drop of r2, of FP64 outputs in the labels' shape; the same bootstrap."""
    return _bootstrap(
        len(labels),
        confidence,
        lambda picked: r2(before[picked], labels[picked]) - r2(after[picked], labels[picked]),
    )


def _bootstrap(rows: int, confidence: float, drop: Callable[[Array], float]) -> float:
    random = np.random.default_rng(_SEED)
    found = [drop(random.integers(0, rows, rows)) for _ in range(RESAMPLES)]
    return float(np.quantile(found, confidence))
