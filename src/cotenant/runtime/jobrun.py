"""One run of a job as the daemon sees it: a shim started or found again, and what it left.

Directory of a run (``jobs/<job>/run-<run>``, gone once its end is recorded):

    lock          locked as long as the shim lives
    alive         FIFO; held open for writing by the daemon that looks after the run
    started.json  pids and start times of shim and command
    exit.tmp      room for the next one; there since before the command was
    exit.json     how the run ended
    gives         there once a program of the job could be asked for memory
    adopted       processes from elsewhere that belong to it, a pid and a start time a line
    shim.err      what the shim itself complained about; empty unless Cotenant has a bug
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import marshal
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import TypeVar

import msgspec

from cotenant.devices import proctree
from cotenant.domain.device import Launch
from cotenant.domain.errors import EnvironmentProblem
from cotenant.domain.reservation import Adopted
from cotenant.domain.units import S, format_bytes
from cotenant.domain.workload import JobSpec

RUN_MARKER = "COTENANT_JOB_RUN"
SHIM_MARKER = "COTENANT_SHIM_RUN"
KEEPER = ("sleep", "infinity")
"""What stands for a reservation's processes, from before they come until it is given up."""
ADOPT_WITHIN_S = 10.0
LOCK_WITHIN_S = 2.0
_SOURCE_ROOT = str(Path(__file__).resolve().parents[2])

T = TypeVar("T")
log = logging.getLogger("cotenant.jobs")


class Outcome(msgspec.Struct, frozen=True):
    """How a run ended: the shim's ``exit.json``, or what is known without one (``lost``)."""

    code: int | None = None
    """Exit code, -N for signal N; None if the command was never executed or nobody knows."""
    failed: str = ""
    """``cwd`` or ``exec`` if that failed, with ``errno``; ``spawn`` if even the shim did."""
    errno: int = 0
    detail: str = ""
    """Why even the shim was not started, where the devices would not have it."""
    stopped: bool = False
    """A stop reached the command before it ended: it may have saved its work and exited with 0."""
    over_memory: int = 0
    log_dropped: int = 0
    left: int = 0
    """Processes that could not be killed."""
    behind: int = 0
    """Processes that the command had left running, ended with it."""
    ran_s: float = 0.0
    cpu_s: float = 0.0
    ended: float = 0.0
    """Wall-clock seconds since 1970."""
    lost: bool = False
    """The shim was killed: there is no record."""
    begun: bool = True
    """Whether the command may have been executed."""

    def reason(self, spec: JobSpec) -> str:
        """One clause for the user; empty for a plain success."""
        if self.failed == "exec" and self.errno == errno.ENOENT:
            return f"command not found: {spec.command[0]} (or the interpreter it names)"
        if self.failed == "exec":
            return f"cannot execute {spec.command[0]}: {os.strerror(self.errno)}"
        if self.failed == "cwd":
            return f"cannot enter the working directory {spec.cwd}: {os.strerror(self.errno)}"
        if self.failed:
            return f"could not be started: {self.detail or os.strerror(self.errno)}"
        if self.over_memory:
            limit, resident = format_bytes(spec.memory), format_bytes(self.over_memory)
            return f"memory limit {limit} exceeded ({resident} resident)"
        if self.lost:
            return "its supervising process was killed" if self.begun else "could not be started"
        return "; ".join(filter(None, (self._end(), self._left_behind())))

    def _end(self) -> str:
        if self.code is not None and self.code < 0:
            with contextlib.suppress(ValueError):
                return f"killed by {signal.Signals(-self.code).name}"
            return f"killed by signal {-self.code}"
        return f"exited with {self.code}" if self.code else ""

    def _left_behind(self) -> str:
        if not self.behind:
            return ""
        processes = "process" if self.behind == 1 else "processes"
        return (
            f"ended with it: {self.behind} background {processes} (let the command wait for them)"
        )


class _Started(msgspec.Struct, frozen=True):
    shim: int
    shim_start: int
    pid: int
    pid_start: int


