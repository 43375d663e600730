"""Our HTTP/2 server against a strict client (the ``h2`` library) and against hostile bytes."""

from __future__ import annotations

import contextlib
import gzip
import socket
import struct
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import unquote

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import numpy as np
import pytest
from hpack import Decoder, Encoder
from tritonclient.grpc import service_pb2

from cotenant.domain.port import Refused
from cotenant.domain.request import Refusal
from cotenant.serving import http2, http2_leaving, http2_limits
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
    PUSH_PROMISE,
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
from cotenant.serving.tensors import Limits
from tests.contract.fake_node import eventually, serving

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
HEAD = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", INFER),
    (":authority", "test"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]


def infer_message(model: str = "echo", count: int = 4, tag: str = "r1") -> bytes:
    """A serialised ModelInferRequest whose input is ``count`` FP32 numbers."""
    message = service_pb2.ModelInferRequest(model_name=model, id=tag)
    message.inputs.add(name="x", datatype="FP32", shape=[1, count])
    message.raw_input_contents.append(np.arange(count, dtype=np.float32).tobytes())
    data: bytes = message.SerializeToString()
    return data


def framed(message: bytes, packed: int = 0) -> bytes:
    return struct.pack(">BI", packed, len(message)) + message


def head(**changed: str) -> list[tuple[str, str]]:
    """The headers of a call, some of them changed (``_`` for ``-``) or added."""
    named = dict(HEAD)
    for key, value in changed.items():
        named[f":{key}" if f":{key}" in named else key.replace("_", "-")] = value
    return list(named.items())


class Answer(NamedTuple):
    """What one stream was answered."""

    headers: dict[str, str]
    body: bytes
    trailers: dict[str, str]
    reset: int | None = None

    @property
    def status(self) -> int:
        return int((self.trailers or self.headers)["grpc-status"])

    @property
    def details(self) -> str:
        return unquote((self.trailers or self.headers).get("grpc-message", ""))

    def tensor(self) -> np.ndarray:
        (length,) = struct.unpack(">I", self.body[1:5])
        assert len(self.body) == 5 + length
        message = service_pb2.ModelInferResponse.FromString(self.body[5:])
        return np.frombuffer(message.raw_output_contents[0], np.float32)


class Client:
    """A client that breaks no rule, and notices when the server does."""

    def __init__(self, address: str, **initial: int) -> None:
        host, port = address.split(":")
        self.sock = socket.create_connection((host, int(port)), timeout=20)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.seen: dict[int, list[Any]] = {}
        self.goaway: h2.events.ConnectionTerminated | None = None
        codes = h2.settings.SettingCodes
        self.h2.local_settings = h2.settings.Settings(
            client=True, initial_values={codes[key]: value for key, value in initial.items()}
        )
        self.h2.initiate_connection()
        # h2 holds the server to later changes of its settings, but not to those it begins with.
        self.h2.max_inbound_frame_size = self.h2.local_settings.max_frame_size
        self.h2.decoder.max_allowed_table_size = self.h2.local_settings.header_table_size
        self.flush()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.sock.close()

    def flush(self) -> None:
        self.sock.sendall(self.h2.data_to_send())

    def open(self, headers: list[tuple[str, str]] = HEAD, ends: bool = False) -> int:
        number = self.h2.get_next_available_stream_id()
        self.h2.send_headers(number, headers, end_stream=ends)
        self.flush()
        return number

    def send(self, number: int, body: bytes, ends: bool = True) -> None:
        """Send within the windows, taking in whatever comes meanwhile; stops if reset."""
        with contextlib.suppress(h2.exceptions.StreamClosedError):
            self._send(number, body, ends)

    def _send(self, number: int, body: bytes, ends: bool) -> None:
        at = 0
        while at < len(body):
            room = min(self.h2.local_flow_control_window(number), self.h2.max_outbound_frame_size)
            if room == 0:
                self.take()
                continue
            self.h2.send_data(number, body[at : at + room])
            at += room
            self.flush()
        if ends:
            self.h2.end_stream(number)
            self.flush()

    def call(self, body: bytes, headers: list[tuple[str, str]] = HEAD) -> int:
        number = self.open(headers)
        self.send(number, body)
        return number

    def take(self, acknowledge: bool = True) -> None:
        """Take in what comes next."""
        data = self.sock.recv(65536)
        if not data:
            raise EOFError
        for event in self.h2.receive_data(data):
            if isinstance(event, h2.events.DataReceived) and acknowledge:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            if isinstance(event, h2.events.ConnectionTerminated):
                self.goaway = event
            number = getattr(event, "stream_id", None)
            if number:
                self.seen.setdefault(number, []).append(event)
        self.flush()

    def answer(self, number: int, acknowledge: bool = True) -> Answer:
        """Wait until a stream has ended."""
        ends = h2.events.StreamEnded, h2.events.StreamReset
        while not any(isinstance(event, ends) for event in self.seen.get(number, [])):
            self.take(acknowledge)
        headers: dict[str, str] = {}
        trailers: dict[str, str] = {}
        body, reset = b"", None
        for event in self.seen[number]:
            if isinstance(event, h2.events.ResponseReceived):
                headers = dict(event.headers)
            elif isinstance(event, h2.events.DataReceived):
                body += event.data
            elif isinstance(event, h2.events.TrailersReceived):
                trailers = dict(event.headers)
            elif isinstance(event, h2.events.StreamReset):
                reset = int(event.error_code)
        return Answer(headers, body, trailers, reset)


