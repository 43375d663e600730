"""What a job makes of space: its speed-up curve and what each pause costs it, learned online.

A job's progress is taken as ``R (m - L z)``: ``m`` is the time that it held space, each stretch
times its speed-up there; ``z`` the pauses, each by the part of its space that it lost, times the
mean speed-up; ``L`` the work that one of them costs. Speed-ups are one of a family: Amdahl's law
with parallel part ``p``, cut off at ``c`` units; and the same for gangs, whose ``c`` threads wait
for each other and get ``g`` times as fast once none shares a unit. Which one, is learned by Bayes'
rule over the family: every member is fitted to what was seen (least squares for ``R`` and ``R L``,
the latter drawn to a prior) and weighs ``prior * exp(-residual / (2 sigma ** 2))``, ``sigma`` being
a twentieth of what was seen (Bayesian model averaging; Hoeting et al., Statistical Science 1999).
The prior favours jobs that scale. Old observations fade.

Only what is tried is learned (``policy/trials.py``): ``unsure`` says of which sizes too little is
known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Final

import msgspec

PARALLEL = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
GANGS = tuple((p, g) for p in (0.9, 1.0) for g in (1.3, 1.7))
"""Parallel part and gain of gangs."""
GANG: Final = 0.1
"""A gang's prior, as a part of that of threads that do not wait for each other."""
FADE: Final = 0.99
"""What an observation still counts for when the next one comes."""
NOISE: Final = 0.05
LOST: Final = 0.001
"""Work (s) that a pause is taken to cost a job of which nothing is known."""
LOST_SURE: Final = 100.0
"""How much that is trusted: as much as one look at ten pauses a second."""
DEAR: Final = 0.01
"""What a pause may well cost (s)."""
APART: Final = 0.01
"""Part of the variance of pauses that must not go with that of time held."""
UNSURE: Final = 0.1
"""Relative standard deviation of a predicted speed-up from which trying out is worth it."""


class Curve(msgspec.Struct):
    """One job on ``units`` units: for each member of the family the sums of products of m, z and
    progress y over what was seen, and those of ``y**2`` and of weights. ``expected`` and
    ``expected_lost``: the speed-ups and the cost of a pause that follow from these, once they
    were asked for."""

    units: int
    mm: list[float] = []
    mz: list[float] = []
    zz: list[float] = []
    my: list[float] = []
    zy: list[float] = []
    yy: float = 0.0
    seen: float = 0.0
    expected: list[float] = []
    expected_lost: float | None = None

    def observe(self, held: Mapping[int, float], rate: float, pauses: float = 0.0) -> None:
        """Learn that the job made ``rate`` per second while it held so many units for a share of
        the time each, and was paused so often per second."""
        family = _family(self.units)
        if not self.mm:
            for sums in (self.mm, self.mz, self.zz, self.my, self.zy):
                sums.extend([0.0] * len(family))
        running = sum(share for units, share in held.items() if units)
        for index, (_, speeds) in enumerate(family):
            m = sum(speeds[min(units, self.units)] * share for units, share in held.items())
            z = m / running * pauses if running else 0.0
            self.mm[index] = self.mm[index] * FADE + m * m
            self.mz[index] = self.mz[index] * FADE + m * z
            self.zz[index] = self.zz[index] * FADE + z * z
            self.my[index] = self.my[index] * FADE + m * rate
            self.zy[index] = self.zy[index] * FADE + z * rate
        self.yy = self.yy * FADE + rate * rate
        self.seen = self.seen * FADE + 1.0
        self.expected, self.expected_lost = [], None

    def _fit(self, index: int) -> tuple[float, float]:
        """R and R L of a member of the family."""
        mm = self.mm[index] + LOST_SURE * LOST**2
        mz = self.mz[index] + LOST_SURE * LOST
        zz = self.zz[index] + LOST_SURE
        my, zy = self.my[index], self.zy[index]
        determinant = mm * zz - mz * mz
        if determinant <= 0.0:
            return 0.0, 0.0
        rate, lost = (my * zz - zy * mz) / determinant, (mz * my - mm * zy) / determinant
        if lost < 0.0:
            return my / mm, 0.0
        return max(0.0, rate), lost

    def weights(self) -> list[float]:
        """Posterior of each member of the family; sums to 1."""
        family = _family(self.units)
        spread = 2.0 * (NOISE**2) * self.yy / self.seen if self.seen else 0.0
        if not spread:
            return [prior for prior, _ in family]
        logs = []
        for index, (prior, _) in enumerate(family):
            rate, lost = self._fit(index)
            residual = self.yy - 2.0 * (rate * self.my[index] - lost * self.zy[index])
            residual += rate * rate * self.mm[index] + lost * lost * self.zz[index]
            residual -= 2.0 * rate * lost * self.mz[index]
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

    def rates(self) -> list[float]:
        """Expected progress per second on 0, 1, 2 … units without a pause; zeros if nothing was
        seen."""
        found = [0.0] * (self.units + 1)
        if self.seen:
            fits = [weight * self._fit(index)[0] for index, weight in enumerate(self.weights())]
            for rate, (_, speeds) in zip(fits, _family(self.units), strict=True):
                for units, speed in enumerate(speeds):
                    found[units] += rate * speed
        return found

    def lost(self) -> float:
        """Expected seconds of work that a pause costs."""
        if not self.seen:
            return LOST
        if self.expected_lost is None:
            self.expected_lost = 0.0
            for index, weight in enumerate(self.weights()):
                rate, lost = self._fit(index)
                self.expected_lost += weight * (lost / rate if rate else LOST)
        return self.expected_lost

    def knows_pauses(self) -> bool:
        """Whether what pauses cost can be told from the speed: because there were more and fewer
        of them, or so few that it does not matter."""
        if not self.seen:
            return False
        mm, mz, zz = self.mm[0], self.mz[0], self.zz[0]
        few = zz * DEAR**2 < (UNSURE / 2) ** 2 * mm
        return few or mm * zz - mz * mz > APART * mm * zz

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
    members: list[tuple[float, tuple[float, ...]]] = []
    for cap in caps:
        # Half of the prior is that of jobs that scale as far as the device goes.
        likely = 0.5 if cap == units else 0.5 / len(caps)
        members += [(likely * (0.2 + p), _speeds(units, p, cap)) for p in PARALLEL]
        if cap > 1:
            members += [
                (GANG * likely * (0.2 + p), _speeds(units, p, cap, gain)) for p, gain in GANGS
            ]
    total = sum(prior for prior, _ in members)
    return tuple((prior / total, speeds) for prior, speeds in members)


def _speeds(units: int, parallel: float, cap: int, gain: float = 1.0) -> tuple[float, ...]:
    """On 0, 1, 2 … units relative to one."""
    return (0.0, *(speed_up(parallel, cap, x, gain) for x in range(1, units + 1)))


def speed_up(parallel: float, cap: int, units: int, gain: float = 1.0) -> float:
    """Speed on ``units`` units relative to one: Amdahl's law up to ``cap`` units (0: without
    end), from which on it is ``gain`` times as much."""
    used = min(units, cap) if cap else units
    whole = gain if cap and units >= cap else 1.0
    return whole / (1.0 - parallel + parallel / max(1, used))
