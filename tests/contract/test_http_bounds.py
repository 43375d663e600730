"""What HTTP/1 forbids is refused, and no client has more of the server than its share."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cotenant.serving import http_connection, http_crowd
from cotenant.serving.http_connection import HEADER_BYTES, HEADERS, URL_BYTES
from tests.contract.fake_node import eventually, serving
from tests.contract.test_http_whole import BODY, SLEEPY, one_answer, send
from tests.contract.test_serving import GOOD, ROUTE, ask, post, read_all

CRLF = "\r\n"
LENGTH = f"Content-Length: {len(BODY)}"
CHUNKED = "Transfer-Encoding: chunked"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)


def request(*headers: str, line: str = f"POST {ROUTE} HTTP/1.1", host: str = "Host: t") -> bytes:
    lines = [line, *([host] if host else []), *headers, "", ""]
    return CRLF.join(lines).encode("latin-1")


def answers(served: Any, data: bytes) -> tuple[list[int], bool]:
    """Statuses of the answers, and whether the connection was closed after them."""
    sock = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    sock.sendall(data)
    sock.settimeout(0.3)
    seen, closed = b"", False
    with contextlib.suppress(TimeoutError):
        while not closed:
            data = sock.recv(65536)
            seen, closed = seen + data, not data
    sock.close()
    return statuses(seen), closed


def statuses(seen: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", seen)]


GET = "GET /v2/health/live HTTP/1.1"
REFUSED: dict[str, bytes] = {
    "length and chunks": request(LENGTH, CHUNKED) + CHUNKS,
    "chunks and length": request(CHUNKED, LENGTH) + CHUNKS,
    "an unknown coding": request("Transfer-Encoding: xchunked") + CHUNKS,
    "chunked not last": request("Transfer-Encoding: chunked, identity") + CHUNKS,
    "identity": request("Transfer-Encoding: identity", LENGTH) + BODY,
    "a blank before the colon": request("Transfer-Encoding : chunked") + CHUNKS,
    "chunked twice": request(CHUNKED, CHUNKED) + CHUNKS,
    "two lengths that differ": request(LENGTH, "Content-Length: 5") + BODY,
    "two equal lengths": request(LENGTH, LENGTH) + BODY,
    "a length with a sign": request(f"Content-Length: +{len(BODY)}") + BODY,
    "a negative length": request("Content-Length: -1") + BODY,
    "a length beyond all numbers": request("Content-Length: " + "9" * 30) + BODY,
    "a folded header": request("X: a\r\n b", LENGTH) + BODY,
    "bare line feeds": request(LENGTH).replace(b"\r\n", b"\n") + BODY,
    "a bare CR in a header": request("X: a\rb", LENGTH) + BODY,
    "a NUL in a header": request("X: a\0b", LENGTH) + BODY,
    "a chunk beyond all numbers": request(CHUNKED) + b"F" * 17 + b"\r\n" + BODY,
    "a chunk size in C": request(CHUNKED) + b"0x10\r\n" + BODY,
    "a negative chunk": request(CHUNKED) + b"-1\r\n" + BODY,
    "a chunk longer than it says": request(CHUNKED) + b"1\r\nxyz\r\n0\r\n\r\n",
    "chunks with bare line feeds": request(CHUNKED) + CHUNKS.replace(b"\r\n", b"\n"),
    "no host": request(LENGTH, host="") + BODY,
    "two hosts": request("Host: u", LENGTH) + BODY,
    "another protocol": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "an unknown version": request(line="GET /v2 HTTP/1.9"),
    "a path that is not ASCII": request(line="GET /v2/\xff HTTP/1.1"),
    "an absolute URI that is none": request(line="GET http://[::1/x HTTP/1.1"),
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_what_is_no_request_is_refused_once_and_closed(served: Any, data: bytes) -> None:
    calls = len(served.node.calls)
    assert answers(served, data) == ([400], True)
    assert len(served.node.calls) == calls


TOO_MUCH: dict[str, tuple[int, bytes]] = {
    "a large head": (431, request("X: " + "a" * HEADER_BYTES)),
    "a very large head": (431, request("X: " + "a" * 10 * HEADER_BYTES)),
    "many headers": (431, request(*["X: a"] * (HEADERS + 1))),
    "a long URL": (414, request(line=f"GET /{'a' * URL_BYTES} HTTP/1.1")),
    "a tunnel": (501, request(line="CONNECT t:1 HTTP/1.1")),
    "an endless chunk extension": (400, request(CHUNKED) + b"1;" + b"v" * 3 * HEADER_BYTES),
    "many trailers": (400, request(CHUNKED) + b"0\r\n" + b"X: v\r\n" * HEADER_BYTES),
    "an endless trailer": (400, request(CHUNKED) + b"0\r\nX: " + b"v" * 3 * HEADER_BYTES),
    "chunks of one byte": (400, request(CHUNKED) + b"1\r\nx\r\n" * HEADER_BYTES),
}


@pytest.mark.parametrize(("status", "data"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_what_is_too_much_is_refused_and_closed(served: Any, status: int, data: bytes) -> None:
    assert answers(served, data) == ([status], True)


TAKEN: dict[str, tuple[list[int], bytes]] = {
    "a large header": ([200], request("X: " + "a" * (HEADER_BYTES - 1000), LENGTH) + BODY),
    "chunks": ([200], request(CHUNKED) + CHUNKS),
    "small chunks": (
        [200],
        request(CHUNKED) + b"".join(b"1\r\n%c\r\n" % c for c in BODY) + b"0\r\n\r\n",
    ),
    "a chunk extension": ([200], request(CHUNKED) + CHUNKS.replace(b"\r\n", b";a=b\r\n", 1)),
    "a trailer": ([200], request(CHUNKED) + CHUNKS[:-2] + b"X: a\r\n\r\n"),
    "a trailer that would be a header": (
        [200],
        request(CHUNKED) + CHUNKS[:-2] + b"Inference-Header-Content-Length: 1\r\n\r\n",
    ),
    "empty lines first": ([200], b"\r\n\r\n" + request(line=GET)),
    "an absolute URI": ([200], request(line="GET http://other/v2/health/live HTTP/1.1")),
    "dots": ([404], request(line="GET /v2/../metrics HTTP/1.1")),
    "an upgrade with a body": (
        [200, 200],
        (request("Connection: Upgrade", "Upgrade: h2c", LENGTH) + BODY) * 2,
    ),
    "an upgrade without": (
        [200, 200],
        request("Connection: Upgrade", "Upgrade: websocket", line=GET) * 2,
    ),
    "expectation": ([100, 200], request("Expect: 100-continue", LENGTH) + BODY),
    "many at once": ([200] * 50, (request(LENGTH) + BODY) * 50),
    "some of each": (
        [200, 404, 200, 400, 200],
        request(LENGTH)
        + BODY
        + request(line="GET /x HTTP/1.1")
        + request(CHUNKED)
        + CHUNKS
        + request("Content-Length: 1")
        + b"{"
        + request(line=GET),
    ),
}


@pytest.mark.parametrize(("wanted", "data"), TAKEN.values(), ids=TAKEN)
@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_what_is_right_is_answered_however_it_is_cut(
    served: Any, wanted: list[int], data: bytes, cut: int
) -> None:
    sock = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    end = data.find(b"\r\n\r\n") + cut
    for piece in (data[:end], data[end:]):
        sock.sendall(piece)
        time.sleep(0.01)
    sock.sendall(request("Connection: close", line=GET))  # it is open as before
    seen = b""
    while more := sock.recv(65536):
        seen += more
    sock.close()
    assert statuses(seen) == [*wanted, 200]


def test_an_old_client_needs_no_host(served: Any) -> None:
    old = request(LENGTH, line=f"POST {ROUTE} HTTP/1.0", host="")
    assert answers(served, old + BODY) == ([200], True)


# --- one connection, many requests ----------------------------------------------------------


@contextlib.contextmanager
def flooding(served: Any, data: bytes, read: bool = True) -> Iterator[None]:
    """One connection that sends ``data`` for as long as it is let."""
    sock = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    stop = threading.Event()

    def send_on() -> None:
        with contextlib.suppress(OSError):
            while not stop.is_set():
                sock.sendall(data)

    def read_on() -> None:
        with contextlib.suppress(OSError):
            while read and sock.recv(65536):
                pass

    threads = [threading.Thread(target=work) for work in (send_on, read_on)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.1)
        yield
    finally:
        stop.set()
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(20)
        sock.close()


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize(
    "one",
    [request(line=GET), request(line="GET /x HTTP/1.1"), request(LENGTH) + BODY, b"\r\n\r\n"],
)
def test_a_connection_that_never_stops_asking_is_one_among_others(
    served: Any, one: bytes, read: bool
) -> None:
    with flooding(served, one * (65536 // len(one)), read):
        for _ in range(5):
            assert ask(served, "POST", ROUTE, GOOD)[0] == 200
    assert eventually(lambda: served.node.unreleased == 0)


def test_a_turn_of_the_loop_sees_one_request_of_a_connection(served: Any) -> None:
    """All come in one read, and each is refused at once."""
    state = served.fronts[0]._server.server_state
    sock = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    sock.sendall(request(line=GET))
    assert one_answer(sock)[0] == 200

    def mine() -> Any:
        (found,) = (c for c in state.connections if c.client == sock.getsockname())
        return found

    def answered_at_once() -> int:
        before = state.total_requests
        mine().data_received((request("Content-Length: 1") + b"{") * 40)
        return int(state.total_requests - before)

    assert served.call(answered_at_once) == 1
    seen = b""
    while len(statuses(seen)) < 40:
        seen += sock.recv(65536)
    sock.close()


def test_what_is_read_ahead_is_bounded(served: Any) -> None:
    """While a request is under way its client may send on, but nobody reads it for ever."""
    sock = send(served, post(len(BODY), SLEEPY), BODY)
    assert served.node.waiting.acquire(timeout=20)
    sock.settimeout(1.0)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < 64 * 2**20:
            sent += sock.send(request(line=GET) * 1000)
    assert sent < 64 * 2**20
    assert served.call(lambda: served.fronts[0].crowd.ahead_bytes) <= 2**20
    sock.close()
    served.call(served.node.gate.set)
    assert eventually(lambda: served.fronts[0].crowd.ahead_bytes == 0)
    served.call(served.node.gate.clear)


def test_an_answer_that_is_not_read_ends_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_crowd, "UNREAD_BYTES", 2**23)
    given = {"name": "x", "datatype": "FP32", "shape": [2**19, 4]}
    given["parameters"] = {"binary_data_size": 2**23}
    start = json.dumps({"inputs": [given], "parameters": {"binary_data_output": True}}).encode()
    more = f"Inference-Header-Content-Length: {len(start)}\r\n"
    with serving() as served:
        socks = []
        for _ in range(4):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.settimeout(20)
            sock.connect(("127.0.0.1", served.port))
            sock.sendall(post(len(start) + 2**23, more=more) + start + bytes(2**23))
            socks.append(sock)
        crowd = served.fronts[0].crowd
        assert eventually(lambda: len(crowd._unread) > 0)
        assert eventually(lambda: len(crowd._members) < 4)
        assert sum(crowd._unread.values()) <= 2**23
        assert ask(served, "POST", ROUTE, GOOD)[0] == 200
        for sock in socks:
            sock.close()


def test_an_answer_that_is_not_read_for_long_ends_its_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_crowd, "UNREAD_S", 0.2)
    with serving() as served:
        with flooding(served, (request(LENGTH) + BODY) * 200, read=False):
            crowd = served.fronts[0].crowd
            assert eventually(lambda: len(crowd._members) == 0)


def test_a_body_that_nobody_reads_is_not_taken_for_ever(served: Any) -> None:
    sock = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    sock.sendall(request(CHUNKED, line=GET))
    with pytest.raises(OSError):
        for _ in range(10000):
            sock.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
    sock.close()


# --- many connections -----------------------------------------------------------------------


def test_the_connection_that_waits_longest_gives_way_to_a_newcomer() -> None:
    whole = post(len(BODY)) + BODY
    with serving(connections=2) as served:
        first = send(served, b"", whole)
        assert one_answer(first)[0] == 200
        second = send(served, b"", whole)
        assert one_answer(second)[0] == 200
        first.sendall(whole)
        assert one_answer(first)[0] == 200
        third = send(served, b"", whole)
        assert one_answer(third)[0] == 200
        assert second.recv(1) == b""
        first.sendall(whole)
        assert one_answer(first)[0] == 200
        for sock in (first, second, third):
            sock.close()


@pytest.mark.parametrize(
    "begun", [b"", b"POST ", post(100), post(len(BODY)) + BODY], ids=["new", "head", "body", "idle"]
)
def test_connections_that_do_nothing_lock_nobody_out(begun: bytes) -> None:
    with serving(connections=4) as served:
        socks = [send(served, b"", begun) for _ in range(8)]
        for _ in range(3):
            assert ask(served, "POST", ROUTE, GOOD)[0] == 200
        for sock in socks:
            sock.close()


def test_a_connection_too_many_is_told_so_where_all_are_at_work() -> None:
    with serving(connections=2) as served:
        kept = [send(served, post(len(BODY), SLEEPY), BODY) for _ in range(2)]
        assert all(served.node.waiting.acquire(timeout=20) for _ in kept)
        third = send(served, post(len(BODY)), BODY)
        head, _, body = read_all(third).lower().partition(b"\r\n\r\n")  # until it is closed
        assert head.startswith(b"http/1.1 503")
        assert b"retry-after: 1" in head
        assert b"cotenant-refusal: unavailable" in head
        assert b"2 connections" in body
        served.call(served.node.gate.set)
        assert [one_answer(sock)[0] for sock in kept] == [200, 200]
        for sock in (*kept, third):
            sock.close()


def test_an_idle_connection_is_closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "CLIENT_S", 20.0)
    with serving() as served:
        crowd = served.fronts[0].crowd
        crowd._keep_alive_s = 0.2
        idle = send(served, post(len(BODY)), BODY)
        assert one_answer(idle)[0] == 200
        busy = send(served, post(len(BODY), SLEEPY), BODY)
        assert served.node.waiting.acquire(timeout=20)
        time.sleep(0.3)
        served.call(crowd._sweep)
        assert idle.recv(1) == b""
        served.call(served.node.gate.set)
        assert one_answer(busy)[0] == 200
        for sock in (idle, busy):
            sock.close()


@pytest.mark.parametrize("begun", [b"", b"POST /v2", request(CHUNKED, line=GET)])
def test_a_client_that_never_goes_on_is_left(begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "CLIENT_S", 0.2)
    with serving() as served:
        sock = send(served, b"", begun)
        read_all(sock)  # until it is closed
        sock.close()


# --- bodies ---------------------------------------------------------------------------------


def numbers(count: int) -> bytes:
    given = {"name": "x", "datatype": "FP32", "shape": [count // 4, 4], "data": [1] * count}
    return json.dumps({"inputs": [given]}).encode()


def test_a_list_that_a_model_has_no_use_for_is_not_decoded(served: Any) -> None:
    served.node.most = 64
    calls = len(served.node.calls)
    for count in (4096, 2**15):
        sock = send(served, post(len(body := numbers(count))), body)
        assert one_answer(sock)[0] == 400
        sock.close()
    assert len(served.node.calls) == calls


@pytest.mark.parametrize("pack", [None, "gzip"])
def test_json_that_a_model_has_no_use_for_is_not_looked_into(served: Any, pack: str | None) -> None:
    served.node.most = 64
    calls = len(served.node.calls)
    for body in (numbers(2**18), b" " * 2**22, b'{"inputs":[' + b"{}," * 2**18 + b"{}]}"):
        more = "" if pack is None else "Content-Encoding: gzip\r\n"
        sent = body if pack is None else gzip.compress(body)
        sock = send(served, post(len(sent), more=more), sent)
        assert one_answer(sock)[0] == 413
        sock.close()
    assert len(served.node.calls) == calls
    served.node.most = None
    sock = send(served, post(len(body := numbers(2**18))), body)
    assert one_answer(sock)[0] == 200
    sock.close()


LONG = 2 * 2**16
HOSTILE: dict[str, bytes] = {
    "nested deeply": b'{"inputs":' + b"[" * LONG,
    "nested deeply in data": b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":'
    + b"[" * LONG,
    "nested in parameters": b'{"inputs":[],"parameters":{"a":' + b"[" * LONG,
    "many inputs": b'{"inputs":['
    + b'{"name":"x","datatype":"FP32","shape":[1],"data":[1]},' * 5000
    + b"{}]}",
    "a long shape": b'{"inputs":[{"name":"x","datatype":"FP32","shape":['
    + b"1," * LONG
    + b'1],"data":[1]}]}',
    "many outputs": b'{"inputs":[],"outputs":[' + b'{"name":"y"},' * 20000 + b'{"name":"y"}]}',
    "many parameters": b'{"parameters":{' + b'"a":1,' * 20000 + b'"a":1},"inputs":[]}',
    "not UTF-8": b'{"id":"\xff","inputs":[]}',
    "not UTF-8 in data": b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],'
    b'"data":["\xff"]}]}',
    "half a surrogate pair": b'{"inputs":[],"id":"\\ud800"}',
    "a number of many digits": b'{"inputs":[],"parameters":{"priority":' + b"9" * 5000 + b"}}",
    "empty": b"",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("path", [ROUTE, "/v2/repository/index"])
def test_a_hostile_body_is_the_clients_fault(served: Any, body: bytes, path: str) -> None:
    sock = send(served, post(len(body), path), body)
    status = one_answer(sock)[0]
    assert status in ((400, 413) if path == ROUTE else (200, 400, 413))
    sock.close()
    assert ask(served, "POST", ROUTE, GOOD)[0] == 200


def test_binary_data_that_a_model_has_no_use_for_are_not_unfolded(served: Any) -> None:
    served.node.most = 64
    body = gzip.compress(BODY + bytes(2**23))
    more = f"Content-Encoding: gzip\r\nInference-Header-Content-Length: {len(BODY)}\r\n"
    sock = send(served, post(len(body), more=more), body)
    assert one_answer(sock)[0] == 413
    sock.close()


def test_a_request_that_unfolds_to_much_is_refused_on_other_routes_too(served: Any) -> None:
    body = gzip.compress(b" " * 2**23)
    head = post(len(body), "/v2/repository/index", "Content-Encoding: gzip\r\n")
    sock = send(served, head, body)
    assert one_answer(sock)[0] == 413
    sock.close()
