"""The clients of the demo: an open-loop generator, a process of its own.

Reads one JSON order from standard input and writes records (``RECORD``) to standard output:
first eight bytes, the monotonic time in ns from which arrivals count, then one record an answer.
Requests go out at their times whether or not earlier ones were answered, so a slow server cannot
slow the arrivals down, and latency counts from the time a request was due.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import socket
import struct
import sys
import time
from typing import Any

import numpy as np

PRIORITY = 30
"""Above server and workers where allowed: the clients of a real box are other machines."""
SPIN_S = 60e-6
FLUSH_NS = 100_000_000
DRAIN_NS = 2_000_000_000
MOST_CONNECTIONS = 256
CLASSES = 10

START = struct.Struct("<q")
RECORD = np.dtype(
    [
        ("index", "<i4"),
        ("status", "<i2"),
        ("predicted", "<i2"),
        ("version", "<i4"),
        ("latency_ms", "<f4"),
        ("lag_ms", "<f4"),
    ]
)
"""``status`` is HTTP's, -1 where the server hung up; ``lag_ms``: sent after it was due."""
_FORM = struct.Struct("<ihhiff")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_VERSION = re.compile(rb'"model_version":"(\d+)"')


class Connection:
    """One kept-alive connection and the response being read on it."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.index = -1
        self.lag_ms = 0.0
        self.buffer = b""

    def fileno(self) -> int:
        """For ``select``."""
        return self.sock.fileno()

    def read(self) -> tuple[int, bytes] | None:
        """(status, body) of a complete response, (-1, b"") if the server hung up, else None."""
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            return -1, b""
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not found or (length is not None and len(body) < int(length[1])):
            return None
        self.buffer = b""
        return int(head[9:12]), body


class Client:
    """Sends one stream of images. ``order``: see ``main``."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._port = order["port"]
        self._images = np.load(order["images"])
        self._picks = list(zip(order["stage"], order["digit"], strict=True))
        self._due = [round(due * 1e9) for due in order["due"]]
        self._head = _head(order["model"], order["port"], self._images[0, 0])
        self._idle = [Connection(self._port) for _ in range(order["connections"])]
        self._busy: set[Connection] = set()
        self._said: list[bytes] = []
        self._flushed = 0
        self._start = 0

    def run(self) -> None:
        """Send everything; wait for the last answers no longer than ``DRAIN_NS``."""
        self._start = time.monotonic_ns() + 20_000_000
        _write(START.pack(self._start))
        end = self._start + (self._due[-1] if self._due else 0) + DRAIN_NS
        position = 0
        while (now := time.monotonic_ns()) < end:
            if position == len(self._due) and not self._busy:
                break
            next_at = self._start + self._due[position] if position < len(self._due) else end
            if now >= next_at:
                self._send(position, now)
                position += 1
                continue
            self._wait(next_at - now)
            self._flush(FLUSH_NS)
        self._flush(0)

    def _wait(self, until_ns: int) -> None:
        """Take answers until shortly before the next request is due."""
        # select counts in microseconds; epoll in Python would round up to whole milliseconds.
        wait = min(max(0.0, until_ns / 1e9 - SPIN_S), 0.1)
        ready, _, _ = select.select(list(self._busy), [], [], wait)
        for connection in ready:
            self._receive(connection)

    def _send(self, index: int, now: int) -> None:
        if not self._idle and len(self._busy) >= MOST_CONNECTIONS:
            return  # counted as never answered
        connection = self._idle.pop() if self._idle else Connection(self._port)
        connection.index = index
        connection.lag_ms = (now - self._start - self._due[index]) / 1e6
        self._busy.add(connection)
        with contextlib.suppress(OSError):
            connection.sock.sendall(self._head + self._images[self._picks[index]].tobytes())

    def _receive(self, connection: Connection) -> None:
        answer = connection.read()
        if answer is None:
            return
        now = time.monotonic_ns()
        status, body = answer
        index = connection.index
        predicted, version = _parse(body) if status == 200 else (-1, 0)
        latency_ms = (now - self._start - self._due[index]) / 1e6
        record = (index, status, predicted, version, latency_ms, connection.lag_ms)
        self._said.append(_FORM.pack(*record))
        self._busy.discard(connection)
        if status > 0:
            self._idle.append(connection)
        else:
            connection.sock.close()

    def _flush(self, after_ns: int) -> None:
        now = time.monotonic_ns()
        if self._said and now - self._flushed >= after_ns:
            _write(b"".join(self._said))
            self._said.clear()
            self._flushed = now


def _head(model: str, port: int, image: Any) -> bytes:
    """All of a request but the image's bytes, which have the same length each time."""
    form = {
        "inputs": [
            {
                "name": "image",
                "datatype": "FP32",
                "shape": [1, *image.shape],
                "parameters": {"binary_data_size": image.nbytes},
            }
        ],
        "outputs": [{"name": "scores", "parameters": {"binary_data": True}}],
    }
    text = json.dumps(form).encode()
    return (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        "Content-Type: application/octet-stream\r\n"
        f"Inference-Header-Content-Length: {len(text)}\r\n"
        f"Content-Length: {len(text) + image.nbytes}\r\n\r\n"
    ).encode() + text


def _parse(body: bytes) -> tuple[int, int]:
    """The class with the highest score, and the version that answered."""
    scores = np.frombuffer(body[-4 * CLASSES :], np.float32)
    version = _VERSION.search(body)
    return int(scores.argmax()), int(version[1]) if version else 0


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def main() -> None:
    """One order in: port, model, images (.npy of stages, digits, 1, height, width), due
    (seconds), stage and digit of each request, core (or null), connections."""
    order = json.load(sys.stdin)
    if order["core"] is not None:
        os.sched_setaffinity(0, {order["core"]})
    client = Client(order)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))
    client.run()


if __name__ == "__main__":
    main()
