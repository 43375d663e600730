"""What the benchmark runs: nodes, training jobs, load, and what the kernel counted meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cotenant.cli.submitting import inherited
from cotenant.devices import proctree
from cotenant.domain.errors import CotenantError, EnvironmentProblem
from cotenant.domain.workload import JobSpec
from cotenant.serving.control_client import ControlClient

JOB_START_S = 120.0


def _prepare(
    sent: signal.Signals, cores: set[int] | None = None, nice: int = 0
) -> Callable[[], None]:
    """What a new process does first: on which cores it runs, and how it ends with this one."""

    def prepare() -> None:
        proctree.end_with_parent(sent)
        if cores:
            os.sched_setaffinity(0, cores)
        os.nice(nice)

    return prepare


class NodeRig:
    """A ``cotenant serve`` process of its own, in a directory of its own."""

    def __init__(self, name: str, directory: Path, config: str, cores: set[int] | None) -> None:
        self.name = name
        self.directory = directory / name
        self.directory.mkdir(parents=True)
        (self.directory / "cotenant.yaml").write_text(config)
        self._cores = cores
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def control(self) -> ControlClient:
        """Client of the node's control socket."""
        return ControlClient(self.directory / "state" / "control.sock")

    @property
    def pid(self) -> int:
        """The node's process id."""
        assert self._process is not None
        return self._process.pid

    def start(self, within_s: float = 60.0) -> None:
        """Start it and wait until its model is warm; raises EnvironmentProblem."""
        with (self.directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cotenant", "serve", "cotenant.yaml"],
                cwd=self.directory,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_prepare(signal.SIGTERM, self._cores),
            )
        end = time.monotonic() + within_s
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(CotenantError):
                status = self.control.status()
                if status["ready"]:
                    self.port = int(status["http"].rpartition(":")[2])
                    return
            time.sleep(0.2)
        said = (self.directory / "log").read_text(errors="replace")[-2000:]
        raise EnvironmentProblem(f"node {self.name} did not become ready: {said}")

    def stop(self) -> None:
        """End it, politely first."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def service_cpu_s(self) -> float:
        """CPU seconds of the node and its workers, jobs not counted."""
        return _own_cpu_s(self.pid) + sum(map(_own_cpu_s, self._children(workers=True)))

    def job_cpu_s(self) -> float:
        """CPU seconds of its jobs."""
        return sum(map(_own_cpu_s, self._children(workers=False)))

    def _children(self, workers: bool) -> list[int]:
        return [
            pid
            for pid in proctree.descendants(self.pid)
            if (b"cotenant.runtime.worker" in _cmdline(pid)) == workers
        ]

    def executed(self) -> tuple[float, int]:
        """Seconds of execution and requests executed since the node started, by its own count."""
        import urllib.request

        url = f"http://127.0.0.1:{self.port}/v2/models/bench/stats"
        with urllib.request.urlopen(url, timeout=10) as answer:
            stats = json.load(answer)["model_stats"][0]
        executed_ns = float(stats["inference_stats"]["compute_infer"]["ns"])
        return executed_ns / 1e9, int(stats["inference_count"])


class PlainJob:
    """The training job as an ordinary process, stopped while it is not its turn."""

    def __init__(self, counter: Path, threads: int, cores: set[int] | None, nice: int) -> None:
        self.counter = counter
        self._process = subprocess.Popen(
            _train_command(counter, threads),
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            # As Cotenant sets it for its jobs, so that scheduling is all that the arms differ in:
            # with the default, long spinning, the arms without Cotenant come out worse.
            env={**os.environ, "GOMP_SPINCOUNT": "1000"},
            start_new_session=True,
            preexec_fn=_prepare(signal.SIGKILL, cores, nice),
        )

    def resume(self) -> None:
        """Let it run."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def suspend(self) -> None:
        """Stop it where it is."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def cpu_s(self) -> float:
        """CPU seconds that it took so far."""
        return _own_cpu_s(self._process.pid)

    def end(self) -> None:
        """End it for good."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class CotenantJob:
    """The training job under a node, held while it is not its turn."""

    def __init__(self, node: NodeRig, counter: Path, threads: int) -> None:
        self.counter = counter
        self._node = node
        self._id = node.control.submit(
            JobSpec(
                id="",
                name="train",
                command=tuple(_train_command(counter, threads)),
                cwd="/",
                env=inherited()[0],
            )
        )

    def resume(self) -> None:
        """Let it run where the node lets it."""
        self._node.control.resume(self._id)

    def suspend(self) -> None:
        """Keep it from running."""
        self._node.control.hold(self._id)

    def cpu_s(self) -> float:
        """CPU seconds that it took so far."""
        return self._node.job_cpu_s()

    def end(self) -> None:
        """End it for good."""
        with contextlib.suppress(CotenantError):
            self._node.control.cancel(self._id)


Job = PlainJob | CotenantJob


def _train_command(counter: Path, threads: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "cotenant.cli.bench.train_job",
        "--counter",
        str(counter),
        "--threads",
        str(threads),
    ]


def wait_for_steps(counter: Path, steps: int) -> None:
    """Wait until a job has made this many steps; raises EnvironmentProblem."""
    from cotenant.cli.bench.train_job import read_counter

    end = time.monotonic() + JOB_START_S
    while time.monotonic() < end:
        if counter.exists() and read_counter(counter)[0] >= steps:
            return
        time.sleep(0.1)
    raise EnvironmentProblem("the training job made no progress; is torch installed?")


def generate(port: int, request: bytes, times: list[float], core: int | None) -> dict[str, Any]:
    """Ask an endpoint at these times; the load generator's answer."""
    order = {
        "port": port,
        "request": request.hex(),
        "times": times,
        "drain_s": 2.0,
        "core": core,
        "warm_connections": 8,
    }
    return drive("loadgen", order, max(times, default=0.0) + 60)


def drive(generator: str, order: dict[str, Any], within_s: float) -> dict[str, Any]:
    """Run a load generator of this package in a process of its own; its answer."""
    done = subprocess.run(
        [sys.executable, "-m", f"cotenant.cli.bench.{generator}"],
        input=json.dumps(order).encode(),
        preexec_fn=_prepare(signal.SIGKILL),
        capture_output=True,
        timeout=within_s,
        check=False,
    )
    if done.returncode:
        raise EnvironmentProblem(f"the load generator failed: {done.stderr.decode()[-500:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def busy_s() -> float:
    """CPU seconds of all programs on all cores since boot (/proc/stat)."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return sum(int(fields[n]) for n in (1, 2, 3, 6, 7)) / os.sysconf("SC_CLK_TCK")


def steal_s() -> float:
    """Seconds that the host took from all cores since boot (/proc/stat)."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(fields[8]) / os.sysconf("SC_CLK_TCK")


def _own_cpu_s(pid: int) -> float:
    found = proctree.stat(pid)
    return found.cpu_ticks / proctree.TICKS_PER_SECOND if found is not None else 0.0


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
