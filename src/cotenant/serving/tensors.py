"""Tensors as clients send them: shape checks, JSON lists and the length-prefixed BYTES form.

Pure functions. Everything that a client states is checked against everything else it
states, and ``InvalidRequest`` names the tensor and says what would be right. Tensor bytes
are little-endian and row-major; a host of the other byte order is refused at import.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

import msgspec

from cotenant.domain.errors import InvalidRequest
from cotenant.domain.port import DATATYPES

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("cotenant.serving needs a little-endian host: tensors are little-endian")

_LENGTH = struct.Struct("<I")

# Datatypes that JSON can carry: (Python element type, struct and memoryview type code).
_JSON: dict[str, tuple[type, str]] = {
    "BOOL": (bool, "B"),
    "UINT8": (int, "B"),
    "UINT16": (int, "H"),
    "UINT32": (int, "I"),
    "UINT64": (int, "Q"),
    "INT8": (int, "b"),
    "INT16": (int, "h"),
    "INT32": (int, "i"),
    "INT64": (int, "q"),
    "FP32": (float, "f"),
    "FP64": (float, "d"),
    "BYTES": (str, ""),
}


class Limits(msgspec.Struct, frozen=True):
    """What one client may send. Counts, bytes and seconds.

    ``body_bytes`` bounds a request's body after decompression, ``json_bytes`` the part of it
    that is JSON (which costs many times its size to decode; larger tensors go as binary),
    ``json_elements`` a tensor's elements in JSON (what the model's inputs hold, where that is
    known), ``strings`` the elements of a BYTES tensor and those of others that are given one by
    one, ``tensor_bytes`` a single tensor (shared memory can be larger than a body),
    ``buffered_bytes`` all bodies being received or held at one time, and ``body_timeout_s`` the
    time in which a body must have arrived.
    """

    body_bytes: int = 64 * 2**20
    json_bytes: int = 8 * 2**20
    json_elements: int | None = None
    tensor_bytes: int = 2**30
    buffered_bytes: int = 2**30
    tensors: int = 64
    dims: int = 16
    strings: int = 2**16
    regions: int = 64
    body_timeout_s: float = 30.0


def shown(name: str) -> str:
    """A client's text, quoted and shortened, fit for an error message."""
    return repr(name if len(name) <= 64 else name[:61] + "...")


def element_count(name: str, datatype: str, shape: Sequence[int], limits: Limits) -> int:
    """Elements of a tensor that is stated rightly; raises InvalidRequest.

    ``name`` is that of an input or output. The size in bytes is at most
    ``limits.tensor_bytes`` (a BYTES element counts as at least 4 bytes).
    """
    size = DATATYPES.get(datatype)
    if size is None:
        raise InvalidRequest(
            f"tensor {shown(name)}: unknown datatype {shown(datatype)};"
            f" use one of {', '.join(DATATYPES)}"
        )
    if not name:
        raise InvalidRequest("a tensor has an empty name; give the name that the model declares")
    if len(shape) > limits.dims:
        raise InvalidRequest(
            f"tensor {shown(name)}: {len(shape)} dimensions; at most {limits.dims} are possible"
        )
    count = 1
    for dim in shape:
        if dim < 0:
            raise InvalidRequest(
                f"tensor {shown(name)}: dimension {dim} in the shape is negative;"
                " a request states every dimension's actual length"
            )
        count *= dim
    if not size and count > limits.strings:
        raise InvalidRequest(
            f"tensor {shown(name)}: {count} elements of {datatype}; at most {limits.strings} are"
            " possible"
        )
    if count * (size or 4) > limits.tensor_bytes:
        raise InvalidRequest(
            f"tensor {shown(name)}: its shape and datatype {datatype} mean more than"
            f" {limits.tensor_bytes} bytes, the largest tensor allowed; check the shape"
        )
    return count


def check_size(name: str, datatype: str, count: int, nbytes: int) -> None:
    """Compare a stated size with that of ``count`` elements; raises InvalidRequest."""
    size = DATATYPES[datatype]
    if size and nbytes != count * size:
        raise InvalidRequest(
            f"tensor {shown(name)}: {nbytes} bytes were sent, but {count} elements of"
            f" {datatype} are {count * size} bytes"
        )
    if not size and nbytes < 4 * count:
        raise InvalidRequest(
            f"tensor {shown(name)}: {nbytes} bytes cannot hold {count} BYTES elements;"
            " each is a 4-byte little-endian length followed by its bytes"
        )


def check_bytes(name: str, data: memoryview | bytes, count: int) -> None:
    """Check that ``data`` is exactly ``count`` length-prefixed elements."""
    pos, end, unpack = 0, len(data), _LENGTH.unpack_from
    for index in range(count):
        if end - pos < 4:
            raise InvalidRequest(
                f"tensor {shown(name)}: the data end before element {index} of {count};"
                " each is a 4-byte little-endian length followed by its bytes"
            )
        pos += 4 + unpack(data, pos)[0]
        if pos > end:
            raise InvalidRequest(
                f"tensor {shown(name)}: element {index} says it is {pos - end} bytes longer than"
                " the data"
            )
    if pos != end:
        raise InvalidRequest(
            f"tensor {shown(name)}: {end - pos} bytes follow the last of {count} elements"
        )