@pytest.fixture
def client(served: Any) -> Iterator[Client]:
    with Client(served.grpc) as client:
        yield client


def test_an_answer_is_headers_message_and_status(client: Client) -> None:
    answer = client.answer(client.call(framed(infer_message())))
    assert answer.headers == {":status": "200", "content-type": "application/grpc"}
    assert answer.trailers == {"grpc-status": "0"}
    assert answer.tensor().tolist() == [0, 1, 2, 3]


def test_limits_are_announced(client: Client) -> None:
    client.answer(client.call(framed(infer_message())))
    told = client.h2.remote_settings
    assert told.max_concurrent_streams == http2_limits.STREAMS
    assert told.max_frame_size == http2_limits.FRAME_BYTES
    assert told.initial_window_size == http2_limits.STREAM_WINDOW
    assert told.max_header_list_size == http2_limits.HEADER_BYTES


@pytest.mark.parametrize("count", [0, 1, 4_000, 300_000, 1_500_000])
def test_tensors_of_every_size_come_back_whole(client: Client, count: int) -> None:
    for _ in range(2):
        answer = client.answer(client.call(framed(infer_message(count=count))))
        assert np.array_equal(answer.tensor(), np.arange(count, dtype=np.float32))


@pytest.mark.parametrize(
    "initial",
    [
        {"INITIAL_WINDOW_SIZE": 7},
        {"INITIAL_WINDOW_SIZE": 2**31 - 1, "MAX_FRAME_SIZE": 2**24 - 1},
        {"HEADER_TABLE_SIZE": 0},
        {"HEADER_TABLE_SIZE": 65536, "MAX_FRAME_SIZE": 20_000},
    ],
)
def test_a_clients_settings_are_kept_to(served: Any, initial: dict[str, int]) -> None:
    # h2 raises where a window, a frame's size or the header table is not respected.
    with Client(served.grpc, **initial) as client:
        for count in (1, 3_000):
            answer = client.answer(client.call(framed(infer_message(count=count))))
            assert np.array_equal(answer.tensor(), np.arange(count, dtype=np.float32))


def test_a_window_may_shrink_below_nothing(served: Any) -> None:
    with Client(served.grpc, INITIAL_WINDOW_SIZE=40_000) as client:
        number = client.call(framed(infer_message(count=30_000)))
        while (
            sum(
                len(event.data)
                for event in client.seen.get(number, [])
                if isinstance(event, h2.events.DataReceived)
            )
            < 40_000
        ):
            client.take(acknowledge=False)
        client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 10})
        client.flush()
        other = client.call(framed(infer_message(count=100)))
        client.h2.increment_flow_control_window(30_000, number)  # still nothing: 10 - 40000 + 30000
        client.h2.increment_flow_control_window(1_000, other)
        client.flush()
        assert client.answer(other).tensor().size == 100
        client.h2.increment_flow_control_window(200_000, number)
        client.flush()
        assert client.answer(number).tensor().size == 30_000


def test_a_stuck_stream_does_not_hold_up_others(served: Any) -> None:
    with Client(served.grpc, INITIAL_WINDOW_SIZE=1000) as client:
        stuck = client.call(framed(infer_message(count=10_000)))
        for _ in range(5):
            number = client.call(framed(infer_message(count=10)))
            assert client.answer(number, acknowledge=False).tensor().size == 10
        client.h2.increment_flow_control_window(100_000, stuck)
        client.flush()
        assert client.answer(stuck).tensor().size == 10_000


def test_many_streams_share_a_connection(client: Client) -> None:
    numbers = {client.call(framed(infer_message(count=c))): c for c in range(1, 60_000, 997)}
    for number, count in numbers.items():
        assert client.answer(number).tensor().size == count


def test_a_stream_beyond_the_limit_is_refused_alone(served: Any) -> None:
    with Client(served.grpc) as client:
        client.answer(client.call(framed(infer_message())))
        client.h2.remote_settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = 9999
        client.h2.remote_settings.acknowledge()
        held = [client.open() for _ in range(http2_limits.STREAMS)]
        over = client.call(framed(infer_message()))
        assert client.answer(over).reset == ErrorCode.REFUSED_STREAM
        for number in held[:2]:
            client.send(number, framed(infer_message()))
            assert client.answer(number).status == 0
        again = client.call(framed(infer_message()))
        assert client.answer(again).status == 0


def test_a_connection_without_an_answer_gives_way_to_a_new_one() -> None:
    with serving() as served:
        served.fronts[1]._server._most = 3
        with Client(served.grpc) as one, Client(served.grpc) as two:
            for client in (one, two, one):
                assert client.answer(client.call(framed(infer_message()))).status == 0
            for _ in range(5):  # each takes the place of the one before, which has done nothing
                idle = connect(served)
                idle.sendall(HELLO)
                assert next(frames(idle))[0] == SETTINGS
            assert one.answer(one.call(framed(infer_message()))).status == 0
            with Client(served.grpc) as three:
                assert three.answer(three.call(framed(infer_message()))).status == 0
                with Client(served.grpc) as four:  # now it is the one whose answer is longest ago
                    assert four.answer(four.call(framed(infer_message()))).status == 0
                    assert three.answer(three.call(framed(infer_message()))).status == 0
                    with pytest.raises(EOFError):
                        while True:
                            two.take()
                    assert two.goaway is not None
        assert eventually(lambda: not served.fronts[1]._server.connections)


