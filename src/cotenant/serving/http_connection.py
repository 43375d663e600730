"""One HTTP/1 connection: uvicorn's protocol, with bounds on what it leaves without any.

* One request at a time. What is read behind one under way is kept as it came, up to
  ``AHEAD_BYTES``, and parsed when that is answered and the answer taken up: a head up to its end,
  a body by its length, chunks in pieces of ``STEP_BYTES``. A turn of the loop sees at most one
  request of a connection, or about ``TURN_CHUNKS`` chunks.
* A head has ``HEADER_BYTES``, ``HEADERS`` headers, a URL of ``URL_BYTES``, and is here within
  ``CLIENT_S``. What is not body in a chunked one (sizes, extensions, trailers) may be
  ``HEADER_BYTES`` more than the body.
* Trailers are thrown away, and requests to upgrade are answered as if they did not ask for it.
* What is wrong is answered, and the connection closed once the client has had time to read that:
  closing at once would reset it, and could destroy the answer.
* A body that nobody reads, since its request is answered, is thrown away up to ``DISCARD_BYTES``.

What would better be seen to in uvicorn and httptools is in docs/adr/0011-bounds-around-uvicorn.md.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cotenant.serving.bodies import STOPPING, WHOLE_ANSWER, error_answer, refusal_answer
from cotenant.serving.http_answers import Application, OneExchange, head, write_answer
from cotenant.serving.http_crowd import AHEAD_TOTAL_BYTES, Crowd

CLIENT_S = 30.0
HEADER_BYTES = 64 * 1024
HEADERS = 128
URL_BYTES = 16 * 1024
READ_AHEAD_BYTES = 2**20
"""Body bytes of one connection read before the application asks for them."""
AHEAD_BYTES = 64 * 1024
STEP_BYTES = 4096
TURN_CHUNKS = 512
DISCARD_BYTES = 2**20
LINGER_S = 2.0

_HEAD_END = b"\r\n\r\n"
_NOT_HTTP = 400, "this is not an HTTP request as RFC 9112 has it"


class Connection(HttpToolsProtocol):
    """See the module's text.

    A request that arrives in one piece is offered to the application as a whole. Such are most
    inferences, and uvicorn's cycle for ASGI (a task, an event, a dictionary for each message)
    would cost more than decoding them. All others take that way.
    """

    app: Application
    cycle: Any
    """The request under way, or the last: uvicorn's cycle, an ``OneExchange`` or None."""

    def __init__(self, crowd: Crowd, full: Application, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._crowd = crowd
        self._full = full
        self.exchange: OneExchange | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False
        """Nothing more is parsed: what comes is thrown away."""
        # What was read and not parsed yet, from ``_ahead_at`` on.
        self._ahead: bytes = b""
        self._ahead_at = 0
        self._going_on = False
        # The message that comes.
        self._begun = False
        self._in_head = True
        self._head_bytes = 0
        self._tail = b""
        self._hosts = 0
        self._body_left = 0
        """Of a body whose length was stated; of chunks what has come, negative."""
        self._chunked = self._upgrade = False
        self._wire_bytes = 0
        self._chunks = 0
        self._discarded = 0
        self._wrong = _NOT_HTTP
        self._parts: list[bytes] | None = None
        """The body of a request that may turn out to be here entirely."""
        self.method = b""
        self.keep_alive = True

    # --- the transport ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport, self._has_room)
        if not self._crowd.enter(self):
            self.app = self._full
        self._await_client()

    def connection_lost(self, exc: Exception | None) -> None:
        self._crowd.leave(self)
        self._forget_ahead()
        self._stop_timer()
        exchange = self.exchange
        try:
            if exchange is not None:
                withdraw = exchange.withdraw
                exchange.forget()
                withdraw()
        finally:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._ended:
            self._discard(len(data))
        elif self._ahead:
            self._keep(self._ahead[self._ahead_at :] + data, 0)
        else:
            self._take(data, 0)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._crowd.unread(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._crowd.read(self)
        self._go_on_soon()

    # --- a member of the crowd --------------------------------------------------------------

    def unread_bytes(self) -> int:
        """See Member."""
        return self.transport.get_write_buffer_size()

    def is_idle(self) -> bool:
        """See Member."""
        return not self._begun

    def give_way(self) -> None:
        """See Member."""
        self.transport.abort() if self.flow.write_paused else self.transport.close()

    # --- so much at a time ------------------------------------------------------------------

    def _take(self, data: bytes, at: int) -> None:
        """Parse of what was read what is to be parsed now, and keep the rest."""
        size, ended_one = len(data), False
        self._chunks = 0
        while at < size and self._chunks <= TURN_CHUNKS:
            if not self._begun and (ended_one or self._busy()):
                break
            end = at + self._step(data, at)
            # What is large is not copied: the parser takes any buffer.
            self._parse(data[at:end] if self._in_head else memoryview(data)[at:end])
            if self._ended or self.transport.is_closing():
                self._parts = None
                return
            at, ended_one = end, not self._begun
        if self._parts is not None:
            self._guarded(self._leave_to_asgi)
        if at < size and not self._ended:
            self._keep(data, at)
            self._go_on_soon()
        if self._begun and self._timer is None:
            self._await_client()

    def _step(self, data: bytes, at: int) -> int:
        """How many bytes belong to one message for sure, or are few enough."""
        size = len(data) - at
        if not self._in_head:
            return STEP_BYTES if self._chunked else self._body_left or STEP_BYTES
        if self._tail:
            split = (self._tail + data[at : at + 3]).find(_HEAD_END)
            if split >= 0:
                return split + 4 - len(self._tail)
        end = data.find(_HEAD_END, at, at + HEADER_BYTES + 4)
        if end < 0 or (size <= STEP_BYTES and data.find(_HEAD_END, end + 4) < 0):
            return size  # with no second head in it there is one message: parsed in one go
        return end + 4 - at

    def _parse(self, piece: bytes | memoryview) -> None:
        if self._in_head:
            self._parse_head(bytes(piece))
        elif self._upgrade:
            self._guarded(self._on_raw_body, bytes(piece))
        else:
            self._guarded(self.parser.feed_data, piece)
            if self._chunked and self._begun and not self._ended:
                self._wire_bytes += len(piece)
                if self._wire_bytes + 2 * self._body_left > HEADER_BYTES:
                    self.refuse(400, "the body's chunks are too small for what is beside them")

    def _parse_head(self, piece: bytes) -> None:
        self._head_bytes += len(piece)
        if self._head_bytes > HEADER_BYTES:
            self.refuse(431, f"the request's head is larger than {HEADER_BYTES} bytes")
            return
        upgraded_at = self._guarded(self.parser.feed_data, piece)
        if upgraded_at and (rest := piece[upgraded_at:]) and not self._ended:
            body, rest = rest[: self._body_left], rest[self._body_left :]
            if body:
                self._guarded(self._on_raw_body, body)
            if rest:
                self._parse_head(rest)
        elif self._in_head and self._begun:
            self._tail = (self._tail + piece[-3:])[-3:]

    def _guarded(self, work: Callable[..., None], *args: object) -> int:
        """Do a piece of work, and answer what turns out to be wrong. Where the parser takes what
        follows for another protocol, it is replaced; returns where that was, else 0."""
        try:
            work(*args)
        except httptools.HttpParserUpgrade as upgrade:
            self.parser = httptools.HttpRequestParser(self)
            return int(upgrade.args[0])
        except (httptools.HttpParserError, UnicodeError):
            self._parts = None
            self.refuse(*self._wrong)
        return 0

    def _on_raw_body(self, piece: bytes) -> None:
        self.on_body(piece)
        if not self._body_left:
            self.on_message_complete()

    def _busy(self) -> bool:
        cycle = self.cycle
        return (cycle is not None and not cycle.response_complete) or self.flow.write_paused

    def _keep(self, data: bytes, at: int) -> None:
        self._crowd.ahead_bytes += len(data) - len(self._ahead)
        self._ahead, self._ahead_at = data, at
        if self._crowd.ahead_bytes > AHEAD_TOTAL_BYTES or len(data) - at > READ_AHEAD_BYTES:
            self.transport.abort()
        elif not self._has_room():
            self.flow.pause_reading()

    def _has_room(self) -> bool:
        return len(self._ahead) - self._ahead_at <= AHEAD_BYTES

    def _forget_ahead(self) -> None:
        self._crowd.ahead_bytes -= len(self._ahead)
        self._ahead, self._ahead_at = b"", 0

    def _go_on_soon(self) -> None:
        if self._ahead and not self._going_on and (self._begun or not self._busy()):
            self._going_on = True
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._going_on = False
        if self.parser is None or self.transport.is_closing() or not self._ahead:
            return
        data, at = self._ahead, self._ahead_at
        self._forget_ahead()
        self._take(data, at)
        if not self.transport.is_closing():
            self.flow.resume_reading()

    # --- parsed -----------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """As uvicorn's, but the scope waits until it is known that one is needed."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = self._chunked = self._upgrade = False
        self._hosts = self._body_left = self._wire_bytes = self._discarded = 0
        self._begun = True

    def on_url(self, url: bytes) -> None:
        self.url += url
        if len(self.url) > URL_BYTES:
            self._fail(414, f"the URL is longer than {URL_BYTES} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer: it must not pass for a header
        name = name.lower()
        if name == b"host":
            self._hosts += 1
        elif name == b"content-length":
            self._body_left = int(value)
        elif name == b"transfer-encoding":
            self._chunked = True
        elif name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))
        if len(self.headers) > HEADERS:
            self._fail(431, f"the request has more than {HEADERS} headers")

    def on_headers_complete(self) -> None:
        parser = self.parser
        self._in_head, self._head_bytes, self._tail = False, 0, b""
        self.method = parser.get_method()
        new = parser.get_http_version() != "1.0"
        self.keep_alive = new and parser.should_keep_alive()
        if self._hosts > 1 or (new and not self._hosts):
            self._fail(400, "an HTTP/1.1 request has one Host header")
        if parser.should_upgrade():
            if self._chunked or self.method == b"CONNECT":
                self._fail(501, "connections cannot be upgraded; leave the header Upgrade out")
            self._upgrade = True
        if self._upgrade or self.expect_100_continue or self._busy():
            self._start_cycle()
        else:
            self._parts = []

    def on_body(self, body: bytes) -> None:
        self._chunks += 1
        self._body_left -= len(body)
        if self._parts is not None:
            self._parts.append(body)
        elif self.cycle.response_complete:
            self._discard(len(body))
        else:
            self._hand_on(body)

    def _hand_on(self, body: bytes) -> None:
        """As uvicorn's ``on_body``, but a body is read in larger pieces before reading is paused:
        each pause costs a turn of the loop, some 20 µs, and a tensor of 600 KB would take ten."""
        cycle = self.cycle
        cycle.body += body
        if len(cycle.body) > READ_AHEAD_BYTES:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        if self._upgrade and self._body_left:
            return  # to httptools what follows is another protocol
        self._in_head, self._begun = True, False
        self._stop_timer()
        parts = self._parts
        if parts is None:
            if not self.cycle.response_complete:
                self._crowd.work(self)
            super().on_message_complete()
            return
        self._crowd.work(self)
        exchange = OneExchange(self)
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        if self.app.whole(self.method, self.url, self.headers, body, exchange):
            self._parts = None
            return
        exchange.forget()
        self._leave_to_asgi()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """As uvicorn's, but one timer sees to all idle connections."""
        self.server_state.total_requests += 1
        cycle = self.cycle
        if cycle is not None and cycle.response_complete:
            cycle.body = bytearray()  # of what was answered unread
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
            return
        self._crowd.rest(self)
        self._go_on_soon()

    def stop_exchange(self) -> None:
        """Answer what is under way that the server stops, and close."""
        exchange = self.exchange
        if exchange is not None:
            exchange.keep_alive = False  # what came behind it is not started
            exchange.withdraw()
            exchange.answer(*refusal_answer(STOPPING))

    def _leave_to_asgi(self) -> None:
        parts, self._parts = self._parts or (), None
        self._start_cycle()
        for part in parts:
            self._hand_on(part)

    def _start_cycle(self) -> None:
        url, headers, expected = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expected
        self.headers = self.scope["headers"] = headers
        super().on_headers_complete()
        self.cycle.keep_alive = self.keep_alive
        # Weakly: the cycle has the scope, and a loop would keep bodies until garbage is looked for.
        cycle: Any = weakref.proxy(self.cycle)
        extensions: dict[str, Any] = {WHOLE_ANSWER: partial(write_answer, cycle)}
        self.scope["extensions"] = extensions

    # --- what is wrong, late or too much ----------------------------------------------------

    def _fail(self, status: int, message: str) -> None:
        """End parsing, from within one of the parser's callbacks."""
        self._wrong = status, message
        raise httptools.HttpParserError(message)

    def refuse(self, status: int, message: str) -> None:
        """Answer what is no request, unless another answer has begun, and close."""
        self._ended = True
        self._forget_ahead()
        cycle, transport = self.cycle, self.transport
        under_way = cycle is not None and not cycle.response_complete
        if transport.is_closing():
            return
        if under_way and (self._in_head or getattr(cycle, "response_started", True)):
            transport.close()
            return
        if under_way:
            cycle.disconnected = True
            cycle.message_event.set()
        _, body, headers = error_answer(status, message)
        defaults = self.server_state.default_headers
        transport.writelines((head(status, (*defaults, *headers), False, body), body))
        self._stop_timer()
        self._discarded = 0
        if transport.can_write_eof():  # not over TLS: there the answer's length has to do
            transport.write_eof()
        self.flow.resume_reading()
        self._timer = self.loop.call_later(LINGER_S, transport.abort)

    def _discard(self, nbytes: int) -> None:
        self._discarded += nbytes
        if self._discarded > DISCARD_BYTES:
            self.transport.close()

    def _await_client(self) -> None:
        if not self.transport.is_closing():
            self._timer = self.loop.call_later(CLIENT_S, self._late)

    def _late(self) -> None:
        self._timer = None
        if self._in_head or self.cycle.response_complete:
            self.transport.close()
        else:  # who reads the body sees to its time
            self._await_client()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Flow(FlowControl):
    """uvicorn's, but reading goes on only where there is room for what is read."""

    def __init__(self, transport: asyncio.Transport, has_room: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._has_room = has_room

    def resume_reading(self) -> None:
        if self.read_paused and self._has_room():
            super().resume_reading()
