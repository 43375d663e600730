"""Answers in pieces as clients see them: the generate extension over REST, streams over gRPC."""

from __future__ import annotations

import http.client
import json
import queue
import socket
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2, service_pb2_grpc

from cotenant.domain.port import Refused
from cotenant.domain.request import Refusal
from tests.contract.fake_node import eventually
from tests.contract.replies import Reply

ASKED = {"text": "hello", "n": [1, 2, 3]}
UNREAD = Refused(Refusal.UNREAD, 0, "too much waits")
LARGE = "x" * 2**20


# --- REST -----------------------------------------------------------------------------------


def ask(served: Any, verb: str, body: Any, model: str = "talk") -> Reply:
    """An answer of the generate extension."""
    return Reply(served, f"/v2/models/{model}/{verb}", body)


def piece(text: str, n: int) -> dict[str, Any]:
    return {"model_name": "talk", "model_version": "1", "text": text, "n": n}


def test_pieces_are_events_in_order(served: Any) -> None:
    served.node.script = ["a", "b", "c"]
    reply = ask(served, "generate_stream", ASKED)
    assert (reply.status, reply.kind) == (200, "text/event-stream; charset=utf-8")
    assert reply.events == [piece("a", 0), piece("b", 1), piece("c", 2)]


def test_a_piece_is_sent_before_the_next_is_there(served: Any) -> None:
    served.node.script = ["a", "", "b"]
    reply = ask(served, "generate_stream", ASKED)
    assert reply.event() == piece("a", 0)
    assert served.node.waiting.acquire(timeout=20)
    served.call(served.node.gate.set)
    assert reply.events == [piece("b", 2)]


def test_an_end_without_outputs_is_no_event(served: Any) -> None:
    served.node.script = ["a", None]
    assert ask(served, "generate_stream", ASKED).events == [piece("a", 0)]
    served.node.script = [None]
    assert ask(served, "generate_stream", ASKED).events == []


def test_a_model_that_answers_at_once_gives_one_event(served: Any) -> None:
    reply = ask(served, "generate_stream", {"x": [0, 1, 2, 3], "id": "7"}, "double")
    (only,) = reply.events
    assert (only["id"], only["y"]) == ("7", [0, 2, 4, 6])
    assert ask(served, "generate", {"x": [0, 1, 2, 3]}, "double").json["y"] == [0, 2, 4, 6]


def test_the_whole_answer_joins_texts_and_lists_numbers(served: Any) -> None:
    served.node.script = ["Good ", "mor", "ning", None]
    reply = ask(served, "generate", ASKED | {"id": "7"})
    assert (reply.status, reply.kind) == (200, "application/json")
    assert reply.json == piece("Good morning", 0) | {"n": [0, 1, 2], "id": "7"}


def test_no_answer_at_all_is_an_error_of_the_whole(served: Any) -> None:
    served.node.script = [None]
    reply = ask(served, "generate", ASKED)
    assert (reply.status, list(reply.json)) == (400, ["error"])


def test_inputs_are_elements_or_lists_beside_or_in_parameters(served: Any) -> None:
    served.node.script = ["a"]
    parameters = {"n": 5, "temperature": 0.1, "stream": False, "priority": 1}
    ask(served, "generate", {"text": "hé,llo", "parameters": parameters}).whole()
    call = served.node.calls[-1]
    text, n = call.inputs
    assert (text.shape, bytes(text.data)) == ((1,), struct.pack("<I", 7) + "hé,llo".encode())
    assert (n.shape, bytes(n.data)) == ((1,), struct.pack("<q", 5))
    assert (call.priority, call.pieces) == (0, True)


def test_a_free_axis_is_as_long_as_the_elements_make_it(served: Any) -> None:
    ask(served, "generate", {"x": list(range(8))}, "double").whole()
    assert served.node.calls[-1].inputs[0].shape == (2, 4)
    ask(served, "generate", {"x": [[0, 1, 2, 3], [4, 5, 6, 7]]}, "double").whole()
    assert served.node.calls[-1].inputs[0].shape == (2, 4)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        ({"text": {"a": 1}, "n": 1}, 400),
        ({"text": ["a", "b"], "n": 1}, 400),
        ({"text": "a", "n": "b"}, 400),
        ({"text": "a", "n": 2**70}, 400),
        ({"text": "a", "n": [1, [2]]}, 400),
        ({"text": "a", "n": 1, "parameters": {"text": "b"}}, 400),
        ({"text": "a", "n": 1, "parameters": 3}, 400),
        ({"text": "a", "n": 1, "sequence_id": 4}, 400),
        ({"text": "a", "n": 1, "timeout": -4}, 400),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "generate_stream"])
