"""The rules of HTTP/2 (RFC 9113) and what breaking each is answered: a table, as h2spec has them.

``S`` in an outcome is a stream's reset, after which the connection lives on; ``C`` the connection's
end; ``OK`` an answered call.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from cotenant.serving import http2_limits
from cotenant.serving.http2_frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    WITH_PRIORITY,
    ErrorCode,
    Setting,
    frame,
    header_block,
    settings,
    word_frame,
)
from tests.contract.fake_node import eventually
from tests.contract.test_http2 import connect, framed, frames, infer_message

Names = list[tuple[bytes, bytes]]
HELLO = PREFACE + settings({})
METHOD, SCHEME = (b":method", b"POST"), (b":scheme", b"http")
PATH = (b":path", b"/inference.GRPCInferenceService/ModelInfer")
TYPE, TE = (b"content-type", b"application/grpc"), (b"te", b"trailers")
GOOD: Names = [METHOD, SCHEME, PATH, (b":authority", b"x"), TYPE, TE]
BODY = framed(infer_message())
SLEEPY = framed(infer_message("sleepy"))
LONG = b"\xe0" + b"\x80" * 12
"""HPACK's integer that does not end."""


def opened(names: Names = GOOD, number: int = 1, flags: int = 0) -> bytes:
    return frame(HEADERS, END_HEADERS | flags, number, header_block(names))


def data(body: bytes = BODY, number: int = 1, flags: int = END_STREAM) -> bytes:
    return frame(DATA, flags, number, body)


def with_name(name: bytes, value: bytes = b"v") -> bytes:
    return opened([*GOOD, (name, value)]) + data()


def outcome(served: Any, sent: bytes) -> str:
    """What comes of ``sent``: how the first stream that ends ends, or the connection."""
    with connect(served) as sock:
        sock.sendall(HELLO + sent + frame(PING, 0, 0, b"12345678"))
        seen = ""
        for kind, flags, _number, payload in frames(sock):
            if kind == GOAWAY:
                return f"C {ErrorCode(int.from_bytes(payload[4:8], 'big')).name}"
            if kind == RST_STREAM and not seen:
                seen = f"S {ErrorCode(int.from_bytes(payload, 'big')).name}"
            if kind == HEADERS and flags & END_STREAM and not seen:
                seen = "OK" if b"grpc-status\x010" in payload else "refused"
            if kind == PING and flags & ACK and seen:
                return seen
            if kind == PING and flags & ACK and not seen:
                sock.sendall(frame(PING, 0, 0, b"12345678"))
    return "closed"


