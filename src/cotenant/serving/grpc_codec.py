"""Inference requests and answers as gRPC messages: the same laws as ``cotenant.serving.oip``.

Tensors arrive in ``raw_input_contents`` (in the order of the inputs, skipping those in shared
memory), or in the inputs' typed ``contents``; never a mixture. Answers are always raw. The
answer's message is serialised without its payload, which is then appended in wire form: that
is one copy of the payload instead of three.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from cotenant.domain.errors import InvalidRequest, TooLarge
from cotenant.domain.port import InferCall, InferResult, TensorIn
from cotenant.serving import calls, protos
from cotenant.serving.calls import Decoded, RegionIO, Wanted
from cotenant.serving.grpc_numbers import unpack as unpack_numbers
from cotenant.serving.tensors import (
    Limits,
    check_bytes,
    check_size,
    element_count,
    join_bytes,
    pack_numbers,
    shown,
)

# Where the typed contents of a datatype lie. FP16 and BF16 have no typed form.
_CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}

_NUMBERS = range(1, 8)
_CONTENTS_NUMBER = {
    datatype: protos.message_class("InferTensorContents").DESCRIPTOR.fields_by_name[field].number
    for datatype, field in _CONTENTS.items()
    if datatype != "BYTES"
}

_RAW_OUTPUT_TAG = b"\x32"  # ModelInferResponse.raw_output_contents: field 6, length-delimited
_RAW_INPUT_TAG = 0x3A  # ModelInferRequest.raw_input_contents: field 7, length-delimited
_INPUT_TAG, _OUTPUT_TAG = 0x2A, 0x32  # ModelInferRequest.inputs and .outputs: fields 5 and 6
_SHAPE_TAG, _CONTENTS_TAG = 0x1A, 0x2A  # InferInputTensor.shape and .contents: fields 3 and 5
_VARINT, _LENGTH_DELIMITED = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}
_FIELDS = 256
"""Of a tensor, and beside tensors of a message: names, dimensions, parameters, unknown ones."""
_SMALL_BYTES = 512
"""What is no longer than this holds nothing that is worth counting."""
_STREAM_ANSWER_TAG = b"\x12"  # ModelStreamInferResponse.infer_response: field 2


def _final(final: bool) -> bytes:
    """The parameter that tells it, as a field of a serialised ModelInferResponse."""
    answer = protos.ModelInferResponse()
    answer.parameters["triton_final_response"].bool_param = final
    data: bytes = answer.SerializeToString()
    return data


_FINAL = (_final(False), _final(True))


Packed = dict[int, dict[int, list[memoryview]]]
"""Of large inputs: which one → number of a field of its contents → what is in that, as it came."""


class InferMessage(NamedTuple):
    """A ModelInferRequest whose raw inputs are views of the bytes it came in."""

    message: Any
    raw: Sequence[bytes | memoryview]
    parsed: int
    """Bytes that protobuf made objects of."""
    packed: Packed


def parse(data: bytes | memoryview, limits: Limits) -> InferMessage:
    """A serialised ModelInferRequest; raises DecodeError, InvalidRequest, TooLarge.

    Its payload is left where it is: protobuf would copy it twice, once when it parses and once
    when it is asked for the field. Of the rest, everything that there may be many of is counted
    before protobuf makes an object of each, which takes up to a hundred times its bytes.
    """
    try:
        rest, raw, packed = _split(data, limits)
    except IndexError:
        raise DecodeError("it is cut short") from None
    return InferMessage(protos.ModelInferRequest.FromString(rest), raw, len(rest), packed)


def _split(data: bytes | memoryview, limits: Limits) -> tuple[bytes, list[memoryview], Packed]:
    """The message without its ``raw_input_contents``, those, and packed numbers; raises IndexError
    if it ends within a field, and what ``parse`` does."""
    view = memoryview(data)
    rest: list[bytes | memoryview] = []
    raw: list[memoryview] = []
    packed: Packed = {}
    at = kept = large = inputs = 0
    fields = 4 * limits.tensors + _FIELDS
    while at < len(data):
        start = at
        tag = data[at]
        at += 1
        if tag > 0x7F:
            tag, at = _read_varint(data, start)
        fields -= 1
        if not fields:
            raise InvalidRequest("the message has too many fields; send fewer tensors in each")
        if tag & 7 != _LENGTH_DELIMITED:
            at = _skip(data, at, tag)
            continue
        length = data[at]
        at += 1
        if length > 0x7F:
            length, at = _read_varint(data, at - 1)
        if tag == _RAW_INPUT_TAG:
            rest.append(data[kept:start])
            raw.append(view[at : at + length])
            kept = at + length
        elif length > _SMALL_BYTES and tag in (_INPUT_TAG, _OUTPUT_TAG):
            numbers: dict[int, list[memoryview]] = {}
            large += _check_tensor(view[at : at + length], limits, numbers)
            if numbers and tag == _INPUT_TAG:
                packed[inputs] = numbers
            if large > limits.strings:
                raise InvalidRequest(f"more than {limits.strings} elements are given one by one")
        inputs += tag == _INPUT_TAG
        at += length
    if at > len(data):
        raise IndexError(at)
    rest.append(data[kept:])
    if len(data) > limits.json_bytes < sum(map(len, rest)):
        raise TooLarge(
            f"beside raw_input_contents a message may have {limits.json_bytes} bytes; send large"
            " tensors raw"
        )
    return b"".join(rest), raw, packed


def _check_tensor(tensor: memoryview, limits: Limits, packed: dict[int, list[memoryview]]) -> int:
    """Count what a large input or output has much of, and note its ``packed`` numbers; returns how
    many of its elements are fields of their own. Raises as ``_split``."""
    elements, single = 0, False
    for tag, field in _fields(tensor, _FIELDS):
        if tag == _SHAPE_TAG and len(field) > _SMALL_BYTES:
            raise InvalidRequest(f"a shape may have {limits.dims} dimensions; there are more")
        if tag == _CONTENTS_TAG:
            for inner, content in _fields(field, limits.strings + 1):
                elements += 1
                if inner >> 3 not in _NUMBERS:
                    continue
                if inner & 7 == _LENGTH_DELIMITED:
                    packed.setdefault(inner >> 3, []).append(content)
                else:
                    single = True
    if single and packed:
        raise InvalidRequest("numbers are given packed and one by one; send all of them packed")
    return elements


def _fields(message: memoryview, most: int) -> Iterator[tuple[int, memoryview]]:
    """Tag and content of a message's fields, of ``most`` at most; raises as ``_split``."""
    at = 0
    while at < len(message):
        if not most:
            raise InvalidRequest("a tensor has too many fields; send its elements raw")
        most -= 1
        tag, at = _read_varint(message, at)
        begin = at
        if tag & 7 == _LENGTH_DELIMITED:
            length, begin = _read_varint(message, at)
            at = begin + length
            if at > len(message):
                raise IndexError(at)
        else:
            at = _skip(message, at, tag)
        yield tag, message[begin:at]


