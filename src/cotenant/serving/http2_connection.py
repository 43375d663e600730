"""The reading half of an HTTP/2 connection: frames in, requests out (RFC 9113, sections 3 to 6).

Nothing here waits or knows a task: what a client may still send and what it has not yet taken are
counters. A connection reads until its turn is over (``http2_credit``), then leaves what it has
and goes on in the next turn of the loop, behind all others that wait for theirs.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Callable
from typing import ClassVar, Generic, Protocol

from cotenant.serving.http2_credit import REQUEST, Credit
from cotenant.serving.http2_frames import (
    ACK,
    CONTINUATION,
    DATA,
    DEFAULT_FRAME_BYTES,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    FRAME_HEAD,
    GOAWAY,
    HEAD_BYTES,
    HEADERS,
    MAX_FRAME_BYTES,
    MAX_WINDOW,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    WITH_PRIORITY,
    ErrorCode,
    Fault,
    Setting,
    frame,
    settings,
    word_frame,
)
from cotenant.serving.http2_headers import Block, Head, HeaderReader, Headers
from cotenant.serving.http2_leaving import Leaving
from cotenant.serving.http2_limits import (
    CONNECTION_WINDOW,
    FRAME_BYTES,
    HEADER_BYTES,
    STREAM_WINDOW,
    STREAMS,
)
from cotenant.serving.http2_sending import Receiver, Sender, Stream, capped
from cotenant.serving.intake import Share
from cotenant.serving.overdue import Overdue

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


def _check_priority(number: int, payload: bytes) -> None:
    if int.from_bytes(payload[:4], "big") & MAX_WINDOW == number and len(payload) >= 4:
        raise Fault(ErrorCode.PROTOCOL_ERROR, f"stream {number} depends on itself")


class Application(Protocol[Head]):
    """What a server serves."""

    def head(self, headers: Headers) -> Head:
        """What a request's headers say. May be remembered for equal headers."""

    def open(self, stream: Stream, head: Head) -> Receiver | None:
        """Take up a request; None if it was answered at once."""


class Host(Protocol[Head]):
    """What a connection needs of its server."""

    app: Application[Head]
    incomplete: Overdue
    unread: Overdue

    def share(self) -> Share:
        """A share of the memory for bodies."""

    def admit(self, connection: Connection[Head]) -> None:
        """Serve one more connection; another may have to give way."""

    def answered(self, connection: Connection[Head]) -> None:
        """A request was answered to some use."""

    def busy(self, connection: Connection[Head]) -> None:
        """It has a request under way, after none."""

    def idle(self, connection: Connection[Head]) -> None:
        """It has no request under way any more."""

    def discard(self, connection: Connection[Head]) -> None:
        """A connection is gone."""


