"""One worker process as the node sees it: start, talk, watch, end.

Messages are sent and received on the node's loop without blocking; the end of the process is
noticed through its pidfd.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from cotenant.domain.device import Launch
from cotenant.domain.errors import EnvironmentProblem
from cotenant.runtime.arena import Arena
from cotenant.runtime.messages import FromWorker, ToWorker, frame, unframe
from cotenant.runtime.rlimits import limit

log = logging.getLogger("cotenant.worker")
_decoder = msgspec.msgpack.Decoder(FromWorker)
_READ = 1 << 18


class WorkerProcess:
    """``start`` spawns the process; ``on_message`` and ``on_exit(returncode)`` are called on the
    loop. ``kill`` is safe at any time; ``on_exit`` comes exactly once after ``start``."""

    def __init__(
        self,
        name: str,
        arena: Arena,
        log_path: Path,
        on_message: Callable[[FromWorker], None],
        on_exit: Callable[[int], None],
    ) -> None:
        self.name = name
        self._arena = arena
        self._log_path = log_path
        self._on_message = on_message
        self._on_exit = on_exit
        self._buffer = bytearray()
        self._backlog = bytearray()
        self._popen: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._pidfd = -1
        self._loop = asyncio.get_running_loop()

    @property
    def pid(self) -> int:
        """Process id; 0 before ``start``."""
        return self._popen.pid if self._popen is not None else 0

    def start(self, launch: Launch) -> None:
        """Spawn with what the device wants. Must run on the loop's thread: the worker dies with
        the thread that made it. Raises EnvironmentProblem."""
        ours, theirs = socket.socketpair()
        try:
            with self._log_path.open("ab") as output:
                self._popen = subprocess.Popen(
                    [
                        sys.executable,
                        "-P",  # whatever lies in the working directory is not ours to import
                        "-m",
                        "cotenant.runtime.worker",
                        str(theirs.fileno()),
                        str(self._arena.fd),
                    ],
                    pass_fds=(theirs.fileno(), self._arena.fd),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=launch.applied({**os.environ, **launch.env}),
                )
            # Now, while it is only an interpreter that starts: what would set them between fork
            # and exec may hang, since other threads of the node hold locks.
            limit(launch.limits, self._popen.pid)
        except (OSError, ValueError) as error:
            ours.close()
            if self._popen is not None:
                self._popen.kill()
                self._popen.wait()
            raise EnvironmentProblem(f"cannot start a worker: {error}") from error
        finally:
            theirs.close()
        ours.setblocking(False)
        self._sock = ours
        self._pidfd = os.pidfd_open(self._popen.pid)
        self._loop.add_reader(ours.fileno(), self._readable)
        self._loop.add_reader(self._pidfd, self._exited)

    def send(self, message: ToWorker) -> None:
        """Send a message; if the socket is full the rest follows when it drains."""
        data = frame(message)
        if self._sock is None:
            return  # gone: on_exit is on its way or was there
        if self._backlog:
            self._backlog += data
            return
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # as above
        if sent < len(data):
            self._backlog += data[sent:]
            self._loop.add_writer(self._sock.fileno(), self._writable)

    def kill(self) -> None:
        """End it at once."""
        if self._popen is not None and self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Tell it to end by closing its socket; ``kill`` if it does not."""
        self._close_socket()

    def _writable(self) -> None:
        assert self._sock is not None
        try:
            sent = self._sock.send(self._backlog)
        except BlockingIOError:
            return
        except OSError:
            sent = len(self._backlog)
        del self._backlog[:sent]
        if not self._backlog:
            self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        if self._sock is None:
            return
        try:
            data = self._sock.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close_socket()
            return
        self._buffer += data
        for body in unframe(self._buffer):
            self._on_message(_decoder.decode(body))

    def _close_socket(self) -> None:
        if self._sock is not None:
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()
            self._sock = None

    def _exited(self) -> None:
        assert self._popen is not None
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        code = self._popen.wait()
        # What it still said before it ended counts.
        while self._sock is not None:
            before = len(self._buffer)
            self._readable()
            if len(self._buffer) == before:
                break
        self._close_socket()
        log.info("worker ended", extra={"worker": self.name, "code": code})
        self._on_exit(code)
