"""Requests over gRPC are read as protobuf reads them, payload aside."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from cotenant.serving import protos
from cotenant.serving.grpc_codec import parse

Request = protos.ModelInferRequest


@given(
    name=st.text(max_size=8),
    tensors=st.lists(st.tuples(st.text(max_size=4), st.lists(st.integers(0, 2**40))), max_size=3),
    raw=st.lists(st.binary(max_size=300), max_size=4),
    numbers=st.lists(st.integers(0, 2**31), max_size=4),
)
def test_a_message_comes_out_as_it_went_in(
    name: str, tensors: list[tuple[str, list[int]]], raw: list[bytes], numbers: list[int]
) -> None:
    sent = Request(model_name=name, id="x" * 200, raw_input_contents=raw)
    for tensor, shape in tensors:
        added = sent.inputs.add(name=tensor, datatype="FP32", shape=shape)
        added.contents.uint_contents.extend(numbers)
        added.parameters["p"].int64_param = 7
    sent.parameters["timeout"].int64_param = 5
    found = parse(sent.SerializeToString())
    assert [bytes(piece) for piece in found.raw] == raw
    del sent.raw_input_contents[:]
    assert found.message == sent


@given(st.binary(max_size=60))
def test_any_bytes_are_read_as_protobuf_reads_them(data: bytes) -> None:
    _compare(data)


@given(st.lists(st.binary(max_size=40), min_size=1), st.integers(0, 200), st.integers(0, 255))
def test_a_damaged_message_is_read_as_protobuf_reads_it(
    raw: list[bytes], at: int, byte: int
) -> None:
    whole = Request(model_name="m", id="i", raw_input_contents=raw).SerializeToString()
    _compare(whole[:at])
    damaged = bytearray(whole)
    damaged[at % len(damaged)] = byte
    _compare(bytes(damaged))


def _compare(data: bytes) -> None:
    try:
        expected = Request.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            parse(data)
        return
    found = parse(data)
    assert [bytes(piece) for piece in found.raw] == list(expected.raw_input_contents)
    assert found.message.model_name == expected.model_name
    assert found.message.id == expected.id
    assert list(found.message.inputs) == list(expected.inputs)


def test_the_payload_is_not_copied() -> None:
    data = Request(model_name="m", raw_input_contents=[b"abc" * 1000]).SerializeToString()
    (piece,) = parse(data).raw
    assert isinstance(piece, memoryview)
    assert piece.obj is data
