"""What latency to expect of some partitions at a load: a G/G/c approximation.

A request waits with probability ``P``, and then for a time that is taken as exponential, with the
mean of Kingman's heavy-traffic formula (1961) for ``c`` servers::

    P(W > 0) = rho ** (sqrt(2 (c + 1)) - 1)
    E[W | W > 0] = S / (c (1 - rho)) * (ca2 + cs2) / 2

(Sakasegawa, Annals of the Institute of Statistical Mathematics 1977; with one server, P is rho.)
So the p-quantile of the wait is ``E * ln(P / (1 - p))`` where that is positive.

Where requests that would be late are refused, the queue does not grow beyond what its patience
is, ``K``, whatever the load. The share that is refused then follows from the tail ``T = P(W > K)``
that the queue would have without refusals (Tijms, Stochastic Models, 1994)::

    lost = (1 - rho) T / (1 - rho T)

which over saturation, where ``T`` stands for the same expression, goes to ``1 - 1 / rho``.

A server that batches whatever waits is better than that while its batches do not fill up: nobody
waits for more than the batch under way. A batch of ``n`` takes ``t + a n``, and on average as many
come meanwhile (Inoue, Performance Evaluation 2021, has the exact mean)::

    n = rate * t / (1 - rate * a)

Arrivals scatter about that with variance ``ca2 n``, and what one batch is larger by, the next one
is larger by ``rate * a`` times: the variance in all is ``ca2 n / (1 - (rate * a) ** 2)``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

HEADROOM: Final = 0.9
"""Share of the objective that the predicted percentile may use."""
ARRIVAL_CV2: Final = 1.5
"""Squared coefficient of variation of arrivals: a little burstier than Poisson."""
SERVICE_CV2: Final = 0.1
_NORMAL = statistics.NormalDist()
_SATURATED: Final = 1e-6
"""Nearer to saturation than this the formula is 0 / 0."""
_FAR: Final = 50.0


def highest_load(exec_ns: float, budget_ns: float, percentile: float, highest: float) -> float:
    """The utilization, at most ``highest``, up to which a single server's delay at ``percentile``
    stays within a budget; 0 if no load does."""
    low, high = 0.0, highest
    if wait_quantile(exec_ns, high, percentile) <= budget_ns:
        return high
    for _ in range(20):
        middle = (low + high) / 2
        if wait_quantile(exec_ns, middle, percentile) <= budget_ns:
            low = middle
        else:
            high = middle
    return low


def wait_quantile(exec_ns: float, rho: float, percentile: float, servers: int = 1) -> float:
    """Ns of queueing delay at ``percentile`` (0..100) before ``servers`` partitions that are used
    ``rho`` each; infinity at or over saturation."""
    if rho >= 1.0:
        return math.inf
    tail = 1.0 - min(percentile, 99.99) / 100.0
    waits = max(0.0, rho) ** (math.sqrt(2.0 * (servers + 1)) - 1.0)
    if waits <= tail:
        return 0.0
    mean = exec_ns / (servers * (1.0 - rho)) * (ARRIVAL_CV2 + SERVICE_CV2) / 2.0
    return mean * math.log(waits / tail)


def lost(
    exec_ns: float, loads: Sequence[tuple[float, float]], budget_ns: float, servers: int = 1
) -> float:
    """Share (0..1) of a service's requests that are refused, for they would wait longer than
    ``budget_ns``, before ``servers`` partitions. ``loads``: of all who queue there, itself
    included, (longest wait that makes sense, utilization it brings).

    Those who cannot wait as long are refused first, so a longer queue is made by the others."""
    patient = sorted((max(0.0, budget), load) for budget, load in loads)
    budget_ns = max(0.0, budget_ns)
    rho = sum(load for _, load in patient)
    if abs(1.0 - rho) < _SATURATED:
        rho = 1.0 - _SATURATED
    scale = exec_ns / servers * (ARRIVAL_CV2 + SERVICE_CV2) / 2.0
    if rho <= 0.0 or scale <= 0.0:
        return 0.0
    longest = min(patient[0][0], budget_ns)
    decay = min(_FAR, max(-_FAR, longest * (1.0 - rho) / scale))
    tail: float = rho ** (math.sqrt(2.0 * (servers + 1)) - 1.0) * math.exp(-decay)
    share = (1.0 - rho) * tail / (1.0 - rho * tail)
    for (budget, load), (following, _) in pairwise((*patient, (math.inf, 0.0))):
        rho -= load
        if budget >= budget_ns:
            break
        further = min(following, budget_ns) - budget
        share *= math.exp(-min(_FAR, further * max(0.0, 1.0 - rho) / scale))
    return share


def batch_delay(
    single_ns: float, full_ns: float, largest: int, rate: float, percentile: float
) -> float:
    """Ns from arrival to answer at ``percentile`` (0..100), where one row takes ``single_ns``, a
    batch of ``largest`` rows ``full_ns``, and ``rate`` rows come per second; infinity where
    batches would fill up, so that more waits than the next batch takes."""
    if largest < 2:
        return math.inf
    per_row = max(0.0, full_ns - single_ns) / (largest - 1)
    fixed = max(0.0, single_ns - per_row)
    growth = rate * per_row / 1e9
    if growth >= 1.0:
        return math.inf
    rows = max(1.0, rate * fixed / 1e9 / (1.0 - growth))
    high = rows + deviations(percentile) * math.sqrt(ARRIVAL_CV2 * rows / (1.0 - growth**2))
    return 2.0 * (fixed + per_row * high) if high <= largest else math.inf


def deviations(percentile: float) -> float:
    """By how many standard deviations a normal's quantile at ``percentile`` (0..100) lies above its
    mean; 0 if it lies below."""
    return max(0.0, _NORMAL.inv_cdf(min(percentile, 99.99) / 100.0))
