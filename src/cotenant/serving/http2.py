"""An HTTP/2 server without TLS (RFC 9113, prior knowledge): as much of it as gRPC needs.

``Connection`` reads frames and hands each stream's data to a ``Receiver``; ``Stream`` is the way
to answer. Nothing here waits or knows a task: what a client may still send and what it has not
yet taken are counters.

Every limit on a client:

* ``STREAMS`` requests at one time on a connection, ``connections`` connections of a server;
* ``HEADER_BYTES`` of headers, compressed and not; ``FRAME_BYTES`` in a frame;
* ``STREAM_WINDOW`` bytes of a stream and ``CONNECTION_WINDOW`` of a connection on their way here;
* ``HEAD_S`` seconds for the greeting, for headers and for any other frame that is no data;
* ``UNREAD_S`` seconds in which a client that has answers to take up takes none of them;
* nothing is read from a client while it does not read what it was sent, so that frames which
  ask for an answer (pings, settings, requests that are wrong) cannot pile answers up.

A client that opens streams and resets them costs no more than one that waits for its answers:
what a frame asks for is done before the next is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Generic, Protocol

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
    Head,
    HeaderReader,
    Headers,
    Setting,
    frame,
    settings,
    word_frame,
)
from cotenant.serving.listening import BACKLOG, UNREAD_S
from cotenant.serving.overdue import Overdue

log = logging.getLogger("cotenant.serving")

STREAMS = 256
HEADER_BYTES = 64 * 1024
FRAME_BYTES = 2**20
STREAM_WINDOW = 2**20
CONNECTION_WINDOW = 16 * 2**20
HEAD_S = 30.0

_CONTROL_BYTES = HEADER_BYTES + 1024
"""The largest frame that is no data; a block of headers with padding and priority fits."""
_TURN_BYTES = 256 * 1024
"""Of one stream's answer, before it is another's turn."""
_GOODBYE = b"goodbye!"
_GOODBYE_S = 1.0
_SAID_BYTES = 1024
_SIZE_OF = {PRIORITY: 5, RST_STREAM: 4, PING: 8, WINDOW_UPDATE: 4}
_TABLE_SIZE_ZERO = b"\x20"
_NOT_HTTP2 = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n"
    b"this port speaks gRPC (HTTP/2 without TLS); REST has a port of its own\n"
)


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


class Application(Protocol[Head]):
    """What a server serves."""

    def head(self, headers: Headers) -> Head:
        """What a request's headers say. May be remembered for equal headers."""

    def open(self, stream: Stream, head: Head) -> Receiver | None:
        """Take up a request; None if it was answered at once."""


class Stream:
    """One request's way back to its client."""

    __slots__ = ("_connection", "answered", "ended", "id", "out", "paused", "receiver", "room",
                 "trailers", "window")  # fmt: skip

    def __init__(self, connection: Connection[Any], number: int, window: int) -> None:
        self._connection = connection
        self.id = number
        self.receiver: Receiver | None = None
        self.window = window
        """Bytes that the client takes from us."""
        self.room = STREAM_WINDOW
        """Bytes that we take from the client."""
        self.paused = False
        self.ended = False
        """The client has sent all."""
        self.answered = False
        """We have said all, though it may not have been sent yet."""
        self.out: deque[memoryview] = deque()
        self.trailers: bytes | None = None

    def send(self, head: bytes, body: bytes, trailers: bytes | None) -> None:
        """Send header block, data and trailer block; each may be missing, and trailers end it.

        Nothing happens once the request was answered or lost.
        """
        if not self.answered:
            self._connection.send(self, head, body, trailers)

    def pause(self) -> None:
        """Let the client send no more than it has been allowed already."""
        self.paused = True

    def resume(self) -> None:
        """Let it send again."""
        self.paused = False
        self._connection.make_room(self)


