"""REST as clients see it: the public client unchanged, and sockets that do not behave."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import socket
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException

from cotenant.domain.errors import EnvironmentProblem, InvalidRequest, NotFound, TooLarge
from cotenant.domain.port import Refused
from cotenant.domain.request import Refusal
from cotenant.serving.http_connection import HEADER_BYTES
from cotenant.serving.http_front import HttpFront
from cotenant.serving.regions import Regions
from cotenant.serving.tensors import Limits
from tests.contract.fake_node import serving

X = np.arange(4, dtype=np.float32).reshape(1, 4)
GOOD = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [0, 1, 2, 3]}]}
ROUTE = "/v2/models/double/infer"


@pytest.fixture
def client(served: Any) -> Iterator[Any]:
    client = triton.InferenceServerClient(served.http)
    yield client
    client.close()


def given(array: np.ndarray = X, name: str = "x", kind: str = "FP32", **how: Any) -> Any:
    item = triton.InferInput(name, list(array.shape), kind)
    item.set_data_from_numpy(array, **how)
    return item


def ask(
    served: Any, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, str], Any]:
    """One plain request; returns status, headers (lower-case) and the JSON or raw body."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    try:
        data = json.dumps(body) if isinstance(body, (dict, list)) else body
        names = {k.replace("_", "-"): v for k, v in headers.items()}
        connection.request(method, path, data, names)
        answer = connection.getresponse()
        raw = answer.read()
        found = {k.lower(): v for k, v in answer.getheaders()}
        is_json = found.get("content-type") == "application/json"
        return answer.status, found, json.loads(raw) if is_json else raw
    finally:
        connection.close()


def raw(served: Any, data: bytes) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    sock.sendall(data)
    return sock


