"""Whatever breaks, breaks alone: every request is answered, and what can come back does."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import uvloop

from cotenant.telemetry.segments import SegmentFiles

if TYPE_CHECKING:
    from tests.live.conftest import Boxes

X = np.ones((1, 4), np.float32)
N = np.array([1])
TWO_CORES = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


def may_be_realtime() -> bool:
    """Whether what is started here may have real-time priority."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except PermissionError:
        return False
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return True


def test_a_worker_killed_under_load_costs_nothing_while_another_lives(boxes: Boxes) -> None:
    box = boxes()
    box.model("count", "count")
    box.configure([{"name": "count", "instances": 2}]).start()
    first, second = box.workers()
    with box.under_load("count", rate=100, n=np.array([5000])) as load:
        box.until(lambda: box.service("count")["answered"] > 20)
        os.kill(first, signal.SIGKILL)
        box.until(lambda: first not in box.workers() and len(box.workers()) == 2)
        box.until(lambda: box.service("count")["workers"] == 2)
    assert second in box.workers()
    assert load.count(200) == len(load.answers) > 20


def test_the_only_worker_killed_under_load_leaves_no_request_unanswered(boxes: Boxes) -> None:
    box = boxes()
    box.model("count", "count")
    box.configure([{"name": "count"}]).start()
    (worker,) = box.workers()
    with box.under_load("count", rate=100, n=np.array([5000])) as load:
        box.until(lambda: box.service("count")["answered"] > 20)
        os.kill(worker, signal.SIGKILL)
        box.until(lambda: box.service("count")["workers"] == 0)
        box.until(lambda: box.service("count")["workers"] == 1)
        seen = box.service("count")["answered"]
        box.until(lambda: box.service("count")["answered"] > seen)
    assert load.count(200) + load.count(503) == len(load.answers)
    assert load.count(503) > 0
    refused = [a for a in load.answers if a is not None and a.status == 503]
    assert all("retry-after" in a.headers for a in refused)


def test_a_worker_that_dies_again_and_again_comes_back_again_and_again(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "double")
    box.configure([{"name": "double"}]).start()
    for _ in range(3):
        (worker,) = box.until(box.workers)
        os.kill(worker, signal.SIGKILL)
        box.until(lambda gone=worker: gone not in box.workers())
        box.until(lambda: box.infer("double", x=X).status == 200)


def test_an_engine_that_crashes_takes_its_own_request_with_it_and_no_other(
    boxes: Boxes, sabotage: dict[str, str]
) -> None:
    box = boxes(env=sabotage)
    box.model("scale", "brittle").with_name(".crash_at_run").touch()
    box.model("scale", "double")
    box.configure([{"name": "brittle"}, {"name": "double"}]).start()
    assert box.infer("brittle", x=X).status == 200
    answer = box.infer("brittle", x=666 * X)
    assert answer.status == 503
    assert box.infer("double", x=X).status == 200
    box.until(lambda: box.infer("brittle", x=X).status == 200)


def test_a_model_on_which_the_engine_crashes_is_refused_with_the_reason(
    boxes: Boxes, sabotage: dict[str, str]
) -> None:
    box = boxes(env=sabotage)
    fuse = box.model("scale", "brittle").with_name(".crash_at_load")
    fuse.touch()
    box.model("scale", "double")
    box.configure([{"name": "brittle"}, {"name": "double"}]).start(ready=False)
    box.until(lambda: box.service("double")["state"] == "READY")
    box.until(lambda: box.service("brittle")["state"] == "UNAVAILABLE")
    assert "died while loading" in box.service("brittle")["reason"]
    assert box.infer("double", x=X).status == 200
    assert box.infer("brittle", x=X).status == 404
    fuse.unlink()
    assert box.post("/v2/repository/models/brittle/load", b"{}").status == 200
    assert box.infer("brittle", x=X).status == 200


