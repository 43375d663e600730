"""Data that a client sends: what it may still send, and the frame of it that is under way."""

from __future__ import annotations

from typing import Protocol

from cotenant.serving.http2_credit import Credit
from cotenant.serving.http2_frames import (
    DATA,
    END_STREAM,
    FRAME_HEAD,
    HEAD_BYTES,
    MAX_WINDOW,
    WINDOW_UPDATE,
    ErrorCode,
    Fault,
    word_frame,
)
from cotenant.serving.http2_limits import CONNECTION_WINDOW, STREAM_WINDOW
from cotenant.serving.http2_sending import Sender, Stream

_SMALL_BYTES = 256
"""Data frames below this size make more work than they bring data."""
_RUN_BYTES = 1024
"""Frames below this size are taken one by one, so that a run has not many."""
_BYTES_PER_UNIT_SHIFT = 13


class Requests(Protocol):
    """What data needs of the connection that it comes on."""

    streams: dict[int, Stream]

    def check_known(self, number: int) -> None:
        """Raises Fault unless the client has opened that stream."""

    def check_late(self, number: int) -> None:
        """Raises Fault unless the client may have sent this before it knew that it had ended."""

    def reset(self, stream: Stream, code: ErrorCode) -> None:
        """End a stream because of what its client did."""

    def end(self, stream: Stream) -> None:
        """A stream's body is complete."""


class Incoming:
    """One connection's data."""

    def __init__(self, connection: Requests, sender: Sender, credit: Credit) -> None:
        self._connection = connection
        self._sender = sender
        self._credit = credit
        self._room = CONNECTION_WINDOW
        self._kept = 0
        self._left = 0
        """Bytes to come of the data frame under way, which is ``_data_of``'s, and after them of
        its padding."""
        self._padding = 0
        self._data_of = 0
        self._data_ends = False

    @property
    def midway(self) -> bool:
        """Whether a frame of data is under way."""
        return bool(self._left or self._padding)

    def run(self, data: bytes, view: memoryview, at: int, number: int) -> int:
        """Take data frames of one stream that follow each other, are here entirely and bring
        nothing but bytes, nor use so much of a window that more is to be given: most of a large
        body that comes in small frames. Returns where the first other one begins."""
        stream = self._connection.streams.get(number)
        if stream is None or stream.receiver is None:
            return at
        if stream.ended or stream.answered:
            return at
        room = min(self._room - CONNECTION_WINDOW // 2, stream.room - STREAM_WINDOW // 4)
        if stream.promised >= 0:
            room = min(room, stream.promised + 1)
        pieces: list[memoryview] = []
        size, taken = len(data), 0
        while size - at >= HEAD_BYTES:
            word, flags, other = FRAME_HEAD.unpack_from(data, at)
            length, begin = word >> 8, at + HEAD_BYTES
            stop = begin + length
            if flags or word & 0xFF != DATA or other & MAX_WINDOW != number:
                break
            if stop > size or taken + length >= room or length < _RUN_BYTES:
                break
            pieces.append(view[begin:stop])
            taken += length
            at = stop
        if pieces:
            self._room -= taken
            stream.room -= taken
            if stream.promised >= 0:
                stream.promised -= taken
            self._credit.turn -= taken >> _BYTES_PER_UNIT_SHIFT
            stream.receiver.data(pieces)
        return at

    def begin(self, number: int, length: int, padding: int, flags: int) -> None:
        """A data frame of ``length`` bytes begins; ``padding`` of them, with the byte that tells
        their number, are padding."""
        stream = self._connection.streams.get(number)
        if stream is None:
            self._connection.check_known(number)
        if padding > length:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "a frame with more padding than payload")
        if length > self._room:
            raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "more data than the connection's window")
        ends = bool(flags & END_STREAM)
        if stream is None or (length - padding < _SMALL_BYTES and not ends):
            self._credit.charge(1)
        self._credit.turn -= 1 + (length >> _BYTES_PER_UNIT_SHIFT)
        self._room -= length
        self._make_room()
        if stream is None:
            self._connection.check_late(number)
        elif stream.promised < 0 and length <= stream.room and not stream.ended:
            stream.room -= length
        else:
            self._count(stream, length, length - padding, ends)
        self._left, self._padding = length - padding, max(0, padding - 1)
        self._data_of, self._data_ends = number, ends

    def keep(self, nbytes: int) -> None:
        """So much more (less, below 0) of what came is not looked at yet: the client may send as
        much less on this connection."""
        self._kept += nbytes
        if nbytes < 0:
            self._make_room()

    def _make_room(self) -> None:
        more = CONNECTION_WINDOW - self._kept - self._room
        if more >= CONNECTION_WINDOW // 2 or (self._kept and more >= CONNECTION_WINDOW // 16):
            self._room += more
            self._sender.control(word_frame(WINDOW_UPDATE, 0, more))

    def _count(self, stream: Stream, length: int, payload: int, ends: bool) -> None:
        """``length`` bytes of a stream's window are used, ``payload`` of them for its body."""
        if stream.ended:
            self._connection.reset(stream, ErrorCode.STREAM_CLOSED)
        elif length > stream.room:
            self._connection.reset(stream, ErrorCode.FLOW_CONTROL_ERROR)
        elif stream.promised >= 0 and (
            payload > stream.promised or (ends and payload < stream.promised)
        ):
            self._connection.reset(stream, ErrorCode.PROTOCOL_ERROR)
        else:
            stream.room -= length
            if stream.promised >= 0:
                stream.promised -= payload

    def take(self, view: memoryview, at: int) -> int:
        """Hand on what is here of the data frame under way; returns where that ends."""
        stop = min(at + self._left, len(view))
        self._left -= stop - at
        after = stop
        if self._padding and not self._left:
            after = min(stop + self._padding, len(view))
            self._padding -= after - stop
        stream = self._connection.streams.get(self._data_of)
        if stream is None or stream.ended:
            return after
        if stop > at and stream.receiver is not None and not stream.answered:
            stream.receiver.data((view[at:stop],))
        if not self._left and self._data_ends:
            self._connection.end(stream)
        elif stream.room < STREAM_WINDOW // 4:
            self.make_room(stream)
        return after

    def make_room(self, stream: Stream) -> None:
        """Let the client send more of a stream's body, if it may."""
        more = STREAM_WINDOW - stream.room
        if more and not (stream.paused or stream.ended or stream.answered):
            stream.room = STREAM_WINDOW
            self._sender.control(word_frame(WINDOW_UPDATE, stream.id, more))
