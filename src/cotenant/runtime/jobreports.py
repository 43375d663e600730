"""What jobs say about their progress: the socket they report to, and the rate made of it."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec

from cotenant.domain.errors import EnvironmentProblem
from cotenant.report import MAX_CHECKPOINT_BYTES

MAX_MESSAGE_BYTES = 8192
MAX_METRICS = 64
MAX_NAME = 64
MAX_SOCKET_PATH_BYTES = 107
"""``sun_path`` has 108 bytes, its end included (unix(7))."""
BATCH = 64
MAX_WAITING = 1024
"""Messages that are read before a run is seen to its end, at most."""
Address = str | bytes
"""Of a sender, as ``recvfrom`` tells it; empty if it has none."""
PAUSE_S = 0.01
"""After a full batch the socket rests: a job that floods it costs some 2 % of a core and then
only fills its own queue."""


class Checkpoint(msgspec.Struct, frozen=True):
    """What a job says of a checkpoint that is complete: its path or URL, its step, and when it said
    so (wall-clock seconds since 1970)."""

    path: str
    step: float | None = None
    at: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether the path can be handed to the next run."""
        length = len(self.path.encode("utf-8", "replace"))
        return 0 < length <= MAX_CHECKPOINT_BYTES and self.path.isprintable()


class Report(msgspec.Struct, frozen=True):
    """One message of a job; see ``cotenant.report``. A metric of None was not finite. ``memory``:
    whoever sent it can be asked for memory (``cotenant.on_memory``), and it says nothing else."""

    job: str
    run: str
    step: float | None = None
    unit: str = "steps"
    metrics: dict[str, float | None] = {}
    memory: bool = False
    checkpoint: Checkpoint | None = None
    """The newest, in each message."""


class Progress:
    """Progress of one run and its rate over a sliding window. ``now`` is in seconds."""

    WINDOW_S = 60.0
    GRAIN_S = 0.25

    def __init__(self) -> None:
        self.value = 0.0
        self.unit = ""
        self.metrics: dict[str, float] = {}
        self.reported = False
        self._samples: collections.deque[tuple[float, float]] = collections.deque(maxlen=256)

    def note(self, now: float, report: Report) -> None:
        """Take a report in."""
        self.metrics.update(
            (name, float("nan") if value is None else value)
            for name, value in report.metrics.items()
            if name in self.metrics or len(self.metrics) < MAX_METRICS
        )
        if report.step is not None:
            if not self.reported or report.unit != self.unit:
                self._samples.clear()  # until now it was CPU seconds, or other units
            self.reported, self.unit = True, report.unit
            self._add(now, report.step)

    def note_cpu(self, now: float, seconds: float) -> None:
        """CPU seconds of the run so far: its progress as long as it reports none itself."""
        if not self.reported:
            self.unit = "cpu-s"
            self._add(now, seconds)

    def rate(self, now: float) -> float:
        """Units per second over the last minute; 0 until two values are known in it."""
        while self._samples and self._samples[0][0] < now - self.WINDOW_S:
            self._samples.popleft()
        if len(self._samples) < 2:
            return 0.0
        (t0, v0), (t1, v1) = self._samples[0], self._samples[-1]
        return (v1 - v0) / (t1 - t0) if t1 > t0 else 0.0

    def _add(self, now: float, value: float) -> None:
        if self._samples and value < self._samples[-1][1]:
            self._samples.clear()  # it went back to a checkpoint
        if len(self._samples) > 1 and now - self._samples[-2][0] < self.GRAIN_S:
            self._samples.pop()
        self._samples.append((now, value))
        self.value = value


class ReportSocket:
    """A Unix datagram socket that jobs report to.

    Counts what it cannot use (``invalid``): no JSON of the right shape, too many metrics, too
    long names. Whether job and run exist is the receiver's to say: it returns False if not.
    """

    def __init__(
        self, path: Path, receive: Callable[[Report, Address], bool], mode: int = 0o600
    ) -> None:
        self.path = path
        self._mode = mode
        self.invalid = 0
        self._receive = receive
        self._decoder = msgspec.json.Decoder(Report)
        self._socket: socket.socket | None = None
        self._resume: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Bind and listen on the running loop; a socket file left by a dead daemon is replaced.

        Raises ``EnvironmentProblem`` if the path is too long for a socket or cannot be bound.
        """
        length = len(os.fsencode(self.path))
        if length > MAX_SOCKET_PATH_BYTES:
            raise EnvironmentProblem(
                f"the path of the report socket {self.path} has {length} bytes, the system allows "
                f"{MAX_SOCKET_PATH_BYTES}; choose a state directory with a shorter path"
            )
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            sock.setblocking(False)
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
            sock.bind(str(self.path))
            self.path.chmod(self._mode)
        except OSError as error:
            sock.close()
            raise EnvironmentProblem(f"cannot listen on {self.path}: {error}") from error
        self._socket = sock
        self._listen()

    def close(self) -> None:
        """Stop listening and remove the socket file."""
        if self._resume is not None:
            self._resume.cancel()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
            self.path.unlink(missing_ok=True)

    def _listen(self) -> None:
        assert self._socket is not None
        self._resume = None
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._on_readable)

    def _on_readable(self) -> None:
        assert self._socket is not None
        if self._read(BATCH):
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket.fileno())
        self._resume = loop.call_later(PAUSE_S, self._listen)

    def drain(self) -> None:
        """Read what waits now: what a run said last, before it is seen to its end."""
        if self._socket is not None:
            self._read(MAX_WAITING)

    def _read(self, most: int) -> bool:
        """Take in so many messages at most; whether these were all."""
        assert self._socket is not None
        for _ in range(most):
            try:
                data, sender = self._socket.recvfrom(MAX_MESSAGE_BYTES + 1)
            except OSError:
                return True
            if not self._take(data, sender or b""):
                self.invalid += 1
        return False

    def send(self, message: bytes, address: Address) -> bool:
        """Answer who sent a report; whether that is still there and takes it."""
        if self._socket is None:
            return False
        try:
            self._socket.sendto(message, address)
        except OSError:
            return False
        return True

    def _take(self, data: bytes, sender: Address) -> bool:
        if len(data) > MAX_MESSAGE_BYTES:
            return False
        try:
            report = self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return False
        names = (report.unit, *report.metrics)
        if len(report.metrics) > MAX_METRICS or any(len(name) > MAX_NAME for name in names):
            return False
        if report.checkpoint is not None and not report.checkpoint.usable:
            return False
        return self._receive(report, sender)
