"""The generate routes: a call's answer at once (``generate``), or its pieces as server-sent events
(``generate_stream``).

A piece is taken from the node only when the client has taken up what was sent before: how much may
wait there is the node's to say. A client that hangs up withdraws its request.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from cotenant.domain.errors import ModelError
from cotenant.domain.port import InferCall, InferResult, NodePort, Refused
from cotenant.serving.bodies import (
    JSON_TYPE,
    STOPPING,
    Answer,
    Hangup,
    HangupWatch,
    Header,
    Receive,
    Send,
    failure_answer,
    refusal_answer,
    respond,
)
from cotenant.serving.calls import pieces
from cotenant.serving.generate import Answer as Said
from cotenant.serving.generate import event
from cotenant.serving.tensors import Limits

_EVENTS: tuple[Header, ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
)


class Generation:
    """See the module's text. Its methods raise Hangup if there is nobody to answer."""

    def __init__(self, node: NodePort, limits: Limits) -> None:
        self._node = node
        self._most = limits.json_bytes

    async def at_once(self, call: InferCall, receive: Receive, send: Send) -> None:
        """Answer when all is there."""
        said = Said(call.id, self._most)
        try:
            async with HangupWatch(receive):
                answer = await self._whole(call, said)
        except Hangup:
            raise
        except asyncio.CancelledError:  # only the HTTP server's stop cancels a request
            answer = refusal_answer(STOPPING)
        except Exception as exc:
            answer = failure_answer(exc, call.model)
        await respond(send, *answer)

    async def _whole(self, call: InferCall, said: Said) -> Answer:
        async with aclosing(pieces(self._node, call)) as outcomes:
            async for outcome in outcomes:
                if isinstance(outcome, Refused):
                    return refusal_answer(outcome)
                try:
                    said.add(outcome)
                finally:
                    outcome.release()
        if not said.pieces:
            raise ModelError(f"model {call.model!r} gave no answer")
        return 200, said.body(), (JSON_TYPE,)

    async def stream(self, call: InferCall, receive: Receive, send: Send) -> None:
        """Answer with an event for each piece. What goes wrong before the first is answered as
        everywhere, and later as an event."""
        events = Events(send)
        ending: Answer | None = None
        try:
            async with HangupWatch(receive), aclosing(pieces(self._node, call)) as outcomes:
                async for outcome in outcomes:
                    if isinstance(outcome, Refused):
                        ending = refusal_answer(outcome)
                    elif body := self._event_of(outcome, call):
                        await events.say(body)
        except Hangup:
            raise
        except asyncio.CancelledError:
            ending = refusal_answer(STOPPING)
        except Exception as exc:
            ending = failure_answer(exc, call.model)
        await events.end(ending)

    @staticmethod
    def _event_of(outcome: InferResult, call: InferCall) -> bytes:
        """Of a piece; empty if it has no outputs."""
        said = Said(call.id)
        try:
            said.add(outcome)
        finally:
            outcome.release()
        return said.body() if said.pieces else b""


class Events:
    """An answer as server-sent events."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._begun = False

    async def say(self, body: bytes) -> None:
        """One event."""
        await self._begin()
        message = {"type": "http.response.body", "body": event(body), "more_body": True}
        await self._send(message)

    async def end(self, ending: Answer | None) -> None:
        """That was all, or something went wrong."""
        if not self._begun and ending is not None:
            await respond(self._send, *ending)
            return
        await self._begin()
        said = b"" if ending is None else event(ending[1])
        await self._send({"type": "http.response.body", "body": said})

    async def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            headers = list(_EVENTS)
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
