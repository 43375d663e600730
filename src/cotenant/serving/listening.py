"""Sockets that front ends listen on."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable

from cotenant.domain.errors import EnvironmentProblem

log = logging.getLogger("cotenant.serving")

BACKLOG = 2048
_ACCEPTED = 4
"""Connections accepted in one turn of the loop."""
_FULL_S = 1.0
HANDSHAKE_S = 10.0
"""Seconds within which a TLS handshake is done."""
HANDSHAKES = 128
"""Handshakes under way at one time; for one more, the oldest gives way."""
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


class Listener:
    """Accepts connections, a few in each turn of the loop: the loop's own server takes all that
    are waiting, and whoever opens more all the time would hold it for as long.

    ``tls`` gives the context for each connection; without it there is no TLS. Handshakes are
    bounded in time and number."""

    def __init__(
        self,
        sock: socket.socket,
        protocol: Callable[[], asyncio.Protocol],
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self._sock = sock
        self._protocol = protocol
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._opening: dict[asyncio.Task[None], None] = {}
        """The oldest first."""
        self._pause: asyncio.TimerHandle | None = None
        sock.listen(BACKLOG)
        self._watch()

    def _watch(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTED):
            try:
                connection, _ = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as exc:  # no more files, or no memory for one
                log.warning("cannot accept connections: %s", exc.strerror)
                self._loop.remove_reader(self._sock)
                self._pause = self._loop.call_later(_FULL_S, self._watch)
                return
            if self._tls is not None and len(self._opening) >= HANDSHAKES:
                next(iter(self._opening)).cancel()
            opening = self._loop.create_task(self._open(connection))
            self._opening[opening] = None
            opening.add_done_callback(self._opened)

    async def _open(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is None:
                await self._loop.connect_accepted_socket(self._protocol, connection)
            else:
                await self._loop.connect_accepted_socket(
                    self._protocol,
                    connection,
                    ssl=self._tls(),
                    ssl_handshake_timeout=HANDSHAKE_S,
                    ssl_shutdown_timeout=HANDSHAKE_S,
                )
        except OSError:  # it is gone already, or speaks no TLS that we know
            connection.close()
        except asyncio.CancelledError:  # it took too long over its handshake
            connection.close()
            raise

    def _opened(self, opening: asyncio.Task[None]) -> None:
        self._opening.pop(opening, None)

    def close(self) -> None:
        """Accept no more."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()
        if self._tls is not None:
            for opening in tuple(self._opening):
                opening.cancel()
