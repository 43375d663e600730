"""Frames about streams and the connection that open no request and bring no data (RFC 9113,
section 6): windows, resets, settings, pings, goodbyes. Priorities are checked and not taken."""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from typing import Protocol

from cotenant.serving.http2_frames import (
    ACK,
    DEFAULT_FRAME_BYTES,
    GOAWAY,
    MAX_FRAME_BYTES,
    MAX_WINDOW,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    ErrorCode,
    Fault,
    Setting,
    frame,
)
from cotenant.serving.http2_leaving import Leaving
from cotenant.serving.http2_sending import Sender, Stream, capped

log = logging.getLogger("cotenant.serving")

_SETTINGS = 64
"""In a frame; there are not a dozen."""


class Controlled(Protocol):
    """What these frames change of a connection."""

    sender: Sender
    leaving: Leaving
    streams: dict[int, Stream]
    settled: bool

    def check_known(self, number: int) -> None:
        """Raises Fault unless the client has opened that stream."""

    def reset(self, stream: Stream, code: ErrorCode) -> None:
        """End a stream because of what its client did."""

    def lose(self, stream: Stream) -> None:
        """The client has given a stream up."""


def check_priority(number: int, payload: bytes) -> None:
    """Raises Fault for a stream that depends on itself."""
    if int.from_bytes(payload[:4], "big") & MAX_WINDOW == number and len(payload) >= 4:
        raise Fault(ErrorCode.PROTOCOL_ERROR, f"stream {number} depends on itself")


def _on_window_update(connection: Controlled, _: int, number: int, payload: bytes) -> None:
    more = int.from_bytes(payload, "big") & MAX_WINDOW
    if not number:
        if not more:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "a window is opened by nothing")
        connection.sender.grow(None, more)
        return
    connection.check_known(number)
    stream = connection.streams.get(number)
    if stream is None:
        return
    if not more:
        connection.reset(stream, ErrorCode.PROTOCOL_ERROR)
    elif stream.window + more > MAX_WINDOW:
        connection.reset(stream, ErrorCode.FLOW_CONTROL_ERROR)
    else:
        connection.sender.grow(stream, more)


def _on_rst_stream(connection: Controlled, _: int, number: int, payload: bytes) -> None:
    connection.check_known(number)
    stream = connection.streams.get(number)
    if stream is not None:
        log.debug("stream %d was reset, code %d", number, int.from_bytes(payload, "big"))
        stream.ended = True
        connection.lose(stream)


def _on_priority(_: Controlled, __: int, number: int, payload: bytes) -> None:
    if not number:
        raise Fault(ErrorCode.PROTOCOL_ERROR, "a priority of no stream")
    check_priority(number, payload)  # which is advice, and not taken


def _on_ping(connection: Controlled, flags: int, number: int, payload: bytes) -> None:
    if number:
        raise Fault(ErrorCode.PROTOCOL_ERROR, "a ping on a stream")
    if not flags & ACK:
        connection.sender.control(frame(PING, ACK, 0, payload))
    else:
        connection.leaving.ping_answered(payload)


def _on_goaway(connection: Controlled, _: int, number: int, payload: bytes) -> None:
    if number:
        raise Fault(ErrorCode.PROTOCOL_ERROR, "a goodbye on a stream")
    if len(payload) < 8:
        raise Fault(ErrorCode.FRAME_SIZE_ERROR, "a goodbye that is too short")
    connection.leaving.leave()


def _on_push_promise(*_: object) -> None:
    raise Fault(ErrorCode.PROTOCOL_ERROR, "a client does not promise")


def _on_settings(connection: Controlled, flags: int, number: int, payload: bytes) -> None:
    if number:
        raise Fault(ErrorCode.PROTOCOL_ERROR, "settings on a stream")
    if len(payload) % 6 or (flags & ACK and payload):
        raise Fault(ErrorCode.FRAME_SIZE_ERROR, "settings of a wrong size")
    if len(payload) > 6 * _SETTINGS:
        raise Fault(ErrorCode.ENHANCE_YOUR_CALM, "too many settings")
    if flags & ACK:
        return
    connection.settled = True
    before = connection.sender.first_window
    for key, value in struct.iter_unpack(">HI", payload):
        _apply_setting(connection, key, value)
    connection.sender.control(frame(SETTINGS, ACK, 0))
    if connection.sender.first_window > before:
        connection.sender.pump()


def _apply_setting(connection: Controlled, key: int, value: int) -> None:
    sender = connection.sender
    if key == Setting.HEADER_TABLE_SIZE:
        # Our blocks use no table, but one that shrinks must be told so (RFC 7541, 4.2).
        sender.shrink_table |= value < 4096
    elif key == Setting.INITIAL_WINDOW_SIZE:
        if value > MAX_WINDOW:
            raise Fault(ErrorCode.FLOW_CONTROL_ERROR, "a window of an impossible size")
        sender.resize(value, connection.streams.values())
    elif key == Setting.MAX_FRAME_SIZE:
        if not DEFAULT_FRAME_BYTES <= value <= MAX_FRAME_BYTES:
            raise Fault(ErrorCode.PROTOCOL_ERROR, "frames of an impossible size")
        sender.frame_bytes = capped(value)
    elif key == Setting.ENABLE_PUSH and value > 1:
        raise Fault(ErrorCode.PROTOCOL_ERROR, "push is neither on nor off")


HANDLERS: dict[int, Callable[[Controlled, int, int, bytes], None]] = {
    PRIORITY: _on_priority,
    RST_STREAM: _on_rst_stream,
    SETTINGS: _on_settings,
    PUSH_PROMISE: _on_push_promise,
    PING: _on_ping,
    GOAWAY: _on_goaway,
    WINDOW_UPDATE: _on_window_update,
}
"""Kind of frame → what is done with its flags, stream and payload; raises Fault."""
