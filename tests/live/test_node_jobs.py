"""Jobs beside requests: confined while a request runs, given the core back after it."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cotenant.devices import proctree

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.live.conftest import Box, Boxes

CORES = tuple(sorted(os.sched_getaffinity(0)))[:2]
TWO_CORES = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
BUSY = "while :; do :; done & while :; do :; done & while :; do :; done"
LONG = 400_000
LOOK = 50


def job_threads(box: Box) -> list[int]:
    pid = box.job("job").pid
    return proctree.threads([pid, *proctree.descendants(pid)])


def masks(box: Box) -> set[tuple[int, ...]]:
    """Affinity masks of all threads of the job."""
    return {tuple(sorted(os.sched_getaffinity(tid))) for tid in job_threads(box)}


def ticks_used(box: Box) -> int:
    """Clock ticks of CPU that the job uses in ``LOOK`` ticks of time."""

    def used() -> int:
        pid = box.job("job").pid
        found = [proctree.stat(p) for p in (pid, *proctree.descendants(pid))]
        return sum(f.cpu_ticks for f in found if f is not None)

    before = used()
    time.sleep(LOOK / proctree.TICKS_PER_SECOND)
    return used() - before


def is_stopped(box: Box) -> bool:
    found = [proctree.stat(f"{tid}/task/{tid}") for tid in job_threads(box)]
    return bool(found) and all(f is not None and f.state in (b"T", b"t") for f in found)


def seen_during_a_batch(box: Box, look: Callable[[], Any], n: int = LONG) -> list[Any]:
    """What ``look`` saw while one and the same batch ran: checked before and after the look."""
    seen = []
    end = threading.Event()

    def ask() -> None:
        while not end.is_set():
            assert box.infer("count", n=np.array([n])).status == 200

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        while len(seen) < 3:
            before = running(box)
            found = look()
            if before and running(box) == before:
                seen.append(found)
    finally:
        end.set()
        thread.join()
    return seen


def running(box: Box) -> int:
    """How many batches were started, if one runs now; else 0."""
    busy = any(p["holder"] == "batch:count" for p in box.status()["partitions"])
    stats = box.ask("GET", "/v2/models/count/stats").json["model_stats"][0]
    return int(stats["execution_count"]) if busy else 0


@TWO_CORES
def test_a_job_leaves_the_core_of_a_request_while_it_runs_and_gets_it_back(boxes: Boxes) -> None:
    box = boxes()
    box.model("count", "count")
    box.configure(
        [{"name": "count", "objective": {"latency": "30s"}}],
        devices=[{"kind": "cpu", "cores": list(CORES)}],
        policy={"split": {"cores": 1}},
    ).start()
    box.submit("sh", "-c", BUSY)
    box.until(lambda: box.job("job").state == "running")
    box.until(lambda: masks(box) == {CORES}, lambda: masks(box))
    # A process born since the last look at the job is confined with the next one.
    box.until(lambda: seen_during_a_batch(box, lambda: masks(box)) == [{CORES[1:]}] * 3)
    box.until(lambda: masks(box) == {CORES}, lambda: masks(box))
    job = box.job("job")
    assert len(job.partitions) == 2
    assert job.held_s > 0


def test_on_one_core_a_job_stands_still_while_a_request_runs_and_goes_on_after(
    boxes: Boxes,
) -> None:
    box = boxes()
    box.model("count", "count")
    box.configure(
        [{"name": "count", "objective": {"latency": "30s"}}],
        devices=[{"kind": "cpu", "cores": [CORES[0]]}],
    ).start()
    box.submit("sh", "-c", BUSY)
    box.until(lambda: box.job("job").state == "running" and box.job("job").partitions)
    # Not "is it stopped": a process that gets no time at all cannot even stop.
    # The kernel takes 5 ticks of each second from real-time workers, which the job may get.
    assert max(seen_during_a_batch(box, lambda: ticks_used(box), n=5 * LONG)) <= 7
    box.until(lambda: ticks_used(box) > 5)
    assert box.job("job").pauses > 0


def test_a_job_over_its_memory_is_ended_alone(boxes: Boxes) -> None:
    box = boxes()
    box.model("count", "count")
    box.configure([{"name": "count"}]).start()
    box.submit("sh", "-c", "while :; do sleep 0.05; done", name="modest", memory=200 * 2**20)
    greedy = "import time; x = bytearray(2**28); time.sleep(1000)"
    box.submit(sys.executable, "-c", greedy, name="greedy", memory=100 * 2**20)
    box.until(lambda: box.job("greedy").state == "failed")
    assert "memory" in box.job("greedy").reason
    assert box.job("modest").state == "running"
    assert box.infer("count", n=np.array([1])).status == 200


def test_declared_jobs_run_once_and_not_again_after_a_restart_of_the_node(boxes: Boxes) -> None:
    box = boxes()
    script = 'echo "$$" >> runs; sleep 1000'
    jobs = [{"name": "declared", "command": ["sh", "-c", script]}]
    box.configure([], jobs=jobs).start()
    box.until(lambda: box.job("declared").state == "running")
    box.stop()
    assert not box.processes()
    box.start()
    box.until(lambda: box.job("declared").state == "running")
    assert sum(j.name == "declared" for j in box.control.jobs()) == 1


def test_a_held_job_has_no_partition_until_it_is_released(boxes: Boxes) -> None:
    box = boxes()
    box.configure([]).start()
    box.submit("sh", "-c", BUSY)
    box.until(lambda: box.job("job").partitions)
    box.control.hold("job")
    box.until(lambda: is_stopped(box))
    assert box.job("job").partitions == ()
    box.control.release("job")
    box.until(lambda: box.job("job").partitions and not is_stopped(box))