def test_an_idle_connection_is_told_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "IDLE_S", 0.2)
    with serving() as served, connect(served) as sock:
        sock.sendall(HELLO + raw_call()[0])
        time.sleep(0.5)  # one with a call is not idle
        sock.sendall(raw_call()[1])
        until_answered(sock)
        assert last_streams(goodbye(sock)) == [2**31 - 1, 1]


# Bytes as they may come.


def raw_call(
    number: int = 1, message: bytes | None = None, flags: int = 0, body_flags: int = 0
) -> list[bytes]:
    """The frames of a call that asks for 4 numbers."""
    block = Encoder().encode(head())
    body = framed(message or infer_message())
    return [
        frame(HEADERS, END_HEADERS | flags, number, block),
        frame(DATA, END_STREAM | body_flags, number, body),
    ]


def connect(served: Any) -> socket.socket:
    host, port = served.grpc.split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def frames(sock: socket.socket) -> Iterator[tuple[int, int, int, bytes]]:
    """Kind, flags, stream and payload of each frame until the server closes."""
    data = b""
    while True:
        while len(data) < 9 or len(data) < 9 + int.from_bytes(data[:3], "big"):
            with contextlib.suppress(ConnectionResetError):
                more = sock.recv(65536)
            if not more:
                return
            data += more
        length = int.from_bytes(data[:3], "big")
        kind, flags, number = data[3], data[4], int.from_bytes(data[5:9], "big")
        yield kind, flags, number, data[9 : 9 + length]
        data = data[9 + length :]


def until_answered(sock: socket.socket, number: int = 1) -> bytes:
    """The message of a call that is answered well."""
    body = b""
    for kind, flags, stream, payload in frames(sock):
        assert kind != GOAWAY, payload
        if stream != number:
            continue
        assert kind in (HEADERS, DATA, WINDOW_UPDATE), (kind, payload)
        body += payload if kind == DATA else b""
        if flags & END_STREAM and kind != WINDOW_UPDATE:
            assert payload == header_block([(b"grpc-status", b"0")])
            return body
    raise AssertionError("the connection was closed")


def ended(served: Any, data: bytes) -> int:
    """The error with which the server ends a connection on which ``data`` is sent."""
    with connect(served) as sock:
        sock.sendall(data)
        for kind, _, _, payload in frames(sock):
            if kind == GOAWAY:
                return int.from_bytes(payload[4:8], "big")
    raise AssertionError("no reason was given")


def reset_of(served: Any, data: bytes, number: int = 1) -> int:
    """The error with which the server resets a stream; the connection lives on."""
    with connect(served) as sock:
        sock.sendall(PREFACE + settings({}) + data + frame(PING, 0, 0, b"12345678"))
        error = None
        for kind, flags, stream, payload in frames(sock):
            assert kind != GOAWAY, payload
            if kind == RST_STREAM and stream == number:
                error = int.from_bytes(payload, "big")
            if kind == PING and flags & ACK:
                break
        assert error is not None
        return error


@pytest.mark.parametrize("size", [1, 2, 9, 10, 17, 100])
def test_frames_may_come_in_any_pieces(served: Any, size: int) -> None:
    data = PREFACE + settings({}) + b"".join(raw_call())
    with connect(served) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(data), size):
            sock.sendall(data[at : at + size])
            if at % (8 * size) == 0:
                time.sleep(0.0005)  # else the kernel joins them again
        assert len(until_answered(sock)) > 16


def test_headers_may_be_padded_prioritised_and_continued(served: Any) -> None:
    block = Encoder().encode(head())
    body = framed(infer_message())
    cut = len(block) // 2
    first = bytes([3]) + bytes(4) + b"\x10" + block[:cut] + bytes(3)
    data = [
        frame(HEADERS, PADDED | WITH_PRIORITY, 1, first),
        frame(CONTINUATION, 0, 1, b""),
        frame(CONTINUATION, END_HEADERS, 1, block[cut:]),
        frame(DATA, PADDED, 1, bytes([200]) + body[:7] + bytes(200)),
        frame(DATA, PADDED, 1, bytes([0])),
        frame(DATA, 0, 1, b""),
        frame(PRIORITY, 0, 1, bytes(4) + b"\x10"),
        frame(0x77, 0xFF, 1, b"unknown"),
        frame(DATA, PADDED, 1, bytes([1]) + body[7:] + bytes(1)),
        frame(HEADERS, END_HEADERS | END_STREAM, 1, header_block([(b"a", b"b")])),
    ]
    with connect(served) as sock:
        sock.sendall(PREFACE + settings({}) + b"".join(data))
        assert len(until_answered(sock)) > 16


def test_headers_mean_the_same_when_they_are_remembered(served: Any) -> None:
    # Indexed headers, first added to the table, then referred to, and then pushed out of it.
    encoder = Encoder()
    with connect(served) as sock:
        sock.sendall(PREFACE + settings({}))
        for i, number in enumerate(range(1, 60, 2)):
            more = [("x-more", "y" * 900 + str(i))] if i % 5 == 4 else []
            block = encoder.encode(head() + more)
            sock.sendall(frame(HEADERS, END_HEADERS, number, block))
            sock.sendall(raw_call(number)[1])
            assert len(until_answered(sock, number)) > 16
            if i == 12:
                encoder.header_table_size = 0
            if i == 20:
                encoder.header_table_size = 4096


def test_what_is_not_http2_is_told_so(served: Any) -> None:
    for request in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00" * 4):
        with connect(served) as sock:
            sock.sendall(request)
            with contextlib.suppress(ConnectionResetError):
                assert b"this port speaks gRPC" in sock.recv(4096)


