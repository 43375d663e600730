"""Files as inputs of a model, and its answers: for ``cotenant infer``.

    .json   what the Open Inference Protocol calls a request (``{"inputs": [...]}``), or a mapping
            from names of inputs to lists
    .npy    an array, for a model with one input
    .npz    arrays by the names of inputs
    .png, .jpg, .jpeg   a picture, for a model with one input of three or four axes

An array gets the datatype that the model wants, and an axis of 1 in front where it lacks one.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from cotenant.domain.errors import EnvironmentProblem, InvalidRequest

DTYPES: Final[dict[str, str]] = {
    "BOOL": "?",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
PICTURES: Final = (".png", ".jpg", ".jpeg")
SUFFIXES: Final = (".json", ".npy", ".npz", *PICTURES)
_LENGTH = struct.Struct("<I")
_COLOURS: Final = {1: "L", 3: "RGB", 4: "RGBA"}


class Input(msgspec.Struct, frozen=True):
    """What a model says of an input; lengths of -1 are free."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class Request(msgspec.Struct, frozen=True):
    """The body of a request, and the length of its JSON (0: it is all JSON)."""

    body: bytes
    head: int = 0


def read_request(path: Path, inputs: Sequence[Input]) -> Request:
    """The request that a file means to a model. Raises InvalidRequest, EnvironmentProblem."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InvalidRequest(f"{path}: give a file that ends in one of {', '.join(SUFFIXES)}")
    try:
        if suffix == ".json":
            return _of_json(path, inputs)
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return request_of({name: arrays[name] for name in arrays.files}, inputs)
        only = _only(path, inputs)
        if suffix in PICTURES:
            return request_of({only.name: picture(path, only)}, inputs)
        return request_of({only.name: np.load(path, allow_pickle=False)}, inputs)
    except OSError as error:
        raise EnvironmentProblem(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from None


def request_of(arrays: Mapping[str, Any], inputs: Sequence[Input]) -> Request:
    """A request with these arrays, in binary form. Raises InvalidRequest."""
    known = {one.name: one for one in inputs}
    if unknown := [name for name in arrays if name not in known]:
        wanted = ", ".join(f"{i.name} ({i.datatype} {list(i.shape)})" for i in inputs)
        raise InvalidRequest(f"the model has no input {unknown[0]!r}; it has: {wanted}")
    described, parts = [], []
    for name, values in arrays.items():
        data, shape = encoded(values, known[name])
        parts.append(data)
        described.append({
            "name": name,
            "datatype": known[name].datatype,
            "shape": shape,
            "parameters": {"binary_data_size": len(data)},
        })  # fmt: skip
    head = msgspec.json.encode({"inputs": described, "parameters": {"binary_data_output": True}})
    return Request(head + b"".join(parts), len(head))


def encoded(values: Any, wanted: Input) -> tuple[bytes, list[int]]:
    """Values as the bytes of a tensor that an input takes, and its shape."""
    if wanted.datatype == "BYTES":
        array = np.asarray(values, dtype=object)
        shape = _shaped(array.shape, wanted)
        texts = (v if isinstance(v, bytes) else str(v).encode() for v in array.ravel())
        return b"".join(_LENGTH.pack(len(text)) + text for text in texts), shape
    dtype = DTYPES.get(wanted.datatype)
    if dtype is None:
        raise InvalidRequest(
            f"input {wanted.name} is {wanted.datatype}, which has no files; send it with a client"
        )
    given = np.asarray(values)
    if not np.can_cast(given.dtype, dtype, "same_kind") and given.dtype.kind not in "iub":
        raise InvalidRequest(
            f"input {wanted.name} takes {wanted.datatype}, the file has {given.dtype}"
        )
    array = given.astype(dtype)
    if dtype[1] in "iu" and not np.array_equal(array, given):
        raise InvalidRequest(f"input {wanted.name}: a value is beyond what {wanted.datatype} holds")
    return array.tobytes(), _shaped(array.shape, wanted)


def _shaped(shape: Sequence[int], wanted: Input) -> list[int]:
    """A shape, with an axis of 1 in front if the model's has one more."""
    return [1, *shape] if len(shape) == len(wanted.shape) - 1 else list(shape)


