"""Attacks on the HTTP/2 server: work for nothing, work out of proportion, and held connections."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from functools import partial

from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

from cotenant.serving.http2_frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Setting,
    frame,
    settings,
    word_frame,
)
from tests.attack.wire import GOT, SERVICE, Peer, call, flood, framed, head, inference, repeatedly

MANY = 1000
STREAM = head(SERVICE + b"ModelStreamInfer")
LIVE = head(SERVICE + b"ServerLive")
STATISTICS = head(SERVICE + b"ModelStatistics")
EMPTY = framed(b"")
OPENED = frame(HEADERS, END_HEADERS, 1, STREAM), 3


def same(data: bytes, times: int = MANY) -> Callable[[int], tuple[bytes, int]]:
    """Always the same bytes."""
    many = data * times
    return lambda number: (many, number)


def each(
    make: Callable[[int], bytes], times: int = MANY // 4
) -> Callable[[int], tuple[bytes, int]]:
    """``make`` for one new stream after the other."""

    def several(number: int) -> tuple[bytes, int]:
        numbers = range(number, number + 2 * times, 2)
        return b"".join(map(make, numbers)), number + 2 * times

    return several


def reset(number: int) -> bytes:
    return word_frame(RST_STREAM, number, 8)


def given_up(block: bytes, body: bytes) -> Callable[[int], tuple[bytes, int]]:
    """Whole calls, each given up at once."""
    return each(lambda number: call(number, block, body) + reset(number))


def made_to_reset(number: int) -> bytes:
    """A whole call, and then a frame for which the server has to reset it."""
    return call(number, head(), inference()) + word_frame(WINDOW_UPDATE, number, 0)


def headers(block: bytes) -> Callable[[int], tuple[bytes, int]]:
    """Calls of no body with these headers."""
    return each(lambda number: frame(HEADERS, END_HEADERS | END_STREAM, number, block), 8)


def long_literal(text: bytes) -> bytes:
    """HPACK's string of more than 127 bytes, Huffman-coded."""
    out, length = bytearray(b"\xff"), len(text) - 127
    while length > 127:
        out.append(length & 127 | 128)
        length >>= 7
    return bytes(out) + bytes([length]) + text


def churn(number: int) -> tuple[bytes, int]:
    """Headers that each push another out of the table."""
    added = (b"\x40\x01a\x06%06d" % ((number * 256 + i) % 10**6) for i in range(400))
    block = LIVE + b"".join(added)
    return frame(HEADERS, END_HEADERS | END_STREAM, number, block), number + 2


def open_streams(block: bytes, body: bytes, count: int = 250) -> tuple[bytes, int]:
    """Many streams that stay open, or whose answer waits."""
    flags = END_STREAM if body else 0
    opened = (
        frame(HEADERS, END_HEADERS, number, block) + frame(DATA, flags, number, body)
        for number in range(1, 2 * count, 2)
    )
    return b"".join(opened), 2 * count + 1


def connections(port: int, seconds: float, hello: bytes, count: int = 700) -> None:
    """Many connections that say ``hello`` and nothing more; closed ones are opened again."""
    until = time.monotonic() + seconds
    held: list[socket.socket] = []
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            sock = socket.create_connection(("127.0.0.1", port), 2)
            sock.sendall(hello)
            held.append(sock)
            GOT["connections"] += 1
        if len(held) > count:
            held.pop(0).close()
    for sock in held:
        sock.close()


def drip(peer: Peer) -> None:
    """Answers taken up a byte at a time."""
    opened, _ = open_streams(head(), inference(), 100)
    peer.send(opened)
    drops = b"".join(word_frame(WINDOW_UPDATE, number, 1) for number in range(1, 200, 2))
    while time.monotonic() < peer.until:
        peer.send(drops)


def held_streams(peer: Peer) -> None:
    """As many calls as may be, that never send."""
    peer.send(open_streams(STREAM, b"", 256)[0])
    peer.rest()