OPEN = raw_call()[0]
BODY = raw_call()[1]
HELLO = PREFACE + settings({})
PROTOCOL, SIZE, FLOW = (
    ErrorCode.PROTOCOL_ERROR,
    ErrorCode.FRAME_SIZE_ERROR,
    ErrorCode.FLOW_CONTROL_ERROR,
)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (PREFACE + frame(PING, 0, 0, bytes(8)), PROTOCOL),
        (PREFACE + frame(SETTINGS, ACK, 0), PROTOCOL),
        (PREFACE + OPEN, PROTOCOL),
        (HELLO + frame(DATA, 0, 0, b"x"), PROTOCOL),
        (HELLO + frame(DATA, 0, 1, b"x"), PROTOCOL),
        (HELLO + OPEN + frame(DATA, 0, 3, b"x"), PROTOCOL),
        (HELLO + OPEN + frame(DATA, PADDED, 1, b"\x05abcd"), PROTOCOL),
        (HELLO + OPEN + frame(DATA, PADDED, 1, b""), PROTOCOL),
        (HELLO + frame(HEADERS, END_HEADERS, 0, OPEN[9:]), PROTOCOL),
        (HELLO + frame(HEADERS, END_HEADERS, 2, OPEN[9:]), PROTOCOL),
        (HELLO + frame(HEADERS, END_HEADERS | PADDED, 1, b""), PROTOCOL),
        (HELLO + frame(HEADERS, END_HEADERS | PADDED, 1, b"\x09abc"), PROTOCOL),
        (HELLO + frame(HEADERS, END_HEADERS | WITH_PRIORITY, 1, b"abc"), PROTOCOL),
        (HELLO + frame(HEADERS, 0, 1, OPEN[9:]) + BODY, PROTOCOL),
        (HELLO + frame(HEADERS, 0, 1, OPEN[9:]) + frame(PING, 0, 0, bytes(8)), PROTOCOL),
        (
            HELLO + frame(HEADERS, 0, 1, b"") + frame(CONTINUATION, END_HEADERS, 3, OPEN[9:]),
            PROTOCOL,
        ),
        (HELLO + frame(CONTINUATION, END_HEADERS, 1, OPEN[9:]), PROTOCOL),
        (HELLO + frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4)), PROTOCOL),
        (HELLO + frame(PING, 0, 1, bytes(8)), PROTOCOL),
        (HELLO + frame(PING, 0, 0, bytes(7)), SIZE),
        (HELLO + frame(PRIORITY, 0, 1, bytes(4)), SIZE),
        (HELLO + OPEN + frame(RST_STREAM, 0, 1, bytes(3)), SIZE),
        (HELLO + word_frame(RST_STREAM, 0, 8), PROTOCOL),
        (HELLO + word_frame(RST_STREAM, 1, 8), PROTOCOL),
        (HELLO + word_frame(WINDOW_UPDATE, 0, 0), PROTOCOL),
        (HELLO + word_frame(WINDOW_UPDATE, 0, 2**31 - 1), FLOW),
        (HELLO + word_frame(WINDOW_UPDATE, 1, 1), PROTOCOL),
        (HELLO + frame(WINDOW_UPDATE, 0, 0, bytes(5)), SIZE),
        (HELLO + frame(SETTINGS, 0, 1), PROTOCOL),
        (HELLO + frame(SETTINGS, 0, 0, bytes(5)), SIZE),
        (HELLO + frame(SETTINGS, ACK, 0, bytes(6)), SIZE),
        (HELLO + settings({Setting.INITIAL_WINDOW_SIZE: 2**31}), FLOW),
        (HELLO + settings({Setting.MAX_FRAME_SIZE: 16_383}), PROTOCOL),
        (HELLO + settings({Setting.MAX_FRAME_SIZE: 2**24}), PROTOCOL),
        (HELLO + settings({Setting.ENABLE_PUSH: 2}), PROTOCOL),
        (
            HELLO
            + OPEN
            + word_frame(WINDOW_UPDATE, 1, 2**31 - 1 - 65535)
            + settings({Setting.INITIAL_WINDOW_SIZE: 65536}),
            FLOW,
        ),
        (HELLO + frame(0x77, 0, 0, bytes(70_000)), SIZE),
        (HELLO + struct.pack(">IBI", (2**20 + 1) << 8 | DATA, 0, 1), SIZE),
        (HELLO + OPEN + struct.pack(">IBI", (2**20 + 1) << 8 | DATA, 0, 1), SIZE),
        (HELLO + OPEN + struct.pack(">IBI", (2**20 + 1) << 8 | DATA, PADDED, 1), SIZE),
        (HELLO + frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff"), ErrorCode.COMPRESSION_ERROR),
        (HELLO + frame(HEADERS, END_HEADERS, 1, b"\x00\x05ab"), ErrorCode.COMPRESSION_ERROR),
        (HELLO + frame(HEADERS, END_HEADERS, 1, b"\xc6"), ErrorCode.COMPRESSION_ERROR),
        (HELLO + frame(HEADERS, END_HEADERS, 1, b"\x3f\xff\xff\x07"), ErrorCode.COMPRESSION_ERROR),
        (  # a small block that unfolds to far more than the limit
            HELLO
            + frame(HEADERS, END_HEADERS, 1, b"\x40\x01a\x7f\xb1\x1e" + bytes(4000) + b"\xbe" * 50),
            ErrorCode.COMPRESSION_ERROR,
        ),
        (
            HELLO + frame(HEADERS, 0, 1, b"") + frame(CONTINUATION, 0, 1, bytes(10_000)) * 2,
            ErrorCode.ENHANCE_YOUR_CALM,
        ),
    ],
)
def test_a_broken_rule_ends_the_connection(served: Any, data: bytes, error: ErrorCode) -> None:
    assert ended(served, data) == error


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (OPEN + word_frame(WINDOW_UPDATE, 1, 0), PROTOCOL),
        (OPEN + word_frame(WINDOW_UPDATE, 1, 2**31 - 1), FLOW),
        (OPEN + OPEN, PROTOCOL),
        (
            OPEN
            + frame(DATA, 0, 1, struct.pack(">BI", 0, 2**22) + bytes(300_000))
            + frame(DATA, 0, 1, bytes(2**20)),
            FLOW,
        ),
    ],
)
def test_a_rule_broken_on_a_stream_ends_it_alone(
    served: Any, data: bytes, error: ErrorCode
) -> None:
    assert reset_of(served, data) == error