@TWO_CORES
def test_an_execution_that_never_ends_is_ended_and_the_other_service_keeps_answering(
    boxes: Boxes,
) -> None:
    box = boxes()
    box.model("count", "count")
    box.model("scale", "double")
    box.configure(
        [{"name": "count", "exec_timeout": "1s"}, {"name": "double"}],
        policy={"split": {"cores": 2, "size": 1}},
    ).start()
    assert not may_be_realtime() or box.status()["devices"][0]["level"] == "PRIORITY"
    before = set(box.workers())
    with box.under_load("double", rate=50, x=X) as load:
        box.until(lambda: box.service("double")["answered"] > 20)
        answer = box.infer("count", n=np.array([2**62]))
        assert answer.status == 503
        box.until(lambda: box.infer("count", n=N).status == 200)
    assert load.count(200) == len(load.answers) > 50
    assert len(before - set(box.workers())) == 1


def test_an_execution_that_never_ends_on_a_shared_core_is_ended(boxes: Boxes) -> None:
    core = min(os.sched_getaffinity(0))
    box = boxes()
    box.model("count", "count")
    box.model("scale", "double")
    box.configure(
        [{"name": "count", "exec_timeout": "1s"}, {"name": "double"}],
        devices=[{"kind": "cpu", "cores": [core]}],
    ).start()
    assert not may_be_realtime() or box.status()["devices"][0]["level"] == "PRIORITY"
    assert box.infer("count", n=np.array([2**62])).status == 503
    box.until(lambda: box.infer("double", x=X).status == 200)
    box.until(lambda: box.infer("count", n=N).status == 200)


def test_a_full_disk_costs_the_journal_and_nothing_else(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "double")
    box.configure([{"name": "double"}])
    journal = box.state / "journal"
    journal.mkdir(parents=True)
    tiny = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(journal)]
    if subprocess.run(tiny, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        box.start()
        with box.under_load("double", rate=200, x=X) as load:
            box.until(lambda: box.status()["journal"]["error"])
        assert "No space left" in box.status()["journal"]["error"]
        assert box.status()["journal"]["dropped"] > 0
        assert load.count(200) == len(load.answers)
        box.stop()
    finally:
        subprocess.run(["umount", "-l", str(journal)], check=True)


def test_a_journal_that_cannot_be_written_is_said_and_serving_goes_on(
    boxes: Boxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SegmentFiles, "write", full)
    box = boxes()
    box.model("scale", "double")
    box.configure([{"name": "double"}])

    async def serve() -> None:
        async with box.here() as node:
            answer = await asyncio.to_thread(box.infer, "double", x=X)
            assert answer.status == 200
            journal = node.journal
            assert journal is not None
            await asyncio.to_thread(box.until, lambda: journal.error)
            assert "No space left" in str(journal.error)
            answer = await asyncio.to_thread(box.infer, "double", x=X)
            assert answer.status == 200

    uvloop.run(serve())


@pytest.mark.parametrize("jump_s", [3600, -3600])
def test_a_clock_that_jumps_stops_nothing(boxes: Boxes, jump_s: int) -> None:
    box = boxes()
    box.model("scale", "double")
    box.configure([{"name": "double", "objective": {"latency": "500ms"}}])
    offset = [0]

    async def serve() -> None:
        async with box.here(lambda: time.monotonic_ns() + offset[0]) as node:
            job = node.submit_job(box.job_spec("sleep", "1000"))
            assert (await asyncio.to_thread(box.infer, "double", x=X)).status == 200
            offset[0] = jump_s * 1_000_000_000
            for _ in range(5):
                answer = await asyncio.to_thread(box.infer, "double", x=X)
                assert answer.status == 200, answer

            def holds_something() -> bool:
                return any(s.id == job and s.partitions for s in node.jobs())

            await asyncio.to_thread(box.until, holds_something)

    uvloop.run(serve())


def test_what_a_worker_says_goes_to_its_own_log(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "double")
    box.configure([{"name": "double"}]).start()
    assert (Path(box.state) / "workers" / "double.log").exists()
