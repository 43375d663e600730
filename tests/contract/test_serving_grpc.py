"""gRPC as clients see it: the public client unchanged, and messages that lie."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.utils.shared_memory as shm
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from cotenant.domain.errors import EnvironmentProblem
from cotenant.domain.port import Refused
from cotenant.domain.request import Refusal
from cotenant.serving.grpc_calls import STREAM_WINDOW
from cotenant.serving.grpc_front import GrpcFront
from cotenant.serving.tensors import Limits
from tests.contract.fake_node import serving

X = np.arange(4, dtype=np.float32).reshape(1, 4)


@pytest.fixture
def client(served: Any) -> Iterator[Any]:
    client = triton.InferenceServerClient(served.grpc)
    yield client
    client.close()


@pytest.fixture
def stub(served: Any) -> Iterator[Any]:
    with grpc.insecure_channel(served.grpc) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def given(array: np.ndarray = X, name: str = "x", kind: str = "FP32") -> Any:
    item = triton.InferInput(name, list(array.shape), kind)
    item.set_data_from_numpy(array)
    return item


def request(model: str = "double", **tensor: Any) -> Any:
    """A message with one input of typed contents, which a test can spoil."""
    message = service_pb2.ModelInferRequest(model_name=model, id="r1")
    fields = {"name": "x", "datatype": "FP32", "shape": [1, 4], **tensor}
    contents = fields.pop("contents", {"fp32_contents": [0, 1, 2, 3]})
    item = message.inputs.add(**fields)
    if contents:
        item.contents.CopyFrom(service_pb2.InferTensorContents(**contents))
    return message


# The public client, unchanged.


def test_client_infers(client: Any) -> None:
    result = client.infer("double", [given()], request_id="a1", model_version="1")
    assert np.array_equal(result.as_numpy("y"), 2 * X)
    assert (result.get_response().id, result.get_response().model_version) == ("a1", "1")


def test_client_chooses_outputs(client: Any) -> None:
    outputs = [triton.InferRequestedOutput("b")]
    inputs = [given(X, "a"), given(X + 1, "b")]
    result = client.infer("echo", inputs, outputs=outputs)
    assert result.as_numpy("a") is None
    assert np.array_equal(result.as_numpy("b"), X + 1)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_client_may_compress(client: Any, algorithm: str) -> None:
    array = np.zeros((100, 1000), np.float32)
    result = client.infer("double", [given(array)], compression_algorithm=algorithm)
    assert np.array_equal(result.as_numpy("y"), array)


def test_client_sends_strings_and_empty_tensors(client: Any) -> None:
    texts = np.array(["a", "", "žluť"], dtype=object)
    got = client.infer("echo", [given(texts, "s", "BYTES")]).as_numpy("s")
    assert [item.decode() for item in got] == list(texts)
    empty = np.zeros((0, 4), np.float32)
    assert client.infer("double", [given(empty)]).as_numpy("y").shape == (0, 4)


def test_client_parameters_reach_the_node(served: Any, client: Any) -> None:
    client.infer("double", [given()], priority=3, timeout=2500)
    call = served.node.calls[-1]
    assert (call.priority, call.timeout_ns) == (2, 2_500_000)


def test_client_sees_health_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("double", "1")
    assert not client.is_model_ready("nothing")
    assert client.get_server_metadata().name == "cotenant"
    meta = client.get_model_metadata("double")
    assert (meta.inputs[0].name, list(meta.inputs[0].shape)) == ("x", [-1, 4])
    config = client.get_model_config("double").config
    assert (config.max_batch_size, list(config.output[0].dims)) == (0, [-1, 4])
    assert client.get_model_config("double", as_json=True)["config"]["name"] == "double"
    stats = client.get_inference_statistics("double").model_stats
    assert stats[0].inference_stats.queue.ns == 100
    assert len(client.get_inference_statistics().model_stats) == 4


def test_client_loads_and_unloads(client: Any) -> None:
    client.unload_model("echo")
    states = {m.name: m.state for m in client.get_model_repository_index().models}
    assert states["echo"] == "UNAVAILABLE"
    client.load_model("echo")
    assert client.is_model_ready("echo")
    with pytest.raises(InferenceServerException, match=r"FAILED_PRECONDITION.*damaged"):
        client.load_model("broken")
    with pytest.raises(InferenceServerException, match="NOT_FOUND"):
        client.unload_model("nothing")


@pytest.mark.parametrize(
    "method", ["get_trace_settings", "get_log_settings", "get_cuda_shared_memory_status"]
)
def test_client_is_told_what_is_not_supported(client: Any, method: str) -> None:
    with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
        getattr(client, method)()


def test_tensors_travel_through_shared_memory(client: Any) -> None:
    key = f"/test_{uuid.uuid4().hex}"
    region = shm.create_shared_memory_region("g", key, 32)
    try:
        client.register_system_shared_memory("g", key, 32)
        shm.set_shared_memory_region(region, [X])
        item = triton.InferInput("x", [1, 4], "FP32")
        item.set_shared_memory("g", 16)
        out = triton.InferRequestedOutput("y")
        out.set_shared_memory("g", 16, offset=16)
        client.infer("double", [item], outputs=[out])
        got = shm.get_contents_as_numpy(region, np.float32, [1, 4], offset=16)
        assert np.array_equal(got, 2 * X)
        assert client.get_system_shared_memory_status().regions["g"].byte_size == 32
        mixed = client.infer("echo", [item, given(X + 1, "b")])
        assert np.array_equal(mixed.as_numpy("b"), X + 1)
    finally:
        client.unregister_system_shared_memory()
        shm.destroy_shared_memory_region(region)
    with pytest.raises(InferenceServerException, match="NOT_FOUND"):
        client.infer("double", [item])


# Streams.


def streamed(client: Any, send: Any, count: int) -> list[tuple[Any, Any]]:
    """Open a stream, let ``send`` put requests on it, return ``count`` (result, error)."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    send()
    got = [answers.get(timeout=20) for _ in range(count)]
    client.stop_stream()
    return got


