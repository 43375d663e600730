"""The Prometheus exposition: parses, and says what the monitor counted."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cotenant.domain import events as e
from cotenant.domain.port import JobStatus
from cotenant.domain.request import Refusal
from cotenant.domain.units import MS, US
from cotenant.telemetry import metrics
from cotenant.telemetry.othernames import REASONS
from tests.unit.test_monitor import Watched, ready

JOB = JobStatus("1", "train", "running", ("x",), 1.0, 0.0, 0.0, 0, progress=7.0, held_s=2.5)


def _plain(name: str) -> str:
    """The parser gives all counters the suffix that those by Triton's names have not."""
    return name.removesuffix("_total") if name.startswith("nv_") else name


def samples(
    world: Watched, loads: dict[str, float] | None = None
) -> dict[tuple[str, tuple[str, ...]], float]:
    """Values by (name, values of the labels in the order of the labels' names)."""
    memory = metrics.Memory({"cpu": {"1": 4096}}, {})
    text = metrics.exposition(
        world.monitor, world.d.state, [JOB], memory, {"s": 0.25} if loads is None else loads
    ).decode()
    return {
        (_plain(s.name), tuple(v for _, v in sorted(s.labels.items()))): s.value
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


def test_units_of_a_device_are_lent_or_not() -> None:
    world = ready()
    world.planned({"s": (0,)}, {"1": (1,)}, version=2)
    before = samples(world)
    world.job("1")
    world.send(e.Granted("1", "p0"))
    found = samples(world)
    assert [before["cotenant_device_units", ("cpu", use)] for use in metrics.USES] == [1, 0, 0, 1]
    assert [found["cotenant_device_units", ("cpu", use)] for use in metrics.USES] == [0, 1, 1, 0]


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


# --- what to scale on -----------------------------------------------------------------------


def test_requests_that_instances_have_are_running_and_the_others_wait() -> None:
    world = ready()
    world.arrive()
    world.arrive()
    world.arrive()
    found = samples(world)
    assert found["cotenant_running_requests", ("s",)] == 1
    assert found["cotenant_queue_length", ("s",)] == 2


def test_a_load_is_shown_as_the_planner_tells_it() -> None:
    assert samples(ready())["cotenant_service_load", ("s",)] == 0.25


def test_a_load_that_is_not_known_is_not_shown() -> None:
    assert ("cotenant_service_load", ("s",)) not in samples(ready(), {})


# --- by Triton's names ----------------------------------------------------------------------


def serving(version: str = "1") -> Watched:
    world = Watched()
    world.service()
    world.planned({"s": (0,)})
    world.offer(version)
    return world


def executed(world: Watched, *, start: int = 0, took: int = 2 * MS, **done: object) -> None:
    """All that waits or is under way is executed, batch after batch."""
    while world.d.state.running:
        batch = next(iter(world.d.state.running))
        world.send(e.BatchDone(batch, took, start, **done), after=start + took)


def test_counters_bear_the_plain_names_that_triton_gives_them() -> None:
    world = serving()
    world.serve()
    text = metrics.exposition(world.monitor, world.d.state, [], metrics.Memory({}, {}), {}).decode()
    assert "# TYPE nv_inference_request_success counter\n" in text
    assert "# TYPE nv_inference_pending_request_count gauge\n" in text
    assert 'nv_inference_request_success{model="s",version="1"} 1\n' in text


def test_times_are_summed_over_the_requests_of_a_batch() -> None:
    world = serving()
    world.arrive()
    world.arrive()
    world.arrive(rows=3)
    executed(world, start=500 * US, took=2 * MS, moved=(300 * US, 200 * US))
    found = samples(world)
    key = ("s", "1")
    assert found["nv_inference_request_success", key] == 3
    assert found["nv_inference_exec_count", key] == 2, "one request, then the two that waited"
    assert found["nv_inference_count", key] == 5
    assert found["nv_inference_queue_duration_us", key] == 2 * 2500
    assert found["nv_inference_compute_input_duration_us", key] == 3 * 800
    assert found["nv_inference_compute_infer_duration_us", key] == 3 * 1500
    assert found["nv_inference_compute_output_duration_us", key] == 3 * 200
    assert found["nv_inference_request_duration_us", key] == 2500 + 2 * 5000


def test_the_wait_of_a_batch_at_hand_is_time_in_the_queue_alone() -> None:
    world = Watched()
    world.service(max_batch=1)
    world.planned({"s": (0,)})
    world.offer("1")
    world.arrive()
    world.arrive()
    world.send(e.BatchDone(1, 2 * MS), after=2 * MS)
    world.send(e.BatchDone(2, 2 * MS, start_ns=2 * MS), after=2 * MS)
    found = samples(world)
    assert found["nv_inference_queue_duration_us", ("s", "1")] == 2000
    assert found["nv_inference_compute_input_duration_us", ("s", "1")] == 0


def test_turns_are_executions_of_one_inference() -> None:
    world = Watched()
    world.service().worker()
    world.planned({"s": (0,)})
    world.monitor.service("s").serve("1")
    world.arrive()
    world.send(e.BatchDone(1, MS, unfinished=(1,), emitted=(1,)), after=MS)
    executed(world, took=MS)
    found = samples(world)
    assert found["nv_inference_exec_count", ("s", "1")] == 2
    assert found["nv_inference_count", ("s", "1")] == 1
    assert found["nv_inference_compute_infer_duration_us", ("s", "1")] == 2000


def test_who_waits_is_pending() -> None:
    world = serving()
    world.arrive()
    world.arrive()
    assert samples(world)["nv_inference_pending_request_count", ("s", "1")] == 1


def test_failures_bear_the_reasons_that_triton_knows() -> None:
    world = serving()
    world.serve(timeout=1)
    world.arrive()
    world.send(e.BatchDone(1, MS, failed=(2,)), after=MS)
    found = samples(world)
    counts = {
        key[1]: value
        for (name, key), value in found.items()
        if name == "nv_inference_request_failure"
    }
    assert counts == {"REJECTED": 1, "CANCELED": 0, "BACKEND": 1, "OTHER": 0}


@pytest.mark.parametrize("refusal", Refusal)
def test_every_refusal_has_a_reason_there(refusal: Refusal) -> None:
    assert REASONS[refusal.name] in {"REJECTED", "CANCELED", "BACKEND", "OTHER"}


def test_each_version_counts_from_its_start() -> None:
    world = serving("1")
    world.serve()
    world.serve()
    world.offer("2")
    world.serve()
    found = samples(world)
    assert found["nv_inference_request_success", ("s", "2")] == 1
    assert ("nv_inference_request_success", ("s", "1")) not in found


def test_before_a_version_serves_there_is_nothing_of_it() -> None:
    world = Watched()
    world.service()
    assert not [name for name, _ in samples(world) if name.startswith("nv_")]
