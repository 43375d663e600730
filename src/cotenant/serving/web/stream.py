"""Server-sent events: what changed on the node each second, the same for all who look.

When nobody looks nothing is computed. Who does not take up what is sent is dropped; a browser then
comes back by itself and is told everything anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec

from cotenant.domain.port import NodePort
from cotenant.serving.bodies import Hangup, HangupWatch, Receive, Send, respond
from cotenant.serving.web.look import Look, look

log = logging.getLogger("cotenant.serving")

EVERY_S: Final = 1.0
MOST_SHARE: Final = 0.01
"""Of a core, looks take so much at most: where one takes long, the next comes later."""
MOST_VIEWERS: Final = 8
WAITING: Final = 4
"""Events that may wait for a viewer."""
SEND_S: Final = 5.0
POINTS: Final = 120
"""Seconds of figures that are kept while somebody looks."""

_encode = msgspec.json.encode


class Stream:
    """Build one a node; ``close`` it before the server stops."""

    def __init__(self, node: NodePort, every_s: float = EVERY_S, send_s: float = SEND_S) -> None:
        self._node = node
        self._every_s = every_s
        self._send_s = send_s
        self._viewers: set[asyncio.Queue[bytes | None]] = set()
        self._beat: asyncio.Task[None] | None = None
        self._last: Look | None = None
        self._points: deque[tuple[float, dict[str, list[float | None]]]] = deque(maxlen=POINTS)
        self._closed = False

    async def serve(self, receive: Receive, send: Send, still: Callable[[], bool]) -> None:
        """Answer with events until the client goes, or may ``still`` see them no more."""
        if self._closed or len(self._viewers) >= MOST_VIEWERS:
            said = b"as many look at this node as may at a time; close another page\n"
            await respond(send, 503, said, [(b"content-type", b"text/plain; charset=utf-8")])
            return
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(WAITING)
        self._viewers.add(queue)
        try:
            async with HangupWatch(receive):
                await self._tell(queue, send, still)
        except (Hangup, TimeoutError):
            pass  # gone, or too slow
        finally:
            self._leave(queue)

    async def _tell(
        self, queue: asyncio.Queue[bytes | None], send: Send, still: Callable[[], bool]
    ) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-content-type-options", b"nosniff"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if self._last is None:
            self._see()
        queue.put_nowait(self._everything())
        if self._beat is None:
            self._beat = asyncio.create_task(self._go_on(), name="cotenant-dashboard")
        while (event := await queue.get()) is not None and still():
            async with asyncio.timeout(self._send_s):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def _leave(self, queue: asyncio.Queue[bytes | None]) -> None:
        self._viewers.discard(queue)
        if not self._viewers and self._beat is not None:
            self._beat.cancel()
            self._beat = self._last = None

    async def _go_on(self) -> None:
        took = 0.0
        while True:
            await asyncio.sleep(max(self._every_s, took / MOST_SHARE))
            began = time.thread_time()
            try:
                event = self._changes()
            except Exception:
                log.exception("the dashboard could not look at the node")
                continue
            took = time.thread_time() - began
            for queue in list(self._viewers):
                if queue.full():
                    self._drop(queue)
                else:
                    queue.put_nowait(event)

    @staticmethod
    def _drop(queue: asyncio.Queue[bytes | None]) -> None:
        while not queue.empty():
            queue.get_nowait()
        queue.put_nowait(None)

    def _see(self) -> Look:
        self._last = found = look(self._node)
        self._points.append((round(time.time(), 2), found.points))
        return found

    def _everything(self) -> bytes:
        """What a new viewer is told."""
        found = self._last
        assert found is not None
        return _event(
            {
                "shape": found.shape,
                "cells": found.cells,
                "meters": found.meters,
                "names": found.names,
                "past": [_span(span) for span in found.past],
                "points": list(self._points),
            }
        )

    def _changes(self) -> bytes:
        """What is new since the last look."""
        before = self._last
        found = self._see()
        assert before is not None
        seen = before.past[-1].until + 0.01 if before.past else 0.0
        return _event(
            {
                "shape": found.shape,
                "cells": _new(before.cells, found.cells),
                "meters": _new(before.meters, found.meters),
                "names": _new(before.names, found.names),
                "past": [_span(span) for span in found.past if span.until > seen],
                "points": [self._points[-1]],
            }
        )

    async def close(self) -> None:
        """Tell all viewers that it is over."""
        self._closed = True
        for queue in list(self._viewers):
            self._drop(queue)
        if self._beat is not None:
            self._beat.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._beat


def _new(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in now.items() if before.get(key) != value}


def _span(span: Any) -> list[Any]:
    rounded = {
        device: {who: round(units, 4) for who, units in held.items()}
        for device, held in span.devices.items()
    }
    return [round(span.until, 2), round(span.seconds, 3), rounded]


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + _encode(value) + b"\n\n"
