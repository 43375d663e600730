"""Meters: what is counted of one service, partition or job."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, deque
from typing import Final, NamedTuple

from cotenant.domain.snapshot import RATE_WINDOW
from cotenant.domain.units import S
from cotenant.policy.forecast import Holt, Season

LATENCY_BUCKETS_S = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0),
)
REVOKE_BUCKETS_S = (10e-6, 20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 50e-3)
RECENT: Final = 2000
"""Latencies kept for quantiles, and for no longer than ``RECENT_NS``."""
RECENT_NS: Final = 30 * S

STEADY: Final = 256


class Histogram:
    """Counts by upper bound (seconds), with sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, ns: int) -> None:
        """Count one duration."""
        seconds = ns / S
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds


class Recent:
    """The newest durations, for quantiles."""

    def __init__(self) -> None:
        self._samples: deque[tuple[int, int]] = deque(maxlen=RECENT)

    def add(self, now: int, ns: int) -> None:
        """Keep one duration."""
        self._samples.append((now, ns))

    def quantiles(self, now: int, *shares: float) -> list[int | None]:
        """Quantiles in ns of what is recent at ``now``; None without samples."""
        while self._samples and now - self._samples[0][0] > RECENT_NS:
            self._samples.popleft()
        ordered = sorted(ns for _, ns in self._samples)
        if not ordered:
            return [None for _ in shares]
        return [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in shares]


class Mean:
    """Mean and standard deviation of the newest samples: of all while they are few, then each
    counts ``1 / STEADY`` (West, Communications of the ACM 1979)."""

    def __init__(self) -> None:
        self.value = 0.0
        self._variance = 0.0
        self._count = 0

    def add(self, sample: float) -> None:
        """Count one sample."""
        self._count = min(STEADY, self._count + 1)
        error, gain = sample - self.value, 1 / self._count
        self.value += error * gain
        self._variance = (1 - gain) * (self._variance + gain * error * error)

    @property
    def deviation(self) -> float:
        """The standard one."""
        return math.sqrt(self._variance)


class Totals(NamedTuple):
    """What a service did. Times in ns, each summed over requests: of a batch once for each of them.

    ``latency``: arrival to result; ``queue``: arrival to dispatch; ``input``: from there until the
    inputs lie before the engine; ``infer``: execution; ``output``: outputs divided and written.
    """

    answered: int = 0
    refused: tuple[tuple[str, int], ...] = ()
    rows: int = 0
    executions: int = 0
    latency: int = 0
    queue: int = 0
    input: int = 0
    infer: int = 0
    output: int = 0

    def since(self, before: Totals) -> Totals:
        """What was done after that."""
        had = dict(before.refused)
        refused = tuple((reason, count - had.get(reason, 0)) for reason, count in self.refused)
        return Totals(
            self.answered - before.answered,
            refused,
            self.rows - before.rows,
            self.executions - before.executions,
            self.latency - before.latency,
            self.queue - before.queue,
            self.input - before.input,
            self.infer - before.infer,
            self.output - before.output,
        )


