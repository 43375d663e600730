"""The generate extension of the Open Inference Protocol over REST, as a pure codec.

A request is one flat JSON object: a key that names an input is that input (one element, or a flat
list of them), in ``parameters`` as well as beside it; any other key is a parameter, of which
``priority``, ``timeout`` and ``id`` mean something here. An answer is an object with the outputs by
name, each one element or a flat list.
"""

from __future__ import annotations

from functools import lru_cache
from math import inf, prod
from typing import Any

import msgspec

from cotenant.domain.errors import InvalidRequest, TooLarge
from cotenant.domain.port import InferCall, InferResult, ModelMeta, TensorIn, TensorMeta
from cotenant.serving.calls import priority_class, refuse_sequence, timeout_ns
from cotenant.serving.oip import from_json
from cotenant.serving.tensors import Limits, bytes_to_json, element_count, shown

_ABSENT = msgspec.Raw()
_PARAMETERS: dict[str, Any] = {
    "priority": int | None,
    "timeout": int | None,
    "sequence_id": int | str | None,
    "sequence_start": bool | None,
    "sequence_end": bool | None,
}


def decode(body: bytes, meta: ModelMeta, version: str, limits: Limits) -> InferCall:
    """The call that a body asks for. Raises InvalidRequest, TooLarge."""
    if len(body) > limits.json_bytes:
        raise TooLarge(f"the request's JSON is {len(body)} bytes; at most {limits.json_bytes} are"
                       " accepted")  # fmt: skip
    asked = _parse(body, _kind(meta.inputs, nested=True))
    parameters: Any = getattr(asked, "parameters", None)
    call = InferCall(meta.name, [], version, getattr(asked, "id", None) or "", pieces=True)
    for number, tensor in enumerate(meta.inputs):
        found = [
            raw
            for holder in (asked, parameters)
            if holder is not None and _is_given(raw := getattr(holder, f"input_{number}"))
        ]
        if len(found) > 1:
            raise InvalidRequest(f"input {shown(tensor.name)} is given twice; give it once")
        if found:
            call.inputs.append(_input(tensor, bytes(found[0]), limits))
    for holder in filter(None, (parameters, asked)):
        _apply(call, holder)
    return call


def _apply(call: InferCall, given: Any) -> None:
    """What is no input is a parameter, and these are not the model's."""

    def of(name: str) -> Any:
        return getattr(given, name, None)

    if of("sequence_id") or of("sequence_start") or of("sequence_end"):
        refuse_sequence()
    if of("priority") is not None:
        call.priority = priority_class(of("priority"))
    if of("timeout") is not None:
        call.timeout_ns = timeout_ns(of("timeout"))


@lru_cache(maxsize=64)
def _kind(inputs: tuple[TensorMeta, ...], nested: bool) -> type[msgspec.Struct]:
    """What a request to a model may hold; all else is skipped, not made."""
    names = {f"input_{number}": tensor.name for number, tensor in enumerate(inputs)}
    fields: list[tuple[str, Any, Any]] = [(field, msgspec.Raw, _ABSENT) for field in names]
    known = dict(_PARAMETERS)
    if nested:
        known |= {"id": str | None, "parameters": _kind(inputs, nested=False) | None}
    fields += [(n, kind, None) for n, kind in known.items() if n not in names.values()]
    return msgspec.defstruct("Generate", fields, rename=names)


def _parse(body: bytes, kind: type[msgspec.Struct]) -> msgspec.Struct:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as exc:
        raise InvalidRequest(str(exc)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise InvalidRequest(f"the request is not valid JSON: {exc}") from None
    except RecursionError:
        raise InvalidRequest("the request's JSON is nested too deeply") from None


def _is_given(raw: msgspec.Raw) -> bool:
    return bool(memoryview(raw)) and bytes(raw) != b"null"


def _input(tensor: TensorMeta, raw: bytes, limits: Limits) -> TensorIn:
    if raw[:1] == b"{":
        raise InvalidRequest(f"input {shown(tensor.name)} is one element or a flat list of them")
    if raw[:1] != b"[":
        given, raw = 1, b"[%b]" % raw
    elif tensor.datatype == "BYTES":
        if raw.count(b'"') > 2 * limits.strings:
            raise TooLarge(f"input {shown(tensor.name)}: more than {limits.strings} strings")
        given = len(msgspec.json.decode(raw, type=list[msgspec.Raw]))
    else:
        given = raw.count(b",") + (raw[1:-1].strip() != b"")
    shape = _filled(tensor, given)
    count = element_count(tensor.name, tensor.datatype, shape, limits)
    data = from_json(tensor, shape, count, raw, limits)
    return TensorIn(tensor.name, tensor.datatype, shape, len(data), data)


def _filled(tensor: TensorMeta, given: int) -> tuple[int, ...]:
    """The model's shape with its free axes filled: the last of them is as long as so many elements
    make it, the others are 1."""
    free = [axis for axis, length in enumerate(tensor.shape) if length < 0]
    shape = [1 if length < 0 else length for length in tensor.shape]
    rest = prod(shape)
    if free and rest:
        shape[free[-1]] = given // rest
    if prod(shape) != given:
        raise InvalidRequest(
            f"input {shown(tensor.name)} has {given} elements; the model takes the shape"
            f" {list(tensor.shape)} (-1: any length)"
        )
    return tuple(shape)


class Answer:
    """What came of a call so far: pieces of text are joined, numbers follow each other. All of it
    is bounded by ``most`` bytes."""

    def __init__(self, request_id: str, most: float = inf) -> None:
        self._fields: dict[str, Any] = {"id": request_id} if request_id else {}
        self._room = most
        self.pieces = 0

    def add(self, result: InferResult) -> None:
        """One more piece, which can be released when this returns. Raises InvalidRequest where
        JSON has no form for it, TooLarge."""
        self._fields |= {"model_name": result.model, "model_version": result.version}
        self.pieces += bool(result.outputs)
        for output in result.outputs:
            self._room -= output.data.nbytes
            if self._room < 0:
                raise TooLarge("the answer is too long to be given at once; use generate_stream")
            values = bytes_to_json(output.name, output.datatype, prod(output.shape), output.data)
            if output.datatype == "BYTES":
                values = [[text] for text in values]
            held = self._fields.setdefault(output.name, values)
            if held is values:
                continue
            if output.datatype == "BYTES" and len(held) == len(values):
                for texts, text in zip(held, values, strict=True):
                    texts.extend(text)
            else:
                held += values

    def body(self) -> bytes:
        """As JSON."""
        return msgspec.json.encode({name: _plain(value) for name, value in self._fields.items()})


def _plain(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    values = ["".join(v) if isinstance(v, list) else v for v in value]
    return values[0] if len(values) == 1 else values


def event(body: bytes) -> bytes:
    """As one server-sent event."""
    return b"data: %b\n\n" % body
