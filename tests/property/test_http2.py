"""Any frames, in any pieces: the HTTP/2 server keeps its books and never breaks."""

from __future__ import annotations

import asyncio
import math
import struct
from collections.abc import Callable
from typing import Any

from hpack import Encoder
from hypothesis import example, given
from hypothesis import strategies as st

from cotenant.domain.port import InferCall, InferResult, OnOutcome, Refused, TensorOut, Withdraw
from cotenant.domain.request import Refusal
from cotenant.serving import protos
from cotenant.serving.grpc_front import GrpcFront
from cotenant.serving.http2_connection import Connection
from cotenant.serving.http2_frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    MAX_WINDOW,
    PREFACE,
    RST_STREAM,
    WINDOW_UPDATE,
    Setting,
    frame,
    settings,
    word_frame,
)
from cotenant.serving.intake import Intake
from cotenant.serving.tensors import Limits


class Transport:
    """Keeps what is written; says when it has more than ``high`` bytes to send, as asyncio's do."""

    def __init__(self, high: float = math.inf) -> None:
        self.written = bytearray()
        self.closed = False
        self.reading = True
        self.connection: Any = None
        self._high = high
        self._waiting = 0
        self._full = False

    def write(self, data: bytes) -> None:
        self.writelines([data])

    def writelines(self, pieces: list[bytes]) -> None:
        assert not self.closed, "written to a closed transport"
        for piece in pieces:
            self.written += piece
            self._waiting += len(piece)
        if self._waiting > self._high and not self._full:
            self._full = True
            self.connection.pause_writing()

    def taken(self) -> None:
        """The client has read everything."""
        self._waiting = 0
        if self._full:
            self._full = False
            self.connection.resume_writing()

    @property
    def full(self) -> bool:
        return self._full

    def pause_reading(self) -> None:
        assert not self.closed
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.closed
        assert not self._full, "reads on though its client does not"
        self.reading = True

    def close(self) -> None:
        self.closed = True

    abort = write_eof = close


class Node:
    """Refuses every third request, answers every third later and the others at the next look."""

    def __init__(self) -> None:
        self.waiting: dict[int, Callable[[], None]] = {}
        self.results = 0
        self._count = 0

    def submit(self, call: InferCall, done: OnOutcome) -> Withdraw | Refused:
        self._count += 1
        number = self._count
        if number % 3 == 0:
            return Refused(Refusal.QUEUE_FULL, 5, "")
        self.results += 1
        data = memoryview(bytes(number * 1000))
        result = InferResult("m", "1", [TensorOut("y", "UINT8", (len(data),), data)], self._release)

        def withdraw() -> None:
            del self.waiting[number]
            self._release()

        self.waiting[number] = lambda: done(result)
        return withdraw

    def answer(self) -> None:
        for number in sorted(self.waiting):
            if number in self.waiting:
                self.waiting.pop(number)()

    def _release(self) -> None:
        self.results -= 1

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the node was asked for {name}")


def message() -> bytes:
    request = protos.ModelInferRequest(model_name="m", id="r")
    request.inputs.add(name="x", datatype="FP32", shape=[4])
    request.raw_input_contents.append(bytes(16))
    data: bytes = request.SerializeToString()
    return struct.pack(">BI", 0, len(data)) + data


def block(method: str) -> bytes:
    path = f"/inference.GRPCInferenceService/{method}"
    return Encoder().encode(
        [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            ("content-type", "application/grpc"),
        ],
        huffman=False,
    )


numbers = st.integers(0, 9)
flags = st.sampled_from([0, END_STREAM, END_HEADERS, END_STREAM | END_HEADERS, 0x08, 0x20, 0xFF])
payloads = st.one_of(
    st.sampled_from([message(), message()[:9], message() * 3, block("ModelInfer"), b"", bytes(8)]),
    st.binary(max_size=40),
)


def in_small_frames(number: int, body: bytes, size: int) -> bytes:
    """A body, or part of one, in data frames of ``size`` that follow each other."""
    pieces = (body[at : at + size] for at in range(0, len(body), size))
    return b"".join(frame(DATA, 0, number, piece) for piece in pieces)


FRAMES = st.one_of(
    st.builds(frame, st.integers(0, 10), flags, numbers, payloads),
    st.builds(
        lambda number, method, more: frame(HEADERS, END_HEADERS | more, number, block(method)),
        st.sampled_from([1, 3, 5, 7, 9]),
        st.sampled_from(["ModelInfer", "ModelStreamInfer", "Nothing"]),
        st.sampled_from([0, 0, 0, END_STREAM]),
    ),
    st.builds(
        lambda number, body, more: frame(DATA, more, number, body),
        st.sampled_from([1, 3, 5, 7, 9]),
        st.sampled_from([message(), message()[:30], message()[30:], message() * 5]),
        st.sampled_from([0, END_STREAM]),
    ),
    st.builds(
        in_small_frames,
        st.sampled_from([1, 3, 5]),
        st.sampled_from([message(), message()[:30], message()[30:], message() * 30]),
        st.sampled_from([1, 3, 50, 500]),
    ),
    st.builds(
        word_frame,
        st.sampled_from([WINDOW_UPDATE, RST_STREAM]),
        numbers,
        st.sampled_from([0, 1, 5000, MAX_WINDOW]),
    ),
    st.builds(
        lambda key, value: settings({key: value}),
        st.sampled_from(list(Setting)),
        st.sampled_from([0, 1, 100, 16_384, 65_535, 2**20]),
    ),
    st.just(frame(CONTINUATION, END_HEADERS, 1, b"")),
)
LOOK, PAUSE, RESUME = "the node answers", "the client reads no more", "it reads on"
STEPS = st.lists(st.one_of(FRAMES, FRAMES, FRAMES, st.sampled_from([LOOK, PAUSE, RESUME])))
MOST_HELD = 3000