def test_what_cannot_be_asked_is_refused_before_it_begins(
    served: Any, body: Any, status: int, verb: str
) -> None:
    before = len(served.node.calls)
    reply = ask(served, verb, body)
    assert (reply.status, reply.kind) == (status, "application/json")
    assert list(reply.json) == ["error"]
    assert len(served.node.calls) == before


@pytest.mark.parametrize("verb", ["generate", "generate_stream"])
def test_a_refusal_before_the_first_piece_is_answered_as_everywhere(served: Any, verb: str) -> None:
    served.node.refuse = Refused(Refusal.OVERLOADED, 1, "")
    reply = ask(served, verb, ASKED)
    assert reply.status == 429
    assert reply.answer.getheader("retry-after") == "1"
    reply.whole()
    served.node.refuse = None
    assert ask(served, verb, ASKED, "nothing").status == 404
    served.node.script = [Refused(Refusal.EXPIRED, 0, "")]
    assert ask(served, verb, ASKED).status == 504


def test_an_error_in_the_middle_is_an_event(served: Any) -> None:
    served.node.script = ["a", UNREAD]
    first, error = ask(served, "generate_stream", ASKED).events
    assert first == piece("a", 0)
    assert error == {"error": UNREAD.message}


def test_an_error_in_the_middle_fails_the_whole(served: Any) -> None:
    served.node.script = ["a", Refused(Refusal.WORKER_LOST, 0, "")]
    assert ask(served, "generate", ASKED).status == 503


def test_the_connection_goes_on_after_a_stream(served: Any) -> None:
    served.node.script = ["a", "b"]
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    for _ in range(2):
        connection.request("POST", "/v2/models/talk/generate_stream", json.dumps(ASKED))
        assert connection.getresponse().read().count(b"data: ") == 2
    connection.close()


@pytest.mark.parametrize("verb", ["generate", "generate_stream"])
def test_hanging_up_in_the_middle_withdraws(served: Any, verb: str) -> None:
    served.node.script = ["a", "", "b"]
    body = json.dumps(ASKED).encode()
    head = f"POST /v2/models/talk/{verb} HTTP/1.1\r\nHost: t\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as sock:
        sock.sendall(f"{head}\r\n\r\n".encode() + body)
        assert served.node.waiting.acquire(timeout=20)
    assert served.node.withdrawn.acquire(timeout=20)


def slow_socket(served: Any) -> socket.socket:
    """One that takes little before it is read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(20)
    sock.connect(("127.0.0.1", served.port))
    return sock


def test_pieces_wait_at_the_node_for_a_slow_reader(served: Any) -> None:
    served.node.script = [*[LARGE] * 32, "", "end"]
    body = json.dumps(ASKED).encode()
    head = b"POST /v2/models/talk/generate_stream HTTP/1.1\r\nHost: t\r\nConnection: close\r\n"
    with slow_socket(served) as sock:
        sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert served.node.waiting.acquire(timeout=20)
        assert served.node.unreleased > 16, "most of it was taken though nobody reads"
        served.call(served.node.gate.set)
        got = bytearray()
        while data := sock.recv(2**20):
            got += data
    assert got.count(b"data: ") == 33


def test_a_stream_needs_chunks(served: Any) -> None:
    body = json.dumps(ASKED).encode()
    head = f"POST /v2/models/talk/generate_stream HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as sock:
        sock.sendall(head.encode() + body)
        assert sock.recv(100).split()[1] == b"505"


# --- gRPC -----------------------------------------------------------------------------------


@pytest.fixture
def client(served: Any) -> Iterator[Any]:
    client = triton.InferenceServerClient(served.grpc)
    yield client
    client.close()


@pytest.fixture
def stub(served: Any) -> Iterator[Any]:
    with grpc.insecure_channel(served.grpc) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def text_input() -> list[Any]:
    text, n = triton.InferInput("text", [1], "BYTES"), triton.InferInput("n", [1], "INT64")
    text.set_data_from_numpy(np.array([b"hello"], np.object_))
    n.set_data_from_numpy(np.array([3], np.int64))
    return [text, n]


def request(name: str = "1", model: str = "talk") -> Any:
    message = service_pb2.ModelInferRequest(model_name=model, id=name)
    kind = "BYTES" if model == "talk" else "FP32"
    shape = [1] if model == "talk" else [1, 4]
    message.inputs.add(name="text" if model == "talk" else "x", datatype=kind, shape=shape)
    message.raw_input_contents.append(b"\1\0\0\0a" if model == "talk" else bytes(16))
    return message


def said(answer: Any) -> tuple[str, str, bool]:
    """Request, text and whether it is the last of a stream's answer."""
    response = answer.infer_response
    raw = response.raw_output_contents
    final = response.parameters["triton_final_response"].bool_param
    return response.id, raw[0][4:].decode() if raw else answer.error_message, final


