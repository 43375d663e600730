"""What came of a run: counts and latency histograms, of the same size however long it was."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from cotenant.domain.units import US, S
from cotenant.sim.moments import Moment, Span

_STEP = math.log(1.02)
"""Latencies are kept in buckets 2 % wide: a percentile is right to that."""


class ServiceTally(msgspec.Struct):
    """One service. ``objective`` in ns."""

    objective: int
    offered: int = 0
    answered: int = 0
    attained: int = 0
    refused: dict[str, int] = {}
    buckets: dict[int, int] = {}

    def answer(self, latency: int) -> None:
        """Count an answer after ``latency`` ns."""
        self.answered += 1
        self.attained += latency <= self.objective
        index = int(math.log(max(latency, US) / US) / _STEP)
        self.buckets[index] = self.buckets.get(index, 0) + 1

    def refuse(self, why: str) -> None:
        """Count a refusal."""
        self.refused[why] = self.refused.get(why, 0) + 1

    def add(self, other: ServiceTally) -> None:
        """Count another box's requests too."""
        self.offered += other.offered
        self.answered += other.answered
        self.attained += other.attained
        for why, count in other.refused.items():
            self.refused[why] = self.refused.get(why, 0) + count
        for index, count in other.buckets.items():
            self.buckets[index] = self.buckets.get(index, 0) + count

    @property
    def attainment(self) -> float:
        """Share (0..1) answered in time of what was answered or refused; 1 if nothing was. What is
        open at the end counts for nothing: with a long objective that would be much of a run."""
        decided = self.answered + sum(self.refused.values())
        return self.attained / decided if decided else 1.0

    def quantile_ns(self, share: float) -> float:
        """Upper edge (ns) of the bucket that holds the quantile; 0 if nothing was answered."""
        wanted, seen = share * self.answered, 0
        for index in sorted(self.buckets):
            seen += self.buckets[index]
            if seen >= wanted:
                return US * math.exp((index + 1) * _STEP)
        return 0.0


class JobTally(msgspec.Struct):
    """One job. ``held_ns`` is unit-nanoseconds."""

    steps: float = 0.0
    held_ns: int = 0
    grants: int = 0


def merge(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of several boxes together; reasons and spans are those of the first."""
    first, *others = outcomes
    for other in others:
        first.units += other.units
        first.served_ns += other.served_ns
        first.repartitions += other.repartitions
        first.repartition_ns += other.repartition_ns
        first.open += other.open
        for name, service in other.services.items():
            first.services[name].add(service)
        for name, job in other.jobs.items():
            mine = first.jobs[name]
            mine.steps += job.steps
            mine.held_ns += job.held_ns
            mine.grants += job.grants
    return first


class Outcome(msgspec.Struct):
    """One run. Times in ns; ``served_ns`` is unit-nanoseconds in which batches held space;
    ``open`` counts requests that were neither answered nor refused at the end."""

    duration: int
    units: int
    services: dict[str, ServiceTally]
    jobs: dict[str, JobTally]
    served_ns: int = 0
    repartitions: int = 0
    repartition_ns: int = 0
    open: int = 0
    reasons: list[tuple[int, tuple[str, ...]]] = []
    spans: list[Span] = []
    """Kept if asked for, of the middle ``moments.SPANS`` ns of the run."""
    moments: list[Moment] = []
    """Kept if asked for, ``moments.MOMENTS`` at most."""

    def figures(self) -> dict[str, float]:
        """The figures that policies are compared by; shares are 0..1. Where a job is still being
        moved off a partition on which a batch has begun, both hold it: more than the whole is
        counted as the whole."""
        services = self.services.values()
        offered = sum(s.offered for s in services)
        held = sum(j.held_ns for j in self.jobs.values())
        return {
            "attainment": sum(s.attained for s in services) / offered if offered else 1.0,
            "worst_attainment": min(
                (s.attained / s.offered for s in services if s.offered), default=1.0
            ),
            "p99_of_objective": max(
                (s.quantile_ns(0.99) / s.objective for s in services if s.answered), default=0.0
            ),
            "refused": sum(sum(s.refused.values()) for s in services) / offered if offered else 0.0,
            "job_rate": sum(j.steps for j in self.jobs.values()) / (self.duration / S),
            "utilization": min(1.0, (self.served_ns + held) / (self.duration * self.units)),
            "repartitions": float(self.repartitions),
            "repartition_s": self.repartition_ns / S,
        }