def post(length: int, path: str = ROUTE, more: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Length: {length}\r\n{more}\r\n".encode()


def read_all(sock: socket.socket) -> bytes:
    chunks = []
    while chunk := sock.recv(65536):
        chunks.append(chunk)
    return b"".join(chunks)


# The public client, unchanged.


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_client_infers(client: Any, binary_in: bool, binary_out: bool) -> None:
    outputs = [triton.InferRequestedOutput("y", binary_data=binary_out)]
    result = client.infer(
        "double", [given(binary_data=binary_in)], outputs=outputs, request_id="a1"
    )
    assert np.array_equal(result.as_numpy("y"), 2 * X)
    assert result.get_response()["id"] == "a1"
    assert result.get_response()["model_version"] == "1"


def test_client_infers_with_default_outputs_and_version(client: Any) -> None:
    result = client.infer("double", [given()], model_version="1")
    assert np.array_equal(result.as_numpy("y"), 2 * X)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_client_may_compress(client: Any, algorithm: str) -> None:
    array = np.zeros((300, 1000), np.float32)
    result = client.infer("double", [given(array)], request_compression_algorithm=algorithm)
    assert np.array_equal(result.as_numpy("y"), array)


@pytest.mark.parametrize("binary", [True, False])
def test_client_sends_strings(client: Any, binary: bool) -> None:
    texts = np.array([["a", "", "žluť", "x" * 300]], dtype=object)
    outputs = [triton.InferRequestedOutput("s", binary_data=binary)]
    inputs = [given(texts, "s", "BYTES", binary_data=binary)]
    got = client.infer("echo", inputs, outputs=outputs).as_numpy("s").ravel()
    decoded = [item.decode() if isinstance(item, bytes) else item for item in got]
    assert decoded == list(texts.ravel())


def test_client_runs_side_by_side(served: Any) -> None:
    client = triton.InferenceServerClient(served.http, concurrency=8)
    waiting = [client.async_infer("double", [given(X + i)]) for i in range(24)]
    for i, handle in enumerate(waiting):
        assert np.array_equal(handle.get_result().as_numpy("y"), 2 * (X + i))
    client.close()


def test_client_parameters_reach_the_node(served: Any, client: Any) -> None:
    client.infer("double", [given()], priority=1, timeout=2500, parameters={"mine": "kept out"})
    call = served.node.calls[-1]
    assert (call.priority, call.timeout_ns, call.model) == (0, 2_500_000, "double")


def test_client_sees_health_and_metadata(served: Any, client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("double")
    assert client.is_model_ready("double", "1")
    assert not client.is_model_ready("double", "9")
    assert not client.is_model_ready("nothing")
    assert client.get_server_metadata()["name"] == "cotenant"
    meta = client.get_model_metadata("double", "1")
    assert meta["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    config = client.get_model_config("double")
    assert (config["max_batch_size"], config["input"][0]["data_type"]) == (0, "TYPE_FP32")
    served.node.loaded.discard("double")
    assert not client.is_server_ready()


def test_client_reads_statistics(client: Any) -> None:
    one = client.get_inference_statistics("double")["model_stats"]
    assert [entry["name"] for entry in one] == ["double"]
    assert one[0]["inference_stats"]["queue"] == {"count": 3, "ns": 100}
    assert one[0]["inference_stats"]["compute_infer"] == {"count": 3, "ns": 2}
    every = client.get_inference_statistics()["model_stats"]
    assert {entry["name"] for entry in every} == {"double", "echo", "sleepy", "talk"}
    with pytest.raises(InferenceServerException, match="not loaded"):
        client.get_inference_statistics("nothing")


def test_client_loads_and_unloads(client: Any) -> None:
    client.unload_model("echo")
    states = {e["name"]: e["state"] for e in client.get_model_repository_index()}
    assert states["echo"] == "UNAVAILABLE"
    client.load_model("echo")
    assert client.is_model_ready("echo")
    with pytest.raises(InferenceServerException, match="damaged"):
        client.load_model("broken")
    with pytest.raises(InferenceServerException, match="no model nothing"):
        client.load_model("nothing")
    with pytest.raises(InferenceServerException, match="without parameters"):
        client.load_model("echo", config="{}")


@pytest.mark.parametrize(
    "method", ["get_trace_settings", "get_log_settings", "get_cuda_shared_memory_status"]
)
def test_client_is_told_what_is_not_supported(client: Any, method: str) -> None:
    with pytest.raises(InferenceServerException, match=r"not supported|cannot be changed"):
        getattr(client, method)()


# Shared memory.


@pytest.fixture
def region(client: Any) -> Iterator[Any]:
    key = f"/test_{uuid.uuid4().hex}"
    handle = shm.create_shared_memory_region("r", key, 64)
    client.register_system_shared_memory("r", key, 64)
    yield handle, f"/dev/shm{key}"
    client.unregister_system_shared_memory()
    shm.destroy_shared_memory_region(handle)


def through_region(offset_in: int = 0, size_in: int = 16) -> tuple[Any, Any]:
    item = triton.InferInput("x", [1, 4], "FP32")
    item.set_shared_memory("r", size_in, offset=offset_in)
    out = triton.InferRequestedOutput("y")
    out.set_shared_memory("r", 16, offset=32)
    return item, out


def test_tensors_travel_through_shared_memory(client: Any, region: Any) -> None:
    shm.set_shared_memory_region(region[0], [X], offset=16)
    item, out = through_region(offset_in=16)
    result = client.infer("double", [item], outputs=[out])
    assert result.get_output("y")["parameters"]["shared_memory_byte_size"] == 16
    got = shm.get_contents_as_numpy(region[0], np.float32, [1, 4], offset=32)
    assert np.array_equal(got, 2 * X)
    status = client.get_system_shared_memory_status("r")
    assert (status[0]["name"], status[0]["byte_size"]) == ("r", 64)


def test_a_truncated_region_is_the_clients_error(client: Any, region: Any) -> None:
    item, out = through_region()
    os.truncate(region[1], 0)
    with pytest.raises(InferenceServerException, match="shorter than it was registered"):
        client.infer("double", [item])
    with pytest.raises(InferenceServerException, match="shorter than it was registered"):
        client.infer("double", [given()], outputs=[out])
    assert Path(region[1]).stat().st_size == 0
    assert client.is_server_live()
    os.truncate(region[1], 64)  # so that the client's own clean-up does not fault


def test_a_region_is_bounded(client: Any, region: Any) -> None:
    item, _ = through_region(offset_in=60)
    with pytest.raises(InferenceServerException, match="do not lie inside"):
        client.infer("double", [item])
    item, _ = through_region(size_in=12)
    with pytest.raises(InferenceServerException, match="12 bytes were sent, but 4 elements"):
        client.infer("double", [item])
    out = triton.InferRequestedOutput("y")
    out.set_shared_memory("r", 15)
    with pytest.raises(InferenceServerException, match="15 bytes given in shared memory"):
        client.infer("double", [given()], outputs=[out])
    out.set_shared_memory("elsewhere", 16)
    with pytest.raises(InferenceServerException, match="no shared memory region 'elsewhere'"):
        client.infer("double", [given()], outputs=[out])


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("../etc/passwd", "POSIX shared memory"),
        ("/etc/passwd", "POSIX shared memory"),
        ("..", "POSIX shared memory"),
        ("", "POSIX shared memory"),
        ("a\0b", "POSIX shared memory"),
        ("/cotenant-pool", "reserved"),
        ("sem.x", "reserved"),
        ("/not-there-at-all", "no shared memory has the key"),
        ("x" * 300, "POSIX shared memory"),
    ],
)
def test_region_keys_cannot_leave_their_directory(client: Any, key: str, says: str) -> None:
    with pytest.raises(InferenceServerException, match=says):
        client.register_system_shared_memory("bad", key, 8)


def test_links_and_wrong_sizes_are_not_registered(client: Any, region: Any) -> None:
    link = Path(f"/dev/shm/test_{uuid.uuid4().hex}")
    link.symlink_to("/etc/passwd")
    try:
        with pytest.raises(InferenceServerException, match="symbolic link"):
            client.register_system_shared_memory("bad", link.name, 8)
    finally:
        link.unlink()
    key = region[1].removeprefix("/dev/shm")
    with pytest.raises(InferenceServerException, match="go beyond the file's 64 bytes"):
        client.register_system_shared_memory("bad", key, 65)
    with pytest.raises(InferenceServerException, match="already registered"):
        client.register_system_shared_memory("r", key, 64)


def test_regions_are_few_and_files_only(tmp_path: Path) -> None:
    regions = Regions(limit=2, directory=str(tmp_path))
    (tmp_path / "a").write_bytes(bytes(range(16)))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for key in ("pipe", "folder"):
        with pytest.raises(InvalidRequest, match=r"is not shared memory|cannot be opened"):
            regions.register("bad", key, 0, 8)
    regions.register("one", "a", 4, 8)
    regions.register("two", "/a", 0, 16)
    with pytest.raises(TooLarge, match="2 shared memory regions"):
        regions.register("three", "a", 0, 1)
    read = regions.reader("one", 2, 4)
    regions.unregister("one")
    regions.register("three", "a", 0, 1)
    buffer = bytearray(4)
    read(memoryview(buffer))  # named before its region was forgotten: still served
    assert buffer == bytes([6, 7, 8, 9])
    with pytest.raises(NotFound):
        regions.reader("one", 0, 1)


# Refusals and errors.


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (Refusal.OVERLOADED, 429),
        (Refusal.QUEUE_FULL, 429),
        (Refusal.RESERVED, 429),
        (Refusal.MEMORY, 429),
        (Refusal.UNAVAILABLE, 503),
        (Refusal.SHUTTING_DOWN, 503),
        (Refusal.WORKER_LOST, 503),
        (Refusal.EXPIRED, 504),
        (Refusal.DEADLINE, 422),
        (Refusal.FAILED, 400),
    ],
)
def test_refusals_say_why_and_when_to_retry(served: Any, refusal: Refusal, status: int) -> None:
    served.node.refuse = Refused(refusal, 1_200_300_000, "a detail")
    got, headers, body = ask(served, "POST", ROUTE, GOOD)
    assert got == status
    assert body == {"error": f"{refusal.value}: a detail"}
    assert headers["cotenant-refusal"] == refusal.name
    retry = (headers.get("retry-after"), headers.get("cotenant-retry-after-ms"))
    assert retry == (("2", "1201") if status in (429, 503) else (None, None))