def test_data_after_the_end_of_a_request_ends_its_stream(served: Any) -> None:
    sleepy = b"".join(raw_call(message=infer_message("sleepy")))
    assert reset_of(served, sleepy + BODY) == ErrorCode.STREAM_CLOSED
    assert served.node.withdrawn.acquire(timeout=20)
    assert reset_of(served, sleepy + OPEN) == ErrorCode.STREAM_CLOSED
    assert served.node.withdrawn.acquire(timeout=20)
    while served.node.waiting.acquire(blocking=False):
        pass


def test_a_connections_window_is_kept(served: Any) -> None:
    # Streams of 1 MiB each, closed by an answer: their data counts for the connection all the same.
    with connect(served) as sock:
        sock.sendall(HELLO)
        encoder = Encoder()
        for number in range(1, 80, 2):
            block = encoder.encode(head(content_type="text/plain"))
            sock.sendall(frame(HEADERS, END_HEADERS, number, block))
            sock.sendall(frame(DATA, END_STREAM, number, bytes(2**20)))
        more = 0
        for kind, flags, stream, payload in frames(sock):
            assert kind != GOAWAY, payload
            if kind == WINDOW_UPDATE and stream == 0:
                more += int.from_bytes(payload, "big")
            if stream == 79 and flags & END_STREAM:
                break
        assert more >= 24 * 2**20


def test_what_a_client_does_not_read_is_not_piled_up(served: Any) -> None:
    pings = frame(PING, 0, 0, b"12345678") * 100
    with connect(served) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(HELLO)
        sock.settimeout(1.0)
        with contextlib.suppress(OSError):
            for _ in range(100_000):
                sock.sendall(pings)
                for connection in served.call(lambda: served.fronts[1]._server.connections):
                    assert connection._transport.get_write_buffer_size() < 2**20
    assert eventually(lambda: not served.fronts[1]._server.connections)


def test_answers_that_are_not_read_are_not_piled_up(served: Any) -> None:
    huge = settings({Setting.INITIAL_WINDOW_SIZE: 2**31 - 1, Setting.MAX_FRAME_SIZE: 2**24 - 1})
    message = framed(infer_message(count=250_000))
    in_two = b"".join(frame(DATA, 0, 1, message[at : at + 2**19]) for at in (0, 2**19))
    block = Encoder().encode(head(path=STREAM_INFER))
    with connect(served) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.sendall(PREFACE + huge + word_frame(WINDOW_UPDATE, 0, 2**31 - 1 - 65535))
        sock.sendall(frame(HEADERS, END_HEADERS, 1, block))
        before = len(served.node.calls)
        sock.settimeout(0.5)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 400:
                sock.sendall(in_two)
                sent += 1
        (connection,) = served.call(lambda: served.fronts[1]._server.connections)
        assert connection._transport.get_write_buffer_size() < 4 * 2**20
        assert len(served.node.calls) - before < 100
        # Reading goes on with the client, and stops again when it does.
        sock.settimeout(20)
        for _ in range(20):
            sock.recv(2**16)
        with pytest.raises(TimeoutError):
            sock.settimeout(0.5)
            for _ in range(10_000):
                sock.sendall(frame(PING, 0, 0, b"12345678") * 1000)
        assert connection._transport.get_write_buffer_size() < 4 * 2**20


def test_a_stream_ends_though_its_window_is_below_nothing(served: Any) -> None:
    with Client(served.grpc) as client:
        number = client.open(head(path=STREAM_INFER))
        client.send(number, framed(infer_message(count=10_000)), ends=False)
        while not any(isinstance(e, h2.events.DataReceived) for e in client.seen.get(number, [])):
            client.take(acknowledge=False)
        client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 10})
        client.flush()
        client.take(acknowledge=False)
        client.send(number, b"")
        assert client.answer(number, acknowledge=False).status == 0


def test_a_stream_that_is_held_up_here_is_not_called_slow() -> None:
    with serving(Limits(body_timeout_s=0.3)) as served, Client(served.grpc) as client:
        number = client.open(head(path=STREAM_INFER))
        client.send(number, framed(infer_message("sleepy")) * 64, ends=False)
        for _ in range(64):
            assert served.node.waiting.acquire(timeout=20)
        half = framed(infer_message(count=200_000))
        client.send(number, framed(infer_message()) + half[:400_000], ends=False)
        time.sleep(0.8)
        served.call(served.node.gate.set)
        client.send(number, half[400_000:])
        answer = client.answer(number)
        assert answer.status == 0
        assert len(stream_messages(answer.body)) == 66