def _skip(data: bytes | memoryview, at: int, tag: int) -> int:
    """Where a field ends that has no length; raises as ``_split``."""
    kind = tag & 7
    if kind == _VARINT:
        return _read_varint(data, at)[1]
    if kind in _FIXED_BYTES:
        return at + _FIXED_BYTES[kind]
    raise DecodeError("it has a group, a form of fields that is no longer in use")


def decode(request: InferMessage, limits: Limits, regions: RegionIO) -> Decoded:
    """A ModelInferRequest as a call; raises InvalidRequest, NotFound (region)."""
    message, raw = request.message, request.raw
    calls.check_count(len(message.inputs), len(message.outputs), limits)
    inputs: list[TensorIn] = []
    used = 0
    for number, tensor in enumerate(message.inputs):
        name, datatype, shape = tensor.name, tensor.datatype, tuple(tensor.shape)
        count = element_count(name, datatype, shape, limits)
        parameters = _parameters(tensor.parameters) if tensor.parameters else {}
        if parameters.get("shared_memory_region"):
            source = _region(name, parameters)
            inputs.append(calls.region_input(name, datatype, shape, count, source, regions))
            continue
        data: bytes | memoryview
        if not raw:
            packed = request.packed.get(number, {}).get(_CONTENTS_NUMBER.get(datatype, 0))
            if packed:
                wire = packed[0] if len(packed) == 1 else b"".join(packed)
                data = unpack_numbers(name, datatype, wire, count)
            else:
                data = _typed(name, datatype, count, tensor.contents)
        elif tensor.HasField("contents"):
            raise InvalidRequest(
                f"tensor {shown(name)}: it has contents although raw_input_contents are given;"
                " give all inputs raw, or all of them typed"
            )
        elif used == len(raw):
            raise InvalidRequest(
                f"tensor {shown(name)}: raw_input_contents has only {used} entries;"
                " it needs one for each input that is not in shared memory"
            )
        else:
            data = raw[used]
            used += 1
            check_size(name, datatype, count, len(data))
            if datatype == "BYTES":
                check_bytes(name, data, count)
        inputs.append(TensorIn(name, datatype, shape, len(data), data))
    if used != len(raw):
        raise InvalidRequest(
            f"raw_input_contents has {len(raw)} entries, but {used} inputs take one; it needs"
            " one for each input that is not in shared memory"
        )
    calls.check_unique("input", (item.name for item in inputs))
    wanted = _wanted(message.outputs, regions)
    call = InferCall(message.model_name, inputs, message.model_version, message.id, tuple(wanted))
    if message.parameters:
        parameters = _parameters(message.parameters)
        _apply(call, parameters)
        empty_final = parameters.get("triton_enable_empty_final_response") is True
        return Decoded(call, wanted, binary=True, empty_final=empty_final)
    return Decoded(call, wanted, binary=True)