@pytest.mark.parametrize("refusal", [Refusal.UNAVAILABLE, Refusal.SHUTTING_DOWN])
def test_what_has_gone_is_to_be_asked_for_again_in_a_second(served: Any, refusal: Refusal) -> None:
    served.node.refuse = Refused(refusal, 0, "")
    _, headers, _ = ask(served, "POST", ROUTE, GOOD)
    assert (headers["retry-after"], headers["cotenant-retry-after-ms"]) == ("1", "1000")


def test_a_short_wait_is_still_a_whole_second(served: Any) -> None:
    served.node.refuse = Refused(Refusal.QUEUE_FULL, 1, "")
    _, headers, _ = ask(served, "POST", ROUTE, GOOD)
    assert (headers["retry-after"], headers["cotenant-retry-after-ms"]) == ("1", "1")


def test_errors_have_their_status(served: Any) -> None:
    assert ask(served, "POST", "/v2/models/none/infer", GOOD)[0] == 404
    assert ask(served, "POST", "/v2/models/double/versions/7/infer", GOOD)[0] == 404
    assert ask(served, "GET", "/v2/models/none")[0] == 404
    assert ask(served, "GET", ROUTE)[0] == 405
    assert ask(served, "GET", "/somewhere")[::2] == (
        404,
        {"error": "no such route; models are at /v2/models/MODEL"},
    )
    served.node.fail = InvalidRequest("input x does not fit")
    assert ask(served, "POST", ROUTE, GOOD)[::2] == (400, {"error": "input x does not fit"})


