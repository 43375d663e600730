"""The Prometheus exposition: parses, and says what the monitor counted."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from cotenant.domain import events as e
from cotenant.domain.port import JobStatus
from cotenant.domain.units import MS
from cotenant.telemetry import metrics
from tests.unit.test_monitor import Watched, ready

JOB = JobStatus("1", "train", "running", ("x",), 1.0, 0.0, 0.0, 0, progress=7.0, held_s=2.5)


def samples(world: Watched) -> dict[tuple[str, tuple[str, ...]], float]:
    """Values by (name, values of the labels in the order of the labels' names)."""
    text = metrics.exposition(
        world.monitor, world.d.state, [JOB], metrics.Memory({"cpu": {"1": 4096}}, {})
    ).decode()
    return {
        (s.name, tuple(v for _, v in sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_services_partitions_and_jobs_are_shown() -> None:
    world = ready()
    world.serve(took=2 * MS)
    world.serve(timeout=1)
    world.job("1")
    world.send(e.Granted("1", "p0"))
    world.arrive()
    world.send(e.Revoked("1", "p0", 40_000))
    found = samples(world)
    assert found["cotenant_requests_total", ("s",)] == 3
    assert found["cotenant_answers_total", ("s",)] == 1
    assert found["cotenant_refusals_total", ("DEADLINE", "s")] == 1
    assert found["cotenant_objective_seconds", ("s",)] == 0.05
    assert found["cotenant_preemption_seconds_count", ("cpu", "p0")] == 1
    assert found["cotenant_tenant_memory_bytes", ("cpu", "1")] == 4096
    assert found["cotenant_job_progress", ("1", "train")] == 7.0
    assert found["cotenant_job_held_seconds_total", ("1", "train")] == 2.5
    assert found["cotenant_job_state", ("1", "train", "running")] == 1


def test_histograms_are_cumulative_and_end_at_infinity() -> None:
    world = ready()
    for took in (1 * MS, 3 * MS, 40 * MS):
        world.serve(took=took)
    found = samples(world)
    buckets = [
        value
        for (name, labels), value in found.items()
        if name == "cotenant_latency_seconds_bucket" and "s" in labels
    ]
    assert buckets == sorted(buckets)
    assert buckets[-1] == found["cotenant_latency_seconds_count", ("s",)] == 3
    assert found["cotenant_batch_rows_count", ("s",)] == 3


def test_an_idle_node_is_shown_too() -> None:
    assert samples(Watched())["cotenant_job_pauses_total", ("1", "train")] == 0
