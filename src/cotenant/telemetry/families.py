"""Metric families from rows of labels and values, and their text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)

from cotenant.telemetry.meters import Histogram

Rows = Iterable[tuple[Sequence[str], float]]
"""Values of the labels, and the metric's own."""
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class _Once:
    """A collector over metric families that exist already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def text(families: Iterable[Metric]) -> bytes:
    """The exposition of these; the names of counters end in ``_total`` there."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once(families))
    return generate_latest(registry)


def bare_text(families: Iterable[Metric]) -> bytes:
    """The same with the names of counters as they are, as programs expose them that are older than
    that rule. Values are whole numbers."""
    lines = []
    for family in families:
        lines += [
            f"# HELP {family.name} {family.documentation}",
            f"# TYPE {family.name} {family.type}",
        ]
        for sample in family.samples:
            labels = ",".join(f'{name}="{_quoted(v)}"' for name, v in sample.labels.items())
            lines.append(f"{family.name}{{{labels}}} {sample.value}")
    return "".join(f"{line}\n" for line in lines).encode()


def _quoted(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def gauge(name: str, says: str, labels: Sequence[str], rows: Rows) -> Metric:
    """What is now."""
    family = GaugeMetricFamily(name, says, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def counter(name: str, says: str, labels: Sequence[str], rows: Rows) -> Metric:
    """What was since the node started."""
    family = CounterMetricFamily(name, says, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def histogram(
    name: str, says: str, labels: Sequence[str], rows: Iterable[tuple[Sequence[str], Histogram]]
) -> Metric:
    """Durations, in seconds."""
    family = HistogramMetricFamily(name, says, labels=labels)
    for values, found in rows:
        buckets, total = [], 0
        for bound, count in zip(found.bounds, found.counts, strict=False):
            total += count
            buckets.append((f"{bound:g}", total))
        buckets.append(("+Inf", total + found.counts[-1]))
        family.add_metric(values, buckets, found.sum)
    return family


def histogram_of_sizes(
    name: str,
    says: str,
    labels: Sequence[str],
    rows: Iterable[tuple[Sequence[str], Mapping[int, int]]],
) -> Metric:
    """How often each size was seen."""
    family = HistogramMetricFamily(name, says, labels=labels)
    for values, found in rows:
        buckets = [(str(b), sum(n for r, n in found.items() if r <= b)) for b in _SIZES]
        buckets.append(("+Inf", sum(found.values())))
        family.add_metric(values, buckets, sum(r * n for r, n in found.items()))
    return family