def test_a_bug_is_answered_without_its_details(served: Any, caplog: Any) -> None:
    served.node.fail = RuntimeError("secret")
    status, _, body = ask(served, "POST", ROUTE, GOOD)
    assert (status, "secret" in str(body)) == (500, False)
    assert "failed inside the server" in caplog.text


def test_metrics_and_index(served: Any) -> None:
    status, headers, body = ask(served, "GET", "/metrics")
    assert (status, headers["content-type"].split(";")[0]) == (200, "text/plain")
    assert b"cotenant_requests 1" in body
    ready = ask(served, "POST", "/v2/repository/index", {"ready": True})[2]
    assert len(ready) == 4
    assert ask(served, "POST", "/v2/repository/index", "[")[0] == 400


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"", {}),
        (b"{", {}),
        (b"\xff\xfe", {}),
        (b"{}" * 10, {}),
        (json.dumps(GOOD).encode(), {"Inference_Header_Content_Length": "-4"}),
        (json.dumps(GOOD).encode(), {"Inference_Header_Content_Length": "99999"}),
        (json.dumps(GOOD).encode(), {"Inference_Header_Content_Length": "0x10"}),
        (json.dumps(GOOD).encode(), {"Content_Encoding": "br"}),
        (json.dumps(GOOD).encode(), {"Content_Encoding": "gzip"}),
        (gzip.compress(json.dumps(GOOD).encode(), mtime=0)[:-9], {"Content_Encoding": "gzip"}),
        (zlib.compress(json.dumps(GOOD).encode()) + b"x", {"Content_Encoding": "deflate"}),
    ],
)
def test_malformed_bodies_are_refused(served: Any, body: bytes, headers: dict[str, str]) -> None:
    status, _, answer = ask(served, "POST", ROUTE, body, **headers)
    assert status == 400
    assert answer["error"]


def test_a_connection_is_kept_after_a_refused_request(served: Any) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    for body, status in (("{", 400), (json.dumps(GOOD), 200)):
        connection.request("POST", ROUTE, body)
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (status, True)
    connection.close()


# Limits, tokens, clients that do not behave.


@pytest.fixture(scope="module")
def narrow() -> Iterator[Any]:
    limits = Limits(body_bytes=4096, body_timeout_s=0.3, buffered_bytes=6000)
    with serving(limits, token="s3cret") as served:
        yield served


AUTH = "Authorization: Bearer s3cret\r\n"


def test_a_token_guards_every_route_but_health(narrow: Any) -> None:
    assert ask(narrow, "GET", "/v2/health/live")[0] == 200
    assert ask(narrow, "GET", "/v2/health/ready")[0] == 200
    assert ask(narrow, "GET", "/health")[0] == 200
    for path in ("/v2", "/metrics", "/v2/models/double", "/v2/health/other"):
        assert ask(narrow, "GET", path)[0] == 401
    assert ask(narrow, "POST", ROUTE, GOOD)[0] == 401
    for wrong in ("Bearer s3cre", "Bearer s3crets", "Basic s3cret", "s3cret", "Bearer", "é"):
        assert ask(narrow, "POST", ROUTE, GOOD, Authorization=wrong)[0] == 401
    assert ask(narrow, "POST", ROUTE, GOOD, Authorization="Bearer s3cret")[0] == 200
    client = triton.InferenceServerClient(narrow.http)
    headers = {"Authorization": "Bearer s3cret"}
    assert client.infer("double", [given()], headers=headers).as_numpy("y") is not None
    client.close()


def test_metrics_can_be_opened_to_who_has_no_token() -> None:
    with serving(token="s3cret", open_metrics=True) as served:
        assert ask(served, "GET", "/metrics")[0] == 200
        assert ask(served, "GET", "/v2")[0] == 401
        assert ask(served, "POST", ROUTE, GOOD)[0] == 401


def test_a_stated_length_over_the_limit_is_refused_at_once(narrow: Any) -> None:
    sock = raw(narrow, post(5000, more=AUTH))  # not one byte of the body
    answer = read_all(sock)
    sock.close()
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"at most 4096 bytes" in answer