MALFORMED = "S PROTOCOL_ERROR"
RULES: dict[str, tuple[bytes, str]] = {
    # 8.2 and 8.3: what a request's headers are
    "a good call": (opened() + data(), "OK"),
    "more headers": (with_name(b"x-more"), "OK"),
    "a name in upper case": (with_name(b"X-More"), MALFORMED),
    "a name with a space": (with_name(b"x more"), MALFORMED),
    "a name with a colon": (with_name(b"x:more"), MALFORMED),
    "an empty name": (with_name(b""), MALFORMED),
    "a name beyond ASCII": (with_name(b"x-\xc3\xbc"), MALFORMED),
    "text beyond ASCII": (with_name(b"x-more", b"\xff\xc3"), "OK"),
    "a line break in a value": (with_name(b"x-more", b"a\r\nb"), MALFORMED),
    "a zero in a value": (with_name(b"x-more", b"a\0b"), MALFORMED),
    "a value that begins with a space": (with_name(b"x-more", b" a"), MALFORMED),
    "connection": (with_name(b"connection", b"close"), MALFORMED),
    "keep-alive": (with_name(b"keep-alive", b"1"), MALFORMED),
    "proxy-connection": (with_name(b"proxy-connection"), MALFORMED),
    "transfer-encoding": (with_name(b"transfer-encoding", b"chunked"), MALFORMED),
    "upgrade": (with_name(b"upgrade", b"h2c"), MALFORMED),
    "te other than trailers": (opened([*GOOD[:-1], (b"te", b"gzip")]) + data(), MALFORMED),
    "no method": (opened([SCHEME, PATH, TYPE]) + data(), MALFORMED),
    "no scheme": (opened([METHOD, PATH, TYPE]) + data(), MALFORMED),
    "no path": (opened([METHOD, SCHEME, TYPE]) + data(), MALFORMED),
    "an empty path": (opened([METHOD, SCHEME, (b":path", b""), TYPE]) + data(), MALFORMED),
    "two methods": (opened([METHOD, METHOD, SCHEME, PATH, TYPE]) + data(), MALFORMED),
    "two paths": (opened([METHOD, SCHEME, PATH, PATH, TYPE]) + data(), MALFORMED),
    "an unknown pseudo-header": (opened([(b":test", b"x"), *GOOD]) + data(), MALFORMED),
    "an answer's pseudo-header": (opened([(b":status", b"200"), *GOOD]) + data(), MALFORMED),
    "a pseudo-header after others": (opened([METHOD, SCHEME, TYPE, PATH]) + data(), MALFORMED),
    "a pseudo-header in trailers": (
        opened() + data(flags=0) + opened([METHOD], flags=END_STREAM),
        MALFORMED,
    ),
    "trailers": (opened() + data(flags=0) + opened([(b"a", b"b")], flags=END_STREAM), "OK"),
    "trailers that do not end": (opened() + data(flags=0) + opened([(b"a", b"b")]), MALFORMED),
    # 8.1.1: content-length
    "a true length": (
        opened([*GOOD, (b"content-length", b"%d" % len(BODY))]) + data(),
        "OK",
    ),
    "a true length, in pieces": (
        opened([*GOOD, (b"content-length", b"%d" % len(BODY))])
        + data(BODY[:9], flags=0)
        + frame(DATA, PADDED | END_STREAM, 1, b"\x05" + BODY[9:] + bytes(5)),
        "OK",
    ),
    "a length too long": (opened([*GOOD, (b"content-length", b"9999")]) + data(), MALFORMED),
    "a length too short": (opened([*GOOD, (b"content-length", b"5")]) + data(), MALFORMED),
    "a length too long, in pieces": (
        opened([*GOOD, (b"content-length", b"9999")]) + data(BODY, flags=0) + data(b""),
        MALFORMED,
    ),
    "a length and no body": (
        opened([*GOOD, (b"content-length", b"5")], flags=END_STREAM),
        MALFORMED,
    ),
    "a length cut short by trailers": (
        opened([*GOOD, (b"content-length", b"9999")])
        + data(flags=0)
        + opened([(b"a", b"b")], flags=END_STREAM),
        MALFORMED,
    ),
    "a length that is no number": (opened([*GOOD, (b"content-length", b"-5")]), MALFORMED),
    "two lengths": (
        opened([*GOOD, (b"content-length", b"5"), (b"content-length", b"6")]),
        MALFORMED,
    ),
    # 5.1: idle, half closed and closed streams
    "data on an idle stream": (data(), "C PROTOCOL_ERROR"),
    "a reset of an idle stream": (word_frame(RST_STREAM, 1, 8), "C PROTOCOL_ERROR"),
    "a window of an idle stream": (word_frame(WINDOW_UPDATE, 1, 1), "C PROTOCOL_ERROR"),
    "a continuation of nothing": (frame(CONTINUATION, END_HEADERS, 1, b""), "C PROTOCOL_ERROR"),
    "data after the end": (opened() + data(SLEEPY) + data(), "S STREAM_CLOSED"),
    "headers after the end": (opened() + data(SLEEPY) + opened(), "S STREAM_CLOSED"),
    "a priority after the end": (
        opened() + data() + frame(PRIORITY, 0, 1, bytes(4) + b"\x10"),
        "OK",
    ),
    "data after a reset": (opened() + word_frame(RST_STREAM, 1, 8) + data(), "C STREAM_CLOSED"),
    "headers after a reset": (
        opened() + word_frame(RST_STREAM, 1, 8) + opened(),
        "C STREAM_CLOSED",
    ),
    "a window after a reset": (
        opened()
        + word_frame(RST_STREAM, 1, 8)
        + word_frame(WINDOW_UPDATE, 1, 9)
        + opened(number=3)
        + data(number=3),
        "OK",
    ),
    "data for what was refused before it came": (
        opened([METHOD, SCHEME, PATH]) + data(flags=0) + data() + opened(number=3),
        "refused",
    ),
    # 5.1.1: stream identifiers
    "an even stream": (opened(number=2), "C PROTOCOL_ERROR"),
    "stream 0": (opened(number=0), "C PROTOCOL_ERROR"),
    "a stream below the last": (opened(number=5) + opened(number=3), "C PROTOCOL_ERROR"),
    "data on an even stream": (opened(number=5) + data(number=2), "C PROTOCOL_ERROR"),
    # 4.2, 4.3 and RFC 7541: sizes and header blocks
    "a header block too long": (
        frame(HEADERS, END_HEADERS, 1, bytes(2 * http2_limits.HEADER_BYTES)),
        "C FRAME_SIZE_ERROR",
    ),
    "a header block that another frame interrupts": (
        frame(HEADERS, 0, 1, b"\x83") + data(),
        "C PROTOCOL_ERROR",
    ),
    "a header block of another stream": (
        frame(HEADERS, 0, 1, b"\x83") + frame(CONTINUATION, END_HEADERS, 3, b""),
        "C PROTOCOL_ERROR",
    ),
    "an index of nothing": (frame(HEADERS, END_HEADERS, 1, b"\xff\x40"), "C COMPRESSION_ERROR"),
    "index 0": (frame(HEADERS, END_HEADERS, 1, b"\x80"), "C COMPRESSION_ERROR"),
    "an integer too long": (
        frame(HEADERS, END_HEADERS, 1, b"\x00" + b"\x7f" + LONG),
        "C COMPRESSION_ERROR",
    ),
    "a table larger than offered": (
        frame(HEADERS, END_HEADERS, 1, b"\x3f\xe2\x1f" + header_block(GOOD)),
        "C COMPRESSION_ERROR",
    ),
    "a table's size at the end": (
        frame(HEADERS, END_HEADERS, 1, header_block(GOOD) + b"\x20"),
        "C COMPRESSION_ERROR",
    ),
    "Huffman code that is not padded well": (
        frame(HEADERS, END_HEADERS, 1, header_block(GOOD) + b"\x00\x01x\x81\x00"),
        "C COMPRESSION_ERROR",
    ),
    "Huffman code with an end in it": (
        frame(HEADERS, END_HEADERS, 1, header_block(GOOD) + b"\x00\x01x\x84\xff\xff\xff\xff"),
        "C COMPRESSION_ERROR",
    ),
    # 6.1, 6.2: padding and priority
    "more padding than payload": (opened() + frame(DATA, PADDED, 1, b"\x09ab"), "C PROTOCOL_ERROR"),
    "padding alone": (opened() + frame(DATA, PADDED, 1, b"\x02ab") + data(), "OK"),
    "more padding than headers": (
        frame(HEADERS, END_HEADERS | PADDED, 1, b"\xff" + header_block(GOOD)[:99]),
        "C PROTOCOL_ERROR",
    ),
    "headers that depend on themselves": (
        frame(HEADERS, END_HEADERS | WITH_PRIORITY, 1, b"\0\0\0\x01\x10" + header_block(GOOD)),
        "C PROTOCOL_ERROR",
    ),
    "a priority of itself": (
        opened() + frame(PRIORITY, 0, 1, b"\0\0\0\x01\x10"),
        "C PROTOCOL_ERROR",
    ),
    "a priority of stream 0": (frame(PRIORITY, 0, 0, bytes(5)), "C PROTOCOL_ERROR"),
    "a priority before its stream": (
        frame(PRIORITY, 0, 1, bytes(4) + b"\x10") + opened() + data(),
        "OK",
    ),
    # 6.5 to 6.9: settings, pings, goodbyes, windows
    "unknown settings": (frame(SETTINGS, 0, 0, b"\0\x99\0\0\0\1") + opened() + data(), "OK"),
    "the first of two settings is wrong": (
        frame(SETTINGS, 0, 0, b"\0\x04\xff\xff\xff\xff" + b"\0\x04\0\0\xff\xff"),
        "C FLOW_CONTROL_ERROR",
    ),
    "a reset of stream 0": (word_frame(RST_STREAM, 0, 8), "C PROTOCOL_ERROR"),
    "a goodbye on a stream": (frame(GOAWAY, 0, 1, bytes(8)), "C PROTOCOL_ERROR"),
    "a goodbye too short": (frame(GOAWAY, 0, 0, bytes(4)), "C FRAME_SIZE_ERROR"),
    "a ping's answer that was not asked for": (
        frame(PING, ACK, 0, bytes(8)) + opened() + data(),
        "OK",
    ),
    "a window opened by nothing": (word_frame(WINDOW_UPDATE, 0, 0), "C PROTOCOL_ERROR"),
    "a stream's window opened by nothing": (
        opened() + word_frame(WINDOW_UPDATE, 1, 0),
        "S PROTOCOL_ERROR",
    ),
    "a window too wide": (word_frame(WINDOW_UPDATE, 0, 2**31 - 1), "C FLOW_CONTROL_ERROR"),
    "a stream's window too wide": (
        opened() + word_frame(WINDOW_UPDATE, 1, 2**31 - 1),
        "S FLOW_CONTROL_ERROR",
    ),
    "a window as wide as may be": (
        word_frame(WINDOW_UPDATE, 0, 2**31 - 1 - 65_535) + opened() + data(),
        "OK",
    ),
    "frames to come": (frame(0x42, 0xFF, 7, b"?") + opened() + data(), "OK"),
    "an unknown frame amid headers": (
        frame(HEADERS, 0, 1, b"\x83") + frame(0x42, 0, 1),
        "C PROTOCOL_ERROR",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_kept_to(served: Any, rule: str) -> None:
    sent, expected = RULES[rule]
    assert outcome(served, sent) == expected
    while served.node.waiting.acquire(blocking=False):
        assert served.node.withdrawn.acquire(timeout=20)


# What may be asked for to no end.

MANY = 30_000
USELESS: dict[str, bytes] = {
    "pings": frame(PING, 0, 0, bytes(8)) * MANY,
    "answers to no ping": frame(PING, ACK, 0, bytes(8)) * MANY,
    "settings": frame(SETTINGS, 0, 0) * MANY,
    "acknowledgements": frame(SETTINGS, ACK, 0) * MANY,
    "priorities": frame(PRIORITY, 0, 1, bytes(4) + b"\x10") * MANY,
    "unknown frames": frame(0x42, 0, 0) * MANY,
    "windows": word_frame(WINDOW_UPDATE, 0, 1) * MANY,
    "continuations": frame(HEADERS, 0, 1) + frame(CONTINUATION, 0, 1) * MANY,
    "empty data": opened() + frame(DATA, 0, 1) * MANY,
    "padding": opened() + frame(DATA, PADDED, 1, b"\0") * MANY,
    "calls begun": b"".join(
        opened(number=n) + word_frame(RST_STREAM, n, 8) for n in range(1, MANY // 5, 2)
    ),
    "calls given up": b"".join(
        opened(number=n) + data(SLEEPY, n) + word_frame(RST_STREAM, n, 8)
        for n in range(1, MANY // 5, 2)
    ),
    "calls reset by the server": b"".join(
        opened(number=n) + data(SLEEPY, n) + word_frame(WINDOW_UPDATE, n, 0)
        for n in range(1, MANY // 5, 2)
    ),
    "calls of nothing": b"".join(
        opened([METHOD, SCHEME, (b":path", b"/no/Thing"), TYPE], n) for n in range(1, MANY, 2)
    ),
    "malformed headers": b"".join(opened([METHOD], n) for n in range(1, MANY, 2)),
    "large headers": b"".join(
        opened([*GOOD, *[(b"x-%d" % i, b"y" * 20) for i in range(150)]], n)
        + word_frame(RST_STREAM, n, 8)
        for n in range(1, 300, 2)
    ),
    "window flips": b"".join(opened(number=n) for n in range(1, 500, 2))
    + (settings({Setting.INITIAL_WINDOW_SIZE: 1}) + settings({Setting.INITIAL_WINDOW_SIZE: 0}))
    * (MANY // 10),
}


@pytest.mark.parametrize("what", USELESS)
def test_a_client_that_asks_for_too_much_to_no_end_is_told_to_calm_down(
    served: Any, what: str
) -> None:
    with connect(served) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(HELLO + USELESS[what])
        ends = [payload for kind, *_, payload in frames(sock) if kind == GOAWAY]
    codes = [int.from_bytes(payload[4:8], "big") for payload in ends]
    assert codes == [ErrorCode.ENHANCE_YOUR_CALM]
    assert eventually(lambda: not served.fronts[1].running)
    for each in (served.node.waiting, served.node.withdrawn):
        while each.acquire(blocking=False):
            pass


def test_answers_pay_for_what_is_asked(served: Any) -> None:
    # Far more frames than may come to nothing, but every second call is answered.
    with connect(served) as sock:
        sock.sendall(HELLO + word_frame(WINDOW_UPDATE, 0, 2**30))
        seen = frames(sock)
        for number in range(1, 4000, 4):
            given_up = opened(number=number) + word_frame(RST_STREAM, number, 8)
            sock.sendall(given_up + opened(number=number + 2) + data(number=number + 2))
            while True:
                kind, flags, stream, payload = next(seen)
                assert kind != GOAWAY, payload
                if stream == number + 2 and flags & END_STREAM and kind == HEADERS:
                    break
