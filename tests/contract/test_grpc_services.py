"""Health and reflection as their clients see them: Kubernetes' probes, grpcurl."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from cotenant.serving import grpc_health, protos
from tests.contract.fake_node import eventually, serving

CHECK, WATCH = f"/{protos.HEALTH}/Check", f"/{protos.HEALTH}/Watch"
SERVING, NOT_SERVING, UNKNOWN = b"\x08\x01", b"\x08\x02", b"\x08\x03"


def service(name: str) -> bytes:
    return b"\x0a" + bytes([len(name)]) + name.encode() if name else b""


@pytest.fixture
def channel(served: Any) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(served.grpc) as channel:
        yield channel


def check(channel: grpc.Channel, name: str) -> bytes:
    answer: bytes = channel.unary_unary(CHECK)(service(name), timeout=20)
    return answer


def test_check_knows_the_node_and_its_models(served: Any, channel: grpc.Channel) -> None:
    for name in ("", protos.SERVICE, "echo"):
        assert check(channel, name) == SERVING
    served.node.loaded = {"echo"}
    assert check(channel, "") == NOT_SERVING
    assert check(channel, "double") == NOT_SERVING
    assert check(channel, "echo") == SERVING
    with pytest.raises(grpc.RpcError) as told:
        check(channel, "nothing")
    assert told.value.code() == grpc.StatusCode.NOT_FOUND


def test_watch_says_what_changes(
    served: Any, channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_health, "_LOOK_S", 0.02)
    node = channel.unary_stream(WATCH)(service(""))
    unknown = channel.unary_stream(WATCH)(service("nothing"))
    assert next(node) == SERVING
    assert next(unknown) == UNKNOWN
    served.node.loaded = set()
    assert next(node) == NOT_SERVING
    served.node.loaded = {"double", "nothing"}
    assert next(node) == SERVING
    assert next(unknown) == SERVING
    node.cancel()
    unknown.cancel()
    assert eventually(lambda: not served.fronts[1]._health._watching)


def test_there_is_an_end_to_watching(
    served: Any, channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_health, "WATCHERS", 2)
    watching = [channel.unary_stream(WATCH)(service("")) for _ in range(2)]
    assert [next(each) for each in watching] == [SERVING] * 2
    with pytest.raises(grpc.RpcError) as told:
        next(channel.unary_stream(WATCH)(service("")))
    assert told.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    for each in watching:
        each.cancel()


def test_a_probe_needs_no_token_and_the_rest_does() -> None:
    with serving(token="s3cret") as served, grpc.insecure_channel(served.grpc) as channel:
        assert check(channel, "") == SERVING
        for path in (WATCH, f"/{protos.REFLECTION[0]}/ServerReflectionInfo"):
            with pytest.raises(grpc.RpcError) as told:
                next(channel.stream_stream(path)(iter([b""])))
            assert told.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("name", protos.REFLECTION)
def test_reflection_describes_every_service(channel: grpc.Channel, name: str) -> None:
    package = name.rpartition(".")[0]
    request = protos.message_class("ServerReflectionRequest", package)
    response = protos.message_class("ServerReflectionResponse", package)
    asked = [
        request(list_services="*"),
        request(file_containing_symbol=protos.SERVICE),
        request(file_containing_symbol=f"{protos.HEALTH}.Check"),
        request(file_containing_symbol="inference.ModelInferRequest.InferInputTensor"),
        request(file_by_filename="cotenant/inference.proto"),
        request(file_containing_symbol="no.such.Thing"),
        request(all_extension_numbers_of_type=protos.SERVICE),
        request(),
    ]
    call = channel.stream_stream(
        f"/{name}/ServerReflectionInfo",
        request_serializer=request.SerializeToString,
        response_deserializer=response.FromString,
    )
    answers = list(call(iter(asked), timeout=20))
    services = {each.name for each in answers[0].list_services_response.service}
    assert services == {protos.SERVICE, protos.HEALTH, *protos.REFLECTION}
    pool = descriptor_pool.DescriptorPool()
    for answer in answers[1:3]:
        for data in answer.file_descriptor_response.file_descriptor_proto:
            pool.Add(descriptor_pb2.FileDescriptorProto.FromString(data))
    method = pool.FindServiceByName(protos.SERVICE).FindMethodByName("ModelStreamInfer")
    assert (method.client_streaming, method.server_streaming) == (True, True)
    assert method.input_type.full_name == "inference.ModelInferRequest"
    assert pool.FindServiceByName(protos.HEALTH).FindMethodByName("Check") is not None
    assert answers[3:5] == [
        response(
            original_request=each, file_descriptor_response=answers[1].file_descriptor_response
        )
        for each in asked[3:5]
    ]
    for answer in answers[5:]:
        assert answer.error_response.error_code in (3, 5)


def test_what_loads_a_model_is_bounded(served: Any, channel: grpc.Channel) -> None:
    gate = threading.Event()

    async def wait(name: str) -> None:
        while not gate.is_set():
            await asyncio.sleep(0.01)

    served.node.load = wait
    try:
        ask = channel.unary_unary("/inference.GRPCInferenceService/RepositoryModelLoad")
        calls = [ask.future(b"\x12\x04echo") for _ in range(20)]
        refused = 0
        end = time.monotonic() + 20
        while refused < 12 and time.monotonic() < end:
            refused = sum(call.done() for call in calls)
        assert refused == 12
        calls[[call.done() for call in calls].index(False)].cancel()  # makes room for another
        assert eventually(lambda: len(served.fronts[1].running) == 7)
        another = ask.future(b"\x12\x04echo")
        gate.set()
        assert another.result(timeout=20) == b""
    finally:
        del served.node.load
