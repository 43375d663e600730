"""Requests over gRPC are read as protobuf reads them, payload aside."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from cotenant.domain.errors import InvalidRequest, TooLarge
from cotenant.serving import protos
from cotenant.serving.grpc_codec import decode, parse
from cotenant.serving.intake import Intake
from cotenant.serving.tensors import Limits

Request = protos.ModelInferRequest
LIMITS = Limits()


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
    found = parse(sent.SerializeToString(), LIMITS)
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
            parse(data, LIMITS)
        return
    try:
        found = parse(data, LIMITS)
    except DecodeError:  # groups, a form of fields from before this protocol, are refused
        assert any(byte & 7 in (3, 4) for byte in data)
        return
    assert [bytes(piece) for piece in found.raw] == list(expected.raw_input_contents)
    assert found.message.model_name == expected.model_name
    assert found.message.id == expected.id
    assert list(found.message.inputs) == list(expected.inputs)


def test_the_payload_is_not_copied() -> None:
    data = Request(model_name="m", raw_input_contents=[b"abc" * 1000]).SerializeToString()
    (piece,) = parse(data, LIMITS).raw
    assert isinstance(piece, memoryview)
    assert piece.obj is data


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    out = bytearray([number << 3 | 2])
    length = len(content)
    while length > 127:
        out.append(length & 127 | 128)
        length >>= 7
    return bytes(out) + bytes([length]) + content


def tensor(content: bytes) -> bytes:
    return field(5, field(1, b"x") + field(2, b"BYTES") + content)


MANY = 2**20


@pytest.mark.parametrize(
    "message",
    [
        field(5, b"") * MANY,
        field(6, b"") * MANY,
        field(7, b"") * MANY,
        b"".join(field(4, field(1, b"%x" % i)) for i in range(10_000)),
        b"\xc0\x3e\x00" * MANY,
        b"\xc5\x3e1234" * MANY,
        b"\xc3\x3e\xc4\x3e" * MANY,
        field(1, b"m") * MANY,
        tensor(field(3, b"\x01" * MANY)),
        tensor(b"\x18\x01" * MANY),
        tensor(b"".join(field(4, field(1, b"%x" % i)) for i in range(10_000))),
        tensor(field(5, field(8, b"") * MANY)),
        tensor(field(5, field(8, b"") * 40_000)) * 2,
        tensor(field(5, field(8, b"") * 40_000) * 2),
        tensor(field(5, b"\x08\x01" * MANY)),
        tensor(field(5, b"\x35abcd" * MANY)),
        tensor(field(5, field(6, bytes(16 * MANY)))),
        tensor(b"") + tensor(field(5, field(6, bytes(16 * MANY)))),
        tensor(field(5, b"\x35abcd" + field(6, bytes(4 * MANY)))),
        field(6, field(2, field(1, b"k")) * MANY),
        field(1, b"m" * 9 * MANY),
    ],
)
def test_what_there_may_be_many_of_is_counted_before_it_is_parsed(
    message: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protos, "ModelInferRequest", None)  # nothing gets there
    with pytest.raises((InvalidRequest, TooLarge, DecodeError)):
        parse(message, LIMITS)


def test_tensors_within_the_limits_are_read_in_every_form() -> None:
    request = Request(model_name="m")
    for number in range(LIMITS.tensors):
        added = request.inputs.add(name=f"x{number}", datatype="BYTES", shape=[1] * 15 + [50])
        added.contents.bytes_contents.extend([b"a string"] * 50)
        request.outputs.add(name=f"y{number}" * 300)
    call = decode(parse(request.SerializeToString(), LIMITS), LIMITS, Intake(LIMITS).regions).call
    assert [item.nbytes for item in call.inputs] == [50 * 12] * LIMITS.tensors


KINDS = {
    "BOOL": ("bool_contents", st.booleans()),
    "INT8": ("int_contents", st.integers(-(2**7), 2**7 - 1)),
    "INT32": ("int_contents", st.integers(-(2**31), 2**31 - 1)),
    "INT64": ("int64_contents", st.integers(-(2**63), 2**63 - 1)),
    "UINT16": ("uint_contents", st.integers(0, 2**16 - 1)),
    "UINT64": ("uint64_contents", st.integers(0, 2**64 - 1)),
    "FP32": ("fp32_contents", st.floats(width=32)),
    "FP64": ("fp64_contents", st.floats()),
}


@given(st.sampled_from(sorted(KINDS)), st.data())
def test_many_numbers_are_what_few_are(kind: str, data: st.DataObject) -> None:
    name, elements = KINDS[kind]
    some = data.draw(st.lists(elements, min_size=1, max_size=20))
    times = 1000 // len(some) + 1

    def sent(values: list[Any]) -> bytes:
        request = Request(model_name="m")
        added = request.inputs.add(name="x", datatype=kind, shape=[len(values)])
        getattr(added.contents, name).extend(values)
        return bytes(request.SerializeToString())

    def read(message: bytes) -> bytes:
        call = decode(parse(message, LIMITS), LIMITS, Intake(LIMITS).regions).call
        assert call.inputs[0].data is not None
        return bytes(call.inputs[0].data)

    assert read(sent(some * times)) == read(sent(some)) * times


def test_numbers_that_do_not_fit_are_refused() -> None:
    for kind, name, value in (("INT8", "int_contents", 200), ("UINT8", "uint_contents", 256)):
        request = Request(model_name="m")
        added = request.inputs.add(name="x", datatype=kind, shape=[1000])
        getattr(added.contents, name).extend([1] * 999 + [value])
        with pytest.raises(InvalidRequest):
            decode(parse(request.SerializeToString(), LIMITS), LIMITS, Intake(LIMITS).regions)


@given(st.sampled_from(["BOOL", "INT32", "UINT64", "FP32"]), st.binary(min_size=1, max_size=9))
def test_damaged_numbers_are_refused_or_read(kind: str, unit: bytes) -> None:
    number = {"BOOL": 1, "INT32": 2, "UINT64": 5, "FP32": 6}[kind]
    contents = field(5, field(number, unit * 600))
    input_ = field(5, field(1, b"x") + field(2, kind.encode()) + field(3, b"\xd8\x04") + contents)
    try:
        found = parse(input_, LIMITS)
        decode(found, LIMITS, Intake(LIMITS).regions)
    except (InvalidRequest, DecodeError):
        return
    expected = list(getattr(found.message.inputs[0].contents, _FIELDS[number]))
    assert len(expected) == 600


_FIELDS = {1: "bool_contents", 2: "int_contents", 5: "uint64_contents", 6: "fp32_contents"}


def test_text_that_is_no_utf8_is_a_damaged_message() -> None:
    for where in (field(1, b"\xff"), tensor(field(1, b"\xff")), field(4, field(1, b"\xff"))):
        with pytest.raises((DecodeError, UnicodeDecodeError)):
            decode(parse(where, LIMITS), LIMITS, Intake(LIMITS).regions)
