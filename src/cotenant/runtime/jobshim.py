"""The job shim: one small process above each running job, which outlives the daemon.

    python -m cotenant.runtime.jobshim RUN_DIRECTORY LOCK_FD SPEC_FD READY_FD

``cotenant.runtime.jobrun`` starts it and reads what it leaves. Its laws:

1. It holds a lock that the daemon took before starting it. The lock is free exactly when the
   shim is dead: there is no moment, whoever is killed when, at which this fails to hold. The
   command never gets the lock.
2. Everything that the command starts stays below the shim (it is a subreaper), and dies with
   the command: a run is over when nothing of it is left. What ends by itself in a moment may;
   the rest is ended, and that is said.
3. ``exit.tmp`` exists before the command does; ``exit.json`` exists once the run is over. The
   room for it is reserved beforehand, so that a full disk does not swallow the exit status.
4. The log is bounded, and what the disk does not take is dropped and counted: it never stops
   the command. Only one that writes faster than 13 MB/s waits, as it would on any pipe.
5. If the daemon goes away, the job is set free (continued, on all CPUs that the shim may use)
   and goes on. A new daemon takes over by opening ``alive`` for writing.
6. A stop is the command's to carry out; the rest hears of it after it (``jobstop``).

It should start fast, use no CPU while nothing happens and keep to memory that is not worth
mentioning; hence the few imports, and numbers instead of messages in what it writes.
"""

# pathlib would cost more to import than everything else here.
# ruff: noqa: PTH104, PTH123

from __future__ import annotations

import contextlib
import ctypes
import marshal
import os
import resource
import select
import signal
import sys
import time

from cotenant.devices import proctree
from cotenant.runtime.boundedlog import BoundedLog
from cotenant.runtime.jobmemory import MemoryLimit
from cotenant.runtime.jobstop import Stop
from cotenant.runtime.rlimits import limit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
OOM_SCORE = 500  # when memory runs out the kernel takes a job before it takes the daemon
CHUNK_BYTES = 65536
RECORD_BYTES = 512
LOOK_EVERY_S = 0.05
"""While something is about to end or to be continued."""
MOMENT_S = 1.0
"""For what the command left, not counting time that it was stopped in."""
AGAIN_S = 1.0
"""How long what is found stopped is continued again: who watches a process may act on the news
of its stop only after it was continued, and stop itself (script, su)."""
LOG_PAUSE_S = 0.005
"""Pause after each chunk: however a job writes, the shim wakes up at most 200 times a second
and takes a few percent of a core, which may be one that inference wants."""

_libc = ctypes.CDLL(None)
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4


