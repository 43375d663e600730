"""What a service's percentile means for the rules that speak of its tail."""

from __future__ import annotations

from statistics import NormalDist
from typing import Final

WHOLE: Final = 1_000_000
"""All answers, in ppm."""
NEARER: Final = 5
"""The quantile that lending watches has so many times the answers beyond it that may miss the
objective: it is known from fewer answers, and comes near the objective before that is missed."""
DEVIATIONS: Final = 2000
"""By how many mean deviations (thousandths) a prediction is taken longer for 99 % (Jacobson's
choice); for others in proportion to the quantiles of a normal distribution."""


def missable(percentile: float) -> int:
    """Ppm of the answers that may miss the objective."""
    return max(1, round(WHOLE * (1 - percentile / 100)))


def watched(percentile: float) -> int:
    """Ppm of the answers that are below the quantile by which lending goes."""
    return WHOLE - min(WHOLE // 2, NEARER * missable(percentile))


def caution(percentile: float) -> int:
    """Mean deviations (thousandths) by which a prediction is taken longer."""
    normal = NormalDist()
    return max(0, round(DEVIATIONS * normal.inv_cdf(percentile / 100) / normal.inv_cdf(0.99)))
