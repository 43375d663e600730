"""What attacks over HTTP/1 are made of: one connection that is sent things for ever, or very many.

Each attack is ``function(port, seconds)``: it attacks loopback, opens a connection anew when it is
closed, and returns when the time is over.
"""

from __future__ import annotations

import contextlib
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


def get(path: bytes, more: bytes = b"") -> bytes:
    """A request without a body."""
    return b"GET " + path + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n" + more + b"\r\n"


def post(path: bytes, body: bytes, more: bytes = b"") -> bytes:
    """A request with one."""
    return line(path) + more + b"Content-Length: %d\r\n\r\n" % len(body) + body


def line(path: bytes) -> bytes:
    """How one with a body begins."""
    return b"POST " + path + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n"


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


def streams(start: bytes, then: bytes, pause_s: float = 0.0, read: bool = True) -> Attack:
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


def crowds(begun: bytes, then: bytes = b"") -> Attack:
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