def test_a_stream_answers_in_order(client: Any) -> None:
    count = 3 * STREAM_WINDOW

    def send() -> None:
        for i in range(count):
            client.async_stream_infer("double", [given(X + i)], request_id=str(i))

    got = streamed(client, send, count)
    assert [result.get_response().id for result, _ in got] == [str(i) for i in range(count)]
    assert np.array_equal(got[7][0].as_numpy("y"), 2 * (X + 7))


def test_a_stream_outlives_a_failed_request(client: Any) -> None:
    def send() -> None:
        client.async_stream_infer("nothing", [given()])
        client.async_stream_infer("double", [given()])

    (_, error), (result, _) = streamed(client, send, 2)
    assert "not loaded" in str(error)
    assert np.array_equal(result.as_numpy("y"), 2 * X)


def test_a_refusal_on_a_stream_says_why(served: Any, stub: Any) -> None:
    served.node.refuse = Refused(Refusal.QUEUE_FULL, 1_500_000, "")
    (answer,) = stub.ModelStreamInfer(iter([request()]))
    assert answer.error_message == Refusal.QUEUE_FULL.value
    assert answer.infer_response.id == "r1"
    parameters = answer.infer_response.parameters
    assert parameters["cotenant-refusal"].string_param == "QUEUE_FULL"
    assert parameters["retry-after-ms"].string_param == "2"


def test_cancelling_a_stream_withdraws_its_requests(served: Any, stub: Any) -> None:
    waiting: queue.Queue[Any] = queue.Queue()
    call = stub.ModelStreamInfer(iter(waiting.get, None))
    for _ in range(3):
        waiting.put(request("sleepy"))
        assert served.node.waiting.acquire(timeout=20)
    call.cancel()
    waiting.put(None)
    for _ in range(3):
        assert served.node.withdrawn.acquire(timeout=20)


def test_a_cancelled_stream_leaves_nothing_behind(served: Any, stub: Any) -> None:
    def tasks() -> int:
        return served.call(lambda: len(asyncio.all_tasks()))

    before = tasks()
    hold = threading.Event()

    def requests() -> Iterator[Any]:
        for _ in range(2 * STREAM_WINDOW):  # more than the window, so its reading has paused
            yield request("sleepy")
        hold.wait(20)

    call = stub.ModelStreamInfer(requests())
    for _ in range(STREAM_WINDOW):
        assert served.node.waiting.acquire(timeout=20)
    call.cancel()
    hold.set()
    deadline = time.monotonic() + 20
    while tasks() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert tasks() <= before
    while served.node.waiting.acquire(blocking=False):
        pass
    while served.node.withdrawn.acquire(blocking=False):
        pass


# Typed contents, lies, refusals.


@pytest.mark.parametrize(
    ("kind", "field", "dtype"),
    [
        ("INT8", "int_contents", np.int8),
        ("INT32", "int_contents", np.int32),
        ("FP64", "fp64_contents", np.float64),
        ("FP32", "fp32_contents", np.float32),
    ],
)
def test_typed_contents_are_understood(stub: Any, kind: str, field: str, dtype: Any) -> None:
    answer = stub.ModelInfer(request(datatype=kind, contents={field: [1, 2, 3, 4]}))
    got = np.frombuffer(answer.raw_output_contents[0], dtype)
    assert got.tolist() == [2, 4, 6, 8]


def test_typed_strings_and_booleans_are_understood(stub: Any) -> None:
    message = request("echo", datatype="BYTES", shape=[2], contents={"bytes_contents": [b"a", b""]})
    assert stub.ModelInfer(message).raw_output_contents[0] == b"\1\0\0\0a\0\0\0\0"
    message = request("echo", datatype="BOOL", shape=[2], contents={"bool_contents": [True, False]})
    assert stub.ModelInfer(message).raw_output_contents[0] == b"\1\0"


def lie(**fields: Any) -> Any:
    raw = fields.pop("raw", [])
    message = request(**fields)
    message.raw_input_contents.extend(raw)
    return message


