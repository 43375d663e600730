"""The gRPC messages agree, field for field, with those of the public client."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor
from tritonclient.grpc import service_pb2

from cotenant.serving import protos
from cotenant.serving.grpc_front import GrpcFront
from cotenant.serving.intake import Intake
from cotenant.serving.tensors import Limits

THEIRS = service_pb2.DESCRIPTOR.pool
MESSAGES = [name for name in protos._TABLE.split("\n") if name and name[0] != " "]


def fields(descriptor: Descriptor) -> dict[str, tuple[Any, ...]]:
    return {
        field.name: (
            field.number,
            field.type,
            field.is_repeated,
            field.containing_oneof.name if field.containing_oneof else "",
            field.message_type.full_name if field.message_type else "",
            bool(field.message_type and field.message_type.GetOptions().map_entry),
        )
        for field in descriptor.fields
    }


@pytest.mark.parametrize("name", MESSAGES)
def test_every_field_is_on_the_wire_as_the_client_expects(name: str) -> None:
    ours = fields(protos.message_class(name).DESCRIPTOR)
    theirs = fields(THEIRS.FindMessageTypeByName(f"{protos.PACKAGE}.{name}"))
    assert ours.items() <= theirs.items()
    if not name.startswith(("Model", "InferStatistics")) or "Infer" in name:
        # Only configuration and statistics leave out fields that nothing here can fill.
        assert ours.keys() == theirs.keys() or name == "InferStatistics"


def test_enum_numbers_agree() -> None:
    theirs = THEIRS.FindEnumTypeByName(f"{protos.PACKAGE}.DataType")
    assert {v.name: v.number for v in theirs.values} == {
        name: number for number, name in enumerate(protos.DATA_TYPES)
    }


def test_service_has_every_method_the_client_knows() -> None:
    front = GrpcFront(None, Intake(Limits()), None, "127.0.0.1", 0)  # type: ignore[arg-type]
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert theirs.full_name == protos.SERVICE
    known = {*front._routes, *front._unsupported}
    assert {path for path in known if path.startswith(f"/{protos.SERVICE}/")} == {
        f"/{protos.SERVICE}/{method.name}" for method in theirs.methods
    }


def test_bytes_can_be_exchanged_with_the_client() -> None:
    theirs = service_pb2.ModelInferRequest(model_name="m", raw_input_contents=[b"\0\1"])
    theirs.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    theirs.parameters["priority"].uint64_param = 2
    ours = protos.ModelInferRequest.FromString(theirs.SerializeToString())
    assert ours.inputs[0].name == "x"
    assert ours.parameters["priority"].uint64_param == 2
    back = service_pb2.ModelInferRequest.FromString(ours.SerializeToString())
    assert back == theirs
