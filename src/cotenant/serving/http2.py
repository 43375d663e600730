"""An HTTP/2 server without TLS (RFC 9113, prior knowledge): as much of it as gRPC needs.

``http2_connection`` reads frames and hands each stream's data to a ``Receiver``, ``http2_sending``
has the ``Stream`` by which it is answered, ``http2_credit`` counts what a client's frames cost,
``http2_leaving`` ends a connection, and ``http2_limits`` lists every limit. This is the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Generic

from cotenant.serving.http2_application import Application
from cotenant.serving.http2_connection import Connection
from cotenant.serving.http2_headers import Head
from cotenant.serving.http2_limits import CONNECTIONS, HEAD_S, IDLE_S
from cotenant.serving.intake import Budget, Share
from cotenant.serving.listening import UNREAD_S, Listener
from cotenant.serving.overdue import Overdue


class Server(Generic[Head]):
    """Listens, and knows its connections: at most ``connections`` at one time.

    One more takes the place of one that has not been answered anything yet, the oldest, or else
    of the one whose last answer is longest ago.
    """

    def __init__(
        self, app: Application[Head], budget: Budget, connections: int = CONNECTIONS
    ) -> None:
        self.app = app
        self.incomplete = Overdue(HEAD_S)
        self.unread = Overdue(UNREAD_S)
        self._budget = budget
        self._most = connections
        self._idle_timer: asyncio.TimerHandle | None = None
        self._new: dict[Connection[Head], None] = {}
        """Connections without an answer so far, the oldest first."""
        self._known: dict[Connection[Head], None] = {}
        """The others, the one whose last answer is longest ago first."""
        self._listener: Listener | None = None
        self._empty = asyncio.Event()

    def start(self, sock: socket.socket) -> None:
        """Listen on a bound socket, which is this server's from now on."""
        self._listener = Listener(sock, lambda: Connection(self))
        self._look_for_idle()

    @property
    def connections(self) -> list[Connection[Head]]:
        """All that are open."""
        return [*self._new, *self._known]

    def share(self) -> Share:
        """See ``Host``."""
        return Share(self._budget)

    def admit(self, connection: Connection[Head]) -> None:
        """See ``Host``."""
        if len(self._new) + len(self._known) >= self._most:
            oldest = next(iter(self._new or self._known))
            self.discard(oldest)
            oldest.give_way()
        self._new[connection] = None

    def answered(self, connection: Connection[Head]) -> None:
        """See ``Host``."""
        if connection in self._known:
            del self._known[connection]
        else:
            self._new.pop(connection, None)
        self._known[connection] = None
        connection.is_idle = False

    def discard(self, connection: Connection[Head]) -> None:
        """See ``Host``."""
        self._new.pop(connection, None)
        self._known.pop(connection, None)
        if not (self._new or self._known):
            self._empty.set()

    def _look_for_idle(self) -> None:
        """Tell those to go that have had no request since the last look."""
        for connection in self.connections:
            if connection.is_idle and not connection.requests:
                connection.drain()
            connection.is_idle = True
        loop = asyncio.get_running_loop()
        self._idle_timer = loop.call_later(IDLE_S, self._look_for_idle)

    async def drain(self, grace: float) -> None:
        """Stop listening and tell clients to go; returns when they have, or after ``grace`` s."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        for connection in self.connections:
            connection.drain()
        await self._gone(grace)

    async def close(self) -> None:
        """End every connection; each has a second to take up what was written to it."""
        await self._gone(1.0)
        for connection in self.connections:
            connection.abort()

    async def _gone(self, within_s: float) -> None:
        self._empty.clear()
        if self.connections:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), within_s)