class ServiceMeter:
    """Counters of one service since the node started."""

    def __init__(self, season: Season) -> None:
        self.arrived = 0
        self.answered = 0
        self.by_variant: Counter[str] = Counter()
        """Requests that were executed to their end, by variant."""
        self.failed = 0
        self.misses = 0
        self.refused: Counter[str] = Counter()
        self.latency = Histogram(LATENCY_BUCKETS_S)
        self.recent = Recent()
        """Latency; of an answer in pieces that of its first one."""
        self.first = Histogram(LATENCY_BUCKETS_S)
        """Of answers in pieces: arrival to the first one."""
        self.pace = Histogram(LATENCY_BUCKETS_S)
        """Of such an answer: the mean time per token after the first."""
        self.recent_pace = Recent()
        self.tokens = 0
        self.prompt_tokens = 0
        self.prompt = Mean()
        """Tokens of a request, and of an answer that is over."""
        self.answer = Mean()
        self.batches = 0
        self.batched_rows = 0
        self.rows: Counter[int] = Counter()
        self.queue_ns = 0
        self.exec_ns = 0
        self.latency_ns = 0
        self.executed_rows = 0
        """Rows of requests that were dispatched for the first time."""
        self.executions = 0
        self.input_ns = 0
        """Of this and the next two see ``Totals``."""
        self.infer_ns = 0
        self.output_ns = 0
        self.version = ""
        """The one that took over last."""
        self._before = Totals()
        """What was done when it began to."""
        self.rate = Holt()
        self.season = season
        self.last_answer = 0
        self._rows = 0
        self._counted = 0

    def serve(self, version: str) -> None:
        """A version takes over, or ("") the one that serves goes."""
        if version != self.version:
            self.version = version
            self._before = self._totals()

    def of_version(self) -> Totals:
        """What was done since then."""
        return self._totals().since(self._before)

    def _totals(self) -> Totals:
        return Totals(
            self.answered,
            tuple(self.refused.items()),
            self.executed_rows,
            self.executions,
            self.latency_ns,
            self.queue_ns,
            self.input_ns,
            self.infer_ns,
            self.output_ns,
        )

    def execute(self, requests: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """So many requests were executed together, once."""
        self.executions += 1
        self.input_ns += requests * input_ns
        self.infer_ns += requests * infer_ns
        self.output_ns += requests * output_ns

    def arrive(self, rows: int) -> None:
        """A request came."""
        self.arrived += 1
        self._rows += rows

    def tick(self, now: int, seconds: float) -> None:
        """Close one interval of the arrival rate (rows per second)."""
        rate = (self._rows - self._counted) / seconds
        self.rate.add(rate)
        self.season.add(now, rate)
        self._counted = self._rows


class Span(NamedTuple):
    """Who held what for ``window`` ns up to ``end`` (ns, monotonic): of each device, its units
    that each workload (``service:x``, ``job:y``) had in the mean."""

    end: int
    window: int
    held: dict[str, dict[str, float]]


class PartitionMeter:
    """Busy time of one partition by workload (``service:x``, ``job:y``), in ns."""

    def __init__(self) -> None:
        self.device = ""
        self.busy: Counter[str] = Counter()
        self.window: Counter[str] = Counter()
        self.last_window: dict[str, float] = {}
        self.switches = 0
        self.revoke = Histogram(REVOKE_BUCKETS_S)
        self.recent_revoke = Recent()
        self.holder = ""
        self.since = 0
        self._last = ""

    def hold(self, workload: str, now: int) -> None:
        """A workload takes the partition ("" = idle)."""
        if self.holder:
            self.busy[self.holder] += now - self.since
            self.window[self.holder] += now - self.since
        if workload and workload != self._last:
            self.switches += 1
            self._last = workload
        self.holder, self.since = workload, now


class JobMeter:
    """Grants of one job. ``held_ns`` is unit-nanoseconds."""

    def __init__(self, now: int) -> None:
        self.held_ns = 0
        self.grants = 0
        self.pauses = 0
        self._units = 0
        self._since = now
        self._now: Counter[int] = Counter()
        self._recent: deque[Counter[int]] = deque()
        self._total: Counter[int] = Counter()
        self._renewed = 0.0
        """Grants, each counted as the part that it is of what the job then holds."""
        self._renewals: deque[float] = deque([0.0], maxlen=RATE_WINDOW // S + 1)

    def change(self, now: int, units: int) -> None:
        """It got or lost units."""
        self._now[self._units] += now - self._since
        self._units, self._since = self._units + units, now

    def tick(self, now: int) -> None:
        """Close one interval."""
        self.change(now, 0)
        self._recent.append(self._now)
        for units, ns in self._now.items():
            self._total[units] += ns
        if len(self._recent) > RATE_WINDOW // S:
            for units, ns in self._recent.popleft().items():
                self._total[units] -= ns
        self._now = Counter()
        self._renewals.append(self._renewed)

    def grant(self, now: int, units: int) -> None:
        """It may use so many units more."""
        self.change(now, units)
        self.grants += 1
        self._renewed += units / self._units

    def grant_rate(self) -> float:
        """How often per second of the last minute it was given what it has."""
        span = sum(self._total.values())
        return (self._renewals[-1] - self._renewals[0]) / (span / S) if span else 0.0

    def shares(self) -> dict[int, float]:
        """For which part of the last minute it held so many units."""
        span = sum(self._total.values())
        if not span:
            return {}
        return {units: ns / span for units, ns in sorted(self._total.items()) if ns > 0}
