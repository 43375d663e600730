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


class _Reporter:
    """Sends the newest state at most ``MAX_PER_SECOND`` times a second."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._sent = -math.inf
        self._step: float | None = None
        self._unit = "steps"
        self._metrics: dict[str, float | None] = {}
        self._pending = False

    def report(self, step: float | None, unit: str, metrics: dict[str, float]) -> bool:
        path = os.environ.get("COTENANT_REPORT_SOCKET")
        # Not waiting for the lock: another thread is reporting at this moment, or this is a
        # signal handler that interrupted a report. The next call brings a newer state.
        if not path or not self._lock.acquire(blocking=False):
            return False
        try:
            self._keep(step, unit, metrics)
            if time.monotonic() - self._sent < 1 / MAX_PER_SECOND:
                return True
            return self._send(path)
        finally:
            self._lock.release()

    def flush(self) -> None:
        """Send what is still kept, whatever the rate."""
        path = os.environ.get("COTENANT_REPORT_SOCKET")
        if path and self._lock.acquire(blocking=False):
            try:
                if self._pending:
                    self._send(path)
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

        message = {
            "job": os.environ.get("COTENANT_JOB_ID", ""),
            "run": os.environ.get("COTENANT_JOB_RUN", ""),
            "step": self._step,
            "unit": self._unit,
            "metrics": self._metrics,
        }
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
        self._pending = False
        return True


_reporter = _Reporter()


def _after_fork() -> None:
    """A fresh reporter in a forked child: the old lock may have been held by another thread."""
    global _reporter  # noqa: PLW0603 - one per process is what this is about
    _reporter = _Reporter()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(lambda: _reporter.flush())  # noqa: PLW0108 - the one of then, not of now


def report(step: float | None = None, *, unit: str = "steps", **metrics: float) -> bool:
    """Tell Cotenant how far this job is; call it as often as you like.

    ``step`` is any number that grows with the work done, counted in ``unit``; ``metrics`` are
    numbers by name (64 at most), shown as they are. More than 20 calls a second keep only the
    newest state, which goes out with a later call or at the end of the program. Anything that
    ``float()`` takes will do, NumPy and torch scalars included (for a tensor on a GPU, ``float()``
    itself waits for the GPU).

    Returns whether the state was sent or is kept to be sent; False outside Cotenant. Never blocks
    and never raises because of I/O; raises ``TypeError`` or ``ValueError`` if a value is no
    number.
    """
    return _reporter.report(step, unit, metrics)
