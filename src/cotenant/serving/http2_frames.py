"""HTTP/2 on the wire: frames (RFC 9113, sections 4 and 6) and the header blocks that we send.

What this server says is known beforehand, so a block that never touches the compression state
(HPACK, RFC 7541) can be made once and sent on any connection. ``http2_headers`` reads blocks.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEAD = struct.Struct(">IBI")
"""Length (24 bits) and kind (8) as one word, flags, stream."""
HEAD_BYTES = FRAME_HEAD.size

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = range(5)
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(5, 10)

END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
WITH_PRIORITY = 0x20

MAX_WINDOW = 2**31 - 1
DEFAULT_WINDOW = 65_535
DEFAULT_FRAME_BYTES = 16_384
MAX_FRAME_BYTES = 2**24 - 1


class ErrorCode(enum.IntEnum):
    """Why a stream or connection ends (RFC 9113, section 7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class Setting(enum.IntEnum):
    """Settings that matter here (RFC 9113, section 6.5.2)."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


class Fault(Exception):
    """The peer broke the protocol or a limit; the connection ends with ``code``."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        self.code = code
        super().__init__(message)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A whole frame."""
    return FRAME_HEAD.pack(len(payload) << 8 | kind, flags, stream) + payload


def settings(values: dict[Setting, int]) -> bytes:
    """A SETTINGS frame."""
    payload = b"".join(struct.pack(">HI", key, value) for key, value in values.items())
    return frame(SETTINGS, 0, 0, payload)


def word_frame(kind: int, stream: int, value: int) -> bytes:
    """A frame whose payload is one 32-bit word: WINDOW_UPDATE or RST_STREAM."""
    return FRAME_HEAD.pack(4 << 8 | kind, 0, stream) + value.to_bytes(4, "big")


def header_block(headers: Iterable[tuple[bytes, bytes]], status: int | None = None) -> bytes:
    """Headers as literals that the peer's table does not take up; ``status`` is HTTP's."""
    block = bytearray()
    if status == 200:
        block.append(0x88)  # entry 8 of the static table
    elif status is not None:
        block += b"\x08\x03%d" % status  # the name of entry 8, and a value
    for name, value in headers:
        block.append(0)
        for text in (name, value):
            _append_length(block, len(text))
            block += text
    return bytes(block)


def _append_length(block: bytearray, length: int) -> None:
    """HPACK's integer with a prefix of 7 bits (RFC 7541, section 5.1)."""
    if length < 127:
        block.append(length)
        return
    block.append(127)
    length -= 127
    while length > 127:
        block.append(length & 127 | 128)
        length >>= 7
    block.append(length)
