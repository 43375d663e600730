"""What things cost in a simulation: plain data, each with its source.

Execution of ``rows`` rows on ``units`` compute units::

    (first + per_row · (rows - 1)) · (1 - parallel + parallel / min(units, saturates))

which is Amdahl's law (AFIPS 1967) cut off where the model has no more parallel work; so
utility curves bend. Jobs speed up by the same law, and gangs of threads that wait for each other
leap once each has a unit of its own. A measured profile, where there is one,
takes the place of the formula, interpolated between its nearest sizes.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import msgspec

from cotenant.domain.costs import GATE_BOUND, MIG_MAKE, MIG_UNMAKE, drain
from cotenant.domain.units import MS, US, S
from cotenant.policy.estimate import ExecTable
from cotenant.policy.utility import speed_up

_NORMAL = NormalDist()


class ExecCost(msgspec.Struct, frozen=True):
    """Execution time of a service's batches. Times in ns; ``cv`` is the coefficient of variation
    of a single execution (log-normal); ``profile`` holds measured ``(units, rows, ns)``."""

    first: int
    per_row: int
    parallel: float = 0.9
    saturates: int = 0
    cv: float = 0.05
    profile: tuple[tuple[int, int, int], ...] = ()

    @property
    def source(self) -> str:
        """Which of the two was used."""
        return "measured profile" if self.profile else "analytic"

    def mean(self, units: int, rows: int) -> int:
        """Mean ns of one execution."""
        if self.profile:
            return self._table().predict(units, rows, 0)
        one = self.first + self.per_row * (rows - 1)
        return round(one / speed_up(self.parallel, self.saturates, units))

    def quantile(self, units: int, rows: int, share: float) -> int:
        """Ns within which this share of executions ends (the log-normal's quantile)."""
        variance = math.log1p(self.cv * self.cv)
        normal = _NORMAL.inv_cdf(share)
        return round(self.mean(units, rows) * math.exp(math.sqrt(variance) * normal - variance / 2))

    def _table(self) -> ExecTable:
        known = ExecTable()
        for units, rows, ns in self.profile:
            known.profile(units, rows, ns)
        return known


class JobCost(msgspec.Struct, frozen=True):
    """Progress of a job: ``rate`` steps/s on one unit; ``gang`` times as much from ``saturates``
    units on, where threads that wait for each other share none; ``resume`` ns are lost whenever
    it is granted space after having had less (caches, a gang at its barrier), ``move`` ns when it
    has to start again elsewhere from its checkpoint."""

    rate: float
    parallel: float = 0.9
    saturates: int = 0
    gang: float = 1.0
    resume: int = 1 * MS
    move: int = 10 * S

    def speed(self, units: int) -> float:
        """Steps/s on ``units`` compute units."""
        if not units:
            return 0.0
        return self.rate * speed_up(self.parallel, self.saturates, units, self.gang)


class Spread(msgspec.Struct, frozen=True):
    """A log-normal time: ``mean`` ns and coefficient of variation."""

    mean: int
    cv: float = 0.0


GATED = "as the device on a node says of itself (cotenant.domain.costs)"


class DeviceCost(msgspec.Struct, frozen=True):
    """What a device charges for changing hands.

    ``start``: from dispatch to execution on an idle partition; ``follow`` the same where a batch
    has just ended, so that nobody has to wake up (``start`` if it is not known); ``at_hand`` from
    the end of one batch to the execution of the next, if the instance has that already; ``preempt``
    comes on top where a job is just being moved off; ``repartition`` is paid once per change of
    layout, or, where partitions are made one by one (MIG), ``make`` and ``unmake`` for each;
    ``contention``: slow-down of an execution (and of a job) when everything else on the device
    is busy, in proportion to how much is (0 = isolated).
    """

    start: Spread
    preempt: Spread
    grant: Spread
    revoke: Spread
    repartition: Spread = Spread(0)
    follow: Spread | None = None
    at_hand: Spread = Spread(0)
    make: Spread = Spread(0)
    unmake: Spread = Spread(0)
    contention: float = 0.0
    source: str = ""


DEVICES: dict[str, DeviceCost] = {
    "cpu": DeviceCost(
        start=Spread(100 * US, 0.3),
        preempt=Spread(60 * US, 0.5),
        grant=Spread(20 * US, 0.5),
        revoke=Spread(20 * US, 1.0),
        repartition=Spread(1 * MS, 0.2),
        contention=0.05,
        source="measured by this project on 2 virtual cores (docs/benchmarks.md)",
    ),
    "sm": DeviceCost(
        start=Spread(50 * US, 0.3),
        preempt=Spread(40 * US, 0.5),
        grant=Spread(20 * US, 0.5),
        revoke=Spread(40 * US, 0.5),
        repartition=Spread(1 * MS, 0.2),
        contention=0.25,
        source="preemption 40 us after GPreempt (ATC 2025); contention assumed",
    ),
    "cuda": DeviceCost(
        start=Spread(50 * US, 0.3),
        preempt=Spread(0),
        grant=Spread(50 * US, 0.5),
        revoke=Spread(drain(GATE_BOUND).mean, 0.5),
        contention=0.0,
        source=f"a launch gate that bounds what is in flight, {GATED}",
    ),
    "mig": DeviceCost(
        start=Spread(50 * US, 0.3),
        preempt=Spread(0),
        grant=Spread(50 * US, 0.5),
        revoke=Spread(drain(GATE_BOUND).mean, 0.5),
        make=Spread(MIG_MAKE, 0.2),
        unmake=Spread(MIG_UNMAKE, 0.2),
        source="means of making and ending an instance on an A100 (gpuless thesis); a launch gate "
        f"in each, {GATED}",
    ),
    "npu": DeviceCost(
        start=Spread(200 * US, 0.3),
        preempt=Spread(0),
        grant=Spread(0),
        revoke=Spread(0),
        source="hand-over of 0.2 ms assumed",
    ),
}
"""Costs by kind of device. ``cuda``: one GPU, whole, whose jobs are behind launch gates. ``sm``:
subsets of the multiprocessors of one GPU, whose memory bandwidth is shared; no node can keep jobs
to them. ``mig``: isolated instances of one GPU. ``npu``: serves, one batch at a time."""
