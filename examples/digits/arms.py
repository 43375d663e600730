"""The three ways to share a box that the demo compares; each runs the same stream.

cotenant         a node as it is meant to be; the training job is submitted to it
unscheduled  a plain server (no pinning, no priority, no admission control) beside the job as an
             ordinary process, both on all cores: what one gets by starting the two
split        the plain server on the first core, the job on the others, for good

Server, model, job and clients are the same programs in all three.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from client import RECORD, START
from counter import read_counter
from numpy.typing import NDArray
from shares import CoreTime, Meter
from stream import TEST, Digits, Stream, write_samples

from cotenant.cli.bench.rigs import NodeRig
from cotenant.cli.submitting import inherited
from cotenant.domain.errors import CotenantError, EnvironmentProblem
from cotenant.domain.units import S
from cotenant.domain.workload import JobSpec

HERE = Path(__file__).resolve().parent
MODEL = "digits"
ARMS = {"cotenant": "Cotenant", "unscheduled": "no scheduling", "split": "fixed split"}
OBJECTIVE_MS = 25.0
PLAIN_OBJECTIVE_MS = 10_000.0
ACCURACY_FLOOR = 0.3
"""Of ten digits a guess gets 0.1: this is against versions that are broken. That one is better than
the one before is the job's business."""
LABEL_DELAY_S = 1.0
"""A label is known this long after its image was seen."""
SAMPLES_S = 2.5
"""The job learns from what was labelled within the last seconds, this many."""
LEAST_SAMPLES = 50
"""Fewer are not worth a change of the file."""
TICK_S = 0.1
SAMPLE_S = 0.5
WARM_STEPS = 5
START_S = 120.0


class Box(NamedTuple):
    """What is the same for all arms. ``images``: the digits' images in a file."""

    directory: Path
    cores: list[int]
    digits: Digits
    stream: Stream
    images: Path
    first: Path


class Sample(NamedTuple):
    """Counters at one moment, ``at`` seconds into the stream."""

    at: float
    steps: int
    time: CoreTime


class Run:
    """What was seen of one arm. Arrays hold a value a request, in order of arrival."""

    def __init__(self, arm: str, stream: Stream) -> None:
        self.arm = arm
        self.due = np.array(stream.due)
        self.answers: NDArray[np.void] = np.zeros(len(stream.due), RECORD)
        self.samples: list[Sample] = []
        self.published: dict[int, float] = {}
        """When each version appeared on the disk, seconds into the stream."""
        self.refusals: dict[str, int] = {}
        """By reason, as the node counted them."""
        self.served_right: NDArray[np.float32] = np.zeros(0, np.float32)
        """See ``judge``."""
        self.start_ns = 0
        self.seconds = 0.0

    @property
    def now(self) -> float:
        """Seconds into the stream."""
        return (time.monotonic_ns() - self.start_ns) / 1e9

    def add(self, records: NDArray[np.void]) -> None:
        """Note answers that came."""
        self.answers[records["index"]] = records


