"""Numbers of ``InferTensorContents`` from their wire form, without an object for each: protobuf's
own way takes a third of a microsecond a number, and a message may have millions."""

from __future__ import annotations

import numpy as np
from google.protobuf.message import DecodeError

from cotenant.domain.errors import InvalidRequest
from cotenant.serving.tensors import shown

VARINTS = 2**20
"""Whole numbers in a tensor; larger ones are sent raw."""

_DTYPES = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
}
_CARRIED = {"b": "?", "u": "<u4", "i": "<i4"}
"""What protobuf makes of the numbers of a field for the smaller types."""
_LONGEST = 10
_SIZES = {"FP32": 4, "FP64": 8}


def unpack(name: str, datatype: str, packed: memoryview | bytes, count: int) -> bytes | memoryview:
    """The bytes of a tensor whose ``count`` elements are in a packed field; raises InvalidRequest
    where that is not so, and DecodeError."""
    size = _SIZES.get(datatype)
    if size is not None:
        if len(packed) != size * count:
            raise InvalidRequest(_miscounted(name, len(packed) // size, count))
        return packed
    if count > VARINTS:
        raise InvalidRequest(
            f"tensor {shown(name)}: {count} whole numbers are given one by one; send those of more"
            f" than {VARINTS} in raw_input_contents"
        )
    numbers = _varints(name, packed, count)
    dtype = _DTYPES[datatype]
    if dtype.itemsize == 8:
        return numbers.astype(dtype).tobytes()
    carried = numbers.astype(bool) if dtype.kind == "b" else numbers.astype(_CARRIED[dtype.kind])
    if dtype.kind != "b":
        info = np.iinfo(dtype.name)
        if carried.size and not (info.min <= carried.min() and carried.max() <= info.max):
            raise InvalidRequest(f"tensor {shown(name)}: an element does not fit {datatype}")
    return carried.astype(dtype).tobytes()


def _varints(name: str, packed: memoryview | bytes, count: int) -> np.ndarray:
    """Protobuf's variable-length integers, modulo 2^64."""
    data = np.frombuffer(packed, np.uint8)
    ends = data < 0x80
    found = int(np.count_nonzero(ends))
    if found != count:
        raise InvalidRequest(_miscounted(name, found, count))
    if found == len(data):
        return data.astype(np.uint64)
    if not ends[-1]:
        raise DecodeError("it ends within a number")
    last = np.flatnonzero(ends)
    first = np.concatenate(([0], last[:-1] + 1))
    if int((last - first).max()) >= _LONGEST:
        raise DecodeError("a number is too long")
    numbers = np.zeros(count, np.uint64)
    for place in range(_LONGEST):
        at = first + place
        there = np.flatnonzero(at <= last)
        if not there.size:
            break
        part = (data[at[there]] & 0x7F).astype(np.uint64)
        numbers[there] |= part << np.uint64(7 * place)
    return numbers


def _miscounted(name: str, found: int, count: int) -> str:
    return (
        f"tensor {shown(name)}: its contents hold {found} elements, but its shape means {count}"
        " (or send raw_input_contents)"
    )