def encode(result: InferResult, request: Decoded, regions: RegionIO) -> bytes:
    """A serialised ModelInferResponse; ``result`` can be released when this returns.

    ``raw_output_contents`` has an entry for every output, an empty one for those that were
    written to shared memory. Raises InvalidRequest where such an output does not fit.
    """
    answer = protos.ModelInferResponse(
        model_name=result.model, model_version=result.version, id=request.call.id
    )
    if result.variant:
        answer.parameters[calls.VARIANT].string_param = result.variant
    raw: list[Any] = []
    for output in result.outputs:
        want = request.wanted.get(output.name)
        if want is None and request.wanted:
            continue
        item = answer.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
        if want is not None and want.region:
            nbytes = calls.write_region(output, want, regions)
            item.parameters["shared_memory_region"].string_param = want.region
            item.parameters["shared_memory_offset"].int64_param = want.offset
            item.parameters["shared_memory_byte_size"].int64_param = nbytes
            raw += (_RAW_OUTPUT_TAG, b"\x00")
        else:
            raw += (_RAW_OUTPUT_TAG, _varint(output.data.nbytes), output.data)
    return b"".join((answer.SerializeToString(), *raw))


def stream_answer(answer: bytes, final: bool) -> bytes:
    """A serialised ModelStreamInferResponse around a serialised ModelInferResponse, to which it
    adds whether this ends the answer to its request (Triton's ``triton_final_response``)."""
    last = _FINAL[final]
    return b"".join((_STREAM_ANSWER_TAG, _varint(len(answer) + len(last)), answer, last))


def stream_error(message: str, request: Any | None, extra: dict[str, str]) -> bytes:
    """A serialised ModelStreamInferResponse for a request that has no result.

    ``request`` is the ModelInferRequest if it could be read, for its id; ``extra`` becomes
    parameters of the (otherwise empty) answer.
    """
    answer = protos.ModelStreamInferResponse(error_message=message)
    if request is not None:
        answer.infer_response.id = request.id
        answer.infer_response.model_name = request.model_name
    for key, value in extra.items():
        answer.infer_response.parameters[key].string_param = value
    data: bytes = answer.SerializeToString()
    return data


def _parameters(found: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, parameter in found.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is not None:
            values[key] = getattr(parameter, kind)
    return values


def _integer(parameters: dict[str, Any], key: str, where: str) -> int | None:
    value = parameters.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise InvalidRequest(f"{where}parameter {key} must be a whole number")
    return value


def _region(name: str, parameters: dict[str, Any]) -> tuple[str, int, int | None]:
    where = f"tensor {shown(name)}: "
    region = parameters["shared_memory_region"]
    if not isinstance(region, str):
        raise InvalidRequest(f"{where}parameter shared_memory_region must be a string")
    offset = _integer(parameters, "shared_memory_offset", where) or 0
    return region, offset, _integer(parameters, "shared_memory_byte_size", where)


def _apply(call: InferCall, parameters: dict[str, Any]) -> None:
    if any(parameters.get(key) for key in ("sequence_id", "sequence_start", "sequence_end")):
        calls.refuse_sequence()
    call.priority = calls.priority_class(_integer(parameters, "priority", "") or 0)
    call.timeout_ns = calls.timeout_ns(_integer(parameters, "timeout", "") or 0)


def _typed(name: str, datatype: str, count: int, contents: Any) -> bytes:
    field = _CONTENTS.get(datatype)
    if field is None:
        raise InvalidRequest(
            f"tensor {shown(name)}: {datatype} has no typed contents; send raw_input_contents"
        )
    values = getattr(contents, field)
    if len(values) != count:
        raise InvalidRequest(
            f"tensor {shown(name)}: {field} holds {len(values)} elements, but its shape means"
            f" {count} (or send raw_input_contents)"
        )
    if datatype == "BYTES":
        return join_bytes(values)
    return pack_numbers(name, datatype, values)


def _wanted(outputs: Any, regions: RegionIO) -> dict[str, Wanted]:
    if not outputs:
        return {}
    wanted: dict[str, Wanted] = {}
    calls.check_unique("output", (output.name for output in outputs))
    for output in outputs:
        want = wanted[output.name] = Wanted(output.name, binary=True)
        parameters = _parameters(output.parameters) if output.parameters else {}
        if parameters.get("classification"):
            calls.refuse_classification(output.name)
        if parameters.get("shared_memory_region"):
            calls.want_region(want, *_region(output.name, parameters), regions)
    return wanted


def _read_varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """The integer that starts at ``at`` and where it ends; raises IndexError beyond the end."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError(at)


def _varint(value: int) -> bytes:
    """Protobuf's variable-length integer: 7 bits to a byte, least significant first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