def test_the_public_client_gets_pieces_in_order(served: Any, client: Any) -> None:
    served.node.script = ["a", "b", "c"]
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer(
        "talk", text_input(), request_id="7", enable_empty_final_response=True
    )
    got = []
    while not (got and got[-1].get_response().parameters["triton_final_response"].bool_param):
        result, error = answers.get(timeout=20)
        assert error is None
        got.append(result)
    client.stop_stream()
    assert [result.as_numpy("text").tolist() for result in got] == [[b"a"], [b"b"], [b"c"]]
    assert {result.get_response().id for result in got} == {"7"}


def test_the_last_of_an_answer_is_marked(served: Any, stub: Any) -> None:
    served.node.script = ["a", "b"]
    got = [said(answer) for answer in stub.ModelStreamInfer(iter([request()]))]
    assert got == [("1", "a", False), ("1", "b", True)]
    (only,) = stub.ModelStreamInfer(iter([request(model="double")]))
    assert only.infer_response.parameters["triton_final_response"].bool_param


@pytest.mark.parametrize("wanted", [True, False])
def test_an_empty_last_piece_is_said_to_who_asks_for_it(
    served: Any, stub: Any, wanted: bool
) -> None:
    served.node.script = ["a", None]
    message = request()
    message.parameters["triton_enable_empty_final_response"].bool_param = wanted
    got = [said(answer) for answer in stub.ModelStreamInfer(iter([message]))]
    assert got == [("1", "a", False), ("1", "", True)][: 1 + wanted]


def test_an_answer_in_pieces_holds_up_no_other(served: Any, stub: Any) -> None:
    served.node.script = ["a", "", "b"]
    waiting: queue.Queue[Any] = queue.Queue()
    answers = stub.ModelStreamInfer(iter(waiting.get, None))
    waiting.put(request("slow"))
    assert said(next(answers)) == ("slow", "a", False)
    waiting.put(request("quick", "double"))
    assert next(answers).infer_response.id == "quick"
    assert served.node.waiting.acquire(timeout=20)
    served.call(served.node.gate.set)
    assert said(next(answers)) == ("slow", "b", True)
    waiting.put(None)
    assert list(answers) == []


def test_an_error_in_the_middle_leaves_the_stream_open(served: Any, stub: Any) -> None:
    served.node.script = ["a", UNREAD]
    waiting: queue.Queue[Any] = queue.Queue()
    answers = stub.ModelStreamInfer(iter(waiting.get, None))
    waiting.put(request())
    assert said(next(answers)) == ("1", "a", False)
    error = next(answers)
    assert error.error_message == UNREAD.message
    assert error.infer_response.parameters["cotenant-refusal"].string_param == "UNREAD"
    waiting.put(request("2", "double"))
    assert next(answers).infer_response.id == "2"
    waiting.put(None)
    assert list(answers) == []


def test_cancelling_in_the_middle_withdraws(served: Any, stub: Any) -> None:
    served.node.script = ["a", "", "b"]
    waiting: queue.Queue[Any] = queue.Queue()
    answers = stub.ModelStreamInfer(iter(waiting.get, None))
    waiting.put(request())
    assert served.node.waiting.acquire(timeout=20)
    answers.cancel()
    waiting.put(None)
    assert served.node.withdrawn.acquire(timeout=20)


def test_pieces_wait_at_the_node_while_a_stream_is_not_read(served: Any) -> None:
    served.node.script = [*[LARGE] * 32, "", "end"]
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(served.grpc, options) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answers = stub.ModelStreamInfer(iter([request()]))
        assert served.node.waiting.acquire(timeout=20)
        assert served.node.unreleased > 16, "most of it was taken though nobody reads"
        served.call(served.node.gate.set)
        got = [said(answer) for answer in answers]
    assert len(got) == 33
    assert got[-1] == ("1", "end", True)
    assert eventually(lambda: served.node.unreleased == 0)


def test_a_single_answer_cannot_come_in_pieces(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request())
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_the_configuration_says_which_models_answer_in_pieces(client: Any) -> None:
    for model, pieces in (("talk", True), ("double", False)):
        config = client.get_model_config(model).config
        assert config.model_transaction_policy.decoupled == pieces
