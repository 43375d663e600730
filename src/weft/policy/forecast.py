"""Level and trend of a rate: Holt's linear exponential smoothing (Holt, 1957, ONR report 52).

The trend is damped (Gardner and McKenzie, 1985), so that a short rise is not carried to
infinity.
"""

from __future__ import annotations

import msgspec

DAMPING = 0.8


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

    def ahead(self, steps: int) -> float:
        """Forecast ``steps`` steps ahead; never negative."""
        damped = sum(DAMPING**i for i in range(1, steps + 1))
        return max(0.0, self.level + damped * self.trend)