def join_bytes(elements: Sequence[bytes]) -> bytes:
    """The length-prefixed form of BYTES elements."""
    return b"".join(chain.from_iterable((_LENGTH.pack(len(e)), e) for e in elements))


def split_bytes(name: str, data: memoryview, count: int) -> list[bytes]:
    """Elements of a length-prefixed BYTES tensor; raises InvalidRequest where it lies."""
    check_bytes(name, data, count)
    pos, out = 0, []
    for _ in range(count):
        size = _LENGTH.unpack_from(data, pos)[0]
        out.append(bytes(data[pos + 4 : pos + 4 + size]))
        pos += 4 + size
    return out


def pack_numbers(name: str, datatype: str, values: Any) -> bytes:
    """Bytes of a flat list of numbers; raises InvalidRequest for one that does not fit."""
    try:
        return struct.pack(f"<{len(values)}{_JSON[datatype][1]}", *values)
    except OverflowError:  # only of floats
        raise InvalidRequest(
            f"tensor {shown(name)}: an element is beyond the range of {datatype}"
        ) from None
    except struct.error:
        raise InvalidRequest(f"tensor {shown(name)}: an element does not fit {datatype}") from None


def json_to_bytes(
    name: str, datatype: str, shape: Sequence[int], count: int, raw: msgspec.Raw | bytes
) -> bytes:
    """Bytes of a tensor given as a JSON list, flat or nested as its shape.

    Raises InvalidRequest for FP16 and BF16 (JSON cannot carry them), another element count,
    elements of another type or out of range, and numbers that are not finite.
    """
    if datatype not in _JSON:
        raise InvalidRequest(
            f"tensor {shown(name)}: {datatype} cannot be sent as JSON;"
            " send it as binary data (binary_data_size)"
        )
    element, _ = _JSON[datatype]
    depth = depth_of(raw, len(shape))
    try:
        values: list[Any] = _list_decoder(element, depth).decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        wanted = {bool: "true or false", int: "whole numbers", float: "numbers", str: "strings"}
        raise InvalidRequest(
            f"tensor {shown(name)}: data must be a list of {wanted[element]}, flat or nested as"
            f" the shape {list(shape)} ({exc})"
        ) from None
    if depth > 1:
        values = _flatten(name, shape, values, depth)
    if len(values) != count:
        raise InvalidRequest(
            f"tensor {shown(name)}: data holds {len(values)} elements, but the shape"
            f" {list(shape)} means {count}"
        )
    if element is str:
        return join_bytes([_utf8(name, value) for value in values])
    return pack_numbers(name, datatype, values)


def bytes_to_json(name: str, datatype: str, count: int, data: memoryview) -> list[Any]:
    """A flat JSON list of an output's elements; raises InvalidRequest where JSON has no form."""
    if datatype not in _JSON:
        raise InvalidRequest(
            f"output {shown(name)} is {datatype}, which JSON cannot carry; ask for it as binary"
            " data (the output's parameter binary_data: true)"
        )
    if datatype == "BYTES":
        try:
            return [str(item, "utf-8") for item in split_bytes(name, data, count)]
        except UnicodeDecodeError:
            raise InvalidRequest(
                f"output {shown(name)} is not UTF-8 text, which JSON needs; ask for it as binary"
                " data (the output's parameter binary_data: true)"
            ) from None
    if not count:  # memoryview cannot cast what has a zero in its shape
        return []
    if datatype == "BOOL":
        return [item != 0 for item in data.cast("B")]
    code: Any = _JSON[datatype][1]
    values: list[Any] = data.cast("B").cast(code).tolist()
    if datatype[0] == "F" and not all(map(math.isfinite, values)):
        raise InvalidRequest(
            f"output {shown(name)} holds NaN or infinity, which JSON cannot carry; ask for it as"
            " binary data (the output's parameter binary_data: true)"
        )
    return values


def _utf8(name: str, value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON escapes can spell
        raise InvalidRequest(
            f"tensor {shown(name)}: a string is not valid Unicode; send it as binary data"
        ) from None


@cache
def _list_decoder(element: type, depth: int) -> msgspec.json.Decoder[list[Any]]:
    kind: Any = element
    for _ in range(depth):
        kind = list[kind]
    return msgspec.json.Decoder(kind)


def depth_of(raw: msgspec.Raw | memoryview | bytes, dims: int) -> int:
    """How many lists ``raw`` opens with: at least 1, at most ``dims``."""
    if dims < 2:
        return 1
    depth = 0
    for byte in memoryview(raw)[:4096]:  # 16 brackets and some white space
        if byte == 0x5B:
            depth += 1
        elif byte not in b" \t\r\n":
            break
    return min(max(depth, 1), dims)


def _flatten(name: str, shape: Sequence[int], values: list[Any], depth: int) -> list[Any]:
    lists: list[Any] = [values]
    for level in range(depth):
        for item in lists:
            if len(item) != shape[level]:
                raise InvalidRequest(
                    f"tensor {shown(name)}: a list at depth {level} of data holds {len(item)}"
                    f" elements, but the shape {list(shape)} means {shape[level]}"
                )
        lists = list(chain.from_iterable(lists))
    return lists