class Connection(asyncio.Protocol, Generic[Head]):
    """One client."""

    def __init__(self, server: Host[Head]) -> None:
        self._server = server
        self.credit = Credit()
        self.share = server.share()
        self._headers = HeaderReader(HEADER_BYTES, server.app.head, self.credit.work)
        self._sender = Sender(self, server.unread)
        self._leaving = Leaving(self, self._sender)
        self._transport: asyncio.Transport = None  # type: ignore[assignment]
        self._streams: dict[int, Stream] = {}
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
        self._settled = False
        """The client's first settings are here."""
        self._left = 0
        """Bytes to come of the data frame under way, which is ``_data_of``'s, and after them of
        its padding."""
        self._padding = 0
        self._data_of = 0
        self._data_ends = False
        self._block: bytearray | None = None
        """Headers to be continued, of stream ``_block_of``."""
        self._block_of = 0
        self._block_ends = False
        self.last = 0
        """The newest stream."""
        self._room = CONNECTION_WINDOW

    # The transport's side.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = self._sender.transport = transport
        self._server.admit(self)
        self._server.incomplete.enter(self, self._late)

    def connection_lost(self, _: Exception | None) -> None:
        self._sender.closed = True
        self._lose_all()
        self._server.incomplete.leave(self)
        self._server.discard(self)

    def pause_writing(self) -> None:
        self._sender.paused = True
        self.credit.turn = 0
        if not self._sender.closed:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if not self._sender.closed:
            self._sender.resume()
            self._end_turn()

    def data_received(self, data: bytes) -> None:
        if self._sender.closed:
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
        if self._sender.closed:
            self._data, self._at = b"", 0
            return
        if self.credit.turn <= 0:
            self._end_turn()
        left = self._at < len(self._data)
        late = self._server.incomplete
        owed = left or self._block is not None or not self._settled
        if self._later or not owed or (self._settled and self._block is None and self._at > before):
            late.leave(self)
        if owed and not self._later and self not in late:
            late.enter(self, self._late)

    def _end_turn(self) -> None:
        """Go on in the next turn of the loop, if the client reads what it was sent."""
        if not self._later:
            self._later = True
            if not self._sender.paused:
                self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._later = False
        if self._sender.closed or self._sender.paused:
            return
        self.credit.begin()
        for _ in range(len(self._again)):
            stream = next(iter(self._again))
            del self._again[stream]
            if stream.receiver is not None:
                stream.receiver.again()
            if self.credit.turn <= 0:
                break
        if not self._sender.closed:
            self._advance()
        if self._again and not self._sender.closed:
            self._end_turn()
        if not (self._later or self._sender.closed or self._sender.paused):
            self._transport.resume_reading()

    def again(self, stream: Stream) -> None:
        """See ``Reading``."""
        if not self._sender.closed:
            self._again[stream] = None
            self._end_turn()

    # Reading.

    def _read(self, data: bytes, at: int) -> int:
        """Go through ``data`` from ``at`` on; returns up to where it was understood."""
        size, credit = len(data), self.credit
        if not self._greeted:
            if not data.startswith(PREFACE[:size]):
                self._transport.write(_NOT_HTTP2)
                self._leaving.close()
                return size
            if size < len(PREFACE):
                return 0
            self.greet()
            at = len(PREFACE)
        view = memoryview(data)
        if self._left or self._padding:
            at = self._take(view, at)
        while size - at >= HEAD_BYTES and credit.turn > 0 and not self._sender.closed:
            word, flags, number = FRAME_HEAD.unpack_from(data, at)
            length, kind, number = word >> 8, word & 0xFF, number & MAX_WINDOW
            begin = at + HEAD_BYTES
            if length > (FRAME_BYTES if kind == DATA else _CONTROL_BYTES):
                raise Fault(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            if kind == DATA:
                if not flags and (stop := self._take_run(data, view, at, number)) > at:
                    at = stop
                    continue
                padding = 0
                if flags & PADDED:
                    if begin == size and length:
                        break
                    padding = data[begin] + 1 if length else 1
                    begin += 1
                self._begin_data(number, length, padding, flags)
                at = self._take(view, begin)
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
        return len(self._streams)

    def greet(self) -> None:
        """Say what a server says first."""
        if not self._greeted:
            self._greeted = True
            self._transport.write(_GREETING)

    def _take_run(self, data: bytes, view: memoryview, at: int, number: int) -> int:
        """Take data frames of one stream that follow each other, are here entirely and bring
        nothing but bytes, nor use so much of a window that more is to be given: most of a large
        body that comes in small frames. Returns where the first other one begins."""
        stream = self._streams.get(number)
        if self._block is not None or stream is None or stream.receiver is None:
            return at
        if stream.ended or stream.answered or stream.promised >= 0:
            return at
        room = min(self._room - CONNECTION_WINDOW // 2, stream.room - STREAM_WINDOW // 4)
        pieces: list[memoryview] = []
        size, taken, most = len(data), 0, self.credit.turn
        while size - at >= HEAD_BYTES and len(pieces) < most:
            word, flags, other = FRAME_HEAD.unpack_from(data, at)
            length, begin = word >> 8, at + HEAD_BYTES
            stop = begin + length
            if flags or word & 0xFF != DATA or other & MAX_WINDOW != number:
                break
            if stop > size or taken + length >= room or not _SMALL_BYTES <= length <= FRAME_BYTES:
                break
            pieces.append(view[begin:stop])
            taken += length
            at = stop
        if pieces:
            self._room -= taken
            stream.room -= taken
            self.credit.turn -= len(pieces) + (taken >> _BYTES_PER_UNIT_SHIFT)
            stream.receiver.data(pieces)
        return at

    def _begin_data(self, number: int, length: int, padding: int, flags: int) -> None:
        """A data frame of ``length`` bytes begins; ``padding`` of them, with the byte that tells
        their number, are padding."""
        if self._block is not None:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "headers were to be continued")
        self._check_known(number)
        if padding > length:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "a frame with more padding than payload")
        if length > self._room:
            raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "more data than the connection's window")
        stream = self._streams.get(number)
        ends = bool(flags & END_STREAM)
        if stream is None or (length - padding < _SMALL_BYTES and not ends):
            self.credit.charge(1)
        self.credit.turn -= 1 + (length >> _BYTES_PER_UNIT_SHIFT)
        self._room -= length
        if self._room <= CONNECTION_WINDOW // 2:
            more = CONNECTION_WINDOW - self._room
            self._room = CONNECTION_WINDOW
            self._sender.control(word_frame(WINDOW_UPDATE, 0, more))
        if stream is not None:
            self._count_data(stream, length, length - padding, ends)
        else:
            self._check_late(number)
        self._left, self._padding = length - padding, max(0, padding - 1)
        self._data_of, self._data_ends = number, ends

    def _count_data(self, stream: Stream, length: int, payload: int, ends: bool) -> None:
        """``length`` bytes of a stream's window are used, ``payload`` of them for its body."""
        if stream.ended:
            self._reset(stream, ErrorCode.STREAM_CLOSED)
        elif length > stream.room:
            self._reset(stream, ErrorCode.FLOW_CONTROL_ERROR)
        elif stream.promised >= 0 and (
            payload > stream.promised or (ends and payload < stream.promised)
        ):
            self._reset(stream, ErrorCode.PROTOCOL_ERROR)
        else:
            stream.room -= length
            if stream.promised >= 0:
                stream.promised -= payload

    def _take(self, view: memoryview, at: int) -> int:
        """Hand on what is here of the data frame under way; returns where that ends."""
        stop = min(at + self._left, len(view))
        self._left -= stop - at
        after = stop
        if self._padding and not self._left:
            after = min(stop + self._padding, len(view))
            self._padding -= after - stop
        stream = self._streams.get(self._data_of)
        if stream is None or stream.ended:
            return after
        if stop > at and stream.receiver is not None and not stream.answered:
            stream.receiver.data((view[at:stop],))
        if not self._left and self._data_ends:
            self._end(stream)
        elif stream.room < STREAM_WINDOW // 4:
            self.make_room(stream)
        return after

    def make_room(self, stream: Stream) -> None:
        """See ``Reading``."""
        more = STREAM_WINDOW - stream.room
        if more and not (stream.paused or stream.ended or stream.answered):
            stream.room = STREAM_WINDOW
            self._sender.control(word_frame(WINDOW_UPDATE, stream.id, more))

    def _end(self, stream: Stream) -> None:
        stream.ended = True
        if stream.receiver is not None and not stream.answered:
            stream.receiver.end()

    def _frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        """Any frame but plain data."""
        if self._block is not None and (kind != CONTINUATION or number != self._block_of):
            raise Fault(ErrorCode.PROTOCOL_ERROR, "headers were to be continued")
        if not self._settled and (kind != SETTINGS or flags & ACK):
            raise Fault(ErrorCode.PROTOCOL_ERROR, "settings must come first")
        if _SIZE_OF.get(kind, len(payload)) != len(payload):
            raise Fault(ErrorCode.FRAME_SIZE_ERROR, f"a frame of kind {kind} of a wrong size")
        self.credit.charge(1)
        handle = self._HANDLERS.get(kind)
        if handle is not None:  # unknown frames are to be ignored
            handle(self, flags, number, payload)

    def _on_headers(self, flags: int, number: int, payload: bytes) -> None:
        begin, stop = 0, len(payload)
        if flags & PADDED:
            begin, stop = 1, stop - (payload[0] if payload else 0)
        if flags & WITH_PRIORITY:
            _check_priority(number, payload[begin:])
            begin += 5
        if number % 2 == 0 or begin > stop:
            raise Fault(ErrorCode.PROTOCOL_ERROR, f"bad headers for stream {number}")
        block = payload[begin:stop]
        if flags & END_HEADERS:
            self._read_block(number, bool(flags & END_STREAM), block)
        else:
            self._block = bytearray(block)
            self._block_of, self._block_ends = number, bool(flags & END_STREAM)

    def _on_continuation(self, flags: int, _: int, payload: bytes) -> None:
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
        stream = self._streams.get(number)
        if stream is None:
            self._check_late(number)
        elif stream.ended:
            self._reset(stream, ErrorCode.STREAM_CLOSED)
        elif not (ends and said.trails and stream.promised <= 0):
            self._reset(stream, ErrorCode.PROTOCOL_ERROR)
        else:  # trailers, which say nothing here
            self._end(stream)

    def _open(self, number: int, ends: bool, said: Block[Head], cost: int) -> None:
        refused = self._leaving.under_way or len(self._streams) >= STREAMS
        if refused or said.head is None or (ends and said.length > 0):
            code = ErrorCode.REFUSED_STREAM if refused else ErrorCode.PROTOCOL_ERROR
            self._sender.control(word_frame(RST_STREAM, number, code))
            self._remember(number, early=not ends)
            self.credit.wasted(cost)
            return
        if not self._streams:
            self._server.busy(self)
        self._streams[number] = stream = Stream(self, self._sender, number, cost)
        stream.promised = said.length
        stream.receiver = self._server.app.open(stream, said.head)
        if ends:
            self._end(stream)

    def _on_window_update(self, _: int, number: int, payload: bytes) -> None:
        more = int.from_bytes(payload, "big") & MAX_WINDOW
        if not number:
            if not more:
                raise Fault(ErrorCode.PROTOCOL_ERROR, "a window is opened by nothing")
            self._sender.grow(None, more)
            return
        self._check_known(number)
        stream = self._streams.get(number)
        if stream is None:
            return
        if not more:
            self._reset(stream, ErrorCode.PROTOCOL_ERROR)
        elif stream.window + more > MAX_WINDOW:
            self._reset(stream, ErrorCode.FLOW_CONTROL_ERROR)
        else:
            self._sender.grow(stream, more)

    def _on_rst_stream(self, _: int, number: int, payload: bytes) -> None:
        self._check_known(number)
        stream = self._streams.get(number)
        if stream is not None:
            log.debug("stream %d was reset, code %d", number, int.from_bytes(payload, "big"))
            stream.ended = True
            self._lose(stream)

    def _on_priority(self, _: int, number: int, payload: bytes) -> None:
        if not number:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "a priority of no stream")
        _check_priority(number, payload)  # which is advice, and not taken

    def _on_ping(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "a ping on a stream")
        if not flags & ACK:
            self._sender.control(frame(PING, ACK, 0, payload))
        else:
            self._leaving.ping_answered(payload)

    def _on_goaway(self, _: int, number: int, payload: bytes) -> None:
        if number:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "a goodbye on a stream")
        if len(payload) < 8:
            raise Fault(ErrorCode.FRAME_SIZE_ERROR, "a goodbye that is too short")
        self._leaving.leave()

    def _on_push_promise(self, *_: object) -> None:
        raise Fault(ErrorCode.PROTOCOL_ERROR, "a client does not promise")

    def _check_known(self, number: int) -> None:
        if number == 0 or number > self.last or number % 2 == 0:
            raise Fault(ErrorCode.PROTOCOL_ERROR, f"stream {number} is not open")

    def _check_late(self, number: int) -> None:
        """Headers or data for a stream that is not open any more, or was passed over: to be ignored
        where the client may have sent them before it knew that the stream had ended."""
        early = self._ended.get(number)
        if early is None:
            raise Fault(ErrorCode.PROTOCOL_ERROR, f"stream {number} cannot be opened any more")
        if not early:
            raise Fault(ErrorCode.STREAM_CLOSED, f"stream {number} has ended")

    def _on_settings(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "settings on a stream")
        if len(payload) % 6 or (flags & ACK and payload):
            raise Fault(ErrorCode.FRAME_SIZE_ERROR, "settings of a wrong size")
        if len(payload) > 6 * _SETTINGS:
            raise Fault(ErrorCode.ENHANCE_YOUR_CALM, "too many settings")
        if flags & ACK:
            return
        self._settled = True
        before = self._sender.first_window
        for key, value in struct.iter_unpack(">HI", payload):
            self._apply_setting(key, value)
        self._sender.control(frame(SETTINGS, ACK, 0))
        if self._sender.first_window > before:
            self._sender.pump()

    def _apply_setting(self, key: int, value: int) -> None:
        sender = self._sender
        if key == Setting.HEADER_TABLE_SIZE:
            # Our blocks use no table, but one that shrinks must be told so (RFC 7541, 4.2).
            sender.shrink_table |= value < 4096
        elif key == Setting.INITIAL_WINDOW_SIZE:
            if value > MAX_WINDOW:
                raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "a window of an impossible size")
            sender.resize(value, self._streams.values())
        elif key == Setting.MAX_FRAME_SIZE:
            if not DEFAULT_FRAME_BYTES <= value <= MAX_FRAME_BYTES:
                raise Fault(ErrorCode.PROTOCOL_ERROR, "frames of an impossible size")
            sender.frame_bytes = capped(value)
        elif key == Setting.ENABLE_PUSH and value > 1:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "push is neither on nor off")

    _HANDLERS: ClassVar[dict[int, Callable[..., None]]] = {
        HEADERS: _on_headers,
        PRIORITY: _on_priority,
        RST_STREAM: _on_rst_stream,
        SETTINGS: _on_settings,
        PUSH_PROMISE: _on_push_promise,
        PING: _on_ping,
        GOAWAY: _on_goaway,
        WINDOW_UPDATE: _on_window_update,
        CONTINUATION: _on_continuation,
    }

    # Ends.

    def said(self, stream: Stream) -> None:
        """See ``Reading``."""
        if stream.blamed:
            self.credit.wasted(stream.cost)
        else:
            self.credit.answered(stream.cost)
            self._server.answered(self)
        self._forget(stream)

    def _reset(self, stream: Stream, code: ErrorCode) -> None:
        """End a stream because of what its client did."""
        self._sender.control(word_frame(RST_STREAM, stream.id, code))
        self._lose(stream)

    def _lose(self, stream: Stream) -> None:
        receiver = stream.receiver
        self.credit.wasted(stream.cost)
        stream.answered = True
        self._forget(stream)
        if receiver is not None:
            receiver.lost()

    def _lose_all(self) -> None:
        for stream in tuple(self._streams.values()):
            self._lose(stream)

    def _forget(self, stream: Stream) -> None:
        self._sender.forget(stream)
        stream.receiver = None
        if self._streams.pop(stream.id, None) is None:
            return
        self._remember(stream.id, early=not stream.ended)
        if not self._streams:
            self._server.idle(self)
            self._leaving.nothing_left()

    def _remember(self, number: int, early: bool) -> None:
        ended = self._ended
        ended[number] = early
        if len(ended) > _REMEMBERED:
            del ended[next(iter(ended))]

    def drain(self) -> None:
        """Take no more requests, and close when those under way are answered."""
        self._leaving.drain(self._greeted)

    def give_way(self) -> None:
        """End: there are too many connections, and others are of more use."""
        if not self._sender.closed:
            self.greet()
            self._leaving.let_go("there are too many connections; try again later")
            self._lose_all()

    def abort(self) -> None:
        """Close now."""
        self._leaving.abort()

    def _late(self) -> None:
        self.fail(ErrorCode.ENHANCE_YOUR_CALM, "a frame was not complete in time")

    def fail(self, code: ErrorCode, message: str) -> None:
        """See ``Reading``."""
        if not self._sender.closed:
            log.debug("an HTTP/2 connection ends: %s", message)
            self.greet()  # settings are what a server says first
            self._leaving.fail(code, message)
            self._lose_all()