class Play:
    """A connection over a fake node, and what it does when it is fed frames."""

    def __init__(self, high: float = math.inf) -> None:
        self.node = Node()
        self.intake = Intake(Limits(body_bytes=1000, buffered_bytes=MOST_HELD))
        self.front = GrpcFront(self.node, self.intake, None, "127.0.0.1", 0)  # type: ignore[arg-type]
        self.connection = Connection(self.front._server)
        self.transport = Transport(high)
        self.transport.connection = self.connection
        self.connection.connection_made(self.transport)  # type: ignore[arg-type]
        self.connection.data_received(PREFACE + settings({}))

    async def feed(self, data: bytes, size: int | None) -> None:
        """In pieces of ``size``, each when the connection reads."""
        for at in range(0, len(data), size or len(data)):
            while not (self.transport.reading or self.transport.closed):
                self.transport.taken()
                await asyncio.sleep(0)
            if not self.transport.closed:
                self.connection.data_received(data[at : at + size if size else None])
            assert 0 <= self.intake.budget.held <= MOST_HELD
        while self.connection._later and not self.transport.full:
            await asyncio.sleep(0)

    def end(self) -> None:
        """The client goes away; nothing must be left."""
        connection, front = self.connection, self.front
        connection.connection_lost(None)
        self.node.answer()
        assert not connection.streams
        assert not connection.sender.blocked
        left = self.node.results, len(self.node.waiting), len(front.running)
        assert (*left, self.intake.budget.held) == (0,) * 4
        assert connection not in front._server.incomplete
        assert connection.sender not in front._server.unread
        assert not front.late._entries


async def play(steps: list[bytes | str], size: int | None) -> bytes:
    """Feed frames to a connection, in pieces of ``size``; what it wrote."""
    the = Play()
    paused = False
    for step in steps:
        if isinstance(step, bytes):
            the.transport.reading = True
            await the.feed(step, size)
        elif step == LOOK:
            the.node.answer()
        elif (step == PAUSE) != paused and not the.transport.closed:
            paused = not paused
            the.connection.pause_writing() if paused else the.connection.resume_writing()
    the.end()
    return bytes(the.transport.written)


@example([frame(HEADERS, END_HEADERS, 1, block("ModelInfer")), frame(DATA, 0, 1, message() * 3)], 1)
@example(
    [
        frame(HEADERS, END_HEADERS, 1, block("ModelStreamInfer")),
        in_small_frames(1, message() * 30, 7),
        frame(DATA, END_STREAM, 1, b""),
    ],
    13,
)
@example(
    [
        frame(HEADERS, END_HEADERS, 1, block("ModelInfer")),
        frame(DATA, 0, 1, message()[:6]),
        in_small_frames(1, message()[6:], 3),
        frame(DATA, END_STREAM, 1, b""),
    ],
    1,
)
@given(STEPS, st.sampled_from([1, 2, 7, 13, 30]))
def test_pieces_make_no_difference_and_nothing_is_left(steps: list[Any], size: int) -> None:
    whole = asyncio.run(play(steps, None))
    assert asyncio.run(play(steps, size)) == whole


async def live(steps: list[bytes | str], high: int) -> None:
    """A client that reads now and then, and in the end everything that it may."""
    the = Play(high)
    for step in steps:
        if isinstance(step, bytes):
            await the.feed(step, None)
        elif step == LOOK:
            the.node.answer()
        else:
            the.transport.taken()
    await the.feed(settings({Setting.INITIAL_WINDOW_SIZE: 2**20}), None)
    await the.feed(word_frame(WINDOW_UPDATE, 0, 2**24), None)
    for _ in range(300):
        the.node.answer()
        the.transport.taken()
        for number, stream in tuple(the.connection.streams.items()):
            if stream.window < 2**20:
                await the.feed(word_frame(WINDOW_UPDATE, number, 2**20), None)
    if not the.transport.closed:
        assert not [s.id for s in the.connection.streams.values() if s.ended], "never answered"
    the.end()


@given(STEPS, st.sampled_from([0, 100, 3000, 50_000]))
def test_every_request_is_answered_in_the_end(steps: list[Any], high: int) -> None:
    asyncio.run(live(steps, high))
