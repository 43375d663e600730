"""The names under which others expose what this node counts, so that what reads theirs reads ours.

Triton's: https://github.com/triton-inference-server/server/blob/main/docs/user_guide/metrics.md.
vLLM's: https://docs.vllm.ai/en/latest/usage/metrics.html. What each means here: docs/metrics.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from prometheus_client import Metric

from cotenant.domain.request import Refusal
from cotenant.policy.state import DispatcherState, WorkerState
from cotenant.telemetry.families import counter, gauge, histogram
from cotenant.telemetry.meters import Totals
from cotenant.telemetry.monitor import Monitor

REASONS: Final = {
    **dict.fromkeys((r.name for r in Refusal), "REJECTED"),
    Refusal.CANCELLED.name: "CANCELED",
    Refusal.UNREAD.name: "CANCELED",
    Refusal.FAILED.name: "BACKEND",
    Refusal.WORKER_LOST.name: "BACKEND",
    Refusal.UNAVAILABLE.name: "OTHER",
    Refusal.SHUTTING_DOWN.name: "OTHER",
}
"""By refusal, the reason that Triton would give."""
_SAID = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
_VERSION = ("model", "version")
_MODEL = ("model_name",)


class Standing(NamedTuple):
    """Requests of a service: those that instances have, those that wait for their first turn."""

    running: int
    waiting: int


def standing(state: DispatcherState) -> dict[str, Standing]:
    """How requests stand now, by service."""
    sent: Counter[str] = Counter()
    for run in state.running.values():
        sent[run.batch.service] += len(run.batch.requests)
    between: Counter[str] = Counter()
    for number in state.residents:
        request = state.queued.get(number)
        if request is not None:
            between[request.service] += 1
    return {
        name: Standing(sent[name] + between[name], known.queued - between[name])
        for name, known in state.services.items()
    }


def triton(
    monitor: Monitor, state: DispatcherState, stands: Mapping[str, Standing]
) -> Iterator[Metric]:
    """Counters of the version that serves, times in microseconds. ``Totals`` says what they are."""
    found: list[tuple[tuple[str, str], Totals]] = []
    for name, known in state.services.items():
        if known.version:
            found.append(((name, known.version), monitor.service(name).of_version()))
    yield counter(
        "nv_inference_request_success",
        "Number of requests answered",
        _VERSION,
        ((key, t.answered) for key, t in found),
    )
    yield counter(
        "nv_inference_request_failure",
        "Number of requests refused or failed",
        (*_VERSION, "reason"),
        (
            ((*key, reason), count)
            for key, totals in found
            for reason, count in _failures(totals).items()
        ),
    )
    yield counter(
        "nv_inference_count",
        "Number of rows inferred (without kept results)",
        _VERSION,
        ((key, t.rows) for key, t in found),
    )
    yield counter(
        "nv_inference_exec_count",
        "Number of executions of the model (without kept results)",
        _VERSION,
        ((key, t.executions) for key, t in found),
    )
    yield gauge(
        "nv_inference_pending_request_count",
        "Number of requests awaiting execution",
        _VERSION,
        ((key, stands[key[0]].waiting) for key, _ in found),
    )
    for name, says, which in _DURATIONS:
        yield counter(
            f"nv_inference_{name}_duration_us",
            f"Cumulative time in microseconds: {says}",
            _VERSION,
            ((key, getattr(totals, which) // 1000) for key, totals in found),
        )


_DURATIONS: Final = (
    ("request", "arrival to result", "latency"),
    ("queue", "arrival to dispatch", "queue"),
    ("compute_input", "dispatch until the inputs are joined", "input"),
    ("compute_infer", "execution", "infer"),
    ("compute_output", "outputs divided and written", "output"),
)


def _failures(totals: Totals) -> dict[str, int]:
    found = dict.fromkeys(_SAID, 0)
    for refusal, count in totals.refused:
        found[REASONS[refusal]] += count
    return found


def vllm(
    monitor: Monitor, state: DispatcherState, stands: Mapping[str, Standing]
) -> Iterator[Metric]:
    """Of services whose instances have pools of keys and values."""
    pools: dict[str, list[WorkerState]] = {}
    for worker in state.workers.values():
        if worker.up and worker.pool and worker.service in state.services:
            pools.setdefault(worker.service, []).append(worker)
    if not pools:
        return
    meters = {name: monitor.service(name) for name in pools}
    yield gauge(
        "vllm:num_requests_running",
        "Requests that have turns",
        _MODEL,
        (((n,), stands[n].running) for n in pools),
    )
    yield gauge(
        "vllm:num_requests_waiting",
        "Requests that wait for their first turn",
        _MODEL,
        (((n,), stands[n].waiting) for n in pools),
    )
    yield gauge(
        "vllm:kv_cache_usage_perc",
        "Part (0..1) of the memory for keys and values that is in use",
        _MODEL,
        (((n,), _usage(workers)) for n, workers in pools.items()),
    )
    yield gauge(
        "vllm:cache_config_info",
        "Tokens of a block of keys and values, and blocks that there are",
        (*_MODEL, "block_size", "num_gpu_blocks"),
        (((n, *_blocks(workers)), 1) for n, workers in pools.items()),
    )
    for name, says, which in _TOKENS:
        yield counter(name, says, _MODEL, (((n,), getattr(m, which)) for n, m in meters.items()))
    for name, says, which in _TIMES:
        yield histogram(name, says, _MODEL, (((n,), getattr(m, which)) for n, m in meters.items()))


_TOKENS: Final = (
    ("vllm:prompt_tokens", "Tokens of prompts", "prompt_tokens"),
    ("vllm:generation_tokens", "Tokens of answers", "tokens"),
)
_TIMES: Final = (
    ("vllm:time_to_first_token_seconds", "Arrival to the first token", "first"),
    (
        "vllm:request_time_per_output_token_seconds",
        "Mean time per token after the first, by answer",
        "pace",
    ),
    ("vllm:e2e_request_latency_seconds", "Arrival to the last token", "latency"),
)


def _usage(pools: list[WorkerState]) -> float:
    size = sum(w.pool_now for w in pools)
    used = sum(max(0, w.held - w.evictable) for w in pools)
    return used / size if size else 0.0


def _blocks(pools: list[WorkerState]) -> tuple[str, str]:
    """Tokens of a block, and how many blocks all instances have at most."""
    tokens = max(w.most_room * w.block // w.pool for w in pools)
    return str(tokens), str(sum(w.pool // w.block for w in pools))