class Connection(asyncio.Protocol, Generic[Head]):
    """One client."""

    def __init__(self, server: Server[Head]) -> None:
        self._server = server
        self._headers = HeaderReader(HEADER_BYTES, server.app.head)
        self._transport: asyncio.Transport = None  # type: ignore[assignment]
        self._streams: dict[int, Stream] = {}
        self._blocked: dict[int, Stream] = {}
        """Streams with data that the windows do not let through, the longest-waiting first."""
        self._rest = b""
        """The beginning of a frame."""
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
        self._last = 0
        """The newest stream."""
        self._window = DEFAULT_WINDOW
        self._first_window = DEFAULT_WINDOW
        self._frame_bytes = DEFAULT_FRAME_BYTES
        self._shrink_table = False
        self._room = CONNECTION_WINDOW
        self._leaving = False
        self._write_paused = False
        self._closed = False

    # The transport's side.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        if not self._server.admit(self):
            self._fail(ErrorCode.REFUSED_STREAM, "too many connections; try again later")
            return
        self._server.incomplete.enter(self, self._late)

    def connection_lost(self, _: Exception | None) -> None:
        self._closed = True
        self._server.discard(self)
        self._server.incomplete.leave(self)
        self._server.unread.leave(self)
        for stream in tuple(self._streams.values()):
            self._lose(stream)

    def pause_writing(self) -> None:
        self._write_paused = True
        if not self._closed:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._closed:
            return
        self._pump_all(self._blocked.values())
        if not (self._closed or self._write_paused):
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._closed:
            return
        if self._rest:
            data = self._rest + data
        try:
            used = self._read(data)
        except Fault as fault:
            self._fail(fault.code, str(fault))
            return
        if self._closed:
            return
        self._rest = data[used:]
        late = self._server.incomplete
        if self._settled and self._block is None and (used or not self._rest):
            late.leave(self)
        if (self._rest or self._block is not None) and self not in late:
            late.enter(self, self._late)

    # Reading.

    def _read(self, data: bytes) -> int:
        """Go through ``data``; returns how much of it was understood."""
        at, size = 0, len(data)
        if not self._greeted:
            if not data.startswith(PREFACE[:size]):
                self._transport.write(_NOT_HTTP2)
                self._close()
                return size
            if size < len(PREFACE):
                return 0
            self._greet()
            at = len(PREFACE)
        view = memoryview(data)
        if self._left or self._padding:
            at = self._take(view, at)
        while size - at >= HEAD_BYTES and not self._closed:
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

    def _greet(self) -> None:
        self._greeted = True
        offer = {
            Setting.MAX_CONCURRENT_STREAMS: STREAMS,
            Setting.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            Setting.MAX_FRAME_SIZE: FRAME_BYTES,
            Setting.MAX_HEADER_LIST_SIZE: HEADER_BYTES,
        }
        more = word_frame(WINDOW_UPDATE, 0, CONNECTION_WINDOW - DEFAULT_WINDOW)
        self._transport.write(settings(offer) + more)

    def _take_run(self, data: bytes, view: memoryview, at: int, number: int) -> int:
        """Take data frames of one stream that follow each other, are here entirely and bring
        nothing but bytes, nor use so much of a window that more is to be given: most of a large
        body that comes in small frames. Returns where the first other one begins."""
        stream = self._streams.get(number)
        if self._block is not None or stream is None or stream.receiver is None:
            return at
        if stream.ended or stream.answered:
            return at
        room = min(self._room - CONNECTION_WINDOW // 2, stream.room - STREAM_WINDOW // 4)
        pieces: list[memoryview] = []
        size, taken = len(data), 0
        while size - at >= HEAD_BYTES:
            word, flags, other = FRAME_HEAD.unpack_from(data, at)
            length, begin = word >> 8, at + HEAD_BYTES
            stop = begin + length
            if flags or word & 0xFF != DATA or other & MAX_WINDOW != number:
                break
            if stop > size or taken + length >= room or length > FRAME_BYTES:
                break
            pieces.append(view[begin:stop])
            taken += length
            at = stop
        if pieces:
            self._room -= taken
            stream.room -= taken
            stream.receiver.data(pieces)
        return at

    def _begin_data(self, number: int, length: int, padding: int, flags: int) -> None:
        """A data frame of ``length`` bytes begins; ``padding`` of them, with the byte that tells
        their number, are padding."""
        if self._block is not None:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "headers were to be continued")
        if number == 0 or number > self._last:
            raise Fault(ErrorCode.PROTOCOL_ERROR, f"data for stream {number}, which is not open")
        if padding > length:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "a frame with more padding than payload")
        if length > self._room:
            raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "more data than the connection's window")
        self._room -= length
        if self._room <= CONNECTION_WINDOW // 2:
            more = CONNECTION_WINDOW - self._room
            self._room = CONNECTION_WINDOW
            self._transport.write(word_frame(WINDOW_UPDATE, 0, more))
        ends = bool(flags & END_STREAM)
        stream = self._streams.get(number)
        if stream is not None:
            if stream.ended:
                self._reset(stream, ErrorCode.STREAM_CLOSED)
            elif length > stream.room:
                self._reset(stream, ErrorCode.FLOW_CONTROL_ERROR)
            else:
                stream.room -= length
        self._left, self._padding = length - padding, max(0, padding - 1)
        self._data_of, self._data_ends = number, ends

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
        """Let the client send more of a stream's body."""
        more = STREAM_WINDOW - stream.room
        if more and not (stream.paused or stream.ended or stream.answered or self._closed):
            stream.room = STREAM_WINDOW
            self._transport.write(word_frame(WINDOW_UPDATE, stream.id, more))

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
        handle = self._HANDLERS.get(kind)
        if handle is not None:  # priorities are advice, and unknown frames are to be ignored
            handle(self, flags, number, payload)

    def _on_headers(self, flags: int, number: int, payload: bytes) -> None:
        begin, stop = 0, len(payload)
        if flags & PADDED:
            begin, stop = 1, stop - (payload[0] if payload else 0)
        if flags & WITH_PRIORITY:
            begin += 5
        if number % 2 == 0 or begin > stop:
            raise Fault(ErrorCode.PROTOCOL_ERROR, f"bad headers for stream {number}")
        block = payload[begin:stop]
        if flags & END_HEADERS:
            self._open(number, bool(flags & END_STREAM), block)
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
            self._open(self._block_of, self._block_ends, block)

    def _open(self, number: int, ends: bool, block: bytes) -> None:
        head = self._headers.read(block)  # always, for the next block builds on it
        stream = self._streams.get(number)
        if stream is not None:
            if stream.ended or not ends:
                self._reset(stream, ErrorCode.PROTOCOL_ERROR)
            else:  # trailers, which say nothing here
                self._end(stream)
            return
        if number <= self._last:
            return  # trailers of a request that was answered before its end
        self._last = number
        if self._leaving or len(self._streams) >= STREAMS:
            self._transport.write(word_frame(RST_STREAM, number, ErrorCode.REFUSED_STREAM))
            return
        self._streams[number] = stream = Stream(self, number, self._first_window)
        stream.receiver = self._server.app.open(stream, head)
        if ends:
            self._end(stream)

    def _on_window_update(self, _: int, number: int, payload: bytes) -> None:
        more = int.from_bytes(payload, "big") & MAX_WINDOW
        if not number:
            was_shut = self._window <= 0
            self._window += more
            if not more or self._window > MAX_WINDOW:
                raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "a window of an impossible size")
            if was_shut:
                self._pump_all(self._blocked.values())
            return
        self._check_known(number)
        stream = self._streams.get(number)
        if stream is None:
            return
        stream.window += more
        if not more or stream.window > MAX_WINDOW:
            self._reset(stream, ErrorCode.FLOW_CONTROL_ERROR)
        elif number in self._blocked:
            self._pump_all((stream,))

    def _on_rst_stream(self, _: int, number: int, payload: bytes) -> None:
        self._check_known(number)
        stream = self._streams.get(number)
        if stream is not None:
            log.debug("stream %d was reset, code %d", number, int.from_bytes(payload, "big"))
            self._lose(stream)

    def _on_ping(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "a ping on a stream")
        if not flags & ACK:
            self._transport.write(frame(PING, ACK, 0, payload))
        elif payload == _GOODBYE:
            self._leave()

    def _on_goaway(self, *_: object) -> None:
        self._leave()

    def _on_push_promise(self, *_: object) -> None:
        raise Fault(ErrorCode.PROTOCOL_ERROR, "a client does not promise")

    def _check_known(self, number: int) -> None:
        if number == 0 or number > self._last:
            raise Fault(ErrorCode.PROTOCOL_ERROR, f"stream {number} is not open")

    def _on_settings(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "settings on a stream")
        if len(payload) % 6 or (flags & ACK and payload):
            raise Fault(ErrorCode.FRAME_SIZE_ERROR, "settings of a wrong size")
        if flags & ACK:
            return
        self._settled = True
        given = dict(struct.iter_unpack(">HI", payload))  # the last of each counts
        for key, value in given.items():
            self._apply_setting(key, value)
        self._transport.write(frame(SETTINGS, ACK, 0))
        if Setting.INITIAL_WINDOW_SIZE in given:
            self._pump_all(self._blocked.values())

    def _apply_setting(self, key: int, value: int) -> None:
        if key == Setting.HEADER_TABLE_SIZE:
            # Our blocks use no table, but one that shrinks must be told so (RFC 7541, 4.2).
            self._shrink_table |= value < 4096
        elif key == Setting.INITIAL_WINDOW_SIZE:
            if value > MAX_WINDOW:
                raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "a window of an impossible size")
            more = value - self._first_window
            self._first_window = value
            for stream in self._streams.values():
                stream.window += more
                if stream.window > MAX_WINDOW:
                    raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "a window of an impossible size")
        elif key == Setting.MAX_FRAME_SIZE:
            if not DEFAULT_FRAME_BYTES <= value <= MAX_FRAME_BYTES:
                raise Fault(ErrorCode.PROTOCOL_ERROR, "frames of an impossible size")
            self._frame_bytes = value
        elif key == Setting.ENABLE_PUSH and value > 1:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "push is neither on nor off")

    _HANDLERS: ClassVar[dict[int, Callable[..., None]]] = {
        HEADERS: _on_headers,
        RST_STREAM: _on_rst_stream,
        SETTINGS: _on_settings,
        PUSH_PROMISE: _on_push_promise,
        PING: _on_ping,
        GOAWAY: _on_goaway,
        WINDOW_UPDATE: _on_window_update,
        CONTINUATION: _on_continuation,
    }

    # Writing.

    def send(self, stream: Stream, head: bytes, body: bytes, trailers: bytes | None) -> None:
        """See ``Stream.send``."""
        stream.answered = trailers is not None
        if self._closed:
            return
        pieces: list[bytes | memoryview] = []
        if head:
            self._add_headers(pieces, stream, head, END_HEADERS)
        size = len(body)
        room = 0 if self._write_paused else min(stream.window, self._window, self._frame_bytes)
        if stream.out or size > max(0, room):
            self._transport.writelines(pieces)
            self._queue(stream, body, trailers)
            return
        if size:
            stream.window -= size
            self._window -= size
            pieces += (FRAME_HEAD.pack(size << 8 | DATA, 0, stream.id), body)
        self._write(stream, pieces, trailers)

    def _queue(self, stream: Stream, body: bytes, trailers: bytes | None) -> None:
        """Send as much as the windows let through, and the rest as they open."""
        if body:
            stream.out.append(memoryview(body))
        stream.trailers = trailers
        if stream.id not in self._blocked:
            if not self._blocked:
                self._server.unread.enter(self, self._unread)
            self._blocked[stream.id] = stream
        self._pump_all((stream,))

    def _pump_all(self, streams: Iterable[Stream]) -> None:
        """Send what the windows let through, a little of each of these streams by turns."""
        waiting = deque(streams)
        while waiting:
            stream = waiting.popleft()
            if stream.id in self._blocked and self._pump(stream):
                waiting.append(stream)

    def _pump(self, stream: Stream) -> bool:
        """Send a little of a blocked stream's data; whether there is more that could be sent."""
        pieces: list[bytes | memoryview] = []
        left = _TURN_BYTES
        while stream.out and left > 0 and not (self._write_paused or self._closed):
            piece = stream.out[0]
            size = min(len(piece), stream.window, self._window, self._frame_bytes)
            if size <= 0:
                break
            pieces += (FRAME_HEAD.pack(size << 8 | DATA, 0, stream.id), piece[:size])
            stream.window -= size
            self._window -= size
            left -= size
            if size == len(piece):
                stream.out.popleft()
            else:
                stream.out[0] = piece[size:]
        if not pieces:
            return False
        unread = self._server.unread
        unread.leave(self)
        del self._blocked[stream.id]
        if stream.out:
            self._blocked[stream.id] = stream
        if self._blocked:
            unread.enter(self, self._unread)
        self._write(stream, pieces, None if stream.out else stream.trailers)
        if not stream.out and stream.receiver is not None:
            stream.receiver.sent()
        return bool(stream.out)

    def _write(
        self, stream: Stream, pieces: list[bytes | memoryview], trailers: bytes | None
    ) -> None:
        """Write frames and, if given, the trailers that end the stream."""
        if trailers is None:
            self._transport.writelines(pieces)
            return
        self._add_headers(pieces, stream, trailers, END_HEADERS | END_STREAM)
        if not stream.ended:  # all is said; what the client has yet to send is not wanted
            pieces.append(word_frame(RST_STREAM, stream.id, ErrorCode.NO_ERROR))
        self._transport.writelines(pieces)
        self._forget(stream)

    def _add_headers(
        self, pieces: list[bytes | memoryview], stream: Stream, block: bytes, flags: int
    ) -> None:
        if self._shrink_table:
            self._shrink_table = False
            block = _TABLE_SIZE_ZERO + block
        pieces += (FRAME_HEAD.pack(len(block) << 8 | HEADERS, flags, stream.id), block)

    def _unread(self) -> None:
        """The client has taken up nothing for too long: give up what waited longest."""
        for stream in self._blocked.values():
            self._reset(stream, ErrorCode.CANCEL)
            break
        if self._blocked:
            self._server.unread.enter(self, self._unread)

    # Ends.

    def _reset(self, stream: Stream, code: ErrorCode) -> None:
        """End a stream because of what its client did."""
        if not self._closed:
            self._transport.write(word_frame(RST_STREAM, stream.id, code))
        self._lose(stream)

    def _lose(self, stream: Stream) -> None:
        receiver, stream.receiver = stream.receiver, None
        stream.answered = True
        self._forget(stream)
        if receiver is not None:
            receiver.lost()

    def _forget(self, stream: Stream) -> None:
        self._streams.pop(stream.id, None)
        if self._blocked.pop(stream.id, None) is not None and not self._blocked:
            self._server.unread.leave(self)
        stream.receiver = None
        stream.out.clear()
        if self._leaving and not self._streams and not self._closed:
            self._close()

    def drain(self) -> None:
        """Take no more requests, and close when those under way are answered.

        What the client sends before it reads of this is still served: only once it has answered
        a ping is it told which of its requests was the last (RFC 9113, section 6.8).
        """
        if self._leaving or self._closed:
            return
        if not self._greeted:
            self._close()
            return
        self._say_goaway(MAX_WINDOW, ErrorCode.NO_ERROR)
        self._transport.write(frame(PING, 0, 0, _GOODBYE))
        asyncio.get_running_loop().call_later(_GOODBYE_S, self._leave)

    def _leave(self) -> None:
        if self._leaving or self._closed:
            return
        self._leaving = True
        self._say_goaway(self._last, ErrorCode.NO_ERROR)
        if not self._streams:
            self._close()

    def _say_goaway(self, last: int, code: ErrorCode, message: str = "") -> None:
        said = message.encode(errors="replace")[:_SAID_BYTES]
        payload = last.to_bytes(4, "big") + code.to_bytes(4, "big") + said
        self._transport.write(frame(GOAWAY, 0, 0, payload))

    def abort(self) -> None:
        """Close now."""
        self._closed = True
        self._transport.abort()

    def _late(self) -> None:
        self._fail(ErrorCode.ENHANCE_YOUR_CALM, f"a frame was not complete within {HEAD_S:g} s")

    def _fail(self, code: ErrorCode, message: str) -> None:
        log.debug("an HTTP/2 connection ends: %s", message)
        if not self._closed:
            if not self._greeted:
                self._greet()  # settings are what a server says first
            self._say_goaway(self._last, code, message)
            self._close()
            for stream in tuple(self._streams.values()):
                self._lose(stream)

    def _close(self) -> None:
        self._closed = True
        self._transport.close()