def _only(path: Path, inputs: Sequence[Input]) -> Input:
    if len(inputs) != 1:
        names = ", ".join(one.name for one in inputs)
        raise InvalidRequest(
            f"{path} is one array and the model has {len(inputs)} inputs ({names}); write an .npz "
            "with these names, or JSON"
        )
    return inputs[0]


def _of_json(path: Path, inputs: Sequence[Input]) -> Request:
    data = path.read_bytes()
    try:
        found = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"{path} is no JSON: {error}") from None
    if isinstance(found, list):
        return request_of({_only(path, inputs).name: found}, inputs)
    if not isinstance(found, dict) or not found:
        raise InvalidRequest(f'{path}: give {{"NAME": [...]}}, or {{"inputs": [...]}}')
    tensors = found.get("inputs")
    if isinstance(tensors, list) and tensors and all(isinstance(t, dict) for t in tensors):
        return Request(data)
    return request_of(found, inputs)


def picture(path: Path, wanted: Input) -> np.ndarray[Any, Any]:
    """A picture of the size and colours that an input takes: 0 to 255 as integers, 0 to 1 as
    floating-point numbers; what else a model wants of it stands in no file of the model."""
    try:
        from PIL import Image
    except ImportError:
        raise EnvironmentProblem(
            "pictures need Pillow: pip install 'cotenant[llm]', or pip install pillow"
        ) from None
    axes = wanted.shape[-3:]
    first, last = (axes[0] in _COLOURS, axes[-1] in _COLOURS) if len(axes) == 3 else (False, False)
    if len(wanted.shape) not in (3, 4) or not (first or last):
        raise InvalidRequest(
            f"input {wanted.name} has the shape {list(wanted.shape)}, which is that of no picture"
        )
    height, width = axes[1:] if first else axes[:2]
    with Image.open(path) as opened:
        image = opened.convert(_COLOURS[axes[0] if first else axes[-1]])
        size = (width if width > 0 else image.width, height if height > 0 else image.height)
        array = np.asarray(image.resize(size) if size != image.size else image)
    array = array.reshape(size[1], size[0], -1)
    array = array.transpose(2, 0, 1) if first else array
    return array / np.float32(255) if wanted.datatype.startswith("FP") else array


# --- answers ------------------------------------------------------------------------------------


class Output(msgspec.Struct, frozen=True):
    """A tensor of an answer; ``values`` has its shape."""

    name: str
    datatype: str
    values: np.ndarray[Any, Any]


def read_answer(body: bytes, head: int) -> list[Output]:
    """The outputs of an answer whose JSON is ``head`` bytes long (0: all of it)."""
    said = msgspec.json.decode(body[:head] if head else body)
    at, found = head or len(body), []
    for tensor in said["outputs"]:
        size = (tensor.get("parameters") or {}).get("binary_data_size")
        kind, shape = tensor["datatype"], tensor["shape"]
        if size is None:
            dtype = object if kind == "BYTES" else DTYPES[kind]
            values = np.asarray(tensor["data"], dtype).reshape(shape)
        else:
            values = _decoded(kind, body[at : at + size]).reshape(shape)
            at += size
        found.append(Output(tensor["name"], kind, values))
    return found


def _decoded(datatype: str, data: bytes) -> np.ndarray[Any, Any]:
    if datatype == "BF16":  # the upper half of a FP32
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    if datatype != "BYTES":
        return np.frombuffer(data, DTYPES[datatype])
    texts, at = [], 0
    while at < len(data):
        (size,) = _LENGTH.unpack_from(data, at)
        texts.append(data[at + 4 : at + 4 + size].decode(errors="replace"))
        at += 4 + size
    return np.array(texts, object)
