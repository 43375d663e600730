"""Jobs beside requests: confined while a request runs, given the core back after it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
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


SECRET = "s3cret-of-the-submitter"
PRINT_ENV = "import json, os; print(json.dumps([dict(os.environ), os.getcwd()]))"


def environment_of(box: Box, name: str) -> tuple[dict[str, str], str]:
    """Environment and directory that a job of ``PRINT_ENV`` printed."""
    box.until(lambda: box.job(name).state == "succeeded", lambda: box.job(name))
    env, directory = json.loads(Path(box.control.log_path(name)).read_text())
    return env, directory


def run(box: Box, env: dict[str, str], *command: str) -> None:
    """``cotenant run`` from a shell with this environment, in the box's directory of models."""
    subprocess.run(
        [sys.executable, "-m", "cotenant.cli.main", "run", "--env", "ADDED=1", "--", *command],
        env={**env, "COTENANT_STATE_DIR": str(box.state)},
        cwd=box.models,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    )


def test_a_jobs_environment_is_its_submitters_and_shown_to_nobody(
    boxes: Boxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_THE_NODE", "1")
    monkeypatch.setenv("COTENANT_TOKEN", "of the node")
    box = boxes()
    box.configure([]).start()
    shell = {"PATH": f"{Path(sys.executable).parent}:/bin", "TOKEN": SECRET, "EMPTY": ""}
    run(box, {**shell, "COTENANT_TOKEN": SECRET}, "python", "-c", PRINT_ENV)
    env, directory = environment_of(box, "python")
    assert env.items() >= {**shell, "ADDED": "1"}.items()
    assert not {"OF_THE_NODE", "COTENANT_TOKEN", "COTENANT_STATE_DIR"} & env.keys()
    assert directory == env["PWD"] == str(box.models)

    shown = json.dumps([box.status(), msgspec.to_builtins(box.control.jobs())]) + box.log()
    assert SECRET not in shown
    box.stop()
    for path in filter(Path.is_file, box.state.rglob("*")):
        if path.name.startswith("jobs.sqlite"):
            assert path.stat().st_mode & 0o077 == 0
        elif path.name != "log":  # its own output
            assert SECRET.encode() not in path.read_bytes(), path


def test_a_declared_job_gets_what_it_declares_and_little_else(
    boxes: Boxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_THE_NODE", "1")
    monkeypatch.setenv("LANG", "C.UTF-8")
    box = boxes()
    command = [sys.executable, "-c", PRINT_ENV]
    jobs = [{"name": "declared", "command": command, "env": {"MINE": 1}, "cwd": "models"}]
    box.configure([], jobs=jobs).start()
    env, directory = environment_of(box, "declared")
    assert (env["MINE"], env["LANG"]) == ("1", "C.UTF-8")
    assert env.keys() >= {"PATH", "HOME"}
    assert "OF_THE_NODE" not in env
    assert directory == str(box.models)


@pytest.mark.skipif(not shutil.which("script"), reason="needs script")
def test_a_job_under_script_goes_on_after_each_request(boxes: Boxes) -> None:
    box = boxes()
    box.model("count", "count")
    box.configure(
        [{"name": "count", "objective": {"latency": "30s"}}],
        devices=[{"kind": "cpu", "cores": [CORES[0]]}],
    ).start()
    beat = "while :; do echo beat; sleep 0.02; done"
    box.submit("script", "-qec", beat, "/dev/null")
    log = Path(box.control.log_path("job"))
    box.until(lambda: log.exists() and log.stat().st_size)
    for _ in range(5):
        assert box.infer("count", n=np.array([LONG])).status == 200
        size = log.stat().st_size
        box.until(lambda size=size: log.stat().st_size > size)
    assert box.job("job").pauses > 0


@TWO_CORES
def test_a_job_that_sets_its_affinity_is_brought_back(boxes: Boxes) -> None:
    box = boxes()
    box.model("count", "count")
    box.configure(
        [{"name": "count", "objective": {"latency": "30s"}}],
        devices=[{"kind": "cpu", "cores": list(CORES)}],
        policy={"lend": False, "split": {"cores": 1}},
    ).start()
    both = f"{CORES[0]},{CORES[1]}"
    box.submit("taskset", "-c", both, "sh", "-c", f"taskset -cp {both} $$; touch set; {BUSY}")
    box.until((box.directory / "set").exists)
    box.until(lambda: masks(box) == {CORES[1:]}, lambda: masks(box))


def test_a_held_job_has_no_partition_until_it_is_released(boxes: Boxes) -> None:
    box = boxes()
    box.configure([]).start()
    box.submit("sh", "-c", BUSY)
    box.until(lambda: box.job("job").partitions)
    box.control.hold("job")
    box.until(lambda: is_stopped(box))
    assert box.job("job").partitions == ()
    box.control.resume("job")
    box.until(lambda: box.job("job").partitions and not is_stopped(box))
