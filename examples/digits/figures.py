"""Figures from what was seen: for the live table, the summary and the picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from arms import OBJECTIVE_MS, Run, Sample
from numpy.typing import NDArray
from stream import BEGINS, TEST, Digits, Stream

Mask = NDArray[np.bool_]


def answered(run: Run) -> Mask:
    """Requests answered with a result."""
    return np.asarray(run.answers["status"] == 200)


def judged(run: Run, stream: Stream, digits: Digits) -> Mask:
    """Answered requests whose digit nobody ever learned from."""
    return np.asarray(answered(run) & (digits.groups[stream.digit] == TEST))


def right(run: Run, stream: Stream, digits: Digits) -> Mask:
    """Requests answered with the right digit."""
    return np.asarray(run.answers["predicted"] == digits.labels[stream.digit])


def between(run: Run, since: float, until: float) -> Mask:
    """Requests due in an interval (seconds)."""
    return np.asarray((run.due >= since) & (run.due < until))


def percentile(latencies: NDArray[np.float32], share: float) -> float:
    """By nearest rank, in ms; nan without samples."""
    if not len(latencies):
        return float("nan")
    ordered = np.sort(latencies)
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])


def mean(values: NDArray[Any]) -> float:
    """The mean; nan without values."""
    return float(values.mean()) if len(values) else float("nan")


def shares(before: Sample, after: Sample, cores: int) -> dict[str, float]:
    """Shares of the box's core time, and steps a second, between two samples."""
    span = max(1e-9, after.at - before.at)
    parts = zip(after.time._fields, before.time, after.time, strict=True)
    found = {name: (new - old) / (span * cores) for name, old, new in parts}
    return {**found, "steps_per_s": (after.steps - before.steps) / span}


def swaps(run: Run) -> dict[int, float]:
    """When each version after the first gave its first answer (seconds), in order."""
    found: dict[int, float] = {}
    best = 1
    done = answered(run)
    at, version = run.due + run.answers["latency_ms"] / 1e3, run.answers["version"]
    for index in np.flatnonzero(done)[np.argsort(at[done], kind="stable")]:
        if version[index] > best:
            best = int(version[index])
            found[best] = float(at[index])
    return found


def summary(run: Run, stream: Stream, digits: Digits, cores: int) -> dict[str, float]:
    """The figures of one arm. A request that was refused or never answered counts as missed."""
    done = answered(run)
    latency = run.answers["latency_ms"]
    correct, test = right(run, stream, digits), judged(run, stream, digits)
    in_time = done & correct & (latency <= OBJECTIVE_MS)
    last = between(run, BEGINS[-1] * run.seconds, run.seconds)
    known = ~np.isnan(run.served_right)
    whole = shares(run.samples[0], run.samples[-1], cores)
    return {
        "requests": len(run.due),
        "p50_ms": percentile(latency[done], 0.50),
        "p95_ms": percentile(latency[done], 0.95),
        "p99_ms": percentile(latency[done], 0.99),
        "attainment": float((latency[done] <= OBJECTIVE_MS).sum()) / max(1, len(run.due)),
        "refused": float((~done).sum()),
        "accuracy": mean(run.served_right[known]),
        "accuracy_answered": mean(correct[test]),
        "right_in_time": mean(in_time[digits.groups[stream.digit] == TEST]),
        "accuracy_last_stage": mean(run.served_right[known & last]),
        "published": len(run.published),
        "swapped_in": len(swaps(run)),
        "publish_to_serve_s": _delay(run),
        "client_lag_p99_ms": percentile(run.answers["lag_ms"][done], 0.99),
        **whole,
    }


def _delay(run: Run) -> float:
    """Median seconds from a version's appearance on the disk to its first answer."""
    seen = swaps(run)
    delays = [at - run.published[v] for v, at in seen.items() if v in run.published]
    return float(np.median(delays)) if delays else float("nan")
