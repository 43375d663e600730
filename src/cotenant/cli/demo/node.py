"""The demo's node: a directory, a ``cotenant serve`` process in it, and a training job."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from cotenant.cli.demo.figures import Steps
from cotenant.cli.demo.model import Model
from cotenant.cli.submitting import inherited
from cotenant.devices import proctree
from cotenant.domain.errors import CotenantError, EnvironmentProblem
from cotenant.domain.port import JobStatus
from cotenant.domain.units import S
from cotenant.domain.workload import ENDED_STATES, JobSpec, JobState
from cotenant.serving.control_client import ControlClient

OBJECTIVE: Final = {"ttft": "1s", "tpot": "150ms", "percentile": 95}
POLL_S: Final = 0.2
STOP_S: Final = 20.0
TRAIN_S: Final = 30.0
"""How long training may take to begin."""
TRAINING: Final = (sys.executable, "-m", "cotenant.cli.demo.train")
_PR_SET_CHILD_SUBREAPER: Final = 36
_TAIL: Final = 1500
ONE_THREAD: Final = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""The job has a thread for each core already."""


class Gone(BaseException):
    """The node ended by itself. It may be noticed anywhere, so no handler of errors takes it."""


class DemoNode:
    """A node with one language model, for as long as the demo lasts. ``keep``: a directory that
    stays; without one it is temporary."""

    def __init__(self, model: Model, port: int = 0, keep: Path | None = None) -> None:
        self.model = model
        self.port = port
        self._keep = keep
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._job = ""
        self._training: tuple[str, ...] = ()
        """Arguments of the job."""

    # life

    def open(self) -> None:
        """Make the directory and start the process. Raises EnvironmentProblem."""
        self._directory = directory = self._make()
        self._lay(directory / "models" / self.model.name)
        node = {
            "state_dir": "./state",
            "models": "./models",
            "http": f"127.0.0.1:{self.port}",
            "grpc": None,
        }
        config = {"node": node, **self._rest()}
        # JSON is YAML, too.
        (directory / "cotenant.yaml").write_text(json.dumps(config, indent=2) + "\n")
        # What loses its parent becomes a child of this process, which then finds it at the end.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        with (directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cotenant", "serve", "cotenant.yaml"],
                cwd=directory,
                env={**os.environ, "TMPDIR": str(directory)},  # libraries leave files there
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the chat alone
                preexec_fn=_end_with_us,
            )

    def _lay(self, place: Path) -> None:
        """Lay the model where the repository has it."""
        if self.model.path.is_dir():
            place.mkdir(parents=True)
            (place / "1").symlink_to(self.model.path)
        else:
            (place / "1").mkdir(parents=True)
            (place / "1" / "model.gguf").symlink_to(self.model.path)

    def _rest(self) -> dict[str, Any]:
        """What the configuration says beside ``node``."""
        return {"services": [{"name": self.model.name, "objective": OBJECTIVE}]}

    def _make(self) -> Path:
        if self._keep is None:
            return Path(tempfile.mkdtemp(prefix="cotenant-demo-"))
        directory = self._keep.absolute()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            used = any(directory.iterdir())
        except OSError as error:
            raise EnvironmentProblem(
                f"--keep {self._keep}: {error.strerror}; name a directory that can be written"
            ) from None
        if used:
            raise EnvironmentProblem(f"--keep {self._keep} is not empty; name a new directory")
        return directory

    def wait(self, tell: Callable[[], None]) -> None:
        """Until the model answers; ``tell`` is called now and then. Raises EnvironmentProblem."""
        while True:
            status: dict[str, Any] = {}
            with contextlib.suppress(CotenantError):  # it is not there yet
                status = self.status()
            for service in status.get("services") or ():
                if service["reason"]:
                    raise EnvironmentProblem(
                        f"the node does not serve {self.model.path}: {service['reason']};"
                        " name another with --model PATH"
                    )
                if status["ready"] and service["state"] == "READY":
                    self.port = int(status["http"].rpartition(":")[2])
                    return
            tell()
            time.sleep(POLL_S)

    def look(self) -> None:
        """Raises Gone if the process has ended."""
        if self._process is None or (code := self._process.poll()) is None:
            return
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        kept = f"its log is {self._keep / 'log'}" if self._keep else "--keep DIR keeps its log"
        raise Gone(f"the node {how}; {kept}{self._tail()}")

    def wait_gone(self, seconds: float) -> None:
        """Raises Gone if the process ends within this time: what broke may be the first of it."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        self.look()

    def _tail(self) -> str:
        assert self._directory is not None
        try:
            said = (self._directory / "log").read_text(errors="replace")[-_TAIL:].strip()
        except OSError:
            return ""
        return f". It said last:\n{said}" if said else ""

    def end(self) -> None:
        """Ask the process to end, and do not wait for it."""
        if self._process is not None:
            self._process.terminate()

    def wait_ended(self) -> None:
        """Wait until the process has ended as it was asked to, and kill it if it does not."""
        if self._process is not None:
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def close(self) -> None:
        """End all there is, and remove the directory unless it is to stay."""
        self.end()
        self.wait_ended()
        if self._process is not None:
            proctree.kill(lambda: proctree.descendants(os.getpid()))
        if self._directory is not None and self._keep is None:
            shutil.rmtree(self._directory, ignore_errors=True)

    # what it says

    @property
    def _control(self) -> ControlClient:
        assert self._directory is not None
        return ControlClient(self._directory / "state" / "control.sock")

    def status(self) -> dict[str, Any]:
        """See ``NodePort.status``."""
        return self._control.status()

    # training

    def train(self) -> None:
        """Start the job, or let it go on."""
        if self._job:
            self._control.resume(self._job)
            return
        assert self._directory is not None
        env = inherited()[0] | dict.fromkeys(ONE_THREAD, "1") | {"TMPDIR": str(self._directory)}
        command = (*TRAINING, *self._training)
        self._job = self._control.submit(
            JobSpec("", "train", command, str(self._directory), env, grace=1 * S)
        )

    def hold(self) -> None:
        """Let the job do nothing until ``train``."""
        if self._job:
            self._control.hold(self._job)

    def job(self) -> JobStatus | None:
        """The job, if there is one."""
        return next((job for job in self._control.jobs() if job.id == self._job), None)

    def steps(self) -> Steps | None:
        """How far training is now; None while it does not run."""
        job = self.job()
        if job is None or job.state != JobState.RUNNING.value or job.progress_unit != "steps":
            return None  # before its first report the node counts CPU seconds
        return Steps(time.monotonic(), job.progress, job.restarts)

    def wait_trains(self) -> None:
        """Until the job has made a step. Raises EnvironmentProblem."""
        end = time.monotonic() + TRAIN_S
        while self.steps() is None:
            job = self.job()
            ended = job is not None and job.state in ENDED_STATES
            if ended or time.monotonic() > end:
                said = f"{job.state} {job.reason}".strip() if job else "unknown"
                raise EnvironmentProblem(f"training does not begin (the job is {said})")
            time.sleep(POLL_S)


def _end_with_us() -> None:
    proctree.end_with_parent(signal.SIGTERM)