def test_what_comes_beyond_a_streams_window_takes_its_bytes_and_no_more() -> None:
    with serving(Limits(buffered_bytes=200_000)) as served, Client(served.grpc) as client:
        number = client.open(head(path=STREAM_INFER))
        client.send(number, framed(infer_message("sleepy")) * 64, ends=False)
        for _ in range(64):
            assert served.node.waiting.acquire(timeout=20)
        before = served.call(lambda: served.intake.budget.held)
        client.send(number, framed(b"") * 10_000, ends=False)
        assert eventually(lambda: served.intake.budget.held == before + 50_000)
        client.send(number, framed(b"") * 10_000, ends=False)
        answer = client.answer(number)
        assert (answer.status, answer.headers["cotenant-refusal"]) == (8, "MEMORY")
        assert eventually(lambda: served.intake.budget.held == 0)


def test_one_connection_never_holds_all_memory() -> None:
    with serving(Limits(buffered_bytes=300_000)) as served:
        with Client(served.grpc) as greedy, Client(served.grpc) as client:
            held = greedy.open()
            big = framed(infer_message(count=60_000))
            greedy.send(held, big[:140_000], ends=False)
            assert eventually(lambda: served.intake.budget.held > 130_000)
            assert client.answer(client.call(framed(infer_message(count=15_000)))).status == 0
            greedy.send(held, big[140_000:])
            assert greedy.answer(held).headers["cotenant-refusal"] == "MEMORY"


def test_announcements_take_no_memory_from_others() -> None:
    with serving(Limits(buffered_bytes=400_000)) as served, Client(served.grpc) as client:
        for _ in range(50):
            client.send(client.open(), struct.pack(">BI", 0, 150_000), ends=False)
        assert client.answer(client.call(framed(infer_message(count=40_000)))).status == 0


def test_slow_heads_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "HEAD_S", 0.2)
    with serving() as served:
        for data in (
            b"",
            PREFACE[:10],
            PREFACE,
            HELLO + OPEN[:12],
            HELLO + frame(HEADERS, 0, 1, b""),
        ):
            assert ended(served, data) == ErrorCode.ENHANCE_YOUR_CALM
        with Client(served.grpc) as client:
            assert client.answer(client.call(framed(infer_message()))).status == 0
            time.sleep(0.5)  # an idle connection is welcome
            assert client.answer(client.call(framed(infer_message()))).status == 0


def test_slow_bodies_are_ended() -> None:
    with serving(Limits(body_timeout_s=0.3)) as served, Client(served.grpc) as client:
        whole = framed(infer_message())
        for body in (b"", whole[:3], whole[:-1]):
            number = client.open()
            client.send(number, body, ends=False)
            answer = client.answer(number)
            assert (answer.status, "did not arrive" in answer.details) == (4, True)
        stream = client.open(head(path=STREAM_INFER))
        time.sleep(0.5)  # a stream owes nothing
        client.send(stream, whole + whole[:9], ends=False)
        answer = client.answer(stream)
        assert answer.status == 4
        assert answer.body
        assert eventually(lambda: served.intake.budget.held == 0)


def test_a_client_that_takes_up_no_answers_is_disconnected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http2, "UNREAD_S", 0.3)
    with serving() as served, Client(served.grpc, INITIAL_WINDOW_SIZE=100) as client:
        for _ in range(2):
            client.call(framed(infer_message(count=1000)))
        with pytest.raises(EOFError):
            while True:
                client.take(acknowledge=False)
        assert client.goaway is not None
        assert client.goaway.error_code == ErrorCode.ENHANCE_YOUR_CALM
        assert eventually(lambda: served.intake.budget.held == 0)


def test_answers_that_are_not_taken_up_count_for_a_connections_memory() -> None:
    with serving() as served:
        with Client(served.grpc, INITIAL_WINDOW_SIZE=100) as client, Client(served.grpc) as other:
            for _ in range(5):
                client.call(framed(infer_message("sleepy", count=20_000)))
                assert served.node.waiting.acquire(timeout=20)
            limit, served.intake.budget._limit = served.intake.budget._limit, 500_000
            served.call(served.node.gate.set)
            with pytest.raises(EOFError):
                while True:
                    client.take(acknowledge=False)
            assert client.goaway is not None
            assert client.goaway.error_code == ErrorCode.ENHANCE_YOUR_CALM
            assert other.answer(other.call(framed(infer_message(count=20_000)))).status == 0
            served.intake.budget._limit = limit
        assert eventually(lambda: served.intake.budget.held == 0)


# Calls.


@pytest.mark.parametrize(
    ("changed", "status"),
    [({"method": "GET"}, "415"), ({"content_type": "application/json"}, "415")],
)
def test_what_is_no_grpc_call_gets_an_http_status(
    client: Client, changed: dict[str, str], status: str
) -> None:
    assert client.answer(client.call(b"", head(**changed))).headers[":status"] == status


