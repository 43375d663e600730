"""Request bodies over ASGI: received within limits of size and time, and decompressed.

The size limit holds while a body streams in, whatever its Content-Length said, and again
for what a compressed body unfolds to.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Protocol

import msgspec

from cotenant.domain.errors import CotenantError, TooLarge
from cotenant.domain.port import Refused
from cotenant.domain.request import Refusal
from cotenant.serving.intake import Budget, inflate
from cotenant.serving.overdue import Overdue
from cotenant.serving.refusals import HTTP_STATUS, as_refused, error_status, refusal_headers
from cotenant.serving.tensors import Limits

log = logging.getLogger("cotenant.serving")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Header = tuple[bytes, bytes]
Answer = tuple[int, bytes, tuple[Header, ...]]
"""Status, body and the headers beside Content-Length."""
WholeAnswer = Callable[[int, bytes, tuple[Header, ...]], bool]


class Exchange(Protocol):
    """A request that came whole, and the way to answer it without ASGI's messages."""

    withdraw: Callable[[], None]
    """Called if the client goes away before the answer."""

    def answer(self, status: int, body: bytes, headers: tuple[Header, ...]) -> None:
        """Answer, once; nothing happens if the client is gone."""


WHOLE_ANSWER = "cotenant.whole_answer"
"""The ASGI extension of our HTTP server: a ``WholeAnswer``, which writes a whole answer at once
or returns False where it cannot and ``respond`` has to."""

JSON_TYPE: Header = (b"content-type", b"application/json")

STOPPING = Refused(Refusal.SHUTTING_DOWN, 0, "")
_LINGER_S = 5.0
_LINGER_IDLE_S = 0.5


class Hangup(Exception):
    """The client closed the connection; there is nobody to answer."""


class SlowBody(Exception):
    """The body did not arrive in time."""


class Head(msgspec.Struct):
    """Those request headers that matter here; lengths in bytes, -1 if not stated."""

    content_length: int = -1
    encoding: bytes = b""
    json_length: bytes | None = None
    authorization: bytes = b""


def parse_head(headers: Iterable[Header]) -> Head:
    """Pick our headers out of an ASGI scope's (names are lower-case there)."""
    head = Head()
    for name, value in headers:
        if name == b"content-length":
            # The HTTP parser has checked it; chunked bodies have none.
            head.content_length = int(value) if value.isdigit() else -1
        elif name == b"inference-header-content-length":
            head.json_length = value
        elif name == b"content-encoding":
            head.encoding = value.strip().lower()
        elif name == b"authorization":
            head.authorization = value
    return head


class BodyReader:
    """Receives bodies within limits and a budget."""

    def __init__(self, limits: Limits, budget: Budget) -> None:
        self._budget = budget
        self._late = Overdue(limits.body_timeout_s)

    async def read(self, receive: Receive, head: Head, most: int) -> tuple[bytes, int]:
        """The decompressed body, at most ``most`` bytes, and the bytes to give back to the budget.

        Raises TooLarge, InvalidRequest (encoding), SlowBody, Hangup, BodyRefused; nothing is
        to be given back then.
        """
        if head.content_length > most:
            raise _too_large(f"Content-Length is {head.content_length}", most)
        held = [0]
        try:
            body = await self._receive_in_time(receive, held, most)
            if head.encoding and head.encoding != b"identity":
                body = await self._decompress(body, head.encoding, held, most)
        except BaseException:
            self._budget.release(held[0])
            raise
        return body, held[0]

    async def _receive_in_time(self, receive: Receive, held: list[int], most: int) -> bytes:
        task = asyncio.current_task()
        assert task is not None
        late = False

        def expire() -> None:
            nonlocal late
            late = True
            task.cancel()

        self._late.enter(task, expire)
        try:
            return await self._receive(receive, held, most)
        except asyncio.CancelledError:
            if late and task.uncancel() == 0:
                raise SlowBody from None
            raise
        finally:
            self._late.leave(task)

    async def _receive(self, receive: Receive, held: list[int], most: int) -> bytes:
        chunks: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Hangup
            chunk: bytes = message.get("body", b"")
            self._hold(held, len(chunk))
            if held[0] > most:
                raise _too_large("the body is larger", most)
            if not message.get("more_body", False):
                break
            chunks.append(chunk)
        if not chunks:
            return chunk
        chunks.append(chunk)
        return b"".join(chunks)

    def _hold(self, held: list[int], more: int) -> None:
        self._budget.hold(more)
        held[0] += more

    async def _decompress(self, body: bytes, encoding: bytes, held: list[int], most: int) -> bytes:
        named = encoding.decode("latin-1"), "Content-Encoding"
        data = await inflate(body, named, most, lambda more: self._hold(held, more))
        if data is None:
            raise _too_large("the decompressed body is larger", most)
        return data


