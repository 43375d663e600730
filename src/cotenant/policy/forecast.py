"""Level, trend and season of a rate.

Level and trend: Holt's linear exponential smoothing (Holt, 1957, ONR report 52), the trend damped
(Gardner and McKenzie, 1985), so that a short rise is not carried to infinity. Season: the
multiplicative index of Winters (Management Science, 1960), kept as mean rates of the slots of a
period: what comes is to what is as their slots are to each other.
"""

from __future__ import annotations

from typing import Final

import msgspec

DAMPING: Final = 0.8
MOST: Final = 4.0
"""A season never predicts more than this many times the present rate."""


class Holt(msgspec.Struct):
    """Smoothing with gains ``alpha`` (level) and ``beta`` (trend), one sample a step."""

    alpha: float = 0.4
    beta: float = 0.2
    level: float = 0.0
    trend: float = 0.0
    samples: int = 0

    def add(self, value: float) -> None:
        """Learn the value of one step."""
        if self.samples == 0:
            self.level = value
        else:
            before = self.level
            expected = before + DAMPING * self.trend
            self.level = max(0.0, self.alpha * value + (1 - self.alpha) * expected)
            self.trend = self.beta * (self.level - before) + (1 - self.beta) * DAMPING * self.trend
        self.samples += 1


class Season(msgspec.Struct):
    """The usual rate in each slot of a period (ns), smoothed over periods with gain ``gamma``."""

    period: int
    rates: list[float]
    known: list[bool]
    gamma: float = 0.4
    slot: int = -1
    sum: float = 0.0
    count: int = 0

    @classmethod
    def of(cls, period: int, slots: int) -> Season:
        """Nothing is known yet."""
        return cls(period, [0.0] * slots, [False] * slots)

    def add(self, now: int, rate: float) -> None:
        """Learn the rate at a time (ns)."""
        slot = self._slot(now)
        if slot != self.slot:
            self._close()
            self.slot = slot
        self.sum += rate
        self.count += 1

    def factor(self, now: int, then: int) -> float:
        """What the usual rate at ``then`` is of that at ``now``; 1 while either is unknown."""
        here, there = self._slot(now), self._slot(then)
        if not (self.known[here] and self.known[there]):
            return 1.0
        least = MOST * max(self.rates) / 100
        return min(MOST, max(1 / MOST, (self.rates[there] + least) / (self.rates[here] + least)))

    def _slot(self, now: int) -> int:
        return now % self.period * len(self.rates) // self.period

    def _close(self) -> None:
        if not self.count:
            return
        mean = self.sum / self.count
        gain = self.gamma if self.known[self.slot] else 1.0
        self.rates[self.slot] += gain * (mean - self.rates[self.slot])
        self.known[self.slot] = True
        self.sum, self.count = 0.0, 0