class Job:
    """The training job of one arm: ``problem`` says why it does not run, if so."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.command = command
        self.log = log

    def start(self) -> None:
        """Start it."""
        raise NotImplementedError

    def problem(self) -> str:
        """Empty while all is well."""
        raise NotImplementedError


class CotenantJob(Job):
    """Submitted to a node, which stops it with itself."""

    def __init__(self, command: list[str], log: Path, node: NodeRig) -> None:
        super().__init__(command, log)
        self._node = node

    def start(self) -> None:
        command = tuple(self.command)
        env = inherited()[0]
        spec = JobSpec(id="", name="train", command=command, cwd="/", env=env, grace=1 * S)
        self._node.control.submit(spec)

    def problem(self) -> str:
        job = self._node.control.jobs()[-1]
        if job.state in ("running", "starting", "queued"):
            return ""
        log = Path(self._node.control.log_path(job.id))
        return f"the training job is {job.state} ({job.reason}): {tail(log)}"


class PlainJob(Job):
    """An ordinary process on these cores."""

    def __init__(self, command: list[str], log: Path, cores: list[int]) -> None:
        super().__init__(command, log)
        self._cores = cores
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        # Before it has made a thread: those it makes later inherit the mask.
        os.sched_setaffinity(self._process.pid, self._cores)

    def problem(self) -> str:
        if self._process is None or self._process.poll() is None:
            return ""
        return f"the training job ended: {tail(self.log)}"

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Arm:
    """One way to share the box, started, run once, stopped."""

    def __init__(self, name: str, box: Box) -> None:
        self.name = name
        self._box = box
        first, rest = box.cores[:1], box.cores[1:] or box.cores
        device = {
            "cotenant": "realtime: auto",
            "unscheduled": "realtime: never, pin: false",
            "split": f"realtime: never, cores: {first}",
        }[name]
        own = set(first) if name == "split" else None
        # A plain server knows no objective and refuses nothing; it is judged by the same one.
        objective_ms = OBJECTIVE_MS if name == "cotenant" else PLAIN_OBJECTIVE_MS
        self.node = NodeRig(name, box.directory, _config(device, objective_ms), own)
        directory = self.node.directory
        self.journal = directory / "state" / "journal"
        self.models = directory / "models" / MODEL
        self._samples = directory / "samples.npz"
        self._counter = directory / "steps"
        job_cores = rest if name == "split" else box.cores
        command = [sys.executable, str(HERE / "train.py"), *self._arguments(len(job_cores))]
        log = directory / "train.log"
        self.job: CotenantJob | PlainJob = (
            CotenantJob(command, log, self.node)
            if name == "cotenant"
            else PlainJob(command, log, job_cores)
        )
        self._client: subprocess.Popen[bytes] | None = None

    def _arguments(self, threads: int) -> list[str]:
        return [
            f"--models={self.models}",
            f"--samples={self._samples}",
            f"--counter={self._counter}",
            f"--threads={threads}",
            f"--floor={ACCURACY_FLOOR}",
        ]

    def start(self) -> None:
        """Start node and job; returns when the model is warm and the job makes steps."""
        shutil.copytree(self._box.first, self.models)
        shutil.copy(self._box.first.parent / "samples.npz", self._samples)
        self.node.start()
        self.job.start()
        end = time.monotonic() + START_S
        while read_counter(self._counter)[0] < WARM_STEPS:
            problem = self.job.problem()
            if problem or time.monotonic() > end:
                raise EnvironmentProblem(problem or "the training job made no step")
            time.sleep(0.05)

    def run(self, seconds: float, watch: Callable[[Run], None]) -> Run:
        """Send the stream; ``watch`` is called with what is known, ten times a second."""
        run = Run(self.name, self._box.stream)
        run.seconds = seconds
        meter = Meter(self._box.cores)
        pipe = self._start_client()
        run.start_ns = START.unpack(_read_start(pipe))[0]
        base, labelled, wall = read_counter(self._counter)[0], 0.0, time.time() - run.now
        run.samples.append(Sample(run.now, 0, meter.read()))
        while not self._take_answers(pipe, run):
            now = run.now
            if now - run.samples[-1].at >= SAMPLE_S and now <= seconds + SAMPLE_S:
                steps = read_counter(self._counter)[0] - base
                run.samples.append(Sample(now, steps, meter.read()))
            if now - labelled >= 1.0:
                labelled = now
                self._write_samples(now)
                self._check()
            watch(run)
        run.published = self._published(wall)
        run.refusals = self.node.control.status()["services"][0]["refused"]
        return run

    def _start_client(self) -> int:
        """Start the clients; the pipe that they answer into."""
        stream = self._box.stream
        order: dict[str, Any] = {
            "port": self.node.port,
            "model": MODEL,
            "images": str(self._box.images),
            "due": stream.due,
            "digit": stream.digit.tolist(),
            "stage": stream.stage.tolist(),
            "core": self._box.cores[-1],
            "connections": 8,
        }
        path = self.node.directory / "order.json"
        path.write_text(json.dumps(order))
        with path.open("rb") as stdin, (self.node.directory / "client.log").open("wb") as log:
            self._client = subprocess.Popen(
                [sys.executable, str(HERE / "client.py")],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self._client.stdout is not None
        return self._client.stdout.fileno()

    def _take_answers(self, pipe: int, run: Run) -> bool:
        """Note what has been answered; True when the clients are done."""
        ready, _, _ = select.select([pipe], [], [], TICK_S)
        if not ready:
            return False
        data = os.read(pipe, 1 << 16)
        # A writer's block of up to 4096 bytes comes whole; a larger one may come in parts.
        while missing := -len(data) % RECORD.itemsize:
            part = os.read(pipe, missing)
            if not part:
                raise EnvironmentProblem("the clients ended in the middle of an answer")
            data += part
        run.add(np.frombuffer(data, RECORD))
        time.sleep(TICK_S / 2)
        return not data

    def _write_samples(self, now: float) -> None:
        """Give the job the images whose labels have become known."""
        stream = self._box.stream
        first, last = np.searchsorted(
            stream.due, (now - LABEL_DELAY_S - SAMPLES_S, now - LABEL_DELAY_S)
        )
        known = self._box.digits.groups[stream.digit[first:last]] != TEST
        if known.sum() >= LEAST_SAMPLES:
            digit, stage = stream.digit[first:last], stream.stage[first:last]
            write_samples(self._samples, self._box.digits, digit, stage)

    def _check(self) -> None:
        problem = self.job.problem()
        if problem:
            raise EnvironmentProblem(problem)

    def _published(self, wall: float) -> dict[int, float]:
        found = {}
        for directory in self.models.iterdir():
            if directory.name.isdigit() and directory.name != "1":
                # Its check data are the last thing written before it gets its name.
                found[int(directory.name)] = (directory / "check.npz").stat().st_mtime - wall
        return dict(sorted(found.items()))

    def stop(self) -> None:
        """End everything of this arm."""
        if self._client is not None:
            self._client.kill()
            self._client.wait()
            assert self._client.stdout is not None
            self._client.stdout.close()
        if isinstance(self.job, PlainJob):
            self.job.stop()
        self.node.stop()


def _config(device: str, objective_ms: float) -> str:
    return f"""
node:
  state_dir: ./state
  models: ./models
  http: "127.0.0.1:0"
  grpc: null
  poll_models_every: 500ms
devices: [{{kind: cpu, {device}}}]
services:
  - name: {MODEL}
    objective: {{latency: {objective_ms:g}ms, percentile: 99}}
    batch: {{max: 8}}
    threads: 1
    accuracy_floor: {ACCURACY_FLOOR}
"""


def _read_start(pipe: int) -> bytes:
    data = b""
    while len(data) < START.size:
        part = os.read(pipe, START.size - len(data))
        if not part:
            raise EnvironmentProblem("the clients did not start; is the node up?")
        data += part
    return data


def tail(path: Path) -> str:
    """The end of a log."""
    with contextlib.suppress(OSError, CotenantError):
        return path.read_text(errors="replace").strip()[-1500:]
    return "(no log)"
