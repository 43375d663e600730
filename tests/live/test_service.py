"""A node that a service manager started says when it answers, that it lives, and that it ends."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cotenant.domain.units import S
from tests.live.conftest import Box, Boxes

GRACE_S = 20


class Manager:
    """The side of systemd: what it hears, message by message."""

    def __init__(self, address: Path) -> None:
        self.environment = {"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "200000"}
        self.heard: list[dict[str, str]] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(address))
        self._sock.setblocking(False)

    def said(self, name: str) -> list[dict[str, str]]:
        """The messages so far that have this."""
        with contextlib.suppress(BlockingIOError):
            while text := self._sock.recv(4096).decode():
                self.heard.append(dict(line.split("=", 1) for line in text.splitlines()))
        return [message for message in self.heard if name in message]

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def manager(directory: Path) -> Iterator[Manager]:
    manager = Manager(directory / "notify")
    yield manager
    manager.close()


def started(box: Box, manager: Manager) -> Box:
    """Spawned, and waited for as systemd does."""
    process = box.spawn()
    box.until(lambda: manager.said("READY") or process.poll() is not None, box.log)
    (ready,) = manager.said("READY")
    assert ready["MAINPID"] == str(process.pid)
    return box


def test_it_is_ready_once_it_answers_though_models_load(
    boxes: Boxes, manager: Manager, sabotage: dict[str, str]
) -> None:
    box = boxes(env={**sabotage, **manager.environment})
    hold = box.model("scale", "double").with_name(".hold")
    hold.touch()
    started(box.configure([{"name": "double"}]), manager)
    box.port = int(box.status()["http"].rpartition(":")[2])
    assert box.ask("GET", "/v2/health/live").status == 200
    assert box.ask("GET", "/v2/health/ready").status != 200
    states = len(manager.said("STATUS"))
    hold.unlink()
    box.until(lambda: len(manager.said("STATUS")) > states)
    assert box.ask("GET", "/v2/health/ready").status == 200


def test_one_that_cannot_start_was_never_ready(boxes: Boxes, manager: Manager) -> None:
    box = boxes(env=manager.environment)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        box.configure([], node={"http": address})
        assert box.spawn().wait(30) == 1
    assert not manager.said("READY")


def ended_by_signal(box: Box) -> None:
    box.stop(signal.SIGTERM)


def ended_by_command(box: Box) -> None:
    box.control.shutdown()


@pytest.mark.parametrize("end", [ended_by_signal, ended_by_command])
def test_it_says_that_it_stops_and_asks_for_its_jobs_grace(
    boxes: Boxes, manager: Manager, end: Callable[[Box], None]
) -> None:
    box = started(boxes(env=manager.environment).configure([]), manager)
    box.submit("sleep", "infinity", grace=GRACE_S * S)
    box.until(lambda: box.job("job").state == "running")
    assert not manager.said("STOPPING")
    end(box)
    (stopping,) = box.until(lambda: manager.said("STOPPING"))
    assert int(stopping["EXTEND_TIMEOUT_USEC"]) >= GRACE_S * 1_000_000
    assert box.process is not None and box.process.wait(30) == 0


def test_it_beats_while_it_runs(boxes: Boxes, manager: Manager) -> None:
    box = started(boxes(env=manager.environment).configure([]), manager)
    beats = len(manager.said("WATCHDOG"))
    box.until(lambda: len(manager.said("WATCHDOG")) > beats + 2)


def test_neither_workers_nor_jobs_can_speak_for_it(boxes: Boxes, manager: Manager) -> None:
    box = boxes(env=manager.environment)
    box.model("scale", "double")
    declared = {"name": "declared", "command": ["sleep", "infinity"]}
    started(box.configure([{"name": "double"}], jobs=[declared]), manager)
    given = box.submit("sleep", "infinity", name="given")
    box.until(lambda: [job.state for job in box.control.jobs()] == ["running", "running"])
    pids = [*box.until(box.workers), *(box.job(name).pid for name in ("declared", given))]
    for pid in pids:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        assert environ
        assert b"NOTIFY_SOCKET" not in environ
        assert b"WATCHDOG" not in environ


def test_the_right_to_start_at_once_is_the_nodes_and_not_its_jobs(boxes: Boxes) -> None:
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("giving a process a capability takes root and setpriv")
    box = boxes().configure([])
    command = ["setpriv", "--inh-caps=+sys_nice", "--ambient-caps=+sys_nice", sys.executable]
    env = {**os.environ, "COTENANT_TEST_BOX": box.mark}
    with (box.directory / "log").open("wb") as log:
        box.process = subprocess.Popen(
            [*command, "-m", "cotenant.cli.main", "serve", "cotenant.yaml"],
            cwd=box.directory,
            env=env,
            stdout=log,
            stderr=log,
        )
    box.until(lambda: (box.state / "control.sock").exists() and box.status()["http"], box.log)
    box.submit("sleep", "infinity")
    box.until(lambda: box.job("job").state == "running")

    def rights(pid: int) -> tuple[int, int]:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        ambient = next(line.split()[1] for line in status if line.startswith("CapAmb"))
        return int(ambient, 16), resource.prlimit(pid, resource.RLIMIT_RTPRIO)[1]

    assert rights(box.process.pid)[0]
    assert rights(box.job("job").pid) == (0, 0)