HUFFMAN = long_literal(HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH).encode(b"a" * 15_000))
NO_WINDOW = {Setting.INITIAL_WINDOW_SIZE: 0}
LATE = frame(DATA, 0, 1, bytes(300))
FLIPS = settings({Setting.INITIAL_WINDOW_SIZE: 1}) + settings({Setting.INITIAL_WINDOW_SIZE: 0})

_FLOODS: dict[str, Callable[[int, float], None]] = {
    name: partial(flood, make=make, **how)  # type: ignore[arg-type]
    for name, make, how in (
        ("pings", same(frame(PING, 0, 0, bytes(8))), {}),
        ("pings, answers not read", same(frame(PING, 0, 0, bytes(8))), {"reads": False}),
        ("ping answers", same(frame(PING, 1, 0, bytes(8))), {}),
        ("settings", same(frame(SETTINGS, 0, 0)), {}),
        ("long settings", same(frame(SETTINGS, 0, 0, b"\0\x08\0\0\0\0" * 2000), 4), {}),
        ("priorities", same(frame(PRIORITY, 0, 1, b"\0\0\0\0\x10")), {}),
        ("unknown frames", same(frame(0x20, 0, 0)), {}),
        ("window updates", same(word_frame(WINDOW_UPDATE, 0, 1)), {}),
        ("resets of nothing", same(reset(1)), {"setup": (OPENED[0] + reset(1), 3)}),
        ("calls begun and given up", each(lambda n: frame(HEADERS, 4, n, head()) + reset(n)), {}),
        ("inferences given up", given_up(head(), inference()), {}),
        ("statistics given up", given_up(STATISTICS, EMPTY), {}),
        ("inferences made to be reset", each(made_to_reset), {}),
        ("statistics", each(lambda n: call(n, STATISTICS, EMPTY)), {}),
        ("inferences", each(lambda n: call(n, head(), inference())), {}),
        ("empty continuations", same(frame(CONTINUATION, 0, 1)), {"setup": (frame(1, 0, 1), 3)}),
        ("empty data", same(frame(DATA, 0, 1)), {"setup": OPENED}),
        ("padded data", same(frame(DATA, PADDED, 1, b"\0")), {"setup": OPENED}),
        ("data of one byte", same(frame(DATA, 0, 1, b"\0")), {"setup": OPENED}),
        (
            "data after the end",
            same(frame(DATA, 0, 1, bytes(300))),
            {"setup": (call(1, LIVE, EMPTY), 3)},
        ),
        ("window flips", same(FLIPS), {"setup": open_streams(STREAM, b"")}),
        (
            "window flips, answers waiting",
            same(FLIPS),
            {"setup": open_streams(LIVE, EMPTY), "ours": NO_WINDOW},
        ),
        ("Huffman code", headers(LIVE + b"\x00\x01x" + HUFFMAN), {}),
        ("many headers", headers(LIVE + b"\x00\x01a\x00" * 450), {}),
        ("too many headers", headers(LIVE + b"\x00\x01a\x00" * 3000), {}),
        ("indexed headers", headers(LIVE + b"\x82" * 300), {}),
        ("table churn", churn, {}),
        ("unknown methods", each(lambda n: call(n, head(SERVICE + b"Nope"), EMPTY)), {}),
        ("no gRPC", each(lambda n: frame(HEADERS, 5, n, b"\x82\x86\x84")), {}),
        ("malformed headers", each(lambda n: frame(HEADERS, 5, n, LIVE + b"\x00\x01A\x01a")), {}),
    )
}

ATTACKS: dict[str, Callable[[int, float], None]] = {
    **_FLOODS,
    "connections that greet": partial(connections, hello=PREFACE + settings({})),
    "connections that say nothing": partial(connections, hello=b""),
    "answers taken up byte by byte": partial(repeatedly, attack=drip, ours=NO_WINDOW),
    "calls that never send": partial(repeatedly, attack=held_streams),
}