def _too_large(what: str, most: int) -> TooLarge:
    return TooLarge(
        f"{what}; at most {most} bytes are accepted in this request's body (large tensors are"
        " sent as binary data, binary_data_size)"
    )


async def respond(
    send: Send, status: int, body: bytes, headers: Iterable[Header] = (JSON_TYPE,)
) -> None:
    """Send a complete answer."""
    start = [(b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})


def error_answer(status: int, message: str, headers: Iterable[Header] = ()) -> Answer:
    """``{"error": message}``."""
    return status, error_body(message), (JSON_TYPE, *headers)


def refusal_answer(refused: Refused) -> Answer:
    """A refusal with its reason and, where it may pass, the time to retry."""
    return error_answer(HTTP_STATUS[refused.refusal], refused.message, refusal_headers(refused))


def failure_answer(exc: Exception, model: str) -> Answer:
    """What to answer to an inference that failed with ``exc``."""
    refused = as_refused(exc)
    if refused is not None:
        return refusal_answer(refused)
    if isinstance(exc, CotenantError):
        return error_answer(error_status(exc), str(exc))
    log.error("inference on %s failed inside the server", model, exc_info=exc)
    return error_answer(500, "the server failed; its log says how")


class HangupWatch:
    """Cancels a request's task when its client disconnects, from ``start`` to ``stop``.

    As a context it watches what is within, and raises Hangup there.
    """

    def __init__(self, receive: Receive) -> None:
        self.fired = False
        task = asyncio.current_task()
        assert task is not None
        self._request = task
        self._receive = receive
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Watch."""
        self._task = asyncio.create_task(self._watch())

    def stop(self) -> None:
        """Watch no longer."""
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        with contextlib.suppress(Exception):  # a broken connection is a hang-up too
            while (await self._receive())["type"] != "http.disconnect":
                pass
        self.fired = True
        self._request.cancel()

    def check(self) -> None:
        """To be called where the task was cancelled; raises Hangup if that was for a hang-up."""
        if self.fired and self._request.uncancel() == 0:
            raise Hangup from None

    async def __aenter__(self) -> None:
        self.start()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop()
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            self.check()


async def respond_unread(
    send: Send, receive: Receive, status: int, message: str, headers: Iterable[Header] = ()
) -> None:
    """Refuse a request whose body was not read, then close the connection."""
    await answer_unread(send, receive, (status, error_body(message), (JSON_TYPE, *headers)))


async def answer_unread(send: Send, receive: Receive, answer: Answer) -> None:
    """Answer a request whose body was not read, then close the connection.

    Closing at once would reset the connection and could destroy the answer before the client
    has read it. So what the client still sends is thrown away first, for some seconds at most.
    """
    status, body, headers = answer
    start = [(b"content-length", b"%d" % len(body)), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": [*start, *headers]})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    try:
        async with asyncio.timeout(_LINGER_S):
            while (await asyncio.wait_for(receive(), _LINGER_IDLE_S)).get("more_body", False):
                pass
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b""})


def error_body(message: str) -> bytes:
    """The protocol's error document."""
    return json.dumps({"error": message}).encode()