class JobRun:
    """One run. ``start`` or ``adopt``, then ``gone``, ``outcome`` and ``discard``.

    Blocking work goes to ``pool``. Everything else happens on the running loop.
    """

    def __init__(self, job_directory: Path, run: str, pool: Executor) -> None:
        self.run = run
        self.shim_pid = 0
        self.pid = 0
        self.adopted: dict[int, int] = {}
        """Processes from elsewhere, and when they started (ticks)."""
        self._job_directory = job_directory
        self._directory = job_directory / f"run-{run}"
        self._pool = pool
        self._process: subprocess.Popen[bytes] | None = None
        self._alive, self._pidfd, self._ready = -1, -1, -1
        self._signal_due: signal.Signals | None = None

    async def start(self, spec: JobSpec, env: Mapping[str, str], launch: Launch) -> int:
        """Start the shim and the command with its environment, and the resource limits and control
        group that its devices want; the command's pid, 0 if that failed or has ended.

        Raises ``OSError`` if there is no shim: no room on the disk, no more processes.
        """
        try:
            await self._in_pool(lambda: self._spawn(spec, env, launch))
        except BaseException:
            self._release()
            raise
        if self._signal_due is not None:
            self._send(self._signal_due)
        await _readable(self._ready)
        data = os.read(self._ready, 4096)
        if data:
            self._note(msgspec.json.decode(data, type=_Started))
        return self.pid

    async def adopt(self) -> int:
        """Look after a run that another daemon started and whose shim lives.

        Returns as ``start`` does; 0 also if the shim dies meanwhile (``gone`` then returns).
        """
        with contextlib.suppress(OSError):  # without it the job is not set free if we are killed
            self._alive = _hold_open(self._directory / "alive")
        end = time.monotonic() + ADOPT_WITHIN_S
        started = None
        while started is None and self.shim_lives() and time.monotonic() < end:
            started = self._read_started()
            if started is None:
                await asyncio.sleep(0.01)
        if started is None and self.shim_lives():
            started = await self._in_pool(self._find)
        if started is not None:
            self._attach(started)
        if self._signal_due is not None:
            self._send(self._signal_due)
        return self.pid

    def shim_lives(self) -> bool:
        """Whether the shim lives (or is being started this moment)."""
        return is_locked(self._directory / "lock")

    async def gone(self) -> None:
        """Return once the shim is dead."""
        if self._process is not None or self.pid:
            await _readable(self._pidfd)
        while self.shim_lives():  # an adopted shim whose pid could not be learnt
            await asyncio.sleep(0.1)
        if self._process is not None:
            self._process.wait()

    async def outcome(self) -> Outcome:
        """How it ended, once the shim is dead; what a killed shim left behind is killed."""
        return await self._in_pool(self._outcome)

    def stop(self) -> None:
        """Ask the shim to stop the job; it takes the job's ``grace`` at most."""
        self._send(signal.SIGTERM)

    def force(self) -> None:
        """Kill the shim; ``outcome`` kills what is left."""
        self._send(signal.SIGKILL)

    def freeze(self) -> None:
        """Stop the job's processes (blocking: reads /proc)."""
        if self.shim_pid:
            proctree.freeze(self.shim_pid, self.adopted)

    def thaw(self) -> None:
        """Continue them, children first: their parents then find them running."""
        if self.shim_pid:
            family = proctree.family(self.shim_pid, self.adopted)
            proctree.send(reversed(family), signal.SIGCONT)

    def take_in(self, adopted: Iterable[Adopted]) -> None:
        """These processes from elsewhere belong to it. The shim sets them free, too, if the daemon
        goes away, as far as the disk takes it down."""
        before, self.adopted = self.adopted, {p.pid: p.start for p in adopted}
        if before == self.adopted:
            return
        text = "".join(f"{pid} {start}\n" for pid, start in self.adopted.items())
        with contextlib.suppress(OSError):
            new = self._directory / "adopted.tmp"
            new.write_text(text)
            new.rename(self._directory / "adopted")

    def note_giver(self) -> None:
        """Remember that a program of the job can be asked for memory."""
        if not self.noted_giver:
            with contextlib.suppress(OSError):  # it is said again, and matters after a restart only
                (self._directory / "gives").touch(mode=0o600)

    @property
    def noted_giver(self) -> bool:
        """Whether that was noted, perhaps by an earlier daemon."""
        return (self._directory / "gives").exists()

    async def discard(self) -> None:
        """Let go of it and remove its directory: its end has been recorded."""
        self._release()
        await self._in_pool(lambda: shutil.rmtree(self._directory, ignore_errors=True))

    def release(self) -> None:
        """Let go of it but keep its directory for the next daemon."""
        self._release()

    def _spawn(self, spec: JobSpec, env: Mapping[str, str], launch: Launch) -> None:
        for old in self._job_directory.glob("run-*"):
            if not is_locked(old / "lock"):
                shutil.rmtree(old, ignore_errors=True)
        self._directory.mkdir(mode=0o700, parents=True)
        fifo = self._directory / "alive"
        os.mkfifo(fifo, 0o600)
        self._alive = _hold_open(fifo)
        order = {
            "command": list(spec.command if spec.reservation is None else KEEPER),
            "cwd": spec.cwd,
            "env": dict(env),
            "limits": dict(launch.limits),
            "cgroup": launch.cgroup,
            "grace_s": spec.grace / S,
            "log": str(self._job_directory / "log"),
            "log_limit": spec.log_limit,
            "memory": 0 if launch.own_memory else spec.memory,
        }
        with contextlib.ExitStack() as stack:
            lock = _closing(stack, os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT, 0o600))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # In memory, so that the environment (which may hold secrets) is on no disk twice.
            paper = _closing(stack, os.memfd_create("cotenant-job"))
            os.write(paper, marshal.dumps(order))
            self._ready, ready = os.pipe2(os.O_CLOEXEC)
            _closing(stack, ready)
            complaints = stack.enter_context((self._directory / "shim.err").open("wb"))
            arguments = [str(self._directory), str(lock), str(paper), str(ready)]
            self._process = subprocess.Popen(
                # No site packages and no current directory on the path: faster, and safe.
                [sys.executable, "-S", "-P", "-m", "cotenant.runtime.jobshim", *arguments],
                env={"PYTHONPATH": _SOURCE_ROOT, SHIM_MARKER: self.run},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=complaints,
                stderr=complaints,
                pass_fds=(lock, paper, ready),
                start_new_session=True,
            )
        try:
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError:
            self._process.kill()
            self._process.wait()
            raise

    def _attach(self, started: _Started) -> None:
        with contextlib.suppress(OSError):  # it is dead, or ``gone`` has to poll
            pidfd = os.pidfd_open(started.shim)
            # The shim may be dead and its pid another process's: compare the start times.
            if proctree.start_time(started.shim) == started.shim_start:
                self._pidfd = pidfd
                self._note(started)
            else:
                os.close(pidfd)

    def _note(self, started: _Started) -> None:
        self.shim_pid, self.pid = started.shim, started.pid

    def _read_started(self) -> _Started | None:
        try:
            data = (self._directory / "started.json").read_bytes()
        except OSError:
            return None
        return msgspec.json.decode(data, type=_Started)

    def _find(self) -> _Started | None:
        """A shim that could not write down its pid (a full disk) is found by its marker."""
        for shim in proctree.marked(SHIM_MARKER, self.run):
            for pid in proctree.descendants(shim)[:1]:
                times = proctree.start_time(shim), proctree.start_time(pid)
                return _Started(shim, times[0], pid, times[1])
        return None

    def _send(self, number: signal.Signals) -> None:
        """Signal the shim; kept until it is known if it is not yet."""
        if self._pidfd < 0:
            self._signal_due = number
        else:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _outcome(self) -> Outcome:
        with contextlib.suppress(OSError, msgspec.DecodeError):
            data = (self._directory / "exit.json").read_bytes()
            return msgspec.json.decode(data, type=Outcome)
        with contextlib.suppress(OSError):
            if complaint := (self._directory / "shim.err").read_text("utf-8", "replace")[-2000:]:
                log.error("job shim failed: %s", complaint, extra={"run": self.run})
        left = proctree.kill(self._strays)
        begun = (self._directory / "exit.tmp").exists()
        return Outcome(lost=True, begun=begun, left=len(left), ended=time.time())

    def _strays(self) -> list[int]:
        found = proctree.marked(RUN_MARKER, self.run)
        if not found:  # a process in the middle of an exec shows no environment
            time.sleep(0.01)
            found = proctree.marked(RUN_MARKER, self.run)
        return found

    def _release(self) -> None:
        for fd in (self._alive, self._pidfd, self._ready):
            if fd >= 0:
                os.close(fd)
        self._alive, self._pidfd, self._ready = -1, -1, -1

    async def _in_pool(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def is_locked(path: Path) -> bool:
    """Whether another open file holds this lock; False if there is no such file.

    True also if that cannot be found out: to wait is safe, to start a second run is not.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    try:
        # Shared: two that look at the same time do not take each other for a shim.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


async def lock_directory(directory: Path) -> int:
    """Create the directory if need be and lock it for one daemon; closing the fd unlocks it.

    Waits ``LOCK_WITHIN_S``: where a daemon was killed in the middle of starting a process, that
    process has the lock, too, until its exec. Raises ``EnvironmentProblem`` if the directory is
    taken or cannot be written.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(directory / "jobs.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise EnvironmentProblem(f"cannot use the job directory: {error}") from error
    end = time.monotonic() + LOCK_WITHIN_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > end:
                break
        await asyncio.sleep(0.02)
    os.close(fd)
    raise EnvironmentProblem(
        f"another Cotenant runs its jobs in {directory}; stop it or choose another state directory"
    )


def _hold_open(fifo: Path) -> int:
    """Open a FIFO as its writer, whether or not it has a reader yet."""
    return os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def _closing(stack: contextlib.ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


async def _readable(fd: int) -> None:
    """Return once ``fd`` is readable (a pidfd: its process is dead)."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, lambda: None if future.done() else future.set_result(None))
    try:
        await future
    finally:
        loop.remove_reader(fd)