class Shim:
    """One run of one job, from ``run`` to its end."""

    def __init__(self, directory: str, spec: dict[str, Any], ready_fd: int) -> None:
        self._directory = directory
        self._spec = spec
        self._ready = ready_fd
        self._log = BoundedLog(spec["log"], spec["log_limit"])
        self._cpus = os.sched_getaffinity(0)
        self._poll = select.poll()
        self._wake, self._log_pipe, self._alive = -1, -1, -1
        self._root = 0
        self._status: int | None = None
        self._began = time.monotonic()
        self._stop_asked = False
        self._stop: Stop | None = None
        self._stopped = False
        """Whether the stop reached the command: it had not ended, and did not ignore it."""
        self._moment_s = MOMENT_S
        self._left_at = self._look_at = self._again_until = self._began
        limit = spec["memory"]
        self._memory = MemoryLimit(limit, self._tree) if limit else None
        self._log_at = 0.0
        self._over_memory = 0

    def run(self) -> None:
        """Start the command, see it through, leave its record."""
        self._prepare()
        reserved = self._path("exit.tmp")
        with open(reserved, "xb", opener=_private) as file:
            file.write(b" " * RECORD_BYTES)
        failure = self._start()
        if failure:
            stage, _, number = failure.partition(b" ")
            self._record(failed=stage.decode(), errno=int(number))
            return
        self._announce()
        while not self._is_over():
            self._turn()
        behind = 0 if self._stop_asked or self._over_memory else len(self._tree())
        left = proctree.kill(self._tree)
        self._reap()
        self._drain_log()
        if behind:
            self._log.write(b"\n[cotenant: the command ended; %d it left were ended]\n" % behind)
        self._record(left=len(left), behind=behind)

    def _path(self, name: str) -> str:
        return f"{self._directory}/{name}"

    def _tree(self) -> list[int]:
        return proctree.descendants(os.getpid())

    def _prepare(self) -> None:
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        if cgroup := self._spec["cgroup"]:
            # Else its memory can be taken back less precisely: no reason not to start it.
            with contextlib.suppress(OSError), open(f"{cgroup}/cgroup.procs", "wb") as file:
                file.write(b"0")
        # The daemon may run at a real-time policy; neither shim nor job inherits that.
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, 0)
        self._wake, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_term)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self._poll.register(self._wake, select.POLLIN)
        self._attend()

    def _on_term(self, _number: int, _frame: FrameType | None) -> None:
        self._stop_asked = True

    def _attend(self) -> None:
        """Watch for the daemon's end. A FIFO opened anew hangs up only after a writer came and
        went, so an unattended shim can wait on it for the next daemon's end without spinning."""
        if self._alive >= 0:
            self._poll.unregister(self._alive)
            os.close(self._alive)
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        self._alive = os.open(self._path("alive"), flags)
        self._poll.register(self._alive, 0)

    def _start(self) -> bytes:
        """Fork and execute the command; returns what failed (stage and errno) or nothing."""
        self._log_pipe, log_write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._log_pipe, False)
        failed_read, failed_write = os.pipe2(os.O_CLOEXEC)
        shim = os.getpid()
        self._root = os.fork()
        if self._root == 0:
            self._become_job(shim, log_write, failed_write)
        os.close(log_write)
        os.close(failed_write)
        failure = os.read(failed_read, 64)
        os.close(failed_read)
        if not failure:
            self._poll.register(self._log_pipe, select.POLLIN)
        return failure

    def _become_job(self, shim: int, log_write: int, failed_write: int) -> NoReturn:
        stage = b"start"
        try:
            os.setsid()
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != shim:  # it died before the line above took effect
                os._exit(1)
            for number in range(1, signal.NSIG):
                with contextlib.suppress(OSError, ValueError):
                    signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "wb") as file:
                file.write(b"%d" % OOM_SCORE)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(log_write, 1)
            os.dup2(log_write, 2)
            # With what lets a request start at once a job could keep one waiting.
            _libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
            limit({resource.RLIMIT_RTPRIO: (0, 0)})
            with contextlib.suppress(ValueError):
                limit(self._spec["limits"])
            stage = b"cwd"
            os.chdir(self._spec["cwd"])
            stage = b"exec"
            command = self._spec["command"]
            os.execvpe(command[0], command, self._spec["env"])
        except OSError as error:
            os.write(failed_write, b"%s %d" % (stage, error.errno or 0))
        except BaseException:
            os.write(failed_write, b"%s 0" % stage)
        finally:
            os._exit(127)

    def _announce(self) -> None:
        """Tell the daemon, and the daemons to come, which processes these are."""
        own, root = proctree.start_time(os.getpid()), proctree.start_time(self._root)
        text = (
            f'{{"shim": {os.getpid()}, "shim_start": {own}, '
            f'"pid": {self._root}, "pid_start": {root}}}'
        ).encode()
        with contextlib.suppress(OSError):
            with open(self._path("started.tmp"), "wb", opener=_private) as file:
                file.write(text)
            os.rename(self._path("started.tmp"), self._path("started.json"))
        with contextlib.suppress(OSError):  # the daemon may be gone already
            os.write(self._ready, text)
        os.close(self._ready)

    def _is_over(self) -> bool:
        if self._status is None:
            return False
        now, left = time.monotonic(), self._tree()
        if not left or self._over_memory:
            return True
        if self._stop is not None:  # its children, say, write their checkpoints
            return now >= self._stop.ends
        # Some only see to it that nothing is left (Python's resource tracker).
        if not all(map(proctree.is_stopped, left)):
            self._moment_s -= min(now - self._left_at, LOOK_EVERY_S)
        self._left_at = now
        return self._moment_s <= 0

    def _turn(self) -> None:
        """Wait for something to happen and see to all that is due."""
        for fd, _ in self._poll.poll(self._timeout_ms()):
            if fd == self._wake:
                os.read(self._wake, 4096)
            elif fd == self._log_pipe:
                self._pump()
            else:
                self._set_free()
        self._reap()
        now = time.monotonic()
        if self._log_at and now >= self._log_at:
            self._log_at = 0.0
            self._poll.modify(self._log_pipe, select.POLLIN)
        if self._stop_asked and self._stop is None:
            self._stop = Stop(now, self._spec["grace_s"], os.getpid(), self._root)
            self._look_at = now
        if now >= self._look_at and (self._stop is not None or now < self._again_until):
            self._look_at = now + LOOK_EVERY_S
            self._look(now, self._stop)
        if self._memory is not None and now >= self._memory.due:
            self._check_memory(self._memory)

    def _timeout_ms(self) -> int | None:
        now = time.monotonic()
        waits = []
        if self._log_at:
            waits.append(self._log_at - now)
        if self._stop is not None or self._status is not None or now < self._again_until:
            waits.append(LOOK_EVERY_S)
        if self._memory is not None:
            waits.append(self._memory.due - now)
        return max(1, round(1000 * min(waits))) if waits else None

    def _look(self, now: float, stop: Stop | None) -> None:
        """See whom a stop reaches now, and who must be continued once more."""
        table = proctree.scan()
        tree = proctree.descendants(os.getpid(), table)
        if now < self._again_until:
            stopped = [pid for pid in tree if table[pid].state == b"T"]
            proctree.send(reversed(stopped), signal.SIGCONT)
        if stop is None:
            return
        runs = self._status is None and self._root in table and not table[self._root].is_dead
        if due := stop.due(now, {pid: table[pid].parent for pid in tree}):
            heard = not all(proctree.ignores(pid, signal.SIGTERM) for pid in due)
            self._stopped = self._stopped or (runs and heard)
            proctree.send(due, signal.SIGTERM)
            self._continue(now, self._tree())
        if now >= stop.ends and self._status is None:
            self._stopped = self._stopped or runs
            proctree.kill(self._tree)
            self._reap()

    def _continue(self, now: float, pids: list[int]) -> None:
        """A stopped process acts on a signal only once it is continued. Children first: their
        parents then find them running."""
        proctree.send(reversed(pids), signal.SIGCONT)
        self._again_until = now + AGAIN_S

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._root:
                    self._status = status

    def _pump(self) -> None:
        """Move one chunk from the pipe to the log."""
        try:
            data = os.read(self._log_pipe, CHUNK_BYTES)
        except BlockingIOError:
            return
        if not data:  # the job closed its output; it may well run on
            self._poll.unregister(self._log_pipe)
            self._log_at = 0.0
            return
        self._log.write(data)
        self._log_at = time.monotonic() + LOG_PAUSE_S
        self._poll.modify(self._log_pipe, 0)

    def _drain_log(self) -> None:
        """What is left in the pipe. Bounded: somebody outside may hold its other end."""
        with contextlib.suppress(OSError):
            for _ in range(64):
                data = os.read(self._log_pipe, CHUNK_BYTES)
                if not data:
                    return
                self._log.write(data)

    def _check_memory(self, memory: MemoryLimit) -> None:
        if over := memory.look():
            self._over_memory = over
            proctree.kill(self._tree)
            self._reap()

    def _set_free(self) -> None:
        """The daemon is gone and nobody else would continue what it had stopped or squeezed."""
        self._attend()
        adopted = self._adopted()
        for _ in range(2):  # again for what was forked in between
            family = proctree.family(os.getpid(), adopted)
            for thread in proctree.threads(family):
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(thread, self._cpus)
            self._continue(time.monotonic(), family)

    def _adopted(self) -> dict[int, int]:
        """Processes from elsewhere that belong to the job, and when they started."""
        with contextlib.suppress(OSError, ValueError), open(self._path("adopted")) as file:
            return {int(pid): int(start) for pid, start in map(str.split, file)}
        return {}

    def _record(self, failed: str = "", errno: int = 0, left: int = 0, behind: int = 0) -> None:
        """Write ``exit.json``, atomically and to the disk, into the room reserved for it."""
        status, times = self._status, os.times()
        code = "null" if status is None else str(os.waitstatus_to_exitcode(status))
        stopped = "true" if self._stopped else "false"
        text = (
            f'{{"code": {code}, "failed": "{failed}", "errno": {errno}, "stopped": {stopped}, '
            f'"over_memory": {self._over_memory}, "log_dropped": {self._log.dropped}, '
            f'"left": {left}, "behind": {behind}, "ran_s": {time.monotonic() - self._began:.3f}, '
            f'"cpu_s": {times.children_user + times.children_system:.2f}, '
            f'"ended": {time.time():.3f}}}'
        )
        fd = os.open(self._path("exit.tmp"), os.O_WRONLY | os.O_CLOEXEC)
        os.pwrite(fd, text.encode().ljust(RECORD_BYTES), 0)
        os.fsync(fd)
        os.close(fd)
        os.rename(self._path("exit.tmp"), self._path("exit.json"))
        directory = os.open(self._directory, os.O_RDONLY | os.O_CLOEXEC)
        os.fsync(directory)
        os.close(directory)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def main(arguments: list[str]) -> None:
    """Entry point; see the module's text for the arguments."""
    directory = arguments[0]
    lock_fd, spec_fd, ready_fd = (int(text) for text in arguments[1:])
    for fd in (lock_fd, spec_fd, ready_fd):
        os.set_inheritable(fd, False)  # they came through an exec; they go no further
    with open(spec_fd, "rb") as file:
        file.seek(0)
        spec = marshal.load(file)
    Shim(directory, spec, ready_fd).run()


if __name__ == "__main__":
    main(sys.argv[1:])
