"""What came of a run: counts and latency histograms, of the same size however long it was."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from cotenant.domain.units import US, S
from cotenant.domain.workload import ORIGINAL
from cotenant.sim.moments import Moment, Span

_STEP = math.log(1.02)
"""Latencies are kept in buckets 2 % wide: a percentile is right to that."""


class TokenTally(msgspec.Struct):
    """What a language model did. ``prompts`` and ``said``: tokens of the answers that are over.
    ``again``: tokens that were computed though they had been before. Blocks: how often one was
    ``read`` by an iteration, and copied to the host (``offloaded``) and back (``restored``).
    ``pace``: mean ns of a token behind the first, by answer."""

    prompts: int = 0
    said: int = 0
    again: int = 0
    put_aside: int = 0
    read: int = 0
    offloaded: int = 0
    restored: int = 0
    pace: dict[int, int] = {}

    def add(self, other: TokenTally) -> None:
        """Count another box's too."""
        for name in ("prompts", "said", "again", "put_aside", "read", "offloaded", "restored"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for index, count in other.pace.items():
            self.pace[index] = self.pace.get(index, 0) + count

    @property
    def from_host(self) -> float:
        """Share (0..1) of block accesses for which the block had to come from the host."""
        return self.restored / self.read if self.read else 0.0


class ServiceTally(msgspec.Struct):
    """One service. ``objective`` in ns. Of a language model (``tokens``) latency is that of the
    first token."""

    objective: int
    offered: int = 0
    answered: int = 0
    attained: int = 0
    refused: dict[str, int] = {}
    buckets: dict[int, int] = {}
    tokens: TokenTally | None = None
    variants: dict[str, int] = {}
    """Answers by the variant that gave them."""

    def answer(self, latency: int, in_time: bool | None = None) -> None:
        """Count an answer after ``latency`` ns; ``in_time``: if not that alone says it."""
        self.answered += 1
        self.attained += latency <= self.objective if in_time is None else in_time
        _count(self.buckets, latency)

    def talked(self, prompt: int, said: int, first: int, last: int) -> None:
        """An answer of so many tokens is over; when (ns) its first and last one came."""
        assert self.tokens is not None
        self.tokens.prompts += prompt
        self.tokens.said += said
        if said > 1:
            _count(self.tokens.pace, (last - first) // (said - 1))

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
        for variant, count in other.variants.items():
            self.variants[variant] = self.variants.get(variant, 0) + count
        if self.tokens is not None and other.tokens is not None:
            self.tokens.add(other.tokens)

    @property
    def attainment(self) -> float:
        """Share (0..1) answered in time of what was answered or refused; 1 if nothing was. What is
        open at the end counts for nothing: with a long objective that would be much of a run."""
        decided = self.answered + sum(self.refused.values())
        return self.attained / decided if decided else 1.0

    def quantile_ns(self, share: float) -> float:
        """Upper edge (ns) of the bucket that holds the quantile; 0 if nothing was answered."""
        return _quantile(self.buckets, share)

    def pace_ns(self, share: float) -> float:
        """The same of a token behind the first."""
        return _quantile(self.tokens.pace, share) if self.tokens is not None else 0.0


def _count(buckets: dict[int, int], ns: int) -> None:
    index = int(math.log(max(ns, US) / US) / _STEP)
    buckets[index] = buckets.get(index, 0) + 1


def _quantile(buckets: dict[int, int], share: float) -> float:
    wanted, seen = share * sum(buckets.values()), 0
    for index in sorted(buckets):
        seen += buckets[index]
        if seen >= wanted:
            return US * math.exp((index + 1) * _STEP)
    return 0.0


class JobTally(msgspec.Struct):
    """One job. ``held_ns`` is unit-nanoseconds."""

    steps: float = 0.0
    held_ns: int = 0
    grants: int = 0
    evicted: int = 0
    rested_ns: int = 0


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
            mine.evicted += job.evicted
            mine.rested_ns += job.rested_ns
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
        } | {**self._token_figures(), **self._memory_figures(), **self._variant_figures()}

    def _variant_figures(self) -> dict[str, float]:
        """Of services with several variants, if there are any: the share (0..1) of their answers
        that another than the original gave."""
        several = [s.variants for s in self.services.values() if s.variants]
        if not several:
            return {}
        answers = sum(sum(v.values()) for v in several)
        return {"by_variants": 1.0 - sum(v.get(ORIGINAL, 0) for v in several) / answers}

    def _memory_figures(self) -> dict[str, float]:
        """Of jobs whose memory was taken, if there are any."""
        evicted = sum(j.evicted for j in self.jobs.values())
        if not evicted:
            return {}
        rested = sum(j.rested_ns for j in self.jobs.values())
        return {"evicted_bytes": float(evicted), "rested_s": rested / S}

    def _token_figures(self) -> dict[str, float]:
        """Of language models, if there are any; of TTFT and TPOT the worst service's."""
        talks = [s for s in self.services.values() if s.tokens is not None]
        tokens = TokenTally()
        for service in talks:
            assert service.tokens is not None
            tokens.add(service.tokens)
        if not talks:
            return {}
        return {
            "ttft_p99_s": max(s.quantile_ns(0.99) for s in talks) / S,
            "tpot_p99_s": max(s.pace_ns(0.99) for s in talks) / S,
            "tokens_s": tokens.said / (self.duration / S),
            "put_aside": float(tokens.put_aside),
            "again": tokens.again / max(1, tokens.prompts + tokens.said),
            "from_host": tokens.from_host,
        }

    def token_figures(self, name: str) -> dict[str, float]:
        """The same of one language model."""
        tally = self.services[name]
        own = Outcome(self.duration, self.units, {name: tally}, {})
        middle = {"ttft_p50_s": tally.quantile_ns(0.5) / S, "tpot_p50_s": tally.pace_ns(0.5) / S}
        return own._token_figures() | middle
