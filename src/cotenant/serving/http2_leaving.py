"""How an HTTP/2 connection ends: on our side in order, or for a fault of the client's."""

from __future__ import annotations

import asyncio
from typing import Protocol

from cotenant.serving.http2_frames import GOAWAY, MAX_WINDOW, PING, ErrorCode, frame
from cotenant.serving.http2_sending import Sender

_GOODBYE = b"goodbye!"
_GOODBYE_S = 1.0
_LINGER_S = 1.0
_SAID_BYTES = 1024


class Whole(Protocol):
    """What ending needs to know of a connection."""

    last: int

    @property
    def requests(self) -> int:
        """How many are under way."""


class Leaving:
    """The end of one connection."""

    def __init__(self, whole: Whole, sender: Sender) -> None:
        self.under_way = False
        """No more requests are taken."""
        self._whole = whole
        self._sender = sender

    def drain(self, greeted: bool) -> None:
        """Take no more requests, and close when those under way are answered.

        What the client sends before it reads of this is still served: only once it has answered
        a ping is it told which of its requests was the last (RFC 9113, section 6.8).
        """
        if self.under_way or self._sender.closed:
            return
        if not greeted:
            self.close()
            return
        self._say(MAX_WINDOW, ErrorCode.NO_ERROR)
        self._sender.control(frame(PING, 0, 0, _GOODBYE))
        asyncio.get_running_loop().call_later(_GOODBYE_S, self.leave)

    def ping_answered(self, payload: bytes) -> None:
        """The client has answered a ping."""
        if payload == _GOODBYE:
            self.leave()

    def leave(self) -> None:
        """Take no more requests from now on."""
        if self.under_way or self._sender.closed:
            return
        self.under_way = True
        self._say(self._whole.last, ErrorCode.NO_ERROR)
        self.nothing_left()

    def nothing_left(self) -> None:
        """Close if this waits for the last answer, and that is said."""
        if self.under_way and not (self._whole.requests or self._sender.closed):
            self.close()

    def fail(self, code: ErrorCode, message: str) -> None:
        """Say why, and close a little later: closed at once, a connection with something unread is
        reset, and the client might not see what was said. Nothing more is read meanwhile."""
        self._say(self._whole.last, code, message)
        self._sender.closed = True
        transport = self._sender.transport
        transport.pause_reading()
        transport.write_eof()
        asyncio.get_running_loop().call_later(_LINGER_S, transport.abort)

    def let_go(self, message: str) -> None:
        """Say why, and close."""
        self._say(self._whole.last, ErrorCode.ENHANCE_YOUR_CALM, message)
        self.close()

    def close(self) -> None:
        """Close when what was written is on its way."""
        self._sender.closed = True
        self._sender.transport.close()

    def abort(self) -> None:
        """Close now."""
        self._sender.closed = True
        self._sender.transport.abort()

    def _say(self, last: int, code: ErrorCode, message: str = "") -> None:
        said = message.encode(errors="replace")[:_SAID_BYTES]
        payload = last.to_bytes(4, "big") + code.to_bytes(4, "big") + said
        self._sender.control(frame(GOAWAY, 0, 0, payload))
