"""The HTTP server: uvicorn embedded in the node's running loop.

uvicorn's protocol gives a client for ever to send its headers and lets them grow without
bound; ``_Protocol`` bounds both. Bodies are bounded by ``cotenant.serving.bodies``, and an answer
that a client does not read by TCP's own user time-out.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any, Protocol

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from cotenant.domain.port import Refused
from cotenant.domain.request import Refusal
from cotenant.serving.bodies import (
    STOPPING,
    WHOLE_ANSWER,
    Exchange,
    Header,
    Receive,
    Scope,
    Send,
    refusal_answer,
    respond_unread,
)
from cotenant.serving.listening import BACKLOG, bind
from cotenant.serving.refusals import AWAY, refusal_headers

KEEP_ALIVE_S = 75
HEADER_TIMEOUT_S = 30.0
HEADER_BYTES = 64 * 1024
READ_AHEAD_BYTES = 2**20
"""Body bytes of one connection read before the application asks for them."""
_READ_ON_S = 0.05


class Application(Protocol):
    """An ASGI application that is offered each request that arrives whole first."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry."""

    def whole(
        self, method: bytes, url: bytes, headers: Iterable[Header], body: bytes, exchange: Exchange
    ) -> bool:
        """See to a request and answer it through ``exchange``, now or later, or return False."""


