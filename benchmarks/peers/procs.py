"""Start a server in a session of its own, wait until it answers, read its CPU time, end it.

Every process a server starts stays in its session, or descends from it; both are looked up in
``/proc``, so CPU time covers worker processes and nothing is left behind after `Server.stop`.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_INTERRUPTS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class CannotStart(Exception):
    """The server ended or did not answer in time; the message says why."""


@dataclass(frozen=True)
class Launch:
    """How one server is started. `ready` is the path that answers 200 once it serves."""

    argv: Sequence[str]
    env: Mapping[str, str]
    ready: str
    http_port: int
    grpc_port: int | None = None


@dataclass(frozen=True)
class _Stat:
    pid: int
    parent: int
    session: int
    cpu_ticks: int
    start_ticks: int
    state: str


class Server:
    """One started server: ``with Server(launch, folder) as server``."""

    def __init__(self, launch: Launch, folder: Path) -> None:
        self._launch = launch
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        with (self._folder / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                self._launch.argv,
                cwd=self._folder,
                env=os.environ | self._launch.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def wait_ready(self, timeout_s: float) -> None:
        """Poll the ready path; raise `CannotStart` with the end of the log if it never is 200."""
        assert self._process is not None
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if (code := self._process.poll()) is not None:
                raise CannotStart(f"ended with code {code}: {self._log_tail()}")
            if _answers(self._launch.http_port, self._launch.ready):
                return
            time.sleep(0.1)
        raise CannotStart(f"not ready after {timeout_s:.0f} s: {self._log_tail()}")

    def cpu_s(self) -> float:
        """CPU seconds used so far by every living process of the server."""
        return sum(stat.cpu_ticks for stat in self._tree()) / _TICKS_PER_S

    def stop(self, grace_s: float = 8.0) -> None:
        """End every process of the server: SIGTERM to its leader, SIGKILL to what is left.

        A second interrupt waits until this is done.
        """
        if self._process is None:
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
        try:
            self._end(self._process, grace_s)
            self._process = None
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPTS)

    def _end(self, process: subprocess.Popen[bytes], grace_s: float) -> None:
        tree = {(stat.pid, stat.start_ticks) for stat in self._tree()}
        if process.poll() is None:
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
        _wait_until(lambda: not self._left(tree), 1.0)
        for pid in self._left(tree):
            _kill(pid)
        process.wait()
        for pid, _ in tree:
            _reap(pid)

    def _left(self, tree: set[tuple[int, int]]) -> list[int]:
        """Living processes of the session, and of `tree` wherever they were re-parented."""
        assert self._process is not None
        return [
            stat.pid
            for stat in _all_stats()
            if stat.state != "Z"
            and (stat.session == self._process.pid or (stat.pid, stat.start_ticks) in tree)
        ]

    def _tree(self) -> list[_Stat]:
        assert self._process is not None
        stats = _all_stats()
        members = {stat.pid for stat in stats if stat.session == self._process.pid}
        members.add(self._process.pid)
        grew = True
        while grew:
            grown = members | {stat.pid for stat in stats if stat.parent in members}
            grew, members = grown != members, grown
        return [stat for stat in stats if stat.pid in members]

    def _log_tail(self) -> str:
        text = (self._folder / "server.log").read_text(errors="replace").strip()
        last = [line.strip()[:200] for line in text.splitlines() if line.strip()][-3:]
        return " | ".join(last) or "it wrote nothing"


def adopt_orphans() -> None:
    """Make this process the parent of servers' processes that outlive theirs (prctl(2))."""
    set_child_subreaper = 36
    ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def end_children() -> None:
    """Kill whatever this process still has as a child: nothing, unless a start was interrupted."""
    for stat in _all_stats():
        if stat.parent == os.getpid():
            _kill(stat.pid)
            _reap(stat.pid)


def machine_cpu_s() -> float:
    """CPU seconds the whole machine spent since boot on anything but idling, stolen time too."""
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = (
        int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_S


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _all_stats() -> list[_Stat]:
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return [stat for pid in pids if (stat := _read_stat(pid)) is not None]


def _read_stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command name is in parentheses and may hold spaces; what follows is fixed (proc(5)).
    rest = text[text.rindex(")") + 2 :].split()
    return _Stat(
        pid=pid,
        state=rest[0],
        parent=int(rest[1]),
        session=int(rest[3]),
        cpu_ticks=int(rest[11]) + int(rest[12]),
        start_ticks=int(rest[19]),
    )


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _reap(pid: int) -> None:
    """Collect an adopted process that has ended, so that it does not stay as a zombie."""
    with contextlib.suppress(ChildProcessError):
        for _ in range(20):
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
            time.sleep(0.05)


def _wait_until(done: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not done() and time.monotonic() < deadline:
        time.sleep(0.05)