class Server(Generic[Head]):
    """Listens, and knows its connections: at most ``connections`` at one time."""

    def __init__(self, app: Application[Head], connections: int = 4096) -> None:
        self.app = app
        self.incomplete = Overdue(HEAD_S)
        self.unread = Overdue(UNREAD_S)
        self._most = connections
        self._connections: set[Connection[Head]] = set()
        self._listener: asyncio.Server | None = None
        self._empty = asyncio.Event()

    async def start(self, sock: socket.socket) -> None:
        """Listen on a bound socket, which is this server's from now on."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: Connection(self), sock=sock, backlog=BACKLOG
        )

    def admit(self, connection: Connection[Head]) -> bool:
        """Whether one more connection is served."""
        if len(self._connections) >= self._most:
            return False
        self._connections.add(connection)
        return True

    def discard(self, connection: Connection[Head]) -> None:
        """A connection is gone."""
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    async def drain(self, grace: float) -> None:
        """Stop listening and tell clients to go; returns when they have, or after ``grace`` s."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for connection in tuple(self._connections):
            connection.drain()
        await self._gone(grace)

    async def close(self) -> None:
        """End every connection; each has a second to take up what was written to it."""
        await self._gone(1.0)
        for connection in tuple(self._connections):
            connection.abort()

    async def _gone(self, within_s: float) -> None:
        self._empty.clear()
        if self._connections:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), within_s)