class HttpFront:
    """Serves an application on one address.

    ``connections`` is the most that are served at one time; one more is answered 503.
    """

    def __init__(self, app: Application, host: str, port: int, connections: int = 4096) -> None:
        self._app = app
        self._host = host
        self._port = port
        self._connections = connections
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
            http=_Protocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="critical",  # our failures are logged in rest; clients' are theirs
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            limit_concurrency=self._connections,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        self._server = server = _Server(config)
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
            if isinstance(connection, _Protocol):
                connection.stop_exchange()
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it listens and leaves the process's signals alone."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class _Protocol(HttpToolsProtocol):
    """One connection, with bounds on the time and size of a request's headers.

    A request that arrives in one piece while none is under way is offered to the application as a
    whole. Such are most inferences, and uvicorn's cycle for ASGI (a task, an event, a dictionary
    for each message) would cost more than decoding them. All others take that way.
    """

    app: Application
    cycle: Any
    """The request under way, or the last: uvicorn's cycle, an ``_Exchange`` or None."""
    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _in_head = True
    _parts: list[bytes] | None = None
    """The body of a request that may turn out to be here entirely."""
    _exchange: _Exchange | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # uvicorn would refuse the next request of every connection once there are too many.
        self._most, self.limit_concurrency = self.limit_concurrency, None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._most is not None and len(self.connections) > self._most:
            self.app = _Full(self._most)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        exchange = self._exchange
        try:
            if exchange is not None:
                withdraw = exchange.withdraw
                exchange.forget()
                withdraw()
        finally:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():  # what came was not HTTP
            self._parts = None
        elif self._parts is not None:
            try:
                self._leave_to_asgi()
            except (httptools.HttpParserError, UnicodeDecodeError):  # the URL is looked at now
                self.send_400_response("Invalid HTTP request received.")
        if self._in_head:
            self._await_head()
            if self._head_bytes > HEADER_BYTES and not self.transport.is_closing():
                self._in_head = False
                self._stop_head_timer()
                self.send_400_response("The request's headers are too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        # The request before it may have been answered in this very read.
        self._unset_keepalive_if_required()
        if not self._in_head:
            self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_head_timer()
        idle = self.cycle is None or self.cycle.response_complete
        if (
            idle
            and not self.flow.write_paused
            and not self.expect_100_continue
            and not self.parser.should_upgrade()
        ):
            self._parts = []
        else:
            self._start_cycle()

    def on_body(self, body: bytes) -> None:
        """As uvicorn's, but a body is read in larger pieces before reading is paused: each
        pause costs a turn of the loop, some 20 µs, and a tensor of 600 KB would take ten."""
        if self._parts is not None:
            self._parts.append(body)
            return
        cycle = self.cycle
        if cycle.response_complete:
            return
        cycle.body += body
        if len(cycle.body) > READ_AHEAD_BYTES:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        parts = self._parts
        if parts is not None:
            exchange = _Exchange(self)
            body = parts[0] if len(parts) == 1 else b"".join(parts)
            if self.app.whole(self.parser.get_method(), self.url, self.headers, body, exchange):
                self._parts = None
                return
            exchange.forget()
            self._leave_to_asgi()
        super().on_message_complete()

    def stop_exchange(self) -> None:
        """Answer what is under way that the server stops, and close."""
        exchange = self._exchange
        if exchange is not None:
            exchange.keep_alive = False  # what came behind it is not started
            exchange.withdraw()
            exchange.answer(*refusal_answer(STOPPING))

    def _leave_to_asgi(self) -> None:
        parts, self._parts = self._parts or (), None
        self._start_cycle()
        for part in parts:
            self.on_body(part)

    def _start_cycle(self) -> None:
        super().on_headers_complete()
        extensions: dict[str, Any] = {WHOLE_ANSWER: partial(_write_answer, self.cycle)}
        self.scope["extensions"] = extensions
        exchange = self._exchange
        if exchange is not None and not exchange.followed:
            # This one waits behind another, and uvicorn reads no further: it would not notice a
            # hang-up. Once only, for what comes then is kept as well.
            exchange.followed = True
            self.loop.call_later(_READ_ON_S, self._read_on, exchange)

    def _read_on(self, exchange: _Exchange) -> None:
        if self._exchange is exchange:
            self.flow.resume_reading()

    def _await_head(self) -> None:
        if self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.close)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class _Full:
    """What a connection beyond the most gets instead of the application."""

    def __init__(self, most: int) -> None:
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, and close."""
        del scope  # whatever it was
        refused = Refused(Refusal.UNAVAILABLE, AWAY, "")
        said = (
            f"the server has {self._most} connections, as many as it takes; keep fewer open, or"
            " try again later"
        )
        await respond_unread(send, receive, 503, said, refusal_headers(refused))

    def whole(self, *_: object, **__: object) -> bool:
        """Never: the connection is to be closed."""
        return False


class _Exchange:
    """See ``Exchange``. To uvicorn it is the cycle under way."""

    __slots__ = ("_protocol", "followed", "keep_alive", "response_complete", "withdraw")

    def __init__(self, protocol: _Protocol) -> None:
        parser = protocol.parser
        self._protocol = protocol
        self.keep_alive = parser.get_http_version() != "1.0" and parser.should_keep_alive()
        self.followed = False
        self.response_complete = False
        self.withdraw: Callable[[], None] = _nothing
        protocol._exchange = protocol.cycle = self

    def forget(self) -> None:
        """It is no longer this connection's; an answer to it goes nowhere."""
        protocol = self._protocol
        self.response_complete = True
        self.withdraw = _nothing  # it refers to the request, and that to this
        protocol._exchange = None
        if protocol.cycle is self:  # else another request has come behind it
            protocol.cycle = None

    def answer(self, status: int, body: bytes, headers: tuple[Header, ...]) -> None:
        """See ``Exchange``."""
        if self.response_complete:
            return
        self.forget()
        protocol = self._protocol
        transport = protocol.transport
        if transport.is_closing():
            return
        defaults = protocol.server_state.default_headers
        transport.writelines((_head(status, (*defaults, *headers), self.keep_alive, body), body))
        if not self.keep_alive:
            transport.close()
        protocol.on_response_complete()


def _nothing() -> None:
    """Nothing is to be withdrawn."""


def _head(status: int, headers: Iterable[Header], keep_alive: bool, body: bytes) -> bytes:
    """Status line and headers, which are ours and so not checked as uvicorn checks others'."""
    lines = [STATUS_LINE[status]]
    for name, value in headers:
        lines += (name, b": ", value, b"\r\n")
    if not keep_alive:
        lines.append(b"connection: close\r\n")
    lines.append(b"content-length: %d\r\n\r\n" % len(body))
    return b"".join(lines)


def _write_answer(
    cycle: RequestResponseCycle, status: int, body: bytes, headers: tuple[Header, ...]
) -> bool:
    """A ``WholeAnswer``: one system call, and one wake-up of the client, instead of two. It
    cannot where the client is gone or reads slowly."""
    if cycle.disconnected or cycle.flow.write_paused:
        return False
    cycle.response_started = cycle.response_complete = True
    cycle.waiting_for_100_continue = False
    head = _head(status, (*cycle.default_headers, *headers), cycle.keep_alive, body)
    cycle.transport.writelines((head, body))
    cycle.message_event.set()
    if not cycle.keep_alive:
        cycle.transport.close()
    cycle.on_response()
    return True