@pytest.mark.parametrize(
    ("changed", "body", "status", "says"),
    [
        ({"path": "/inference.GRPCInferenceService/Nothing"}, b"", 12, "no method"),
        ({"path": "/other.Service/ModelInfer"}, b"", 12, "no method"),
        ({"path": "/x%0ay"}, b"", 12, "/x%0ay"),
        ({"path": INFER.replace("I", "%49")}, framed(infer_message()), 12, "no method"),
        ({"grpc_encoding": "snappy"}, framed(infer_message()), 12, "use gzip or deflate"),
        ({}, b"", 13, "none came"),
        ({}, framed(infer_message())[:-1], 13, "none came"),
        ({}, framed(infer_message()) * 2, 13, "there are more"),
        ({}, framed(infer_message(), packed=1), 13, "no grpc-encoding"),
        ({}, framed(infer_message(), packed=2), 13, "flags 2"),
        ({"grpc_encoding": "gzip"}, framed(b"no gzip", packed=1), 3, "not gzip data"),
        (
            {"grpc_encoding": "gzip"},
            framed(gzip.compress(infer_message(), mtime=0)[:-4], packed=1),
            3,
            "is cut short",
        ),
        (
            {"grpc_encoding": "gzip"},
            framed(gzip.compress(bytes(80 * 2**20), mtime=0), packed=1),
            8,
            "larger when decompressed",
        ),
        ({}, framed(b"")[:1] + b"\xff" * 4, 8, "at most 67108864"),
        ({"path": "/inference.GRPCInferenceService/ModelMetadata"}, framed(b"\xff"), 3, "read"),
    ],
)
def test_a_call_that_is_wrong_is_told_what(
    client: Client, changed: dict[str, str], body: bytes, status: int, says: str
) -> None:
    answer = client.answer(client.call(body, head(**changed)))
    assert answer.status == status
    assert says in answer.details
    assert client.answer(client.call(framed(infer_message()))).status == 0


def test_compressed_and_plain_messages_may_alternate(client: Client) -> None:
    number = client.open(head(path=STREAM_INFER, grpc_encoding="gzip"))
    for i in range(20):
        data = infer_message(tag=str(i))
        client.send(number, framed(gzip.compress(data), 1) if i % 2 else framed(data), ends=False)
    client.send(number, b"")
    answer = client.answer(number)
    assert answer.status == 0
    assert [m.infer_response.id for m in stream_messages(answer.body)] == [
        str(i) for i in range(20)
    ]


def stream_messages(body: bytes) -> list[Any]:
    found = []
    while body:
        (length,) = struct.unpack(">I", body[1:5])
        found.append(service_pb2.ModelStreamInferResponse.FromString(body[5 : 5 + length]))
        body = body[5 + length :]
    return found


def test_a_thousand_bad_messages_on_a_stream_are_each_answered(client: Client) -> None:
    number = client.open(head(path=STREAM_INFER))
    client.send(number, framed(b"\xff") * 3000)
    answer = client.answer(number)
    assert answer.status == 0
    messages = stream_messages(answer.body)
    assert len(messages) == 3000
    assert all("cannot be read" in m.error_message for m in messages)


def test_a_stream_whose_answers_are_not_read_starts_no_more(served: Any) -> None:
    with Client(served.grpc, INITIAL_WINDOW_SIZE=1000) as client:
        before = len(served.node.calls)
        number = client.open(head(path=STREAM_INFER))
        client.send(number, framed(infer_message(count=1000)) * 200, ends=False)
        time.sleep(0.3)
        assert len(served.node.calls) - before <= 2 * 64
        client.h2.increment_flow_control_window(2**20, number)
        client.send(number, b"")
        answer = client.answer(number)
        assert answer.status == 0
        assert len(stream_messages(answer.body)) == 200


def test_a_deadline_withdraws_the_request(served: Any, client: Client) -> None:
    message = framed(infer_message("sleepy"))
    for timeout in ("50m", "1u", "0n"):
        answer = client.answer(client.call(message, head(grpc_timeout=timeout)))
        assert (answer.status, "deadline" in answer.details) == (4, True)
    started = 0
    while served.node.waiting.acquire(timeout=0.2):
        started += 1
        assert served.node.withdrawn.acquire(timeout=20)
    assert started >= 1
    for odd in ("1H", "", "soon", "-5S", "123456789S", "5", "٣S"):
        answer = client.answer(client.call(framed(infer_message()), head(grpc_timeout=odd)))
        assert answer.status == 0


@pytest.mark.parametrize("how", ["reset", "close", "goaway"])
def test_a_client_that_leaves_withdraws_its_requests(served: Any, how: str) -> None:
    with Client(served.grpc) as client:
        numbers = [client.call(framed(infer_message("sleepy"))) for _ in range(3)]
        half = client.open()
        client.send(half, framed(infer_message(count=50_000))[:9000], ends=False)
        for _ in numbers:
            assert served.node.waiting.acquire(timeout=20)
        if how == "reset":
            for number in (*numbers, half):
                client.h2.reset_stream(number, h2.errors.ErrorCodes.CANCEL)
            client.flush()
        elif how == "goaway":
            client.h2.close_connection()
            client.flush()
            client.sock.close()
        else:
            client.sock.close()
        for _ in numbers:
            assert served.node.withdrawn.acquire(timeout=20)
        assert eventually(lambda: not served.fronts[1].running)


def test_messages_share_the_memory_of_all_bodies() -> None:
    with serving(Limits(buffered_bytes=500_000)) as served, Client(served.grpc) as client:
        big = framed(infer_message(count=40_000))
        held = client.open()
        client.send(held, big[:-10], ends=False)
        answer = client.answer(client.call(big))
        assert (answer.status, answer.headers["cotenant-refusal"]) == (8, "MEMORY")
        assert int(answer.headers["retry-after-ms"]) > 0
        client.send(held, big[-10:])
        assert client.answer(held).status == 0
        assert client.answer(client.call(big)).status == 0
        packed = framed(gzip.compress(bytes(600_000)), packed=1)
        answer = client.answer(client.call(packed, head(grpc_encoding="gzip")))
        assert (answer.status, answer.headers["cotenant-refusal"]) == (8, "MEMORY")
        assert eventually(lambda: served.intake.budget.held == 0)


