"""The HTTP server: uvicorn embedded in the node's running loop, with TLS where it is asked for.

What one connection may do is bounded in ``http_connection``, what all may have in ``http_crowd``,
bodies in ``bodies``, and an answer that nobody acknowledges by TCP's own user time-out.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Generator
from functools import partial

import uvicorn

from cotenant.domain.port import Refused
from cotenant.domain.request import Refusal
from cotenant.serving.bodies import Receive, Scope, Send, answer_unread, respond_unread
from cotenant.serving.http_answers import Application
from cotenant.serving.http_connection import Connection
from cotenant.serving.http_crowd import Crowd
from cotenant.serving.listening import BACKLOG, Listener, bind
from cotenant.serving.refusals import AWAY, refusal_headers
from cotenant.serving.rest_openai import is_openai
from cotenant.serving.rest_openai import refusal as openai_refusal


class HttpFront:
    """Serves an application on one address.

    ``connections`` is the most that are open at one time (see ``http_crowd`` for who gives way);
    where all are at work, one more is answered 503. ``tls`` gives the context for each connection.
    """

    def __init__(
        self,
        app: Application,
        host: str,
        port: int,
        connections: int = 4096,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self._app = app
        self._host = host
        self._port = port
        self._tls = tls
        self.crowd = Crowd(connections)
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen and serve; returns the port (useful where 0 was asked for).

        Raises EnvironmentProblem if the address cannot be bound.
        """
        sock = bind(self._host, self._port, "HTTP")
        config = uvicorn.Config(
            self._app,
            loop="none",
            http=partial(Connection, self.crowd, _Full(self.crowd.most)),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="critical",  # our failures are logged in rest; clients' are theirs
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
        )
        self._server = server = _Server(config, self._tls)
        self._task = asyncio.create_task(server.serve(sockets=[sock]), name="cotenant-http")
        listening = asyncio.create_task(server.listening.wait())
        try:
            await asyncio.wait({self._task, listening}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            listening.cancel()
        if self._task.done():
            self._task.result()
        port: int = sock.getsockname()[1]
        return port

    async def stop(self, grace: float) -> None:
        """Stop listening, let requests in flight finish for ``grace`` seconds, then end them."""
        server, task = self._server, self._task
        if server is None or task is None:
            return
        self._server = self._task = None
        server.config.timeout_graceful_shutdown = grace  # type: ignore[assignment]
        server.should_exit = True
        await task
        # Those that were told to end need one turn of the loop to answer.
        pending = list(server.server_state.tasks)
        if pending:
            await asyncio.wait(pending, timeout=1.0)
        for connection in list(server.server_state.connections):
            if isinstance(connection, Connection):
                connection.stop_exchange()
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it listens and leaves the process's signals alone. With
    TLS our own ``Listener`` accepts for it: to uvicorn handshakes have no bounds of ours."""

    def __init__(
        self, config: uvicorn.Config, tls: Callable[[], ssl.SSLContext] | None = None
    ) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self._tls = tls
        self._listener: Listener | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._tls is None:
            await super().startup(sockets)
        else:
            await self.lifespan.startup()
            assert sockets is not None
            self.servers = []
            self._listener = Listener(sockets[0], self._connection, self._tls)
            self.started = True
        self.listening.set()

    def _connection(self) -> asyncio.Protocol:
        make: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        return make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._listener is not None:
            self._listener.close()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class _Full:
    """What a connection beyond the most gets instead of the application."""

    def __init__(self, most: int) -> None:
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, and close."""
        said = (
            f"the server has {self._most} connections, as many as it takes; keep fewer open, or"
            " try again later"
        )
        if is_openai(scope["path"]):
            full = Refused(Refusal.UNAVAILABLE, AWAY, said)
            await answer_unread(send, receive, openai_refusal(full))
            return
        refused = Refused(Refusal.UNAVAILABLE, AWAY, "")
        await respond_unread(send, receive, 503, said, refusal_headers(refused))

    def whole(self, *_: object, **__: object) -> bool:
        """Never: the connection is to be closed."""
        return False
