"""Prometheus exposition of what the monitor counted, made when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)

from cotenant.domain.port import JobStatus
from cotenant.domain.units import S
from cotenant.policy.memory.account import Line
from cotenant.policy.state import DispatcherState
from cotenant.telemetry.meters import Histogram
from cotenant.telemetry.monitor import Monitor
from cotenant.telemetry.variants import serving_on


class _Once:
    """A collector over metric families that exist already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class Memory(NamedTuple):
    """Of each device: what tenants were seen to occupy, and what its ledger says."""

    resident: Mapping[str, Mapping[str, int]]
    booked: Mapping[str, Sequence[Line]]
    kept: Mapping[str, tuple[int, int, int]] = {}
    """Of services whose results are kept: lookups, hits, bytes."""


def exposition(
    monitor: Monitor,
    state: DispatcherState,
    jobs: Sequence[JobStatus],
    memory: Memory,
) -> bytes:
    """The text that ``/metrics`` answers with. Times in seconds, memory in bytes."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once([*_families(monitor, state, jobs), *_memory(memory)]))
    return generate_latest(registry)


def _families(
    monitor: Monitor, state: DispatcherState, jobs: Sequence[JobStatus]
) -> Iterator[Metric]:
    yield from _services(monitor, state)
    yield from _language_models(monitor, state)
    yield from _partitions(monitor)
    yield from _jobs(monitor, jobs)


def _memory(memory: Memory) -> Iterator[Metric]:
    resident = GaugeMetricFamily(
        "cotenant_tenant_memory_bytes",
        "Resident memory of a model instance or a job on a device",
        labels=["device", "tenant"],
    )
    for device, tenants in memory.resident.items():
        for tenant, occupied in tenants.items():
            resident.add_metric([device, tenant], occupied)
    booked = GaugeMetricFamily(
        "cotenant_memory_bytes",
        "What the ledger of a device's memory says of a holder",
        labels=["device", "holder", "kind", "what"],
    )
    for device, lines in memory.booked.items():
        for line in lines:
            for what in ("held", "guaranteed", "limit", "wanted", "asked", "waiting", "over"):
                booked.add_metric([device, line.name, line.kind, what], getattr(line, what))
    lookups = CounterMetricFamily(
        "cotenant_result_lookups", "Requests looked up among kept results", labels=["service"]
    )
    hits = CounterMetricFamily(
        "cotenant_result_hits", "Requests answered with a kept result", labels=["service"]
    )
    for service, (asked, found, _) in memory.kept.items():
        lookups.add_metric([service], asked)
        hits.add_metric([service], found)
    yield from (resident, booked, lookups, hits)


def _services(monitor: Monitor, state: DispatcherState) -> Iterator[Metric]:
    label = ["service"]
    arrived = CounterMetricFamily("cotenant_requests", "Requests that arrived", labels=label)
    answered = CounterMetricFamily("cotenant_answers", "Requests answered", labels=label)
    by_variant = CounterMetricFamily(
        "cotenant_variant_answers",
        "Requests answered by each variant of the model",
        labels=["service", "variant"],
    )
    serving = GaugeMetricFamily(
        "cotenant_variant_serving",
        "1 for the variant of the model that serves on a kind of device",
        labels=["service", "kind", "variant"],
    )
    misses = CounterMetricFamily(
        "cotenant_deadline_misses", "Answers after the deadline", labels=label
    )
    refused = CounterMetricFamily(
        "cotenant_refusals", "Requests refused, by reason", labels=["service", "reason"]
    )
    rate = GaugeMetricFamily("cotenant_request_rate", "Arrivals per second, smoothed", labels=label)
    trend = GaugeMetricFamily(
        "cotenant_request_rate_trend", "Change of the arrival rate per second", labels=label
    )
    queue = GaugeMetricFamily("cotenant_queue_length", "Requests waiting", labels=label)
    objective = GaugeMetricFamily("cotenant_objective_seconds", "Latency objective", labels=label)
    latency = HistogramMetricFamily(
        "cotenant_latency_seconds", "Arrival to result, in the node", labels=label
    )
    first = HistogramMetricFamily(
        "cotenant_first_piece_seconds", "Arrival to the first piece of an answer", labels=label
    )
    pace = HistogramMetricFamily(
        "cotenant_token_seconds", "Mean time per token after the first, by answer", labels=label
    )
    tokens = CounterMetricFamily(
        "cotenant_tokens", "Tokens, read and said", labels=["service", "kind"]
    )
    batches = HistogramMetricFamily("cotenant_batch_rows", "Rows per batch", labels=label)
    for name, meter in monitor.services.items():
        arrived.add_metric([name], meter.arrived)
        answered.add_metric([name], meter.answered)
        misses.add_metric([name], meter.misses)
        for reason, count in meter.refused.items():
            refused.add_metric([name, reason], count)
        rate.add_metric([name], meter.rate.level)
        trend.add_metric([name], meter.rate.trend)
        _add_histogram(latency, [name], meter.latency)
        if meter.tokens:
            _add_histogram(first, [name], meter.first)
            _add_histogram(pace, [name], meter.pace)
            tokens.add_metric([name, "prompt"], meter.prompt_tokens)
            tokens.add_metric([name, "answer"], meter.tokens)
        _add_sizes(batches, [name], meter.rows)
        if name in state.services:
            queue.add_metric([name], state.services[name].queued)
            objective.add_metric([name], state.services[name].objective / S)
            if any(state.services[name].variants.values()):
                for kind, variant in serving_on(state.services[name]).items():
                    serving.add_metric([name, kind, variant], 1)
                for variant, count in meter.by_variant.items():
                    by_variant.add_metric([name, variant], count)
    yield from (arrived, answered, misses, refused, rate, trend, queue, objective)
    yield from (latency, batches, first, pace, tokens, by_variant, serving)


def _language_models(monitor: Monitor, state: DispatcherState) -> Iterator[Metric]:
    """By the names that routers and dashboards made for vLLM read
    (https://docs.vllm.ai/en/latest/usage/metrics.html)."""
    label = ["model_name"]
    running = GaugeMetricFamily(
        "vllm:num_requests_running", "Requests that have turns", labels=label
    )
    waiting = GaugeMetricFamily(
        "vllm:num_requests_waiting", "Requests that wait for their first turn", labels=label
    )
    usage = GaugeMetricFamily(
        "vllm:kv_cache_usage_perc",
        "Part (0..1) of the memory for keys and values that is in use",
        labels=label,
    )
    read = CounterMetricFamily("vllm:prompt_tokens", "Tokens of prompts", labels=label)
    said = CounterMetricFamily("vllm:generation_tokens", "Tokens of answers", labels=label)
    first = HistogramMetricFamily(
        "vllm:time_to_first_token_seconds", "Arrival to the first token", labels=label
    )
    pace = HistogramMetricFamily(
        "vllm:request_time_per_output_token_seconds",
        "Mean time per token after the first, by answer",
        labels=label,
    )
    whole = HistogramMetricFamily(
        "vllm:e2e_request_latency_seconds", "Arrival to the last token", labels=label
    )
    for name in state.services:
        pools = [w for w in state.workers.values() if w.service == name and w.up and w.pool]
        if not pools:
            continue
        mine = {r.id for r in state.queued.values() if r.service == name}
        resident = mine & state.residents.keys()
        batches = [run.batch for run in state.running.values() if run.batch.service == name]
        turns = sum(len(batch.requests) for batch in batches)
        running.add_metric([name], turns + len(resident))
        waiting.add_metric([name], len(mine) - len(resident))
        size = sum(w.pool_now for w in pools)
        used = sum(max(0, w.held - w.evictable) for w in pools)
        usage.add_metric([name], used / size if size else 0.0)
        meter = monitor.service(name)
        read.add_metric([name], meter.prompt_tokens)
        said.add_metric([name], meter.tokens)
        _add_histogram(first, [name], meter.first)
        _add_histogram(pace, [name], meter.pace)
        _add_histogram(whole, [name], meter.latency)
    found = (running, waiting, usage, read, said, first, pace, whole)
    if running.samples:
        yield from found


def _partitions(monitor: Monitor) -> Iterator[Metric]:
    busy = CounterMetricFamily(
        "cotenant_partition_busy_seconds",
        "Time a partition was held, by workload",
        labels=["device", "partition", "workload"],
    )
    switches = CounterMetricFamily(
        "cotenant_partition_switches",
        "Changes of the workload on a partition",
        labels=["device", "partition"],
    )
    revoke = HistogramMetricFamily(
        "cotenant_preemption_seconds",
        "Taking a partition back from a job",
        labels=["device", "partition"],
    )
    for name, meter in monitor.partitions.items():
        for workload, ns in meter.busy.items():
            busy.add_metric([meter.device, name, workload], ns / S)
        switches.add_metric([meter.device, name], meter.switches)
        _add_histogram(revoke, [meter.device, name], meter.revoke)
    yield from (busy, switches, revoke)


def _jobs(monitor: Monitor, jobs: Sequence[JobStatus]) -> Iterator[Metric]:
    labels = ["job", "name"]
    progress = GaugeMetricFamily(
        "cotenant_job_progress", "Steps reported by the job", labels=labels
    )
    rate = GaugeMetricFamily(
        "cotenant_job_rate",
        "Progress per second (CPU seconds where none is reported)",
        labels=labels,
    )
    share = CounterMetricFamily(
        "cotenant_job_held_seconds", "Partition time granted to the job", labels=labels
    )
    pauses = CounterMetricFamily(
        "cotenant_job_pauses", "Times the job lost its last partition", labels=labels
    )
    state = GaugeMetricFamily(
        "cotenant_job_state", "1 for the present state", labels=[*labels, "state"]
    )
    for job in jobs:
        key = [job.id, job.name]
        progress.add_metric(key, job.progress)
        rate.add_metric(key, job.rate)
        share.add_metric(key, job.held_s)
        pauses.add_metric(key, monitor.job(job.id).pauses)
        state.add_metric([*key, job.state], 1)
    yield from (progress, rate, share, pauses, state)


def _add_histogram(
    family: HistogramMetricFamily, labels: Sequence[str], histogram: Histogram
) -> None:
    buckets, total = [], 0
    for bound, count in zip(histogram.bounds, histogram.counts, strict=False):
        total += count
        buckets.append((f"{bound:g}", total))
    buckets.append(("+Inf", total + histogram.counts[-1]))
    family.add_metric(labels, buckets, histogram.sum)


def _add_sizes(family: HistogramMetricFamily, labels: Sequence[str], rows: dict[int, int]) -> None:
    bounds = [1, 2, 4, 8, 16, 32, 64, 128]
    buckets = [(str(b), sum(n for r, n in rows.items() if r <= b)) for b in bounds]
    buckets.append(("+Inf", sum(rows.values())))
    family.add_metric(labels, buckets, sum(r * n for r, n in rows.items()))
