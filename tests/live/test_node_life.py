"""A node starts alone or not at all, and however it ends, nothing of it is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cotenant.devices import proctree

if TYPE_CHECKING:
    from tests.live.conftest import Answer, Box, Boxes

X = np.ones((1, 4), np.float32)


def shared_memory() -> set[str]:
    """Names in shared memory; semaphores of other programs' pools come and go."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


def is_worker(pid: int) -> bool:
    try:
        return b"cotenant.runtime.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_a_port_in_use_is_named_and_nothing_is_left(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "double")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        box.configure([{"name": "double"}], node={"http": address})
        assert box.spawn().wait(30) == 1
    assert address in box.log()
    assert "Traceback" not in box.log()
    assert not box.processes()
    box.configure([{"name": "double"}]).start()
    assert box.infer("double", x=X).status == 200


def test_a_state_directory_in_use_is_named_with_its_owner(boxes: Boxes) -> None:
    box = boxes()
    box.configure([]).start()
    second = boxes(directory=box.directory)
    assert second.spawn().wait(30) == 1
    assert box.process is not None
    assert f"pid {box.process.pid}" in second.log()
    assert "in use by another node" in second.log()
    assert box.status()["pid"] == box.process.pid


def test_a_wrong_configuration_is_one_line_and_exit_1(boxes: Boxes) -> None:
    box = boxes()
    (box.directory / "cotenant.yaml").write_text("servces: []\n")
    assert box.spawn().wait(30) == 1
    assert "did you mean 'services'?" in box.log()
    assert "Traceback" not in box.log()


def test_sigterm_answers_what_was_accepted_and_leaves_nothing(boxes: Boxes) -> None:
    before = shared_memory()
    box = boxes()
    box.model("count", "count")
    box.configure([{"name": "count", "objective": {"latency": "30s"}}]).start()
    box.submit("sh", "-c", "while :; do sleep 0.1; done")
    box.until(lambda: box.job("job").state == "running")
    answers: list[Answer] = []
    slow = np.array([400_000])
    threads = [
        threading.Thread(target=lambda: answers.append(box.infer("count", n=slow)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    came = b'cotenant_requests_total{service="count"} 3.0'
    box.until(lambda: came in box.ask("GET", "/metrics").body)
    assert box.stop(signal.SIGTERM) == 0
    for thread in threads:
        thread.join()
    assert [a.status for a in answers] == [200, 200, 200]
    assert not box.processes()
    assert not (box.state / "control.sock").exists()
    assert shared_memory() <= before


def test_sigterm_while_models_load_ends_at_once(boxes: Boxes, sabotage: dict[str, str]) -> None:
    box = boxes(env=sabotage)
    box.model("scale", "double").with_name(".hold").touch()
    box.configure([{"name": "double"}]).start(ready=False)
    box.until(box.workers)
    assert box.stop(signal.SIGTERM) == 0
    assert not box.processes()


def test_a_killed_daemon_leaves_no_worker_and_its_jobs_are_taken_up_once(boxes: Boxes) -> None:
    before = shared_memory()
    box = boxes()
    box.model("scale", "double")
    box.configure([{"name": "double"}]).start()
    script = 'echo "$$" >> runs; while :; do sleep 0.05; done'
    ids = [box.submit("sh", "-c", script, name=f"job{i}") for i in range(3)]
    runs = box.directory / "runs"
    box.until(lambda: runs.exists() and len(runs.read_text().split()) == 3)
    pids = sorted(runs.read_text().split())
    box.stop(signal.SIGKILL)
    box.until(lambda: not [p for p in box.processes() if is_worker(p)])

    box.start()
    box.until(lambda: all(box.job(i).state == "running" for i in ids))
    assert box.infer("double", x=X).status == 200
    box.until(lambda: all(box.job(i).partitions for i in ids[:1]))
    assert sorted(runs.read_text().split()) == pids, "a job was started twice"
    for i in ids:
        box.control.cancel(i)
    box.until(lambda: all(box.job(i).state == "cancelled" for i in ids))
    assert not [p for p in pids if proctree.start_time(int(p))]
    assert shared_memory() <= before


def test_a_killed_daemon_is_followed_by_one_that_uses_the_same_place(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "double")
    box.configure([{"name": "double"}]).start()
    for _ in range(2):
        box.stop(signal.SIGKILL)
        box.start()
        assert box.infer("double", x=X).status == 200


def test_the_control_socket_stops_the_node(boxes: Boxes) -> None:
    box: Box = boxes()
    box.configure([]).start()
    box.control.shutdown()
    assert box.process is not None
    assert box.process.wait(30) == 0


def test_what_a_node_decided_is_decided_again_from_its_journal(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "double")
    box.configure([{"name": "double", "objective": {"latency": "50ms"}}]).start()
    box.submit("sh", "-c", "while :; do :; done")
    box.until(lambda: box.job("job").state == "running")
    with box.under_load("double", rate=100, x=X):
        box.until(lambda: box.service("double")["answered"] > 100)
    assert box.stop() == 0
    journal = str(box.state / "journal")
    replay = [sys.executable, "-m", "cotenant", "replay", journal]
    done = subprocess.run(replay, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no difference" in done.stdout
