"""Sockets that front ends listen on."""

from __future__ import annotations

import socket

from cotenant.domain.errors import EnvironmentProblem

BACKLOG = 2048
UNREAD_S = 60
"""Seconds after which a client that takes up nothing of its answers is given up."""


def bind(host: str, port: int, what: str) -> socket.socket:
    """A bound TCP socket; ``what`` is to be served on it. Raises EnvironmentProblem."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
    except OSError as exc:
        raise EnvironmentProblem(
            f"cannot resolve {host} for {what}: {exc.strerror or exc}"
        ) from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Inherited by accepted connections: one that does not read its answer is ended, and
        # one whose client has vanished is noticed.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_S * 1000)
        sock.bind(address)
        sock.setblocking(False)
    except OSError as exc:
        sock.close()
        raise EnvironmentProblem(
            f"cannot listen for {what} on {host}:{port}: {exc.strerror};"
            " stop the program that holds the port or choose another"
        ) from None
    return sock
