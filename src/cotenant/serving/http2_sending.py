"""The writing half of an HTTP/2 connection: answers, the windows that hold them up, and the memory
that they take meanwhile."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from cotenant.serving.http2_credit import Credit
from cotenant.serving.http2_frames import (
    DATA,
    DEFAULT_FRAME_BYTES,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    FRAME_HEAD,
    HEADERS,
    MAX_WINDOW,
    RST_STREAM,
    ErrorCode,
    Fault,
    word_frame,
)
from cotenant.serving.http2_limits import FRAME_BYTES, STREAM_WINDOW
from cotenant.serving.intake import BodyRefused, Share
from cotenant.serving.overdue import Overdue

_TURN_BYTES = 256 * 1024
"""Of one stream's answer, before it is another's turn."""
_STREAMS_PER_UNIT = 4
"""A unit of work (``http2_credit``) looks at about so many streams."""
_TABLE_SIZE_ZERO = b"\x20"

Pieces = list[bytes | memoryview]


class Receiver(Protocol):
    """What becomes of one request. Its methods may answer at once."""

    def data(self, pieces: Sequence[memoryview]) -> None:
        """More of the body; ``pieces`` are to be copied before this returns."""

    def end(self) -> None:
        """The body is complete."""

    def lost(self) -> None:
        """The client has given the request up or is gone; there is nobody to answer."""

    def sent(self) -> None:
        """Data that the windows had held up is all on its way."""

    def again(self) -> None:
        """It is the connection's turn again, as ``Stream.again`` asked."""


class Reading(Protocol):
    """What a stream and the writing half need of the reading half."""

    credit: Credit
    share: Share

    def make_room(self, stream: Stream) -> None:
        """Let the client send more of a stream's body, if it may."""

    def keep(self, nbytes: int) -> None:
        """See ``Stream.keep``."""

    def again(self, stream: Stream) -> None:
        """See ``Stream.again``."""

    def said(self, stream: Stream) -> None:
        """All of a stream's answer is written."""

    def fail(self, code: ErrorCode, message: str) -> None:
        """End the connection because of what its client did."""


class Stream:
    """One request's way back to its client."""

    __slots__ = ("_reading", "_sender", "answered", "blamed", "cost", "ended", "id", "out",
                 "paused", "promised", "receiver", "room", "share", "trailers",
                 "window")  # fmt: skip

    def __init__(self, reading: Reading, sender: Sender, number: int, cost: int) -> None:
        self._reading = reading
        self._sender = sender
        self.share = reading.share
        """The memory that its connection may take."""
        self.id = number
        self.cost = cost
        """Units of work that taking it up took."""
        self.receiver: Receiver | None = None
        self.window = sender.first_window
        """Bytes that the client takes from us."""
        self.room = STREAM_WINDOW
        """Bytes that we take from the client."""
        self.promised = -1
        """Bytes of the body still to come by its stated length; below 0 if none was stated."""
        self.paused = False
        self.ended = False
        """The client has sent all."""
        self.answered = False
        """We have said all, though it may not have been sent yet."""
        self.blamed = False
        """What is wrong with it is the client's fault: its cost is not given back."""
        self.out: deque[memoryview] = deque()
        self.trailers: bytes | None = None

    def send(self, head: bytes, body: bytes, trailers: bytes | None) -> None:
        """Send header block, data and trailer block; each may be missing, and trailers end it.

        Nothing happens once the request was answered or lost.
        """
        if not self.answered:
            self._sender.send(self, head, body, trailers)

    def pause(self) -> None:
        """Let the client send no more than it has been allowed already."""
        self.paused = True

    def resume(self) -> None:
        """Let it send again."""
        self.paused = False
        self._reading.make_room(self)

    def keep(self, nbytes: int) -> None:
        """So much more (less, below 0) of the body is not looked at yet; raises BodyRefused where
        that is too much for the connection."""
        if nbytes > 0:
            self.share.hold(nbytes)
        else:
            self.share.release(-nbytes)
        self._reading.keep(nbytes)

    def work(self, units: int) -> bool:
        """Count work that was done for this request; whether its connection's turn lasts."""
        credit = self._reading.credit
        credit.turn -= units
        return credit.turn > 0

    def again(self) -> None:
        """Have ``Receiver.again`` called when it is the connection's turn again."""
        self._reading.again(self)


