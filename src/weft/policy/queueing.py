"""What latency to expect of a partition at a load: a G/G/1 approximation.

The waiting time of a single server is taken as exponential beyond the probability of waiting,
with the mean of Kingman's formula (Kingman, 1961; tail after Kingman's heavy-traffic limit)::

    E[W | W > 0] = S / (1 - rho) * (ca2 + cs2) / 2        P(W > 0) = rho

so the p-quantile of the wait is ``E * ln(rho / (1 - p))`` where that is positive.
"""

from __future__ import annotations

import math

ARRIVAL_CV2 = 1.5
"""Squared coefficient of variation of arrivals: a little burstier than Poisson."""
SERVICE_CV2 = 0.1


def wait_quantile(exec_ns: float, rho: float, percentile: float) -> float:
    """Ns of queueing delay at ``percentile`` (0..100); infinity at or over saturation."""
    if rho >= 1.0:
        return math.inf
    tail = 1.0 - min(percentile, 99.99) / 100.0
    if rho <= tail:
        return 0.0
    mean = exec_ns / (1.0 - rho) * (ARRIVAL_CV2 + SERVICE_CV2) / 2.0
    return mean * math.log(rho / tail)