def spoiled(**parameters: Any) -> Any:
    message = request()
    for key, value in parameters.items():
        kind = {str: "string_param", int: "int64_param", bool: "bool_param"}[type(value)]
        setattr(message.parameters[key], kind, value)
    return message


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (service_pb2.ModelInferRequest(model_name="double"), "no inputs"),
        (lie(raw=[b"\0" * 16]), "'x': it has contents although raw_input_contents"),
        (lie(raw=[b"\0" * 15], contents=None), "'x': 15 bytes were sent, but 4 elements"),
        (lie(raw=[b"\0" * 16] * 2, contents=None), "has 2 entries, but 1 inputs"),
        (lie(contents=None), "'x': fp32_contents holds 0 elements"),
        (lie(shape=[-1, 4]), "'x': dimension -1"),
        (lie(shape=[2**62, 2**62]), "'x': its shape"),
        (lie(shape=[1] * 17), "'x': 17 dimensions"),
        (lie(datatype="FP31"), "'x': unknown datatype 'FP31'"),
        (lie(datatype="FP16"), "'x': FP16 has no typed contents"),
        (lie(datatype="INT8", contents={"int_contents": [1, 2, 3, 300]}), "does not fit INT8"),
        (lie(datatype="BYTES", shape=[1], raw=[b"\5\0\0\0a"], contents=None), "'x': element 0"),
        (lie(name=""), "empty name"),
        (spoiled(priority="high"), "parameter priority must be a whole number"),
        (spoiled(timeout=-4), "timeout is -4"),
        (spoiled(sequence_id=4), "sequence parameters"),
        (spoiled(sequence_start=True), "sequence parameters"),
    ],
)
def test_a_lie_is_refused_by_name(stub: Any, message: Any, says: str) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        stub.ModelInfer(message)
    assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert says in refusal.value.details()


def test_bytes_that_are_no_message_are_the_clients_error(served: Any) -> None:
    with grpc.insecure_channel(served.grpc) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        with pytest.raises(grpc.RpcError) as refusal:
            call(b"\xff\xff\xff")
    assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("refusal", "code", "retry"),
    [
        (Refusal.OVERLOADED, "RESOURCE_EXHAUSTED", True),
        (Refusal.MEMORY, "RESOURCE_EXHAUSTED", True),
        (Refusal.UNAVAILABLE, "UNAVAILABLE", True),
        (Refusal.WORKER_LOST, "UNAVAILABLE", True),
        (Refusal.EXPIRED, "DEADLINE_EXCEEDED", False),
        (Refusal.DEADLINE, "INVALID_ARGUMENT", False),
        (Refusal.FAILED, "INVALID_ARGUMENT", False),
    ],
)
def test_refusals_say_why_and_when_to_retry(
    served: Any, stub: Any, refusal: Refusal, code: str, retry: bool
) -> None:
    served.node.refuse = Refused(refusal, 2_000_001, "a detail")
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(request())
    metadata = dict(error.value.trailing_metadata())
    assert error.value.code().name == code
    assert error.value.details() == f"{refusal.value}: a detail"
    assert metadata["cotenant-refusal"] == refusal.name
    assert metadata.get("retry-after-ms") == ("3" if retry else None)


def test_what_has_gone_is_to_be_asked_for_again_in_a_second(served: Any, stub: Any) -> None:
    served.node.refuse = Refused(Refusal.SHUTTING_DOWN, 0, "")
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(request())
    assert dict(error.value.trailing_metadata())["retry-after-ms"] == "1000"


def test_a_bug_is_answered_without_its_details(served: Any, stub: Any, caplog: Any) -> None:
    served.node.fail = RuntimeError("secret")
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(request())
    assert error.value.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in error.value.details()
    assert "failed inside the server" in caplog.text


def test_cancelling_withdraws_the_request(served: Any, stub: Any) -> None:
    call = stub.ModelInfer.future(request("sleepy"))
    assert served.node.waiting.acquire(timeout=20)
    call.cancel()
    assert served.node.withdrawn.acquire(timeout=20)


def test_a_token_guards_every_method_but_health() -> None:
    with serving(Limits(body_bytes=10_000), token="s3cret") as served:
        client = triton.InferenceServerClient(served.grpc)
        assert client.is_server_live()
        assert client.is_server_ready()
        for headers in (None, {"authorization": "Bearer no"}, {"authorization": "Basic s3cret"}):
            with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                client.get_server_metadata(headers=headers)
            with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                client.infer("double", [given()], headers=headers)
        right = {"authorization": "Bearer s3cret"}
        result = client.infer("double", [given()], headers=right)
        assert np.array_equal(result.as_numpy("y"), 2 * X)
        with pytest.raises(InferenceServerException, match="RESOURCE_EXHAUSTED"):
            client.infer("double", [given(np.zeros((1, 5000), np.float32))], headers=right)
        errors: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: errors.put(error))
        assert "UNAUTHENTICATED" in str(errors.get(timeout=20))
        client.stop_stream()
        client.close()


def test_a_taken_port_is_named(served: Any) -> None:
    host, port = served.grpc.split(":")
    front = GrpcFront(served.node, served.intake, None, host, int(port))
    with pytest.raises(EnvironmentProblem, match=served.grpc.replace(".", r"\.")):
        served.run(front.start())
