"""The reading half of an HTTP/2 connection: frames in, requests out (RFC 9113, sections 3 to 6).

Nothing here waits or knows a task: what a client may still send and what it has not yet taken are
counters. A connection reads until its turn is over (``http2_credit``), then leaves what it has
and goes on in the next turn of the loop, behind all others that wait for theirs.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Generic

from cotenant.serving.http2_application import Host
from cotenant.serving.http2_control import HANDLERS, check_priority
from cotenant.serving.http2_credit import REQUEST, Credit
from cotenant.serving.http2_frames import (
    ACK,
    CONTINUATION,
    DATA,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    FRAME_HEAD,
    HEAD_BYTES,
    HEADERS,
    MAX_WINDOW,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    WITH_PRIORITY,
    ErrorCode,
    Fault,
    Setting,
    settings,
    word_frame,
)
from cotenant.serving.http2_headers import Block, Head, HeaderReader
from cotenant.serving.http2_incoming import Incoming
from cotenant.serving.http2_leaving import Leaving
from cotenant.serving.http2_limits import (
    CONNECTION_WINDOW,
    FRAME_BYTES,
    HEADER_BYTES,
    STREAM_WINDOW,
    STREAMS,
)
from cotenant.serving.http2_sending import Sender, Stream

log = logging.getLogger("cotenant.serving")

_CONTROL_BYTES = HEADER_BYTES + 1024
"""The largest frame that is no data; a block of headers with padding and priority fits."""
_SMALL_BYTES = 256
"""Data frames below this size make more work than they bring data."""
_BYTES_PER_UNIT_SHIFT = 13
_REMEMBERED = 1024
"""Streams that have ended, whose late frames are told from those of a client that is wrong."""
_SIZE_OF = {PRIORITY: 5, RST_STREAM: 4, PING: 8, WINDOW_UPDATE: 4}
_SETTINGS = 64
"""In a frame; there are not a dozen."""
_NOT_HTTP2 = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n"
    b"this port speaks gRPC (HTTP/2 without TLS); REST has a port of its own\n"
)
_GREETING = settings(
    {
        Setting.MAX_CONCURRENT_STREAMS: STREAMS,
        Setting.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
        Setting.MAX_FRAME_SIZE: FRAME_BYTES,
        Setting.MAX_HEADER_LIST_SIZE: HEADER_BYTES,
    }
) + word_frame(WINDOW_UPDATE, 0, CONNECTION_WINDOW - DEFAULT_WINDOW)


class Connection(asyncio.Protocol, Generic[Head]):
    """One client."""

    def __init__(self, server: Host[Head]) -> None:
        self._server = server
        self.credit = Credit()
        self.share = server.share()
        self._headers = HeaderReader(HEADER_BYTES, server.app.head, self.credit.work)
        self.sender = Sender(self, server.unread)
        self.leaving = Leaving(self, self.sender)
        self._incoming = Incoming(self, self.sender, self.credit)
        self._transport: asyncio.Transport = None  # type: ignore[assignment]
        self.streams: dict[int, Stream] = {}
        self._ended: dict[int, bool] = {}
        """Streams that ended lately; whether the client may have sent more before it knew."""
        self._again: dict[Stream, None] = {}
        """Streams with work of their own for the next turn."""
        self._later = False
        """The turn is over, and the next is on its way."""
        self._data = b""
        self._at = 0
        """What was read and from where on it is still to be gone through."""
        self._greeted = False
        self.settled = False
        """The client's first settings are here."""
        self._block: bytearray | None = None
        """Headers to be continued, of stream ``_block_of``."""
        self._block_of = 0
        self._block_ends = False
        self.last = 0
        """The newest stream."""
        self.is_idle = False
        """No request was answered since the server last looked."""

    # The transport's side.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = self.sender.transport = transport
        self._server.admit(self)
        self._server.incomplete.enter(self, self._late)

    def connection_lost(self, _: Exception | None) -> None:
        self.sender.closed = True
        self._lose_all()
        self._server.incomplete.leave(self)
        self._server.discard(self)

    def pause_writing(self) -> None:
        self.sender.paused = True
        self.credit.turn = 0
        if not self.sender.closed:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if not self.sender.closed:
            self.sender.resume()
            self._end_turn()

    def data_received(self, data: bytes) -> None:
        if self.sender.closed:
            return
        if self._at < len(self._data):
            data = self._data[self._at :] + data
        self._data, self._at = data, 0
        self._advance()

    # Turns.

    def _advance(self) -> None:
        """Go through what was read, until the turn is over."""
        before = self._at
        try:
            self._at = self._read(self._data, before)
        except Fault as fault:
            self.fail(fault.code, str(fault))
        if self.sender.closed:
            self._data, self._at = b"", 0
            return
        moved = self._at > before
        if self.credit.turn <= 0:
            self._end_turn()
        else:  # large buffers are cheap to have again while they are given back at once
            self._data, self._at = self._data[self._at :], 0
        left = self._at < len(self._data)
        late = self._server.incomplete
        owed = left or self._block is not None or not self.settled
        if self._later or not owed or (self.settled and self._block is None and moved):
            late.leave(self)
        if owed and not self._later and self not in late:
            late.enter(self, self._late)

    def _end_turn(self) -> None:
        """Go on in the next turn of the loop, if the client reads what it was sent."""
        if not self._later:
            self._later = True
            if not self.sender.paused:
                self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._later = False
        if self.sender.closed or self.sender.paused:
            return
        self.credit.begin()
        for _ in range(len(self._again)):
            stream = next(iter(self._again))
            del self._again[stream]
            if stream.receiver is not None:
                stream.receiver.again()
            if self.credit.turn <= 0:
                break
        if not self.sender.closed:
            self._advance()
        if self._again and not self.sender.closed:
            self._end_turn()
        if not (self._later or self.sender.closed or self.sender.paused):
            self._transport.resume_reading()

    def again(self, stream: Stream) -> None:
        """See ``Reading``."""
        if not self.sender.closed:
            self._again[stream] = None
            self._end_turn()

    # Reading.

    def _read(self, data: bytes, at: int) -> int:
        """Go through ``data`` from ``at`` on; returns up to where it was understood."""
        size, credit, incoming, sender = len(data), self.credit, self._incoming, self.sender
        if not self._greeted:
            if not data.startswith(PREFACE[:size]):
                self._transport.write(_NOT_HTTP2)
                self.leaving.close()
                return size
            if size < len(PREFACE):
                return 0
            self.greet()
            at = len(PREFACE)
        view = memoryview(data)
        if incoming.midway:
            at = incoming.take(view, at)
        while size - at >= HEAD_BYTES and credit.turn > 0 and not sender.closed:
            word, flags, number = FRAME_HEAD.unpack_from(data, at)
            length, kind, number = word >> 8, word & 0xFF, number & MAX_WINDOW
            begin = at + HEAD_BYTES
            if length > (FRAME_BYTES if kind == DATA else _CONTROL_BYTES):
                raise Fault(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            if kind == DATA:
                if self._block is not None:
                    raise Fault(ErrorCode.PROTOCOL_ERROR, "headers were to be continued")
                if not flags and (stop := incoming.run(data, view, at, number)) > at:
                    at = stop
                    continue
                padding = 0
                if flags & PADDED:
                    if begin == size and length:
                        break
                    padding = data[begin] + 1 if length else 1
                    begin += 1
                incoming.begin(number, length, padding, flags)
                at = incoming.take(view, begin)
                continue
            stop = begin + length
            if stop > size:
                break
            self._frame(kind, flags, number, data[begin:stop])
            at = stop
        return at

    @property
    def requests(self) -> int:
        """How many are under way."""
        return len(self.streams)

    def greet(self) -> None:
        """Say what a server says first."""
        if not self._greeted:
            self._greeted = True
            self._transport.write(_GREETING)

    def make_room(self, stream: Stream) -> None:
        """See ``Reading``."""
        self._incoming.make_room(stream)

    def keep(self, nbytes: int) -> None:
        """See ``Reading``."""
        self._incoming.keep(nbytes)

    def end(self, stream: Stream) -> None:
        """See ``Requests``."""
        stream.ended = True
        if stream.receiver is not None and not stream.answered:
            stream.receiver.end()

    def _frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        """Any frame but plain data."""
        if self._block is not None and (kind != CONTINUATION or number != self._block_of):
            raise Fault(ErrorCode.PROTOCOL_ERROR, "headers were to be continued")
        if not self.settled and (kind != SETTINGS or flags & ACK):
            raise Fault(ErrorCode.PROTOCOL_ERROR, "settings must come first")
        if _SIZE_OF.get(kind, len(payload)) != len(payload):
            raise Fault(ErrorCode.FRAME_SIZE_ERROR, f"a frame of kind {kind} of a wrong size")
        self.credit.charge(1)
        if kind == HEADERS:
            self._on_headers(flags, number, payload)
        elif kind == CONTINUATION:
            self._on_continuation(flags, payload)
        elif kind in HANDLERS:  # unknown frames are to be ignored
            HANDLERS[kind](self, flags, number, payload)

    def _on_headers(self, flags: int, number: int, payload: bytes) -> None:
        begin, stop = 0, len(payload)
        if flags & PADDED:
            begin, stop = 1, stop - (payload[0] if payload else 0)
        if flags & WITH_PRIORITY:
            check_priority(number, payload[begin:])
            begin += 5
        if number % 2 == 0 or begin > stop:
            raise Fault(ErrorCode.PROTOCOL_ERROR, f"bad headers for stream {number}")
        block = payload[begin:stop]
        if flags & END_HEADERS:
            self._read_block(number, bool(flags & END_STREAM), block)
        else:
            self._block = bytearray(block)
            self._block_of, self._block_ends = number, bool(flags & END_STREAM)

    def _on_continuation(self, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "there are no headers to continue")
        self._block += payload
        if len(self._block) > HEADER_BYTES:
            raise Fault(ErrorCode.ENHANCE_YOUR_CALM, "the headers are too large")
        if flags & END_HEADERS:
            block, self._block = bytes(self._block), None
            self._read_block(self._block_of, self._block_ends, block)

    def _read_block(self, number: int, ends: bool, block: bytes) -> None:
        before = self.credit.turn
        said = self._headers.read(block)  # always, for the next block builds on it
        cost = before - self.credit.turn
        if number > self.last:
            self.last = number
            self.credit.work(REQUEST)
            self._open(number, ends, said, REQUEST + cost)
            return
        self.credit.wasted(cost)
        stream = self.streams.get(number)
        if stream is None:
            self.check_late(number)
        elif stream.ended:
            self.reset(stream, ErrorCode.STREAM_CLOSED)
        elif not (ends and said.trails and stream.promised <= 0):
            self.reset(stream, ErrorCode.PROTOCOL_ERROR)
        else:  # trailers, which say nothing here
            self.end(stream)

    def _open(self, number: int, ends: bool, said: Block[Head], cost: int) -> None:
        refused = self.leaving.under_way or len(self.streams) >= STREAMS
        if refused or said.head is None or (ends and said.length > 0):
            code = ErrorCode.REFUSED_STREAM if refused else ErrorCode.PROTOCOL_ERROR
            self.sender.control(word_frame(RST_STREAM, number, code))
            self._remember(number, early=not ends)
            self.credit.wasted(cost)
            return
        self.streams[number] = stream = Stream(self, self.sender, number, cost)
        stream.promised = said.length
        stream.receiver = self._server.app.open(stream, said.head)
        if ends:
            self.end(stream)

    def check_known(self, number: int) -> None:
        if number == 0 or number > self.last or number % 2 == 0:
            raise Fault(ErrorCode.PROTOCOL_ERROR, f"stream {number} is not open")

    def check_late(self, number: int) -> None:
        """Headers or data for a stream that is not open any more, or was passed over: to be ignored
        where the client may have sent them before it knew that the stream had ended."""
        early = self._ended.get(number)
        if early is None:
            raise Fault(ErrorCode.PROTOCOL_ERROR, f"stream {number} cannot be opened any more")
        if not early:
            raise Fault(ErrorCode.STREAM_CLOSED, f"stream {number} has ended")

    # Ends.

    def said(self, stream: Stream) -> None:
        """See ``Reading``."""
        if stream.blamed:
            self.credit.wasted(stream.cost)
        else:
            self.credit.answered(stream.cost)
            self._server.answered(self)
        self._forget(stream)

    def reset(self, stream: Stream, code: ErrorCode) -> None:
        """End a stream because of what its client did."""
        self.sender.control(word_frame(RST_STREAM, stream.id, code))
        self.lose(stream)

    def lose(self, stream: Stream) -> None:
        receiver = stream.receiver
        self.credit.wasted(stream.cost)
        stream.answered = True
        self._forget(stream)
        if receiver is not None:
            receiver.lost()

    def _lose_all(self) -> None:
        for stream in tuple(self.streams.values()):
            self.lose(stream)

    def _forget(self, stream: Stream) -> None:
        self.sender.forget(stream)
        stream.receiver = None
        if self.streams.pop(stream.id, None) is None:
            return
        self._remember(stream.id, early=not stream.ended)
        if self.leaving.under_way:
            self.leaving.nothing_left()

    def _remember(self, number: int, early: bool) -> None:
        ended = self._ended
        ended[number] = early
        if len(ended) > _REMEMBERED:
            del ended[next(iter(ended))]

    def drain(self) -> None:
        """Take no more requests, and close when those under way are answered."""
        self.leaving.drain(self._greeted)

    def give_way(self) -> None:
        """End: there are too many connections, and others are of more use."""
        if not self.sender.closed:
            self.greet()
            self.leaving.let_go("there are too many connections; try again later")
            self._lose_all()

    def abort(self) -> None:
        """Close now."""
        self.leaving.abort()

    def _late(self) -> None:
        self.fail(ErrorCode.ENHANCE_YOUR_CALM, "a frame was not complete in time")

    def fail(self, code: ErrorCode, message: str) -> None:
        """See ``Reading``."""
        if not self.sender.closed:
            log.debug("an HTTP/2 connection ends: %s", message)
            self.greet()  # settings are what a server says first
            self.leaving.fail(code, message)
            self._lose_all()