class Sender:
    """Writes one connection's frames, within the client's windows.

    What they hold up counts for the connection's share of memory. A client that lets its answers
    pile up beyond that, or takes nothing of them for the time that ``unread`` gives, is
    disconnected.
    """

    def __init__(self, reading: Reading, unread: Overdue) -> None:
        self.transport: asyncio.Transport = None  # type: ignore[assignment]
        self.closed = False
        self.paused = False
        """The client does not read what it was sent."""
        self.window = DEFAULT_WINDOW
        self.first_window = DEFAULT_WINDOW
        self.frame_bytes = DEFAULT_FRAME_BYTES
        self.shrink_table = False
        """The client's header table has become smaller, and has not been told that we know."""
        self.blocked: dict[int, Stream] = {}
        """Streams with data that the windows do not let through, the longest-waiting first."""
        self._reading = reading
        self._overdue = unread

    def send(self, stream: Stream, head: bytes, body: bytes, trailers: bytes | None) -> None:
        """See ``Stream.send``."""
        stream.answered = trailers is not None
        if self.closed:
            return
        pieces: Pieces = []
        if head:
            self._add_headers(pieces, stream, head, END_HEADERS)
        size = len(body)
        room = 0 if self.paused else min(stream.window, self.window, self.frame_bytes)
        if stream.out or size > max(0, room):
            self.transport.writelines(pieces)
            self._queue(stream, body, trailers)
            return
        if size:
            stream.window -= size
            self.window -= size
            pieces += (FRAME_HEAD.pack(size << 8 | DATA, 0, stream.id), body)
            self._reading.credit.sent(size)
        self._write(stream, pieces, trailers)

    def control(self, data: bytes) -> None:
        """Write frames that no window holds up."""
        if not self.closed:
            self.transport.write(data)

    def grow(self, stream: Stream | None, more: int) -> None:
        """The client takes ``more`` bytes of a stream, or (None) of all; raises Fault."""
        if stream is not None:
            stream.window += more
            self._pump_all((stream,))
            return
        was_shut = self.window <= 0
        self.window += more
        if self.window > MAX_WINDOW:
            raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "a window of an impossible size")
        if was_shut:
            self.pump()

    def resize(self, first_window: int, streams: Iterable[Stream]) -> None:
        """The client changes the windows that streams begin with, and so of those that are open;
        raises Fault."""
        more = first_window - self.first_window
        self.first_window = first_window
        looked_at = 0
        for stream in streams:
            looked_at += 1
            stream.window += more
            if stream.window > MAX_WINDOW:
                raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "a window of an impossible size")
        self._reading.credit.charge(looked_at // _STREAMS_PER_UNIT)

    def resume(self) -> None:
        """The client reads again."""
        self.paused = False
        self.pump()

    def pump(self) -> None:
        """Send what the windows let through by now."""
        self._pump_all(self.blocked.values())

    def forget(self, stream: Stream) -> None:
        """Drop what is held up of a stream."""
        if self.blocked.pop(stream.id, None) is not None and not self.blocked:
            self._overdue.leave(self)
        if stream.out:
            self._reading.share.release(sum(map(len, stream.out)))
            stream.out.clear()

    def _queue(self, stream: Stream, body: bytes, trailers: bytes | None) -> None:
        """Send as much as the windows let through, and the rest as they open."""
        if body:
            try:
                self._reading.share.hold(len(body))
            except BodyRefused:
                self._reading.fail(ErrorCode.ENHANCE_YOUR_CALM, "too many answers are not read")
                return
            stream.out.append(memoryview(body))
        stream.trailers = trailers
        if stream.id not in self.blocked:
            if not self.blocked:
                self._overdue.enter(self, self._unread)
            self.blocked[stream.id] = stream
        self._pump_all((stream,))

    def _pump_all(self, streams: Iterable[Stream]) -> None:
        """Send what the windows let through, a little of each of these streams by turns."""
        waiting = deque(streams)
        looked_at = 0
        while waiting and not (self.paused or self.closed):
            stream = waiting.popleft()
            looked_at += 1
            if stream.id in self.blocked and self._pump(stream):
                waiting.append(stream)
        self._reading.credit.turn -= looked_at // _STREAMS_PER_UNIT

    def _pump(self, stream: Stream) -> bool:
        """Send a little of a blocked stream's data; whether there is more that could be sent."""
        pieces: Pieces = []
        sent = 0
        while stream.out and sent < _TURN_BYTES:
            piece = stream.out[0]
            size = min(len(piece), stream.window, self.window, self.frame_bytes)
            if size <= 0:
                break
            pieces += (FRAME_HEAD.pack(size << 8 | DATA, 0, stream.id), piece[:size])
            stream.window -= size
            self.window -= size
            sent += size
            if size == len(piece):
                stream.out.popleft()
            else:
                stream.out[0] = piece[size:]
        if not pieces:
            return False
        self._reading.share.release(sent)
        self._reading.credit.taken_up(sent)
        self._overdue.leave(self)
        del self.blocked[stream.id]
        if stream.out:
            self.blocked[stream.id] = stream
        if self.blocked:
            self._overdue.enter(self, self._unread)
        self._write(stream, pieces, None if stream.out else stream.trailers)
        if not stream.out and stream.receiver is not None:
            stream.receiver.sent()
        return bool(stream.out)

    def _write(self, stream: Stream, pieces: Pieces, trailers: bytes | None) -> None:
        """Write frames and, if given, the trailers that end the stream."""
        if trailers is None:
            self.transport.writelines(pieces)
            return
        self._add_headers(pieces, stream, trailers, END_HEADERS | END_STREAM)
        if not stream.ended:  # all is said; what the client has yet to send is not wanted
            pieces.append(word_frame(RST_STREAM, stream.id, ErrorCode.NO_ERROR))
        self.transport.writelines(pieces)
        self._reading.said(stream)

    def _add_headers(self, pieces: Pieces, stream: Stream, block: bytes, flags: int) -> None:
        if self.shrink_table:
            self.shrink_table = False
            block = _TABLE_SIZE_ZERO + block
        pieces += (FRAME_HEAD.pack(len(block) << 8 | HEADERS, flags, stream.id), block)

    def _unread(self) -> None:
        self._reading.fail(ErrorCode.ENHANCE_YOUR_CALM, "answers were not read for too long")


def capped(frame_bytes: int) -> int:
    """The size of our frames for a client that takes so large ones: what a frame holds is on its
    way at once, and counts for no share of memory."""
    return min(frame_bytes, FRAME_BYTES)