def test_a_message_too_large_is_refused_before_it_is_sent() -> None:
    with serving(Limits(body_bytes=10_000)) as served, Client(served.grpc) as client:
        number = client.open()
        client.send(number, struct.pack(">BI", 0, 10_001), ends=False)
        answer = client.answer(number)
        assert (answer.status, "at most 10000" in answer.details) == (8, True)


def test_details_survive_any_text(served: Any, client: Client) -> None:
    text = 'žluť, 100% "quoted"\r\nsecond line\x00 ' + "x" * 3000
    served.node.refuse = Refused(Refusal.FAILED, 0, text)
    answer = client.answer(client.call(framed(infer_message())))
    assert answer.status == 3
    assert answer.details.endswith("x" * 100)
    assert 'žluť, 100% "quoted"\r\nsecond line\x00 ' in answer.details
    served.node.refuse = Refused(Refusal.FAILED, 0, "a file named \udcff " + "猫" * 2000)
    answer = client.answer(client.call(framed(infer_message())))
    assert answer.status == 3
    assert "a file named ? 猫" in answer.details
    assert len(answer.headers["grpc-message"]) < 4096
    number = client.open(head(path=STREAM_INFER))
    client.send(number, framed(infer_message()))
    (message,) = stream_messages(client.answer(number).body)
    assert "a file named ? 猫" in message.error_message


def goodbye(sock: socket.socket) -> list[tuple[int, int, int, bytes]]:
    """Everything that comes until the server closes; its ping is answered."""
    seen = []
    for each in frames(sock):
        seen.append(each)
        kind, flags, _, payload = each
        if kind == PING and not flags & ACK:
            sock.sendall(frame(PING, ACK, 0, payload))
    return seen


def stopping(served: Any, grace: float) -> threading.Thread:
    """The gRPC front being stopped, in a thread of its own."""
    thread = threading.Thread(target=lambda: served.run(served.fronts[1].stop(grace)))
    thread.start()
    return thread


def last_streams(seen: list[tuple[int, int, int, bytes]]) -> list[int]:
    return [int.from_bytes(payload[:4], "big") for kind, _, _, payload in seen if kind == GOAWAY]


def test_stopping_finishes_what_is_under_way() -> None:
    with serving() as served, connect(served) as sock:
        sock.sendall(HELLO + b"".join(raw_call(message=infer_message("sleepy"))))
        assert served.node.waiting.acquire(timeout=20)
        stopper = stopping(served, 20)
        seen = []
        for each in frames(sock):
            seen.append(each)
            kind, flags, _, payload = each
            if kind == PING and not flags & ACK:
                # On its way before the client knew, and so still served.
                sock.sendall(b"".join(raw_call(3)) + frame(PING, ACK, 0, payload))
            if last_streams(seen)[1:]:
                served.call(served.node.gate.set)
        stopper.join()
        assert last_streams(seen) == [2**31 - 1, 3]
        good = header_block([(b"grpc-status", b"0")])
        assert [n for _, flags, n, block in seen if flags & END_STREAM and block == good] == [3, 1]
        with pytest.raises(OSError, match="refused"):
            connect(served)


def test_stopping_ends_what_takes_too_long() -> None:
    with serving() as served, connect(served) as late, connect(served) as idle:
        idle.sendall(HELLO + b"".join(raw_call()))
        until_answered(idle)
        late.sendall(HELLO + b"".join(raw_call(message=infer_message("sleepy"))))
        assert served.node.waiting.acquire(timeout=20)
        stopper = stopping(served, 0.3)
        assert last_streams(goodbye(idle)) == [2**31 - 1, 1]
        seen = goodbye(late)
        stopper.join()
        assert served.node.withdrawn.acquire(timeout=20)
        kind, flags, number, block = seen[-1]
        assert (kind, flags, number) == (HEADERS, END_HEADERS | END_STREAM, 1)
        status = dict(Decoder().decode(block))
        assert status["grpc-status"] == "14"
        assert "shutting down" in unquote(status["grpc-message"])


def test_a_client_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2_leaving, "_GOODBYE_S", 0.1)
    with serving() as served, connect(served) as sock:
        sock.sendall(HELLO + b"".join(raw_call(message=infer_message("sleepy"))))
        assert served.node.waiting.acquire(timeout=20)
        stopper = stopping(served, 20)
        seen = []
        for each in frames(sock):
            seen.append(each)
            if last_streams(seen) == [2**31 - 1, 1] and each[0] == GOAWAY:
                sock.sendall(b"".join(raw_call(3)))
            if each[0] == RST_STREAM:
                served.call(served.node.gate.set)
        stopper.join()
        ((_, _, number, payload),) = [each for each in seen if each[0] == RST_STREAM]
        assert (number, int.from_bytes(payload, "big")) == (3, ErrorCode.REFUSED_STREAM)


def test_one_that_has_not_spoken_yet_is_let_go_at_once() -> None:
    with serving() as served, connect(served) as silent:
        assert eventually(lambda: bool(served.fronts[1]._server.connections))
        stopper = stopping(served, 20)
        assert list(frames(silent)) == []
        stopper.join()
