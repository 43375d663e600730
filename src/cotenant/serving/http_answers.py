"""What the application of the HTTP server is, and how whole answers are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from cotenant.serving.bodies import Exchange, Header, Receive, Scope, Send


class Application(Protocol):
    """An ASGI application that is offered each request that arrives whole first."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry."""

    def whole(
        self, method: bytes, url: bytes, headers: Iterable[Header], body: bytes, exchange: Exchange
    ) -> bool:
        """See to a request and answer it through ``exchange``, now or later, or return False."""


class OneExchange:
    """See ``Exchange``. To uvicorn it is the cycle under way."""

    __slots__ = ("_protocol", "keep_alive", "response_complete", "withdraw")

    def __init__(self, protocol: Any) -> None:
        self._protocol = protocol
        self.keep_alive = protocol.keep_alive
        self.response_complete = False
        self.withdraw: Callable[[], None] = _nothing
        protocol.exchange = protocol.cycle = self

    def forget(self) -> None:
        """It is no longer this connection's; an answer to it goes nowhere."""
        protocol = self._protocol
        self.response_complete = True
        self.withdraw = _nothing  # it refers to the request, and that to this
        protocol.exchange = None
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
        transport.writelines((head(status, (*defaults, *headers), self.keep_alive, body), body))
        if not self.keep_alive:
            transport.close()
        protocol.on_response_complete()


def _nothing() -> None:
    """Nothing is to be withdrawn."""


def head(status: int, headers: Iterable[Header], keep_alive: bool, body: bytes) -> bytes:
    """Status line and headers, which are ours and so not checked as uvicorn checks others'."""
    lines = [STATUS_LINE[status]]
    for name, value in headers:
        lines += (name, b": ", value, b"\r\n")
    if not keep_alive:
        lines.append(b"connection: close\r\n")
    lines.append(b"content-length: %d\r\n\r\n" % len(body))
    return b"".join(lines)


def write_answer(
    cycle: RequestResponseCycle, status: int, body: bytes, headers: tuple[Header, ...]
) -> bool:
    """A ``WholeAnswer``: one system call, and one wake-up of the client, instead of two. It
    cannot where the client is gone or reads slowly."""
    if cycle.disconnected or cycle.flow.write_paused:
        return False
    cycle.response_started = cycle.response_complete = True
    cycle.waiting_for_100_continue = False
    start = head(status, (*cycle.default_headers, *headers), cycle.keep_alive, body)
    cycle.transport.writelines((start, body))
    cycle.message_event.set()
    if not cycle.keep_alive:
        cycle.transport.close()
    cycle.on_response()
    return True
