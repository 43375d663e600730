"""What a batch will cost: execution times by compute units and rows, learned online.

Means and mean deviations follow Jacobson's estimator for round-trip times ("Congestion
Avoidance and Control", SIGCOMM 1988, appendix A): gains of 1/8 and 1/4, prediction = mean +
2 deviations. Sizes never seen are interpolated between the nearest measured ones.

A warm-up has the box for itself, or shares it with other warm-ups; requests share it with the node,
their clients and training. So what warm-ups alone have measured is, for plans, corrected by how
much longer those sizes take in service that have been executed there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

_OUTLIER: Final = 4
"""A sample counts as at most this multiple of the mean: one theft of the core by the host
must not make the predictor refuse traffic for seconds."""


@dataclass
class ExecTable:
    """Execution times (ns) of one service: ``mean[units][rows]``, 0 where not measured.

    ``warm[units][rows]`` is what the last warm-up measured, and ``served[units]`` the numbers of
    rows that have been executed for requests.
    """

    mean: dict[int, list[int]] = field(default_factory=dict)
    dev: dict[int, list[int]] = field(default_factory=dict)
    warm: dict[int, dict[int, int]] = field(default_factory=dict)
    served: dict[int, list[int]] = field(default_factory=dict)

    def profile(self, units: int, rows: int, ns: int) -> None:
        """Learn from a warm-up: ``rows`` rows on ``units`` compute units took ``ns``."""
        self.warm.setdefault(units, {})[rows] = ns
        self._learn(units, rows, ns)

    def observe(self, units: int, rows: int, ns: int) -> None:
        """Learn from one execution of ``rows`` rows on ``units`` compute units."""
        served = self.served.setdefault(units, [])
        if rows not in served:
            served.append(rows)
        self._learn(units, rows, ns)

    def _learn(self, units: int, rows: int, ns: int) -> None:
        means = self.mean.setdefault(units, [])
        devs = self.dev.setdefault(units, [])
        if rows >= len(means):
            grow = rows + 1 - len(means)
            means.extend([0] * grow)
            devs.extend([0] * grow)
        mean = means[rows]
        if mean == 0:
            means[rows] = max(1, ns)
            devs[rows] = ns // 8
            return
        error = min(ns, _OUTLIER * mean) - mean
        if 2 * ns < mean:
            # A slow spell is over. What was refused because of it was not measured, so there
            # are few samples to come down by.
            means[rows], devs[rows] = max(1, mean + error // 2), devs[rows] // 2
            return
        means[rows] = max(1, mean + error // 8)
        devs[rows] += (abs(error) - devs[rows]) // 4

    def predict(self, units: int, rows: int, deviations: int = 2) -> int:
        """Mean plus ``deviations`` deviations, ns, for ``rows`` on ``units``; 0 if nothing was
        ever measured.

        Unknown unit counts fall back to the nearest smaller measured one (slower, so safe),
        else the nearest larger.
        """
        mean, dev = self.moments(units, rows)
        return mean + deviations * dev

    def moments(self, units: int, rows: int) -> tuple[int, int]:
        """Mean and mean deviation (ns), as ``predict`` takes them."""
        means = self.mean.get(units)
        if means is None:
            nearest = self._nearest_units(units)
            if nearest == 0:
                return 0, 0
            units, means = nearest, self.mean[nearest]
        if rows < len(means) and means[rows]:
            return means[rows], self.dev[units][rows]
        return _interpolate(means, self.dev[units], rows)

    def expected(self) -> dict[int, dict[int, int]]:
        """Mean times in service (ns) by units and rows: of sizes that were executed, and of those
        that warm-ups alone have measured."""
        warm = seen = 0
        for units, rows in self.served.items():
            for n in rows:
                ns = self.warm.get(units, {}).get(n, 0)
                if ns:
                    warm += ns
                    seen += self.mean[units][n]
        found: dict[int, dict[int, int]] = {}
        for units, means in self.mean.items():
            served = self.served.get(units, [])
            known = found[units] = {}
            for n, mean in enumerate(means):
                if mean:
                    known[n] = mean if n in served or not warm else mean * seen // warm
        return found

    def _nearest_units(self, units: int) -> int:
        smaller = [u for u in self.mean if u <= units]
        if smaller:
            return max(smaller)
        return min(self.mean, default=0)


@dataclass
class Quantile:
    """A running quantile by stochastic approximation (Robbins and Monro, 1951): up by
    ``step * p`` when a sample lies above, down by ``step * (1 - p)`` when below."""

    step: int
    permille: int = 950
    value: int = 0

    def add(self, sample: int) -> None:
        """Learn one sample (same unit as ``step``)."""
        if sample > self.value:
            self.value += self.step * self.permille // 1000
        else:
            self.value = max(0, self.value - max(1, self.step * (1000 - self.permille) // 1000))


def _interpolate(means: list[int], devs: list[int], rows: int) -> tuple[int, int]:
    known = [n for n, mean in enumerate(means) if mean]
    if not known:
        return 0, 0
    below = max((n for n in known if n < rows), default=0)
    above = min((n for n in known if n > rows), default=0)
    if below and above:
        part, whole = rows - below, above - below
        return (
            means[below] + (means[above] - means[below]) * part // whole,
            devs[below] + (devs[above] - devs[below]) * part // whole,
        )
    if above:
        return means[above], devs[above]
    lower = max((n for n in known if n < below), default=0)
    if not lower:
        return means[below] * rows // below, devs[below] * rows // below
    slope = max(0, (means[below] - means[lower]) // (below - lower))
    return means[below] + slope * (rows - below), devs[below]
