"""Attacks over HTTP/1, for a node that serves the quickstart's ``digits``.

``ATTACKS`` maps a name to ``function(port, seconds)``, which attacks one loopback connection,
opens it anew when it is closed, and returns when the time is over. ``idle connections`` and
``slow heads`` need many connections, so they open up to ``CONNECTIONS`` and keep them.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import repeat

Attack = Callable[[int, float], None]

CONNECTIONS = 5000
"""More than a server takes; as many file descriptors as the process may have are enough."""
_PAUSE_S = 0.01
_TRIES_S = 5.0

_LINE = b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\n"
_BODY = json.dumps(
    {"inputs": [{"name": "image", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}]}
).encode()
_CHUNKED = _LINE + b"Transfer-Encoding: chunked\r\n\r\n"
_LAST_CHUNK = _CHUNKED + b"%x\r\n%b\r\n0\r\n" % (len(_BODY), _BODY)


def _post(body: bytes, more: bytes = b"") -> bytes:
    return _LINE + more + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _get(path: bytes) -> bytes:
    return b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n"


def _numbers(count: int) -> bytes:
    start = b'{"inputs":[{"name":"image","shape":[1,%d],"datatype":"FP32","data":[' % count
    return start + b"1," * (count - 1) + b"1]}]}"


def _open(port: int, end: float) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=_TRIES_S)
    sock.settimeout(max(0.05, end - time.monotonic()))
    return sock


def _read_all(sock: socket.socket) -> None:
    with contextlib.suppress(OSError, ValueError):
        while sock.recv(2**18):
            pass


def _send_all(port: int, end: float, pieces: Iterator[bytes], read: bool) -> None:
    """One connection, until it is closed or the time is over."""
    with _open(port, end) as sock:
        reader = threading.Thread(target=_read_all, args=(sock,), daemon=True)
        if read:
            reader.start()
        try:
            for piece in pieces:
                if time.monotonic() > end:
                    break
                sock.sendall(piece)
        finally:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            if read:
                reader.join(1.0)


def _streams(start: bytes, then: bytes, pause_s: float = 0.0, read: bool = True) -> Attack:
    """An attack that sends ``start`` and then, for ever, ``then``."""

    def pieces() -> Iterator[bytes]:
        yield start
        for piece in repeat(then):
            yield piece
            if pause_s:
                time.sleep(pause_s)

    def attack(port: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                _send_all(port, end, pieces(), read)
            time.sleep(_PAUSE_S)

    return attack


def _crowds(begun: bytes, then: bytes = b"") -> Attack:
    """An attack of connections that send ``begun``, and ``then`` once a second."""

    def attack(port: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        held: list[socket.socket] = []
        try:
            while time.monotonic() < end:
                with contextlib.suppress(OSError):  # ours to have, or the server's to give
                    while len(held) < CONNECTIONS and time.monotonic() < end:
                        held.append(_open(port, end))
                        held[-1].sendall(begun)
                held = [sock for sock in held if _goes_on(sock, then)]
                time.sleep(min(1.0, max(0.0, end - time.monotonic())))
        finally:
            for sock in held:
                sock.close()

    return attack


def _goes_on(sock: socket.socket, then: bytes) -> bool:
    """Whether a connection is open still, after one more ``then``."""
    try:
        sock.setblocking(False)
        if then:
            sock.send(then)
        if sock.recv(1024):
            return True
    except BlockingIOError:
        return True
    except OSError:
        pass
    sock.close()
    return False


ATTACKS: dict[str, Attack] = {
    "trailers": _streams(_LAST_CHUNK, b"".join(b"X%d: vvvvvvvvvv\r\n" % n for n in range(20000))),
    "one endless trailer": _streams(_LAST_CHUNK + b"X: ", b"v" * 10**6),
    "chunk extensions": _streams(_CHUNKED + b"1;", b"v" * 10**6),
    "chunks with extensions": _streams(_CHUNKED, (b"1;" + b"v" * 100 + b"\r\nx\r\n") * 5000),
    "chunks of one byte": _streams(_CHUNKED, b"1\r\nx\r\n" * 50000),
    "chunks of six bytes": _streams(_CHUNKED, b"6\r\nxxxxxx\r\n" * 30000),
    "a body that nobody asked for": _streams(
        b"GET /v2 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"10000\r\n" + b"x" * 65536 + b"\r\n",
    ),
    "pipelined inferences": _streams(b"", _post(_BODY) * 500),
    "pipelined inferences, unread": _streams(b"", _post(_BODY) * 500, read=False),
    "pipelined GETs": _streams(b"", _get(b"/v2") * 5000),
    "pipelined GETs, unread": _streams(b"", _get(b"/metrics") * 5000, read=False),
    "pipelined 404s": _streams(b"", _get(b"/x") * 5000),
    "pipelined indexes": _streams(b"", _get(b"/v2/repository/index") * 5000),
    "pipelined statistics": _streams(b"", _get(b"/v2/models/stats") * 5000),
    "pipelined loads of nothing": _streams(
        b"", b"POST /v2/repository/models/x/load HTTP/1.1\r\nHost: x\r\n\r\n" * 3000
    ),
    "pipelined loads": _streams(
        b"", b"POST /v2/repository/models/digits/load HTTP/1.1\r\nHost: x\r\n\r\n" * 3000
    ),
    "refused inferences": _streams(b"", _post(b"{") * 3000),
    "inferences of nothing": _streams(b"", _post(_BODY).replace(b"digits", b"nobody") * 500),
    "empty lines": _streams(b"", b"\r\n" * 100000),
    "numbers": _streams(b"", _post(_numbers(4 * 10**6))),
    "numbers that just fit on the loop": _streams(b"", _post(_numbers(32000))),
    "nested lists": _streams(b"", _post(b'{"inputs":' + b"[" * 60000)),
    "many inputs": _streams(
        b"", _post(b'{"inputs":[' + b'{"name":"x","datatype":"FP32","shape":[1]},' * 1400 + b"{}]}")
    ),
    "a gzip bomb of blanks": _streams(
        b"", _post(gzip.compress(b" " * (64 * 2**20 - 10)), b"Content-Encoding: gzip\r\n")
    ),
    "a gzip bomb of numbers": _streams(
        b"", _post(gzip.compress(_numbers(4 * 10**6)), b"Content-Encoding: gzip\r\n")
    ),
    "a gzip bomb beside JSON": _streams(
        b"",
        _post(
            gzip.compress(_BODY + bytes(63 * 2**20)),
            b"Content-Encoding: gzip\r\nInference-Header-Content-Length: %d\r\n" % len(_BODY),
        ),
    ),
    "idle connections": _crowds(b""),
    "connections idle after a request": _crowds(_post(_BODY)),
    "slow heads": _crowds(_LINE, b"X: a\r\n"),
    "slow bodies": _crowds(_LINE + b"Content-Length: 100000\r\n\r\n", b" "),
    "one slow head": _streams(_LINE, b"X: a\r\n", pause_s=0.2),
    "one slow body": _streams(_LINE + b"Content-Length: 100000\r\n\r\n", b" ", pause_s=0.2),
    "endless heads": _streams(_LINE, b"X: a\r\n" * 20000),
    "one endless header": _streams(_LINE + b"X: ", b"a" * 10**6),
    "an endless URL": _streams(b"GET /", b"a" * 10**6),
    "no HTTP": _streams(b"", bytes(range(256)) * 400),
}
