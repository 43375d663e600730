"""Attacks by what gRPC messages say, by their size, and by not reading the answers."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable
from functools import cache, partial

from cotenant.serving.http2_frames import (
    END_HEADERS,
    HEADERS,
    RST_STREAM,
    Setting,
    frame,
    word_frame,
)
from tests.attack.wire import GOT, SERVICE, Peer, call, flood, framed, head, inference, repeatedly

__all__ = ["ATTACKS", "GOT"]

MiB = 2**20
GZIP = (b"grpc-encoding", b"gzip")
STREAM = head(SERVICE + b"ModelStreamInfer")
HUGE = {Setting.INITIAL_WINDOW_SIZE: 2**31 - 1, Setting.MAX_FRAME_SIZE: 2**24 - 1}


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    out, length = bytearray([number << 3 | 2]), len(content)
    while length > 127:
        out.append(length & 127 | 128)
        length >>= 7
    return bytes(out) + bytes([length]) + content


def tensor(content: bytes) -> bytes:
    return field(5, field(1, b"x") + field(2, b"FP32") + content)


STRINGS = field(5, field(1, b"x") + field(2, b"BYTES") + field(3, b"\x80\x80\x80\x02"))


def many(unit: bytes, nbytes: int) -> bytes:
    return unit * (nbytes // len(unit))


BOMBS: dict[str, Callable[[int], bytes]] = {
    "inputs": lambda n: many(field(5, b""), n),
    "outputs": lambda n: many(field(6, b""), n),
    "raw contents": lambda n: many(field(7, b""), n),
    "parameters": lambda n: many(field(4, field(1, b"key")), n),
    "unknown fields": lambda n: many(b"\xc0\x3e\x00", n),
    "groups": lambda n: many(b"\xc3\x3e\xc4\x3e", n),
    "dimensions": lambda n: tensor(field(3, many(b"\x01", n))),
    "strings": lambda n: tensor(field(5, many(field(8, b""), n))),
    "numbers": lambda n: tensor(field(3, b"\x01\x40") + field(5, field(6, bytes(n)))),
    "numbers one by one": lambda n: tensor(field(5, many(b"\x35abcd", n))),
    "raw strings": lambda n: STRINGS + field(7, bytes(n)),
}


@cache
def bomb(kind: str, nbytes: int, packed: bool) -> bytes:
    """A framed message of about ``nbytes``."""
    message = field(1, b"small") + BOMBS[kind](nbytes)
    return framed(gzip.compress(message, 6) if packed else message, packed)


def explode(peer: Peer, kind: str, nbytes: int, packed: bool) -> None:
    """One such message after the other."""
    body, number = bomb(kind, nbytes, packed), 1
    block = head(SERVICE + b"ModelInfer", *([GZIP] if packed else []))
    while time.monotonic() < peer.until and not peer.over.is_set():
        peer.send(frame(HEADERS, END_HEADERS, number, block))
        peer.upload(number, body)
        number += 2


def small_messages(peer: Peer, message: bytes) -> None:
    """A stream of them, as fast as it may be sent."""
    peer.send(frame(HEADERS, END_HEADERS, 1, STREAM))
    body = message * (MiB // len(message))
    while time.monotonic() < peer.until and not peer.over.is_set():
        peer.upload(1, body, ends=False)


def unread(peer: Peer) -> None:
    """Inferences whose answers are never taken up."""
    number, body = 1, inference(8)
    while time.monotonic() < peer.until:
        peer.send(call(number, head(), body))
        number += 2
        time.sleep(0.002)


def held_uploads(peer: Peer) -> None:
    """Messages of which the last byte does not come."""
    body = framed(bytes(63 * MiB))[:-1]
    for number in range(1, 100, 2):
        peer.send(frame(HEADERS, END_HEADERS, number, head()))
        peer.upload(number, body, ends=False)
    peer.rest()


def uploads_given_up(peer: Peer) -> None:
    """Large messages that are given up before their end."""
    body, number = framed(bytes(8 * MiB))[:-1], 1
    while time.monotonic() < peer.until and not peer.over.is_set():
        peer.send(frame(HEADERS, END_HEADERS, number, head()))
        peer.upload(number, body, ends=False)
        peer.send(word_frame(RST_STREAM, number, 8))
        number += 2


def held_backlogs(peer: Peer) -> None:
    """Streams full of tiny messages whose answers are not taken up."""
    body = framed(b"") * 200_000
    for number in range(1, 400, 2):
        peer.send(frame(HEADERS, END_HEADERS, number, STREAM))
        peer.upload(number, body, ends=False)
    peer.rest()


def one_after_the_other(block: bytes, body: bytes) -> Callable[[int, float], None]:
    """Calls without end."""

    def make(number: int) -> tuple[bytes, int]:
        numbers = range(number, number + 200, 2)
        return b"".join(call(n, block, body) for n in numbers), number + 200

    return partial(flood, make=make)


NO_WINDOW = {Setting.INITIAL_WINDOW_SIZE: 0}

ATTACKS: dict[str, Callable[[int, float], None]] = {
    **{
        f"{kind}, {'gzip' if packed else 'plain'}": partial(
            repeatedly, attack=partial(explode, kind=kind, nbytes=nbytes, packed=packed)
        )
        for kind in BOMBS
        for packed, nbytes in ((True, 60 * MiB), (False, 4 * MiB))
        if packed or kind in ("strings", "numbers", "raw contents", "raw strings")
    },
    "empty messages on a stream": partial(
        repeatedly, attack=partial(small_messages, message=framed(b""))
    ),
    "bad messages on a stream": partial(
        repeatedly, attack=partial(small_messages, message=framed(field(1, b"\xff")))
    ),
    "bad text": one_after_the_other(head(), framed(field(1, b"\xff") + tensor(b""))),
    "no messages": one_after_the_other(head(), b""),
    "past deadlines": one_after_the_other(
        head(SERVICE + b"ModelInfer", (b"grpc-timeout", b"1n")), inference()
    ),
    "answers not taken up": partial(repeatedly, attack=unread, ours=NO_WINDOW),
    "answers not read": partial(repeatedly, attack=unread, ours=HUGE, reads=False),
    "messages held back": partial(repeatedly, attack=held_uploads),
    "messages given up": partial(repeatedly, attack=uploads_given_up),
    "streams held full": partial(repeatedly, attack=held_backlogs, ours=NO_WINDOW),
}
