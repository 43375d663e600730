"""The Open Inference Protocol v2 over REST, as a pure codec: bytes to domain and back.

A request's body is JSON, or JSON followed by the raw bytes of those inputs that state a
``binary_data_size`` (the binary tensor extension; the header
``Inference-Header-Content-Length`` says where the JSON ends). Inputs and outputs may also
lie in shared-memory regions. No payload is copied in decoding: binary inputs are slices. A field
that is null counts as absent.

Laws: a body either decodes to a call whose every size agrees with every other, or raises
``InvalidRequest`` naming the tensor and saying what would be right. ``encode`` honours what
the request asked per output, and the caller releases the result afterwards.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from cotenant.domain.errors import InvalidRequest, TooLarge
from cotenant.domain.port import InferCall, InferResult, TensorIn, TensorMeta
from cotenant.serving.calls import (
    VARIANT,
    Decoded,
    RegionIO,
    Wanted,
    check_count,
    check_unique,
    priority_class,
    refuse_classification,
    refuse_sequence,
    region_input,
    timeout_ns,
    want_region,
    write_region,
)
from cotenant.serving.long_lists import PIECE_BYTES, long_to_bytes
from cotenant.serving.tensors import (
    Limits,
    bytes_to_json,
    check_bytes,
    check_size,
    element_count,
    json_to_bytes,
    shown,
)

__all__ = ["Decoded", "Limits", "RegionIO", "decode", "encode"]

_HEADER = "Inference-Header-Content-Length"


class _InputParameters(msgspec.Struct):
    binary_data_size: int | None = None
    shared_memory_region: str | None = None
    shared_memory_offset: int | None = None
    shared_memory_byte_size: int | None = None


class _Input(msgspec.Struct):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: _InputParameters | None = None
    data: msgspec.Raw = msgspec.Raw()


class _OutputParameters(msgspec.Struct):
    binary_data: bool | None = None
    classification: int | None = None
    shared_memory_region: str | None = None
    shared_memory_offset: int | None = None
    shared_memory_byte_size: int | None = None


class _Output(msgspec.Struct):
    name: str
    parameters: _OutputParameters | None = None


class _Parameters(msgspec.Struct):
    binary_data_output: bool | None = None
    priority: int | None = None
    timeout: int | None = None
    sequence_id: int | str | None = None
    sequence_start: bool | None = None
    sequence_end: bool | None = None


class _Request(msgspec.Struct):
    inputs: list[_Input]
    id: str | None = None
    outputs: list[_Output] | None = None
    parameters: _Parameters | None = None


class _Named(msgspec.Struct):
    name: msgspec.Raw = msgspec.Raw()


class _Names(msgspec.Struct):
    """What is needed of a request that is wrong: all else is skipped, not made."""

    inputs: list[_Named] = []
    outputs: list[_Named] = []


class _OutputJson(msgspec.Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, int | str] | None = None
    data: list[Any] | None = None


class _ResponseJson(msgspec.Struct, omit_defaults=True):
    model_name: str
    model_version: str
    outputs: list[_OutputJson]
    id: str = ""
    parameters: dict[str, str] | None = None


_decoder = msgspec.json.Decoder(_Request)
_named = msgspec.json.Decoder(_Names)
_encoder = msgspec.json.Encoder()
_NO_INPUT_PARAMETERS = _InputParameters()


def decode(
    body: bytes | bytearray | memoryview,
    header_length: bytes | str | None,
    model: str,
    version: str,
    limits: Limits,
    regions: RegionIO,
) -> Decoded:
    """Decode an inference request.

    ``header_length`` is the value of the Inference-Header-Content-Length header, None where
    it was not sent. The call's tensors are views of ``body``. Raises InvalidRequest, TooLarge,
    and NotFound for an unknown region.
    """
    end = json_length(header_length, len(body))
    if end > limits.json_bytes:
        raise TooLarge(
            f"the request's JSON is {end} bytes; at most {limits.json_bytes} are accepted."
            " Send large tensors as binary data (binary_data_size)"
        )
    view = memoryview(body)
    request = _parse(view[:end])
    check_count(len(request.inputs), len(request.outputs or ()), limits)
    inputs, pos = [], end
    for tensor in request.inputs:
        item, pos = _input(tensor, view, pos, limits, regions)
        inputs.append(item)
    if pos != len(body):
        raise InvalidRequest(
            f"{len(body) - pos} bytes follow the last binary tensor; the sum of all"
            f" binary_data_size must be what follows the JSON, {len(body) - end} bytes"
        )
    if len(inputs) > 1:
        check_unique("input", (item.name for item in inputs))
    call = InferCall(model=model, inputs=inputs, version=version, id=request.id or "")
    binary = _apply(call, request.parameters)
    wanted = _wanted(request.outputs, binary, regions) if request.outputs else {}
    call.outputs = tuple(wanted)
    return Decoded(call, wanted, binary)


def encode(result: InferResult, request: Decoded, regions: RegionIO) -> tuple[bytes, int | None]:
    """The answer's body, and the length of its JSON where binary tensors follow it.

    The body is a copy: ``result`` can be released when this returns. Raises InvalidRequest
    where an output has no JSON form or does not fit the shared memory it was asked into.
    """
    tensors, blobs = [], []
    wanted = request.wanted
    for output in result.outputs:
        if not wanted:
            binary, want = request.binary, None
        elif (want := wanted.get(output.name)) is not None:
            binary = want.binary
        else:
            continue
        entry = _OutputJson(output.name, output.datatype, output.shape)
        if want is not None and want.region:
            nbytes = write_region(output, want, regions)
            entry.parameters = {
                "shared_memory_region": want.region,
                "shared_memory_offset": want.offset,
                "shared_memory_byte_size": nbytes,
            }
        elif binary:
            entry.parameters = {"binary_data_size": output.data.nbytes}
            blobs.append(output.data)
        else:
            count = 1
            for dim in output.shape:
                count *= dim
            entry.data = bytes_to_json(output.name, output.datatype, count, output.data)
        tensors.append(entry)
    said = {VARIANT: result.variant} if result.variant else None
    head = _encoder.encode(
        _ResponseJson(result.model, result.version, tensors, request.call.id, said)
    )
    if not blobs:
        return head, None
    return b"".join((head, *blobs)), len(head)


def json_length(header: bytes | str | None, total: int) -> int:
    """How many of a body's ``total`` bytes are JSON, by its header; raises InvalidRequest."""
    if header is None:
        return total
    text = header.decode("latin-1") if isinstance(header, bytes) else header
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise InvalidRequest(
            f"{_HEADER} is {shown(text)}; it must be the number of bytes of the JSON in the body"
        )
    length = int(text)
    if length > total:
        raise InvalidRequest(
            f"{_HEADER} is {length}, but the body has only {total} bytes;"
            " it must be the number of bytes of the JSON in the body"
        )
    return length


