"""HTTP/2 by hand, for clients that keep no rule: bytes out, and a note of what came back."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import TracebackType

import numpy as np

from cotenant.serving import protos
from cotenant.serving.http2_frames import (
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    ErrorCode,
    Setting,
    frame,
    header_block,
    settings,
)

GOT: Counter[str] = Counter()
"""What this process's attacks did and were answered."""

SERVICE = b"/inference.GRPCInferenceService/"
CODES = {int(code): code.name for code in ErrorCode}


def head(path: bytes = SERVICE + b"ModelInfer", *more: tuple[bytes, bytes]) -> bytes:
    """The header block of a call; ``more`` headers come last."""
    return header_block(
        (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", path),
            (b":authority", b"x"),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
            *more,
        )
    )


def framed(message: bytes, packed: bool = False) -> bytes:
    """A message with gRPC's prefix."""
    return struct.pack(">BI", packed, len(message)) + message


def inference(rows: int = 1) -> bytes:
    """A good message for the campaign's model, framed."""
    request = protos.ModelInferRequest(model_name="small")
    request.inputs.add(name="x", datatype="FP32", shape=[rows, 64])
    request.raw_input_contents.append(np.zeros((rows, 64), np.float32).tobytes())
    return framed(request.SerializeToString())


def call(number: int, block: bytes, body: bytes) -> bytes:
    """A whole call in two frames."""
    return frame(HEADERS, END_HEADERS, number, block) + frame(DATA, END_STREAM, number, body)


class Peer:
    """A connection of an attack's. Unless ``reads`` is False a thread reads what comes, counts it,
    and keeps to the server's windows for ``upload``."""

    def __init__(
        self, port: int, until: float, ours: dict[Setting, int] | None = None, reads: bool = True
    ) -> None:
        self.until = until
        self.sock = socket.create_connection(("127.0.0.1", port), 5)
        self.sock.settimeout(max(0.1, until - time.monotonic()))
        self.over = threading.Event()
        self._windows = {0: 65_535}
        self._first = 65_535
        self._changed = threading.Condition()
        GOT["connections"] += 1
        self.send(PREFACE + settings(ours or {}))
        if reads:
            threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)
        GOT["sent_kB"] += len(data) // 1000

    def rest(self) -> None:
        """Wait until the attack or the connection is over."""
        self.over.wait(max(0.0, self.until - time.monotonic()))

    def upload(self, number: int, body: bytes, ends: bool = True) -> None:
        """A body within the windows, as far as time and connection last."""
        view = memoryview(body)
        while view and not self.over.is_set() and time.monotonic() < self.until:
            with self._changed:
                window = self._windows.setdefault(number, self._first)
                size = min(len(view), 16_384, window, self._windows[0])
                if size <= 0:
                    self._changed.wait(0.2)
                    continue
                self._windows[number] -= size
                self._windows[0] -= size
            last = ends and size == len(view)
            self.send(frame(DATA, END_STREAM if last else 0, number, bytes(view[:size])))
            view = view[size:]

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            for kind, flags, number, payload in self._frames():
                if kind == SETTINGS and not flags & 1:
                    self._apply(payload)
                elif kind == WINDOW_UPDATE:
                    with self._changed:
                        window = self._windows.setdefault(number, self._first)
                        self._windows[number] = window + int.from_bytes(payload, "big")
                        self._changed.notify_all()
                elif kind in (GOAWAY, RST_STREAM):
                    code = int.from_bytes(payload[4:8] if kind == GOAWAY else payload, "big")
                    what = "goaway" if kind == GOAWAY else "reset"
                    GOT[f"{what} {CODES.get(code, code)}"] += 1
                elif flags & END_STREAM and kind == HEADERS:
                    GOT["answers"] += 1
        self.over.set()

    def _apply(self, payload: bytes) -> None:
        for key, value in struct.iter_unpack(">HI", payload):
            if key == Setting.INITIAL_WINDOW_SIZE:
                with self._changed:
                    for number in self._windows:
                        if number:
                            self._windows[number] += value - self._first
                    self._first = value
                    self._changed.notify_all()

    def _frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        data = b""
        while more := self.sock.recv(2**20):
            data += more
            at = 0
            while len(data) - at >= 9:
                stop = at + 9 + int.from_bytes(data[at : at + 3], "big")
                if stop > len(data):
                    break
                number = int.from_bytes(data[at + 5 : at + 9], "big")
                yield data[at + 3], data[at + 4], number, data[at + 9 : stop]
                at = stop
            data = data[at:]


def repeatedly(port: int, seconds: float, attack: Callable[[Peer], None], **how: object) -> None:
    """Attack a connection, and another when it is closed, until the time is over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            with Peer(port, until, **how) as peer:  # type: ignore[arg-type]
                attack(peer)
                if peer.over.is_set():
                    GOT["closed"] += 1
        except OSError:
            GOT["closed"] += 1
            time.sleep(0.005)


def flood(
    port: int,
    seconds: float,
    make: Callable[[int], tuple[bytes, int]],
    setup: tuple[bytes, int] = (b"", 1),
    **how: object,
) -> None:
    """Send what ``make`` makes, over and over: from a stream's number to bytes and the next
    number. ``setup`` goes first."""

    def attack(peer: Peer) -> None:
        first, number = setup
        peer.send(first)
        while time.monotonic() < peer.until and number < 2**31 - 2**20:
            data, number = make(number)
            peer.send(data)

    repeatedly(port, seconds, attack, **how)
