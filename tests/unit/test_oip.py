"""The REST codec: what is sent comes out as it was meant, and every lie is refused by name."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cotenant.domain.errors import CotenantError, InvalidRequest, NotFound, TooLarge
from cotenant.domain.port import DATATYPES, InferResult, TensorOut
from cotenant.serving import oip
from cotenant.serving.oip import Limits
from cotenant.serving.regions import Regions
from cotenant.serving.tensors import join_bytes, split_bytes

NUMPY = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP32": np.float32,
    "FP64": np.float64,
}


def tensor(name: str = "x", shape: Any = (1, 2), datatype: str = "FP32", **more: Any) -> dict:
    return {"name": name, "shape": list(shape), "datatype": datatype, **more}


def decode(
    document: Any, tail: bytes = b"", header: str | None = None, limits: Limits | None = None
) -> oip.Decoded:
    head = document if isinstance(document, bytes) else json.dumps(document).encode()
    if tail and header is None:
        header = str(len(head))
    return oip.decode(head + tail, header, "m", "", limits or Limits(), Regions())


def only(document: Any, tail: bytes = b"") -> np.ndarray:
    item = decode(document, tail).call.inputs[0]
    assert item.data is not None and len(item.data) == item.nbytes
    return np.frombuffer(item.data, NUMPY[item.datatype]).reshape(item.shape)


def answer(request: oip.Decoded, **outputs: Any) -> tuple[dict, bytes]:
    """Encode numpy outputs; returns the JSON document and what follows it."""
    kinds = {np.dtype(v): k for k, v in NUMPY.items()}
    outs = [
        TensorOut(name, kinds[a.dtype], a.shape, memoryview(a.tobytes()))
        for name, a in outputs.items()
    ]
    body, length = oip.encode(InferResult("m", "1", outs, lambda: None), request, Regions())
    head = body if length is None else body[:length]
    return json.loads(head), b"" if length is None else body[length:]


arrays = st.sampled_from(sorted(NUMPY)).flatmap(
    lambda kind: hnp.arrays(
        NUMPY[kind],
        hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4),
        elements=(
            {"allow_nan": False, "allow_infinity": False} if kind in ("FP32", "FP64") else None
        ),
    )
)


def datatype_of(array: np.ndarray) -> str:
    return next(k for k, v in NUMPY.items() if array.dtype == v)


@given(arrays, st.booleans())
def test_json_round_trip(array: np.ndarray, nested: bool) -> None:
    data = array.tolist() if nested else array.ravel().tolist()
    request = decode({"inputs": [tensor("x", array.shape, datatype_of(array), data=data)]})
    item = request.call.inputs[0]
    assert item.data is not None and bytes(item.data) == array.tobytes()
    document, tail = answer(request, y=array)
    assert tail == b""
    (out,) = document["outputs"]
    assert out["shape"] == list(array.shape)
    got = np.array(out["data"], array.dtype).reshape(array.shape)
    assert got.tobytes() == array.tobytes()


@given(st.lists(arrays, min_size=1, max_size=4))
def test_binary_round_trip(several: list[np.ndarray]) -> None:
    inputs = [
        tensor(f"x{i}", a.shape, datatype_of(a), parameters={"binary_data_size": len(a.tobytes())})
        for i, a in enumerate(several)
    ]
    document = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    request = (
        decode(document, b"".join(a.tobytes() for a in several), header=None)
        if any(a.size for a in several)
        else decode(document)
    )
    for item, array in zip(request.call.inputs, several, strict=True):
        assert isinstance(item.data, memoryview)
        assert bytes(item.data) == array.tobytes()
    document, tail = answer(request, **{f"y{i}": a for i, a in enumerate(several)})
    assert tail == b"".join(a.tobytes() for a in several)
    sizes = [out["parameters"]["binary_data_size"] for out in document["outputs"]]
    assert sizes == [a.nbytes for a in several]


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), max_size=5))
def test_strings_round_trip(texts: list[str]) -> None:
    request = decode({"inputs": [tensor("s", [len(texts)], "BYTES", data=texts)]})
    data = request.call.inputs[0].data
    assert data is not None
    encoded = [text.encode() for text in texts]
    assert split_bytes("s", memoryview(data), len(texts)) == encoded
    assert bytes(data) == join_bytes(encoded)
    out = TensorOut("t", "BYTES", (len(texts),), memoryview(data))
    body, length = oip.encode(InferResult("m", "1", [out], lambda: None), request, Regions())
    assert length is None and json.loads(body)["outputs"][0]["data"] == texts


@settings(max_examples=300)
@given(st.binary(max_size=200), st.one_of(st.none(), st.text(max_size=4), st.integers(-5, 300)))
def test_no_body_brings_the_decoder_down(body: bytes, header: Any) -> None:
    length = None if header is None else str(header)
    with pytest.raises(CotenantError):
        oip.decode(body, length, "m", "", Limits(), Regions())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@settings(max_examples=300)
@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            ("name", "shape", "datatype", "data", "parameters", "id", "outputs"), json_values
        ),
    ),
    st.sampled_from(["", "name", "shape", "datatype", "data", "parameters"]),
)
def test_no_field_brings_the_decoder_down(fields: dict, keep: str) -> None:
    """One field of a good tensor stays, the others are anything at all."""
    good = tensor(data=[1.0, 2.0])
    item = {**good, **{k: v for k, v in fields.items() if k != keep}}
    try:
        request = decode({"inputs": [item], **({"id": fields["id"]} if "id" in fields else {})})
    except CotenantError:
        return
    got = request.call.inputs[0]
    size = DATATYPES[got.datatype]
    assert not size or got.nbytes == size * math.prod(got.shape)


NULLS: dict[str, Any] = {
    "id": {"id": None},
    "outputs": {"outputs": None},
    "parameters": {"parameters": None},
    "parameters' fields": {
        "parameters": dict.fromkeys(
            ("binary_data_output", "priority", "timeout", "sequence_id", "sequence_start", "other")
        )
    },
    "an output's": {"outputs": [{"name": "y", "parameters": None}]},
    "an output's fields": {
        "outputs": [
            {
                "name": "y",
                "parameters": dict.fromkeys(
                    ("binary_data", "classification", "shared_memory_region")
                ),
            }
        ]
    },
    "an input's": {"inputs": [tensor(data=[1, 2], parameters=None)]},
    "an input's fields": {
        "inputs": [
            tensor(
                data=[1, 2],
                parameters=dict.fromkeys(("binary_data_size", "shared_memory_region", "other")),
            )
        ]
    },
}


@pytest.mark.parametrize("nulls", NULLS.values(), ids=NULLS)
def test_a_null_field_counts_as_absent(nulls: dict[str, Any]) -> None:
    document = {"inputs": [tensor(data=[1, 2])]}
    plain, given = decode(document), decode(document | nulls)
    assert (given.call.id, given.call.priority, given.binary) == ("", plain.call.priority, False)
    assert [bytes(i.data or b"") for i in given.call.inputs] == [
        bytes(i.data or b"") for i in plain.call.inputs
    ]


def test_null_data_beside_binary_data_are_absent() -> None:
    given = {"inputs": [tensor(data=None, parameters={"binary_data_size": 8})]}
    assert only(given, np.array([1, 2], "<f4").tobytes()).tolist() == [[1, 2]]


def test_payload_is_not_copied() -> None:
    payload = np.arange(6, dtype=np.float32)
    head = json.dumps({"inputs": [tensor(shape=[6], parameters={"binary_data_size": 24})]}).encode()
    body = bytearray(head + payload.tobytes())
    request = oip.decode(body, str(len(head)), "m", "", Limits(), Regions())
    body[-4:] = np.float32(41).tobytes()
    data = request.call.inputs[0].data
    assert data is not None and np.frombuffer(data, np.float32)[-1] == 41


def test_nested_integers_become_floats() -> None:
    got = only({"inputs": [tensor(shape=[2, 2], data=[[1, 2], [3, 4]])]})
    assert got.tolist() == [[1, 2], [3, 4]]


def test_call_carries_what_was_asked() -> None:
    request = decode(
        {
            "id": "r7",
            "inputs": [tensor(data=[1, 2])],
            "outputs": [{"name": "a"}, {"name": "b", "parameters": {"binary_data": True}}],
            "parameters": {"priority": 1, "timeout": 1500, "something_else": [1]},
        }
    )
    call = request.call
    assert (call.model, call.id, call.outputs) == ("m", "r7", ("a", "b"))
    assert (call.priority, call.timeout_ns) == (0, 1_500_000)
    a, b, c = (np.full(2, v, np.float32) for v in (1, 2, 3))
    document, tail = answer(request, a=a, b=b, c=c)
    assert document["id"] == "r7"
    assert [out["name"] for out in document["outputs"]] == ["a", "b"]
    assert document["outputs"][0]["data"] == [1, 1]
    assert tail == b.tobytes()


@pytest.mark.parametrize(("theirs", "ours"), [(0, 1), (1, 0), (2, 1), (3, 2), (99, 2)])
def test_priorities_map_to_classes(theirs: int, ours: int) -> None:
    request = decode({"inputs": [tensor(data=[1, 2])], "parameters": {"priority": theirs}})
    assert request.call.priority == ours


X12 = {"data": [1, 2]}
LIES: list[tuple[str, Any, str]] = [
    ("no inputs", {"inputs": []}, "no inputs"),
    ("inputs missing", {}, "inputs"),
    ("not an object", [], "Expected `object`"),
    ("unknown datatype", {"inputs": [tensor(datatype="FP31", **X12)]}, "'x': unknown datatype"),
    ("empty name", {"inputs": [tensor("", **X12)]}, "empty name"),
    ("negative dim", {"inputs": [tensor(shape=[-1, 2], **X12)]}, "'x': dimension -1"),
    ("dims overflow", {"inputs": [tensor(shape=[2**40] * 4, **X12)]}, "'x': its shape"),
    ("long dim", {"inputs": [tensor(shape=[10**400], **X12)]}, "'x'"),
    ("too many dims", {"inputs": [tensor(shape=[1] * 17, **X12)]}, "'x': 17 dimensions"),
    ("fraction dim", {"inputs": [tensor(shape=[1.5], **X12)]}, "input 'x': Expected `int`"),
    ("text dim", {"inputs": [tensor(shape=["2"], **X12)]}, "input 'x': Expected `int`"),
    ("count", {"inputs": [tensor(shape=[3], **X12)]}, "'x': data holds 2 elements"),
    ("ragged", {"inputs": [tensor(shape=[2, 2], data=[[1, 2], [3]])]}, "'x': a list at depth 1"),
    ("transposed", {"inputs": [tensor(shape=[2, 3], data=[[1, 2]] * 3)]}, "'x': a list at"),
    ("deeper", {"inputs": [tensor(shape=[2], data=[[1], [2]])]}, "'x': data must be a list"),
    ("no data", {"inputs": [tensor()]}, "'x': give its elements once"),
    ("data null", {"inputs": [tensor(data=None)]}, "'x': give its elements"),
    ("text element", {"inputs": [tensor(data=["a", "b"])]}, "'x': data must be a list of num"),
    ("null element", {"inputs": [tensor(data=[1, None])]}, "'x': data must be"),
    ("bool element", {"inputs": [tensor(data=[1, True])]}, "'x': data must be"),
    ("number as BOOL", {"inputs": [tensor(datatype="BOOL", **X12)]}, "true or false"),
    ("float as INT32", {"inputs": [tensor(datatype="INT32", data=[1, 2.5])]}, "whole numbers"),
    ("INT8 range", {"inputs": [tensor(datatype="INT8", data=[1, 128])]}, "'x': an element does"),
    ("UINT8 range", {"inputs": [tensor(datatype="UINT8", data=[1, -1])]}, "does not fit UINT8"),
    ("UINT64 range", {"inputs": [tensor(datatype="UINT64", data=[1, 2**64])]}, "'x': an element"),
    ("FP32 range", {"inputs": [tensor(data=[1, 1e39])]}, "'x': an element is beyond"),
    ("FP16 as JSON", {"inputs": [tensor(datatype="FP16", **X12)]}, "'x': FP16 cannot be sent"),
    ("BF16 as JSON", {"inputs": [tensor(datatype="BF16", **X12)]}, "'x': BF16 cannot be sent"),
    ("number as BYTES", {"inputs": [tensor(datatype="BYTES", **X12)]}, "list of strings"),
    ("twice", {"inputs": [tensor(**X12), tensor(**X12)]}, "input 'x' is given twice"),
    (
        "output twice",
        {"inputs": [tensor(**X12)], "outputs": [{"name": "y"}, {"name": "y"}]},
        "output 'y' is given twice",
    ),
    (
        "classification",
        {
            "inputs": [tensor(**X12)],
            "outputs": [{"name": "y", "parameters": {"classification": 3}}],
        },
        "'y': the classification extension is not supported",
    ),
    (
        "sequence",
        {"inputs": [tensor(**X12)], "parameters": {"sequence_id": 5}},
        "sequence parameters",
    ),
    ("priority", {"inputs": [tensor(**X12)], "parameters": {"priority": -1}}, "priority is -1"),
    ("priority text", {"inputs": [tensor(**X12)], "parameters": {"priority": "1"}}, "priority"),
    ("timeout", {"inputs": [tensor(**X12)], "parameters": {"timeout": -1}}, "timeout is -1"),
    ("timeout far", {"inputs": [tensor(**X12)], "parameters": {"timeout": 2**62}}, "timeout is"),
    (
        "size and data",
        {"inputs": [tensor(**X12, parameters={"binary_data_size": 0})]},
        "'x': give its elements once",
    ),
    (
        "binary without bytes",
        {"inputs": [tensor(parameters={"binary_data_size": 8})]},
        "'x': binary_data_size is 8, but 0 bytes",
    ),
    (
        "negative size",
        {"inputs": [tensor(parameters={"binary_data_size": -8})]},
        "'x': binary_data_size is -8",
    ),
    (
        "region without size",
        {"inputs": [tensor(parameters={"shared_memory_region": "r"})]},
        "'x': shared_memory_byte_size is missing",
    ),
    ("NaN", b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[NaN]}]}', "not valid"),
    ("1e999", b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP64","data":[1e999]}]}', "'x'"),
    ("cut short", b'{"inputs":[{"name":"x"', "not valid JSON"),
    ("not UTF-8", b'{"inputs":[{"name":"\xff"}]}', "not valid JSON"),
    ("deep", b'{"inputs":[{"name":"x","data":' + b"[" * 10**5, "nested too deeply"),
    (
        "surrogate",
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"BYTES","data":["\\ud800"]}]}',
        "",
    ),
    ("empty", b"", "not valid JSON"),
]


@pytest.mark.parametrize(("document", "says"), [lie[1:] for lie in LIES], ids=[i[0] for i in LIES])
def test_a_lie_is_refused_by_name(document: Any, says: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        decode(document)
    assert says in str(refusal.value)


TWO = {"inputs": [tensor(parameters={"binary_data_size": 8})]}


@pytest.mark.parametrize(
    ("tail", "header", "says"),
    [
        (b"\0" * 8, "999999", "999999, but the body has only"),
        (b"\0" * 8, "-1", "'-1'; it must be the number of bytes"),
        (b"\0" * 8, "ten", "'ten'; it must be"),
        (b"\0" * 8, "1e2", "must be"),
        (b"\0" * 8, "", "must be"),
        (b"\0" * 8, "9" * 5000, "must be"),
        (b"\0" * 8, "0", "not valid JSON"),
        (b"\0" * 8, "12", "not valid JSON"),
        (b"\0" * 7, None, "'x': binary_data_size is 8, but 7 bytes"),
        (b"\0" * 9, None, "1 bytes follow the last binary tensor"),
    ],
)
def test_a_wrong_header_length_is_refused(tail: bytes, header: str | None, says: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        decode(TWO, tail, header)
    assert says in str(refusal.value)


def test_binary_size_must_fit_the_shape() -> None:
    document = {"inputs": [tensor(shape=[3], parameters={"binary_data_size": 8})]}
    with pytest.raises(InvalidRequest, match=r"'x': 8 bytes were sent, but 3 elements .* 12 bytes"):
        decode(document, b"\0" * 8)


@pytest.mark.parametrize(
    "tail", [b"\5\0\0\0abc", b"\1\0\0\0abc", b"\1\0\0", b"\xff\xff\xff\xff", b""]
)
def test_length_prefixed_elements_must_add_up(tail: bytes) -> None:
    document = {"inputs": [tensor("s", [1], "BYTES", parameters={"binary_data_size": len(tail)})]}
    with pytest.raises(InvalidRequest, match="'s'"):
        decode(document, tail)


def test_many_tensors_and_large_json_are_refused() -> None:
    small = Limits(tensors=2, json_bytes=200)
    with pytest.raises(InvalidRequest, match="at most 2"):
        decode(
            {"inputs": [tensor(f"{i}", [0], data=[]) for i in range(3)]}, limits=Limits(tensors=2)
        )
    with pytest.raises(TooLarge, match="as binary data"):
        decode({"inputs": [tensor(shape=[100], data=[1.0] * 100)]}, limits=small)


def test_unknown_region_is_not_found() -> None:
    parameters = {"shared_memory_region": "r", "shared_memory_byte_size": 8}
    with pytest.raises(NotFound, match="'r'"):
        decode({"inputs": [tensor(parameters=parameters)]})


@pytest.mark.parametrize(
    ("out", "says"),
    [
        (TensorOut("y", "FP16", (1,), memoryview(b"\0\0")), "'y' is FP16"),
        (TensorOut("y", "FP32", (1,), memoryview(np.float32("nan").tobytes())), "'y' holds NaN"),
        (TensorOut("y", "BYTES", (1,), memoryview(b"\1\0\0\0\xff")), "'y' is not UTF-8"),
    ],
)
def test_outputs_without_a_json_form_ask_for_binary(out: TensorOut, says: str) -> None:
    request = decode({"inputs": [tensor(data=[1, 2])]})
    with pytest.raises(InvalidRequest) as refusal:
        oip.encode(InferResult("m", "1", [out], lambda: None), request, Regions())
    assert says in str(refusal.value)
    assert "binary" in str(refusal.value)


def test_lists_longer_than_the_models_inputs_are_not_decoded() -> None:
    document = {"inputs": [tensor(shape=(3, 2), data=["no", "number"])]}
    with pytest.raises(InvalidRequest, match="'x': the shape"):
        decode(document, limits=Limits(json_elements=4))