def _parse(view: memoryview) -> _Request:
    try:
        return _decoder.decode(view)
    except msgspec.ValidationError as exc:
        where = re.search(r"\$\.(inputs|outputs)\[(\d+)\]", str(exc))
        name = _name_at(view, where[1], int(where[2])) if where else ""
        raise InvalidRequest(f"{name}{exc}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise InvalidRequest(f"the request is not valid JSON: {exc}") from None
    except RecursionError:
        raise InvalidRequest("the request's JSON is nested too deeply") from None


def _name_at(view: memoryview, kind: str, index: int) -> str:
    """``"input 'x': "`` for the error message, empty where the tensor has no name either."""
    try:
        names = _named.decode(view)
        name = msgspec.json.decode(getattr(names, kind)[index].name, type=str)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, IndexError):
        return ""
    return f"{kind[:-1]} {shown(name)}: "


def _input(
    tensor: _Input, view: memoryview, pos: int, limits: Limits, regions: RegionIO
) -> tuple[TensorIn, int]:
    """One input, and where the next binary tensor begins."""
    name, datatype, shape = tensor.name, tensor.datatype, tensor.shape
    count = element_count(name, datatype, shape, limits)
    parameters = tensor.parameters or _NO_INPUT_PARAMETERS
    region, size = parameters.shared_memory_region, parameters.binary_data_size
    raw = memoryview(tensor.data)
    if (size is not None) + bool(region) + bool(raw and bytes(raw[:4]) != b"null") != 1:
        raise InvalidRequest(
            f"tensor {shown(name)}: give its elements once, as data (JSON), binary_data_size"
            " (after the JSON) or shared_memory_region"
        )
    if region:
        offset = parameters.shared_memory_offset or 0
        source = (region, offset, parameters.shared_memory_byte_size)
        return region_input(name, datatype, shape, count, source, regions), pos
    if size is None:
        data = from_json(tensor, shape, count, tensor.data, limits)
        return TensorIn(name, datatype, shape, len(data), data), pos
    if not 0 <= size <= len(view) - pos:
        raise InvalidRequest(
            f"tensor {shown(name)}: binary_data_size is {size}, but {len(view) - pos} bytes are"
            f" left in the body after the JSON and earlier tensors (is {_HEADER} set?)"
        )
    check_size(name, datatype, count, size)
    part = view[pos : pos + size]
    if datatype == "BYTES":
        check_bytes(name, part, count)
    return TensorIn(name, datatype, shape, size, part), pos + size


def from_json(
    tensor: _Input | TensorMeta,
    shape: tuple[int, ...],
    count: int,
    data: msgspec.Raw | bytes,
    limits: Limits,
) -> bytes:
    """Bytes of a tensor of so many elements, given as a JSON list; raises InvalidRequest,
    TooLarge."""
    raw, most = memoryview(data), limits.json_elements
    if most is not None and count > most:
        raise InvalidRequest(
            f"tensor {shown(tensor.name)}: the shape {list(shape)} means {count} elements;"
            f" a request to this model has at most {most}"
        )
    if len(raw) > PIECE_BYTES:
        if tensor.datatype != "BYTES":
            return long_to_bytes(tensor.name, tensor.datatype, shape, raw)
        if bytes(raw).count(b'"') > 2 * limits.strings:
            raise TooLarge(
                f"tensor {shown(tensor.name)}: more than {limits.strings} strings in JSON;"
                " send them as binary data (binary_data_size)"
            )
    return json_to_bytes(tensor.name, tensor.datatype, shape, count, data)


def _apply(call: InferCall, parameters: _Parameters | None) -> bool:
    """Set the call's priority and time-out; returns binary_data_output."""
    if parameters is None:
        return False
    if parameters.sequence_id or parameters.sequence_start or parameters.sequence_end:
        refuse_sequence()
    call.priority = priority_class(parameters.priority or 0)
    call.timeout_ns = timeout_ns(parameters.timeout or 0)
    return bool(parameters.binary_data_output)


def _wanted(outputs: list[_Output], binary: bool, regions: RegionIO) -> dict[str, Wanted]:
    wanted: dict[str, Wanted] = {}
    check_unique("output", (output.name for output in outputs))
    for output in outputs:
        given = output.parameters
        want = wanted[output.name] = Wanted(output.name, binary)
        if given is None:
            continue
        if given.classification:
            refuse_classification(output.name)
        if given.binary_data is not None:
            want.binary = given.binary_data
        if given.shared_memory_region:
            want_region(
                want,
                given.shared_memory_region,
                given.shared_memory_offset or 0,
                given.shared_memory_byte_size,
                regions,
            )
    return wanted
