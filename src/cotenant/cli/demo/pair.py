"""The two boxes of ``cotenant demo``: a node as it is meant to be, whose job is on its queue, and a
plain one beside which the same job runs as an ordinary process. One of them works at a time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from cotenant.cli.demo import tinymodel
from cotenant.cli.demo.model import Model
from cotenant.cli.demo.node import ONE_THREAD, POLL_S, TRAINING, DemoNode
from cotenant.cli.demo.tally import Answer
from cotenant.cli.demo.train import read_counter
from cotenant.devices import proctree
from cotenant.domain.errors import CotenantError, EnvironmentProblem

OBJECTIVE_MS: Final = 25.0
PLAIN_OBJECTIVE_MS: Final = 10_000.0
"""A plain server knows no objective; it is judged by the same one."""
RATE: Final = 60.0
"""Requests a second."""
ORDER_S: Final = 900.0
"""Clients ask for so long, then others take their place."""
BEGIN_S: Final = 60.0


class TinyNode(DemoNode):
    """A node with the built-in model. ``plain``: as a server without scheduling is."""

    def __init__(self, document: bytes, port: int, plain: bool) -> None:
        super().__init__(Model(tinymodel.NAME, Path(tinymodel.NAME)), port)
        self._document = document
        self._plain = plain

    def _lay(self, place: Path) -> None:
        (place / "1").mkdir(parents=True)
        (place / "1" / "model.onnx").write_bytes(self._document)
        self.counter = place.parent.parent / "steps"
        self._training = ("--counter", str(self.counter))

    def _rest(self) -> dict[str, Any]:
        latency = PLAIN_OBJECTIVE_MS if self._plain else OBJECTIVE_MS
        objective = {"latency": f"{latency:g}ms", "percentile": 99}
        device = {"kind": "cpu"} | ({"realtime": "never", "pin": False} if self._plain else {})
        service = {"name": self.model.name, "objective": objective, "threads": 1}
        return {"devices": [device], "services": [service]}

    @property
    def place(self) -> Path:
        """Its directory."""
        assert self._directory is not None
        return self._directory


class PlainJob:
    """The training job as an ordinary process."""

    def __init__(self, node: TinyNode) -> None:
        self._node = node
        self._process: subprocess.Popen[bytes] | None = None

    def train(self) -> None:
        """Start it, or let it go on."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            return
        directory = self._node.place
        self._process = subprocess.Popen(
            [*TRAINING, "--counter", str(self._node.counter)],
            cwd=directory,
            env={**os.environ, **dict.fromkeys(ONE_THREAD, "1"), "TMPDIR": str(directory)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_us,
        )

    def hold(self) -> None:
        """Stop it where it is."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def look(self) -> None:
        """Raises EnvironmentProblem if it has ended."""
        if self._process is not None and self._process.poll() is not None:
            raise EnvironmentProblem("the training job beside the plain node ended")


class Clients:
    """The process that asks a node; see ``asking``."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self._ends = 0.0
        self._port = self._seed = 0

    def ask(self, port: int) -> None:
        """Ask this node from now on, and nobody else."""
        self.stop()
        self._port, self._seed, self._rest = port, self._seed + 1, b""
        self._ends = time.monotonic() + ORDER_S
        order = {
            "port": port,
            "request": tinymodel.request(port).hex(),
            "rate": RATE,
            "seconds": ORDER_S,
            "seed": self._seed,
            "core": max(os.sched_getaffinity(0)),
        }
        with tempfile.TemporaryFile() as given:
            given.write(json.dumps(order).encode())
            given.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cotenant.cli.demo.asking"],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_die_with_us,
            )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    def answers(self) -> list[Answer]:
        """Those that came since the last call."""
        assert self._process is not None and self._process.stdout is not None
        if time.monotonic() > self._ends:
            self.ask(self._port)
            return []
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._process.stdout.fileno(), 1 << 16):
                self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        parts = (line.split() for line in lines)
        return [Answer(float(p[0]), int(p[1]), float(p[2])) for p in parts if len(p) == 3]

    def stop(self) -> None:
        """Nobody asks."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


class Pair:
    """Both boxes. ``on``: whether the one that schedules is at work."""

    def __init__(self, port: int, on: bool) -> None:
        self.on = on
        self._port = port
        self._nodes: list[TinyNode] = []
        self._clients = Clients()

    def open(self) -> None:
        """Make the model, and start both nodes. Raises EnvironmentProblem."""
        with tempfile.TemporaryDirectory(prefix="cotenant-demo-") as directory:
            path = Path(directory) / "model.onnx"
            tinymodel.write(path)
            document = path.read_bytes()
        for port, plain in ((self._port, False), (0, True)):
            self._nodes.append(TinyNode(document, port, plain))
            self._nodes[-1].open()
        self._plain_job = PlainJob(self._nodes[1])

    def look(self) -> None:
        """Raises Gone if a node has ended."""
        for node in self._nodes:
            node.look()

    def begin(self, tell: Any) -> None:
        """Until both nodes serve and both jobs train; then the one that is ``on`` is asked."""
        for node in self._nodes:
            node.wait(lambda: tell("starting two nodes with a small model"))
        for on in (not self.on, self.on):
            self._job(on).train()
            self._await_steps(on, tell)
            if on is not self.on:
                self._job(on).hold()
        self._clients.ask(self._node(self.on).port)

    def _await_steps(self, on: bool, tell: Any) -> None:
        end = time.monotonic() + BEGIN_S
        while not read_counter(self._node(on).counter):
            tell("starting a training job beside each")
            if time.monotonic() > end:
                raise EnvironmentProblem("the training job makes no step")
            time.sleep(POLL_S)

    def switch(self) -> None:
        """The other box is at work from now on."""
        self._clients.stop()
        self._job(self.on).hold()
        self.on = not self.on
        self._job(self.on).train()
        self._clients.ask(self._node(self.on).port)

    def answers(self) -> list[Answer]:
        """Those that came since the last call; raises EnvironmentProblem if a job ended."""
        self._plain_job.look()
        return self._clients.answers()

    def steps(self) -> int:
        """Steps of the job that is at work."""
        return read_counter(self._node(self.on).counter)

    def partitions(self) -> list[dict[str, Any]] | None:
        """Whose the cores were in the last second; None where nobody lends them."""
        if not self.on:
            return None
        with contextlib.suppress(CotenantError):  # on a busy box it may take its time
            found: list[dict[str, Any]] = self._nodes[0].status()["partitions"]
            return found
        return []

    @property
    def port(self) -> int:
        """Of the node that schedules."""
        return self._nodes[0].port

    def close(self) -> None:
        """End all there is."""
        self._clients.stop()
        for node in self._nodes:  # together, not one after the other
            node.end()
        for node in reversed(self._nodes):
            node.wait_ended()
        for node in reversed(self._nodes):
            node.close()

    def _node(self, on: bool) -> TinyNode:
        return self._nodes[0 if on else 1]

    def _job(self, on: bool) -> TinyNode | PlainJob:
        return self._nodes[0] if on else self._plain_job


def _die_with_us() -> None:
    proctree.end_with_parent(signal.SIGKILL)
