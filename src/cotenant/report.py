"""``cotenant.report(...)``: how a job tells Cotenant how far it is. Optional, and never in the way.

Standard library only: a training script may import this in any environment. Each report is one
small datagram; nothing waits, nothing raises because of I/O, and outside Cotenant nothing happens.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

MAX_PER_SECOND = 20
MAX_METRICS = 64
MAX_NAME = 64
MAX_MESSAGE_BYTES = 8192
MAX_CHECKPOINT_BYTES = 1024
"""Of a checkpoint's path: it fits into a message whatever its characters are."""
LAST_WORD_S = 1.0
"""How long the end of the program waits at most to get word of a checkpoint out."""


class _Reporter:
    """Sends the newest state at most ``MAX_PER_SECOND`` times a second."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._sent = -math.inf
        self._step: float | None = None
        self._unit = "steps"
        self._metrics: dict[str, float | None] = {}
        self._checkpoint: dict[str, object] | None = None
        self._pending = False
        self._urgent = False
        """Whether what is kept has a checkpoint that nobody was told of."""

    def report(
        self, step: float | None, unit: str, checkpoint: str, metrics: dict[str, float]
    ) -> bool:
        path = os.environ.get("COTENANT_REPORT_SOCKET")
        # Not waiting for the lock: another thread is reporting at this moment, or this is a
        # signal handler that interrupted a report. The next call brings a newer state.
        if not path or not self._lock.acquire(blocking=False):
            return False
        try:
            self._keep(step, unit, metrics)
            if checkpoint:
                self._checkpoint = {"path": checkpoint, "step": self._step, "at": time.time()}
                self._urgent = True
            if not self._urgent and time.monotonic() - self._sent < 1 / MAX_PER_SECOND:
                return True
            return self._send(path)
        finally:
            self._lock.release()

    def flush(self) -> None:
        """Send what is still kept, whatever the rate; word of a checkpoint is tried again."""
        path = os.environ.get("COTENANT_REPORT_SOCKET")
        if path and self._lock.acquire(blocking=False):
            try:
                end = time.monotonic() + LAST_WORD_S
                while self._pending and not self._send(path):
                    if not self._urgent or time.monotonic() >= end:
                        break
                    time.sleep(0.02)
            finally:
                self._lock.release()

    def _keep(self, step: float | None, unit: str, metrics: dict[str, float]) -> None:
        if step is not None and math.isfinite(value := float(step)):
            self._step = value
        self._unit = str(unit)[:MAX_NAME]
        for full_name, number in metrics.items():
            name = full_name[:MAX_NAME]
            if name in self._metrics or len(self._metrics) < MAX_METRICS:
                value = float(number)
                # JSON has no NaN or infinity; a loss that diverged should still be seen.
                self._metrics[name] = value if math.isfinite(value) else None
        self._pending = True

    def _send(self, path: str) -> bool:
        import json  # not above: Cotenant's own processes import this file and never send
        import socket

        message: dict[str, object] = {
            "job": os.environ.get("COTENANT_JOB_ID", ""),
            "run": os.environ.get("COTENANT_JOB_RUN", ""),
            "step": self._step,
            "unit": self._unit,
            "metrics": self._metrics,
        }
        if self._checkpoint is not None:  # each time: a node that was killed did not read it
            message["checkpoint"] = self._checkpoint
        self._sent = time.monotonic()
        data = json.dumps(message).encode()
        if len(data) > MAX_MESSAGE_BYTES:
            data = json.dumps({**message, "metrics": {}}).encode()
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._socket.setblocking(False)
            self._socket.sendto(data, path)
        except OSError:
            # Cotenant is restarting or its queue is full: the state is kept for the next call.
            return False
        self._pending = self._urgent = False
        return True


def _place(checkpoint: str | os.PathLike[str]) -> str:
    """Where a checkpoint is, for whoever goes on with it: absolute, or a URL as it is."""
    text = os.fspath(checkpoint)
    if not isinstance(text, str):
        raise TypeError("checkpoint: a path or a URL as text, not bytes")
    if not text:
        raise ValueError("checkpoint: the path is empty")
    place = text if "://" in text else os.path.abspath(text)  # noqa: PTH100 - no pathlib here
    if not place.isprintable() or len(place.encode()) > MAX_CHECKPOINT_BYTES:
        raise ValueError(
            f"checkpoint: a path of printable characters, {MAX_CHECKPOINT_BYTES} bytes at most"
        )
    return place


_reporter = _Reporter()


def _after_fork() -> None:
    """A fresh reporter in a forked child: the old lock may have been held by another thread."""
    global _reporter  # noqa: PLW0603 - one per process is what this is about
    _reporter = _Reporter()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(lambda: _reporter.flush())  # noqa: PLW0108 - the one of then, not of now


def report(
    step: float | None = None,
    *,
    unit: str = "steps",
    checkpoint: str | os.PathLike[str] | None = None,
    **metrics: float,
) -> bool:
    """Tell Cotenant how far this job is; call it as often as you like.

    ``step`` is any number that grows with the work done, counted in ``unit``; ``metrics`` are
    numbers by name (64 at most), shown as they are. More than 20 calls a second keep only the
    newest state, which goes out with a later call or at the end of the program. Anything that
    ``float()`` takes will do, NumPy and torch scalars included (for a tensor on a GPU, ``float()``
    itself waits for the GPU).

    ``checkpoint`` is the path (or URL) of a checkpoint of ``step`` (else of the step reported
    last) that is complete: say so once it is written. It is sent at once. When the job is started
    again, the newest one is in its environment, as ``COTENANT_CHECKPOINT``.

    Returns whether the state was sent or is kept to be sent; False outside Cotenant. Never blocks
    and never raises because of I/O; raises ``TypeError`` or ``ValueError`` if a value is no
    number, or the path cannot be one. From a signal handler it may do nothing, where it interrupts
    another report: rather let the handler set a flag.
    """
    place = "" if checkpoint is None else _place(checkpoint)
    return _reporter.report(step, unit, place, metrics)
