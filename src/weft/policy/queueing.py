"""What latency to expect of some partitions at a load: a G/G/c approximation.

A request waits with probability ``P``, and then for a time that is taken as exponential, with the
mean of Kingman's heavy-traffic formula (1961) for ``c`` servers::

    P(W > 0) = rho ** (sqrt(2 (c + 1)) - 1)
    E[W | W > 0] = S / (c (1 - rho)) * (ca2 + cs2) / 2

(Sakasegawa, Annals of the Institute of Statistical Mathematics 1977; with one server, P is rho.)
So the p-quantile of the wait is ``E * ln(P / (1 - p))`` where that is positive.
"""

from __future__ import annotations

import math

ARRIVAL_CV2 = 1.5
"""Squared coefficient of variation of arrivals: a little burstier than Poisson."""
SERVICE_CV2 = 0.1


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
