"""Prometheus exposition of what the monitor counted, made when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from prometheus_client import Metric

from cotenant.domain.port import JobStatus
from cotenant.domain.units import S
from cotenant.policy.memory.account import Line
from cotenant.policy.state import DispatcherState
from cotenant.telemetry.families import (
    bare_text,
    counter,
    gauge,
    histogram,
    histogram_of_sizes,
    text,
)
from cotenant.telemetry.monitor import Monitor
from cotenant.telemetry.othernames import Standing, standing, triton, vllm
from cotenant.telemetry.variants import serving_on

_SERVICE = ("service",)
_PARTITION = ("device", "partition")
_JOB = ("job", "name")
_LINES = ("held", "guaranteed", "limit", "wanted", "asked", "waiting", "over")


USES: Final = ("services", "lent", "owned", "free")
"""Of units: a service has them; they are a service's and lent to a job; a job's own, and it has
them; a job's own, and it has not."""


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
    loads: Mapping[str, float],
) -> bytes:
    """The text that ``/metrics`` answers with. Times in seconds, memory in bytes; Triton's times
    in microseconds. ``loads``: see ``cotenant.policy.saturation``."""
    stands = standing(state)
    ours = (
        *_traffic(monitor, state),
        *_scaling(state, stands, loads),
        *_latencies(monitor),
        *_variants(monitor, state),
        *_units(state),
        *_partitions(monitor),
        *_jobs(monitor, jobs),
        *_memory(memory),
    )
    theirs = vllm(monitor, state, stands)
    return text((*ours, *theirs)) + bare_text(triton(monitor, state, stands))


def _traffic(monitor: Monitor, state: DispatcherState) -> Iterator[Metric]:
    meters, services = monitor.services.items(), state.services.items()
    yield counter(
        "cotenant_requests",
        "Requests that arrived",
        _SERVICE,
        (((n,), m.arrived) for n, m in meters),
    )
    yield counter(
        "cotenant_answers", "Requests answered", _SERVICE, (((n,), m.answered) for n, m in meters)
    )
    yield counter(
        "cotenant_deadline_misses",
        "Answers after the deadline",
        _SERVICE,
        (((n,), m.misses) for n, m in meters),
    )
    yield counter(
        "cotenant_refusals",
        "Requests refused, by reason",
        (*_SERVICE, "reason"),
        (((n, why), count) for n, m in meters for why, count in m.refused.items()),
    )
    yield gauge(
        "cotenant_request_rate",
        "Rows that arrive per second, smoothed",
        _SERVICE,
        (((n,), m.rate.level) for n, m in meters),
    )
    yield gauge(
        "cotenant_request_rate_trend",
        "Change of the arrival rate per second",
        _SERVICE,
        (((n,), m.rate.trend) for n, m in meters),
    )
    yield gauge(
        "cotenant_queue_length",
        "Requests waiting",
        _SERVICE,
        (((n,), known.queued) for n, known in services),
    )
    yield gauge(
        "cotenant_objective_seconds",
        "Latency objective",
        _SERVICE,
        (((n,), known.objective / S) for n, known in services),
    )
    yield counter(
        "cotenant_tokens",
        "Tokens, read and said",
        (*_SERVICE, "kind"),
        (
            ((n, kind), count)
            for n, m in meters
            if m.tokens
            for kind, count in (("prompt", m.prompt_tokens), ("answer", m.tokens))
        ),
    )


def _scaling(
    state: DispatcherState, stands: Mapping[str, Standing], loads: Mapping[str, float]
) -> Iterator[Metric]:
    yield gauge(
        "cotenant_running_requests",
        "Requests that instances have: those under way, and those between two turns",
        _SERVICE,
        (((n,), stands[n].running) for n in state.services),
    )
    yield gauge(
        "cotenant_service_load",
        "Arrival rate over the highest at which the objective is predicted to hold",
        _SERVICE,
        (((n,), loads[n]) for n in state.services if n in loads),
    )


def _latencies(monitor: Monitor) -> Iterator[Metric]:
    meters = monitor.services.items()
    talking = [(n, m) for n, m in meters if m.tokens]
    yield histogram(
        "cotenant_latency_seconds",
        "Arrival to result, in the node",
        _SERVICE,
        (((n,), m.latency) for n, m in meters),
    )
    yield histogram(
        "cotenant_first_piece_seconds",
        "Arrival to the first piece of an answer",
        _SERVICE,
        (((n,), m.first) for n, m in talking),
    )
    yield histogram(
        "cotenant_token_seconds",
        "Mean time per token after the first, by answer",
        _SERVICE,
        (((n,), m.pace) for n, m in talking),
    )
    yield histogram_of_sizes(
        "cotenant_batch_rows", "Rows per batch", _SERVICE, (((n,), m.rows) for n, m in meters)
    )


