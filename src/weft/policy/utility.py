"""What a job makes of space: its speed-up curve, learned online.

A job's speed on ``x`` units is taken as ``rate * s(x)``, ``s`` being one of a family of speed-ups:
Amdahl's law with parallel part ``p``, cut off at ``c`` units. Which one, is learned by Bayes' rule
over the family: every member is fitted to what was seen (least squares for ``rate``) and weighs
``prior * exp(-residual / (2 sigma ** 2))``, ``sigma`` being a twentieth of what was seen (Bayesian
model averaging; Hoeting et al., Statistical Science 1999). The prior favours jobs that scale. Old
observations fade.

Only what is tried is learned: ``unsure`` says of which sizes too little is known. The planner then
gives the job more for a while, seldom enough to stay below ``EXPLORE`` of all units' time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import msgspec

PARALLEL = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
FADE = 0.99
"""What an observation still counts for when the next one comes."""
NOISE = 0.05
EXPLORE = 0.03
"""Share of all units' time that may be spent on trying out."""
UNSURE = 0.1
"""Relative standard deviation of a predicted speed-up from which trying out is worth it."""


class Curve(msgspec.Struct):
    """One job on ``units`` units: for each member of the family the sums of ``s**2`` and ``s*y``
    over what was seen, and those of ``y**2`` and of weights. ``expected``: the speed-ups that
    follow from these, once they were asked for."""

    units: int
    ss: list[float] = []
    sy: list[float] = []
    yy: float = 0.0
    seen: float = 0.0
    expected: list[float] = []

    def observe(self, held: Mapping[int, float], rate: float) -> None:
        """Learn that the job made ``rate`` per second while it held so many units for a share of
        the time each."""
        family = _family(self.units)
        if not self.ss:
            self.ss, self.sy = [0.0] * len(family), [0.0] * len(family)
        for index, (_, speeds) in enumerate(family):
            made = sum(speeds[min(units, self.units)] * share for units, share in held.items())
            self.ss[index] = self.ss[index] * FADE + made * made
            self.sy[index] = self.sy[index] * FADE + made * rate
        self.yy = self.yy * FADE + rate * rate
        self.seen = self.seen * FADE + 1.0
        self.expected = []

    def weights(self) -> list[float]:
        """Posterior of each member of the family; sums to 1."""
        family = _family(self.units)
        if not self.seen or not self.yy:
            return [prior for prior, _ in family]
        spread = 2.0 * (NOISE**2) * self.yy / self.seen
        logs = []
        for (prior, _), ss, sy in zip(family, self.ss, self.sy, strict=True):
            residual = self.yy - sy * sy / ss if ss else self.yy
            logs.append(math.log(prior) - max(0.0, residual) / spread)
        top = max(logs)
        raw = [math.exp(each - top) for each in logs]
        total = sum(raw)
        return [each / total for each in raw]

    def speed_ups(self) -> list[float]:
        """Expected speed on 0, 1, 2 … units relative to one."""
        if not self.expected:
            weights, family = self.weights(), _family(self.units)
            self.expected = [
                sum(w * speeds[x] for w, (_, speeds) in zip(weights, family, strict=True))
                for x in range(self.units + 1)
            ]
        return self.expected

    def rate(self) -> float:
        """Expected progress per second on one unit; 0 if nothing was seen."""
        if not self.ss:
            return 0.0
        fits = [sy / ss if ss else 0.0 for ss, sy in zip(self.ss, self.sy, strict=True)]
        return sum(w * fit for w, fit in zip(self.weights(), fits, strict=True))

    def unsure(self, units: int) -> bool:
        """Whether too little is known of the speed-up on so many units."""
        weights, family = self.weights(), _family(self.units)
        values = [speeds[units] for _, speeds in family]
        mean = sum(w * v for w, v in zip(weights, values, strict=True))
        variance = sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True))
        return math.sqrt(variance) > UNSURE * mean


@cache
def _family(units: int) -> tuple[tuple[float, tuple[float, ...]], ...]:
    """(prior, speed-ups by units) of each member."""
    caps = sorted({min(units, c) for c in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, units)})
    members = []
    for parallel in PARALLEL:
        for cap in caps:
            speeds = tuple(
                0.0 if not x else 1.0 / (1.0 - parallel + parallel / min(x, cap))
                for x in range(units + 1)
            )
            # Half of the prior is that of jobs that scale as far as the device goes.
            members.append(((0.5 if cap == units else 0.5 / len(caps)) * (0.2 + parallel), speeds))
    total = sum(prior for prior, _ in members)
    return tuple((prior / total, speeds) for prior, speeds in members)