def test_a_streamed_body_over_the_limit_is_refused(narrow: Any) -> None:
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n{AUTH}\r\n"
    sock = raw(narrow, head.encode() + b"1000\r\n" + b" " * 4096 + b"\r\n1\r\n \r\n")
    assert sock.recv(65536).startswith(b"HTTP/1.1 413")
    sock.close()


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_a_body_that_unfolds_beyond_the_limit_is_refused(narrow: Any, pack: Any) -> None:
    bomb = pack(b" " * 10**6)
    assert len(bomb) < 4096
    kind = "gzip" if pack is gzip.compress else "deflate"
    got = ask(narrow, "POST", ROUTE, bomb, Content_Encoding=kind, Authorization="Bearer s3cret")
    assert got[0] == 413


def test_a_slow_body_times_out(narrow: Any) -> None:
    sock = raw(narrow, post(100, more=AUTH) + b"{")
    answer = read_all(sock)
    sock.close()
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"error"' in answer


def test_bodies_share_a_memory_budget(narrow: Any) -> None:
    first = raw(narrow, post(4000, more=AUTH) + b" " * 3999)
    answers = b""
    for _ in range(50):  # until the server has read the first
        second = raw(narrow, post(4000, more=AUTH) + b" " * 3999)
        answers = second.recv(65536)
        second.close()
        if b"429" in answers[:20]:
            break
    assert b"cotenant-refusal: MEMORY" in answers
    first.close()


def test_a_hang_up_withdraws_the_request(served: Any) -> None:
    body = json.dumps(GOOD).encode()
    sock = raw(served, post(len(body), "/v2/models/sleepy/infer") + body)
    assert served.node.waiting.acquire(timeout=20)
    sock.close()
    assert served.node.withdrawn.acquire(timeout=20)


def test_a_hang_up_within_the_body_reaches_no_model(served: Any) -> None:
    calls = len(served.node.calls)
    sock = raw(served, post(1000) + b"{")
    sock.close()
    assert ask(served, "GET", "/v2/health/live")[0] == 200
    assert len(served.node.calls) == calls


def test_a_client_that_waits_is_answered(served: Any) -> None:
    answers: list[int] = []
    thread = threading.Thread(
        target=lambda: answers.append(ask(served, "POST", "/v2/models/sleepy/infer", GOOD)[0])
    )
    thread.start()
    assert served.node.waiting.acquire(timeout=20)
    time.sleep(0.2)  # beyond the delay after which a hang-up is looked for
    served.call(served.node.gate.set)
    thread.join(20)
    served.call(served.node.gate.clear)
    assert answers == [200]


def test_endless_headers_are_refused(served: Any) -> None:
    sock = raw(served, b"GET /v2 HTTP/1.1\r\nHost: t\r\n")
    filler = b"X-Filler: " + b"a" * 1000 + b"\r\n"
    for _ in range(4 * HEADER_BYTES // len(filler)):
        sock.sendall(filler)
    assert read_all(sock).startswith(b"HTTP/1.1 431")
    sock.close()


def test_garbage_does_not_stop_the_server(served: Any) -> None:
    for data in (b"\0" * 100, b"POST\r\n\r\n", b"GET /%zz%00 HTTP/1.1\r\n\r\n", os.urandom(500)):
        raw(served, data).close()
    assert ask(served, "GET", "/v2/health/live")[0] == 200


def test_many_connections_are_served(served: Any) -> None:
    body = json.dumps(GOOD).encode()
    socks = [raw(served, post(len(body)) + body) for _ in range(300)]
    assert all(sock.recv(65536).startswith(b"HTTP/1.1 200") for sock in socks)
    for sock in socks:
        sock.close()


def test_a_taken_port_is_named(served: Any) -> None:
    with pytest.raises(EnvironmentProblem, match=rf"127\.0\.0\.1:{served.port}"):
        served.run(HttpFront(None, "127.0.0.1", served.port).start())
    with pytest.raises(EnvironmentProblem, match="cannot resolve"):
        served.run(HttpFront(None, "no.such.host.invalid", 0).start())


def test_stopping_answers_those_that_wait() -> None:
    with serving() as served:
        answers: list[Any] = []
        thread = threading.Thread(
            target=lambda: answers.append(ask(served, "POST", "/v2/models/sleepy/infer", GOOD))
        )
        thread.start()
        assert served.node.waiting.acquire(timeout=20)
        served.run(served.fronts[0].stop(0.1))
        thread.join(20)
        status, headers, _ = answers[0]
        assert (status, headers["cotenant-refusal"]) == (503, "SHUTTING_DOWN")
        assert served.node.withdrawn.acquire(timeout=20)
        with pytest.raises(ConnectionRefusedError):
            raw(served, b"")