def _variants(monitor: Monitor, state: DispatcherState) -> Iterator[Metric]:
    several = {n: s for n, s in state.services.items() if any(s.variants.values())}
    yield counter(
        "cotenant_variant_answers",
        "Requests answered by each variant of the model",
        (*_SERVICE, "variant"),
        (
            ((n, variant), count)
            for n in several
            for variant, count in monitor.service(n).by_variant.items()
        ),
    )
    yield gauge(
        "cotenant_variant_serving",
        "1 for the variant of the model that serves on a kind of device",
        (*_SERVICE, "kind", "variant"),
        (
            ((n, kind, variant), 1)
            for n, known in several.items()
            for kind, variant in serving_on(known).items()
        ),
    )


def _units(state: DispatcherState) -> Iterator[Metric]:
    counts: dict[tuple[str, str], int] = {}
    for partition in state.partitions.values():
        use = "owned" if partition.job else "free"
        if partition.services or partition.lendable:
            use = "lent" if partition.job else "services"
        for each in USES:
            counts.setdefault((partition.device, each), 0)
        counts[partition.device, use] += partition.compute
    yield gauge(
        "cotenant_device_units",
        "Compute units of a device, by who has them now",
        ("device", "use"),
        counts.items(),
    )


def _partitions(monitor: Monitor) -> Iterator[Metric]:
    meters = monitor.partitions.items()
    yield counter(
        "cotenant_partition_busy_seconds",
        "Time a partition was held, by workload",
        (*_PARTITION, "workload"),
        (((m.device, n, who), ns / S) for n, m in meters for who, ns in m.busy.items()),
    )
    yield counter(
        "cotenant_partition_switches",
        "Changes of the workload on a partition",
        _PARTITION,
        (((m.device, n), m.switches) for n, m in meters),
    )
    yield histogram(
        "cotenant_preemption_seconds",
        "Taking a partition back from a job",
        _PARTITION,
        (((m.device, n), m.revoke) for n, m in meters),
    )


def _jobs(monitor: Monitor, jobs: Sequence[JobStatus]) -> Iterator[Metric]:
    yield gauge(
        "cotenant_job_progress",
        "Steps reported by the job",
        _JOB,
        (((j.id, j.name), j.progress) for j in jobs),
    )
    yield gauge(
        "cotenant_job_rate",
        "Progress per second (CPU seconds where none is reported)",
        _JOB,
        (((j.id, j.name), j.rate) for j in jobs),
    )
    yield counter(
        "cotenant_job_held_seconds",
        "Partition time granted to the job",
        _JOB,
        (((j.id, j.name), j.held_s) for j in jobs),
    )
    yield counter(
        "cotenant_job_pauses",
        "Times the job lost its last partition",
        _JOB,
        (((j.id, j.name), monitor.job(j.id).pauses) for j in jobs),
    )
    yield gauge(
        "cotenant_job_state",
        "1 for the present state",
        (*_JOB, "state"),
        (((j.id, j.name, j.state), 1) for j in jobs),
    )


def _memory(memory: Memory) -> Iterator[Metric]:
    yield gauge(
        "cotenant_tenant_memory_bytes",
        "Resident memory of a model instance or a job on a device",
        ("device", "tenant"),
        (
            ((device, tenant), occupied)
            for device, tenants in memory.resident.items()
            for tenant, occupied in tenants.items()
        ),
    )
    yield gauge(
        "cotenant_memory_bytes",
        "What the ledger of a device's memory says of a holder",
        ("device", "holder", "kind", "what"),
        (
            ((device, line.name, line.kind, what), getattr(line, what))
            for device, lines in memory.booked.items()
            for line in lines
            for what in _LINES
        ),
    )
    kept = memory.kept.items()
    yield counter(
        "cotenant_result_lookups",
        "Requests looked up among kept results",
        _SERVICE,
        (((n,), asked) for n, (asked, _, _) in kept),
    )
    yield counter(
        "cotenant_result_hits",
        "Requests answered with a kept result",
        _SERVICE,
        (((n,), found) for n, (_, found, _) in kept),
    )
