"""Requests that come in one piece are answered without ASGI, and as those that do not."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from typing import Any

import pytest

from cotenant.serving.tensors import Limits
from tests.contract.fake_node import eventually, serving
from tests.contract.test_serving import AUTH, GOOD, ROUTE, ask, post, read_all

SLEEPY = "/v2/models/sleepy/infer"
BODY = json.dumps(GOOD).encode()
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
WHOLE, PIECES = 0, 10
BOTH_WAYS = pytest.mark.parametrize("cut", [WHOLE, PIECES], ids=["whole", "pieces"])


def send(served: Any, head: bytes, body: bytes, cut: int = WHOLE) -> socket.socket:
    """Send a request; if ``cut``, its last so many bytes only when the rest was read."""
    sock = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    data = head + body
    if cut:
        sock.sendall(data[:-cut])
        time.sleep(0.05)
    sock.sendall(data[-cut:])
    return sock


def one_answer(sock: socket.socket) -> tuple[int, bytes]:
    """Status and body of an answer that states its length; the connection stays open."""
    seen = b""
    while b"\r\n\r\n" not in (seen := seen.removeprefix(CONTINUE)):
        seen += more(sock)
    head, _, body = seen.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += more(sock)
    assert len(body) == length
    return int(head.split(b" ")[1]), body


def more(sock: socket.socket) -> bytes:
    data = sock.recv(65536)
    assert data, "the connection was closed"
    return data


def asgi_tasks(served: Any) -> int:
    return int(served.call(lambda: len(served.fronts[0]._server.server_state.tasks)))


@pytest.mark.parametrize(("cut", "tasks"), [(WHOLE, 0), (PIECES, 1)])
def test_only_what_comes_in_pieces_costs_a_task(served: Any, cut: int, tasks: int) -> None:
    sock = send(served, post(len(BODY), SLEEPY), BODY, cut)
    assert served.node.waiting.acquire(timeout=20)
    assert asgi_tasks(served) == tasks
    served.call(served.node.gate.set)
    assert one_answer(sock)[0] == 200
    served.call(served.node.gate.clear)
    sock.close()


@pytest.mark.parametrize(
    ("path", "body", "more"),
    [
        (ROUTE, BODY, ""),
        (ROUTE, b"{", ""),
        (ROUTE, b"", ""),
        (ROUTE, BODY + b"....", f"Inference-Header-Content-Length: {len(BODY)}\r\n"),
        (ROUTE, BODY, "Inference-Header-Content-Length: 9999\r\n"),
        (ROUTE, gzip.compress(BODY, mtime=0), "Content-Encoding: gzip\r\n"),
        (ROUTE, BODY, "Content-Encoding: brotli\r\n"),
        (ROUTE, BODY, "Expect: 100-continue\r\n"),
        (ROUTE, BODY, "Connection: close\r\n"),
        (ROUTE + "?a=b", BODY, ""),
        ("/v2/models/d%6Fuble/infer", BODY, ""),
        ("/v2/models/double/versions/1/infer", BODY, ""),
        ("/v2/models/double/versions/7/infer", BODY, ""),
        ("/v2/models/nobody/infer", BODY, ""),
        ("/v2/models//infer", BODY, ""),
        ("/v2/repository/index", b"{}", ""),
    ],
)
def test_both_ways_give_the_same_answer(served: Any, path: str, body: bytes, more: str) -> None:
    answers = []
    for cut in (WHOLE, (len(body) + 1) // 2):
        sock = send(served, post(len(body), path, more), body, cut)
        answers.append(one_answer(sock))
        sock.close()
    assert answers[0] == answers[1]


@BOTH_WAYS
def test_a_bug_is_answered_without_its_details(served: Any, cut: int, caplog: Any) -> None:
    served.node.fail = RuntimeError("secret")
    sock = send(served, post(len(BODY)), BODY, cut)
    status, answer = one_answer(sock)
    sock.close()
    assert status == 500
    assert b"secret" not in answer
    assert "secret" in caplog.text


@BOTH_WAYS
def test_a_hang_up_withdraws_the_request(served: Any, cut: int) -> None:
    sock = send(served, post(len(BODY), SLEEPY), BODY, cut)
    assert served.node.waiting.acquire(timeout=20)
    sock.close()
    assert served.node.withdrawn.acquire(timeout=20)


def test_a_hang_up_is_seen_while_another_request_waits(served: Any) -> None:
    requests = post(len(BODY), SLEEPY) + BODY + post(len(BODY)) + BODY
    calls = len(served.node.calls)
    sock = send(served, b"", requests)
    assert served.node.waiting.acquire(timeout=20)
    sock.close()
    assert served.node.withdrawn.acquire(timeout=20)
    assert len(served.node.calls) == calls + 1


def test_a_body_that_is_not_http_starts_nothing(served: Any) -> None:
    head = f"POST {SLEEPY} HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    sock = send(served, head, b"zz\r\nnothing\r\n")
    assert read_all(sock).startswith(b"HTTP/1.1 400")
    sock.close()
    assert asgi_tasks(served) == 0


@pytest.mark.parametrize("url", ["http://[::1/x", "http://a:b:c/", "/v2/models/\xe9/infer"])
@BOTH_WAYS
def test_a_bad_url_is_refused(served: Any, url: str, cut: int, caplog: Any) -> None:
    head = post(len(BODY)).replace(ROUTE.encode(), url.encode("latin-1"))
    sock = send(served, head, BODY, cut)
    assert read_all(sock).startswith(b"HTTP/1.1 400")
    sock.close()
    assert "Traceback" not in caplog.text


def test_a_connection_lives_while_a_request_waits_behind_one_answered_at_once(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.fronts[0].crowd, "_keep_alive_s", 0.2)
    served.call(served.fronts[0].crowd._sweep)
    refused, waits = post(1) + b"{", post(len(BODY), SLEEPY) + BODY
    sock = send(served, b"", refused + waits)
    assert one_answer(sock)[0] == 400
    assert served.node.waiting.acquire(timeout=20)
    time.sleep(0.5)
    served.call(served.node.gate.set)
    assert one_answer(sock)[0] == 200
    served.call(served.node.gate.clear)
    sock.close()


def test_pipelined_requests_are_answered_in_order(served: Any) -> None:
    def doubled(value: int) -> bytes:
        given = {"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [value]}
        return json.dumps({"id": str(value), "inputs": [given]}).encode()

    bodies = [doubled(n) for n in range(5)]
    paths = [SLEEPY, ROUTE, ROUTE, SLEEPY, ROUTE]
    requests = [post(len(b), p) + b for b, p in zip(bodies, paths, strict=True)]
    requests[-1] = requests[-1].replace(b"Host: t\r\n", b"Host: t\r\nConnection: close\r\n")
    sock = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    sock.sendall(b"".join(requests))
    assert served.node.waiting.acquire(timeout=20)
    served.call(served.node.gate.set)
    answers = read_all(sock)
    served.call(served.node.gate.clear)
    sock.close()
    assert served.node.waiting.acquire(timeout=20)
    assert answers.count(b"HTTP/1.1 200") == 5
    places = [answers.index(b'"id":"%d"' % n) for n in range(5)]
    assert places == sorted(places)


def test_a_connection_is_closed_after_the_answer_if_asked(served: Any) -> None:
    old = post(len(BODY)).replace(b"HTTP/1.1", b"HTTP/1.0")
    for head in (old, post(len(BODY), more="Connection: close\r\n")):
        sock = send(served, head, BODY)
        answer = read_all(sock)
        sock.close()
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in answer


def test_bodies_share_a_memory_budget() -> None:
    limits = Limits(body_bytes=4096, buffered_bytes=2 * len(BODY))
    with serving(limits) as served:
        held = [send(served, post(len(BODY), SLEEPY), BODY) for _ in range(2)]
        assert all(served.node.waiting.acquire(timeout=20) for _ in held)
        assert ask(served, "POST", ROUTE, GOOD)[1]["cotenant-refusal"] == "MEMORY"
        held.pop().close()
        assert served.node.withdrawn.acquire(timeout=20)
        assert ask(served, "POST", ROUTE, GOOD)[0] == 200
        served.call(served.node.gate.set)
        assert one_answer(held[0])[0] == 200
        held.pop().close()


def test_a_token_is_needed() -> None:
    with serving(token="s3cret") as served:
        for more, status in (("", 401), (AUTH, 200), (AUTH.replace("s3", "S3"), 401)):
            sock = send(served, post(len(BODY), more=more), BODY)
            assert one_answer(sock)[0] == status
            sock.close()


def test_a_body_over_the_limit_is_refused() -> None:
    with serving(Limits(body_bytes=len(BODY) - 1)) as served:
        sock = send(served, post(len(BODY)), BODY)
        assert one_answer(sock)[0] == 413
        sock.close()


def test_stopping_starts_nothing_that_came_behind() -> None:
    with serving() as served:
        request = post(len(BODY), SLEEPY) + BODY
        sock = send(served, b"", request + request)
        assert served.node.waiting.acquire(timeout=20)
        served.run(served.fronts[0].stop(0.1))
        answers = read_all(sock)
        sock.close()
        assert answers.count(b"HTTP/1.1 503") == 1
        assert len(served.node.calls) == 1


@BOTH_WAYS
def test_stopping_answers_those_that_wait(cut: int) -> None:
    with serving() as served:
        sock = send(served, post(len(BODY), SLEEPY), BODY, cut)
        assert served.node.waiting.acquire(timeout=20)
        stopping = threading.Thread(target=lambda: served.run(served.fronts[0].stop(0.1)))
        stopping.start()
        status, answer = one_answer(sock)
        stopping.join(20)
        sock.close()
        assert status == 503
        assert b"the node is shutting down" in answer
        assert served.node.withdrawn.acquire(timeout=20)


def test_a_client_that_reads_slowly_delays_no_other_and_gets_all() -> None:
    rows = json.dumps(GOOD | {"inputs": [tensor(2**18)]}).encode()
    with serving() as served:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(20)
        slow.connect(("127.0.0.1", served.port))
        slow.sendall(post(len(rows)) + rows)
        for _ in range(20):
            sock = send(served, b"", post(len(BODY)) + BODY)
            assert one_answer(sock)[0] == 200
            sock.close()
        status, answer = one_answer(slow)
        slow.close()
        assert status == 200
        assert json.loads(answer)["outputs"][0]["data"] == [2.0] * 2**18
        assert eventually(lambda: served.node.unreleased == 0)


def tensor(elements: int) -> dict[str, object]:
    shape = [elements // 4, 4]
    return {"name": "x", "datatype": "FP32", "shape": shape, "data": [1.0] * elements}
