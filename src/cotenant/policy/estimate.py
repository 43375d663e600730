"""What a batch will cost: execution times by compute units, rows and size, learned online.

Means and mean deviations follow Jacobson's estimator for round-trip times ("Congestion
Avoidance and Control", SIGCOMM 1988, appendix A): gains of 1/8 and 1/4, prediction = mean +
2 deviations. Row counts never seen are interpolated between the nearest measured ones.

Requests with free axes differ in size: a long document is not a short one. Each class of sizes has
times of its own, so a few long ones say nothing of what the short ones cost; classes never seen are
interpolated, and what is larger than anything seen is only taken to cost more where two sizes have
shown that it does.

A warm-up has the box for itself, or shares it with other warm-ups; requests share it with the node,
their clients and training. So what larger partitions promise, which only warm-ups have measured,
is for plans corrected by how much longer executions have taken in service.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

_OUTLIER: Final = 4
"""A sample counts as at most this multiple of the mean: one theft of the core by the host
must not make the predictor refuse traffic for seconds."""
_LAST: Final = 9
"""Samples that a median is of."""
_RECENT: Final = 64
"""Executions over which it is averaged which sizes come."""
_STEADY: Final = 256
"""Executions over which it is averaged how much longer they take than in a warm-up: layouts that
are compared by it must not seem to change places with every few samples."""


@dataclass
class ExecTable:
    """Execution times (ns) of one service, for rows of about one size: ``mean[units][rows]``, 0
    where not measured.

    ``warm[units][rows]`` is what the last warm-up measured, ``served`` the most units on which
    requests have been executed, and ``extra`` how much longer (ns) they took than in the warm-up.
    """

    mean: dict[int, list[int]] = field(default_factory=dict)
    dev: dict[int, list[int]] = field(default_factory=dict)
    least: int = 0
    """The shortest execution ever, ns; 0: none yet."""
    warm: dict[int, dict[int, int]] = field(default_factory=dict)
    served: int = 0
    extra: int = 0

    def profile(self, units: int, rows: int, ns: int) -> None:
        """Learn from a warm-up: ``rows`` rows on ``units`` compute units took ``ns``."""
        self.warm.setdefault(units, {})[rows] = ns
        self._learn(units, rows, ns)

    def observe(self, units: int, rows: int, ns: int) -> None:
        """Learn from one execution of ``rows`` rows on ``units`` compute units."""
        self.served = max(self.served, units)
        warm = self.warm.get(units, {}).get(rows, 0)
        if warm:
            self.extra += (min(ns, _OUTLIER * warm) - warm - self.extra) // _STEADY
        self._learn(units, rows, ns)

    def _learn(self, units: int, rows: int, ns: int) -> None:
        if ns < self.least or not self.least:
            self.least = max(1, ns)
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
        """Mean times (ns) by units and rows, for plans: on more units than have ever served it will
        not be what the warm-up measured."""
        found: dict[int, dict[int, int]] = {}
        for units, means in self.mean.items():
            more = max(0, self.extra) if units > self.served else 0
            found[units] = {rows: mean + more for rows, mean in enumerate(means) if mean}
        return found

    def _nearest_units(self, units: int) -> int:
        smaller = [u for u in self.mean if u <= units]
        if smaller:
            return max(smaller)
        return min(self.mean, default=0)


@dataclass
class Costs:
    """Execution times (ns) of one service on one kind of device, by class of size (see
    ``size_class``). ``recent`` is the share of each class (ppm) in the executions of late."""

    tables: dict[int, ExecTable] = field(default_factory=dict)
    recent: dict[int, int] = field(default_factory=dict)

    def profile(self, units: int, rows: int, ns: int, size: int = 0) -> None:
        """Learn from a warm-up."""
        self._table(size).profile(units, rows, ns)

    def observe(self, units: int, rows: int, ns: int, size: int = 0) -> None:
        """Learn from one execution of ``rows`` rows of class ``size`` on ``units`` units."""
        self._table(size).observe(units, rows, ns)
        recent = self.recent
        for other, share in recent.items():
            recent[other] = share - share // _RECENT
        recent[size] = recent.get(size, 0) + 1_000_000 // _RECENT

    def _table(self, size: int) -> ExecTable:
        table = self.tables.get(size)
        if table is None:
            table = self.tables[size] = ExecTable()
        return table

    def predict(self, units: int, rows: int, size: int = 0, deviations: int = 2) -> int:
        """Mean plus ``deviations`` deviations, ns; 0 if nothing was ever measured."""
        mean, dev = self.moments(units, rows, size)
        return mean + deviations * dev

    def moments(self, units: int, rows: int, size: int = 0) -> tuple[int, int]:
        """Mean and mean deviation, ns."""
        table = self.tables.get(size)
        if table is not None:
            return table.moments(units, rows)
        below = max((s for s in self.tables if s < size), default=-1)
        above = min((s for s in self.tables if s > size), default=-1)
        if below < 0:
            return self.tables[above].moments(units, rows) if above >= 0 else (0, 0)
        mean, dev = self.tables[below].moments(units, rows)
        if above >= 0:
            more, more_dev = self.tables[above].moments(units, rows)
            part, whole = _elements(size) - _elements(below), _elements(above) - _elements(below)
            return mean + (more - mean) * part // whole, max(dev, more_dev)
        second = max((s for s in self.tables if s < below), default=-1)
        if second < 0:
            return mean, dev
        less, _ = self.tables[second].moments(units, rows)
        part, whole = _elements(size) - _elements(below), _elements(below) - _elements(second)
        return mean + max(0, mean - less) * part // whole, dev

    def least(self, size: int) -> int:
        """The shortest execution ever of this class of size, ns; 0: none yet."""
        table = self.tables.get(size)
        return table.least if table is not None else 0

    def warm(self) -> dict[int, int]:
        """What one row, of the least size that was warmed up with, took then (ns), by units."""
        for size in sorted(self.tables):
            tables = self.tables[size].warm
            found = {units: rows[1] for units, rows in tables.items() if 1 in rows}
            if found:
                return found
        return {}

    def expected(self) -> dict[int, dict[int, int]]:
        """Mean times (ns) by units and rows of the sizes that came of late, in the proportion in
        which they came, for plans."""
        shares = self.recent or dict.fromkeys(self.tables, 1)
        if len(shares) == 1:
            return self.tables[next(iter(shares))].expected()
        times = {size: self.tables[size].expected() for size in shares}
        cells = {(u, r) for table in times.values() for u, rows in table.items() for r in rows}
        whole = sum(shares.values())
        found: dict[int, dict[int, int]] = {}
        for units, rows in sorted(cells):
            total = 0
            for size, share in shares.items():
                known = times[size].get(units, {}).get(rows)
                total += share * (known or self.tables[size].predict(units, rows, 0))
            found.setdefault(units, {})[rows] = total // whole
        return found


def size_class(size: int) -> int:
    """Class of a size in elements: two of them to each doubling, 0 for 1."""
    bits = size.bit_length()
    return 2 * bits - 2 + (size * size >> (2 * bits - 1))


def _elements(size: int) -> int:
    """About how many elements a class of size has, in fifths: the powers of the root of 2."""
    return (5 << size // 2) if size % 2 == 0 else (7 << size // 2)


@dataclass
class Median:
    """Of the last samples, oldest first: a few that are far off, however far, leave it as it is."""

    last: list[int] = field(default_factory=list)

    def add(self, sample: int) -> None:
        """Learn one sample."""
        self.last.append(sample)
        if len(self.last) > _LAST:
            del self.last[0]

    @property
    def value(self) -> int:
        """The lower median; 0 as long as one sample that is off could be it."""
        count = len(self.last)
        return sorted(self.last)[(count - 1) // 2] if count > 2 else 0


@dataclass
class Quantile:
    """A running quantile by stochastic approximation (Robbins and Monro, 1951): up by
    ``step * p`` when a sample lies above, down by ``step * (1 - p)`` when below."""

    step: int
    ppm: int = 950_000
    value: int = 0

    def add(self, sample: int) -> None:
        """Learn one sample (same unit as ``step``)."""
        if sample > self.value:
            self.value += self.step * self.ppm // 1_000_000
        else:
            down = self.step * (1_000_000 - self.ppm) // 1_000_000
            self.value = max(0, self.value - max(1, down))


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
