"""Reads GGUF files: a model's weights, quantized, with all that is to be known of it in one file.

Nothing in a file is believed: every length is held against what is left of it, every tensor against
its end. What is wrong is a ModelError that says where. Versions 2 and 3, little-endian.

Weights are mapped, all else is read: to touch a mapped page that was cut off the file meanwhile is
the end of the process, and a front end needs no weights.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from cotenant.domain.errors import ModelError

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
MOST_ENTRIES: Final = 65_536
"""Keys, and tensors."""
MOST_DIMENSIONS: Final = 4
_SCALARS: Final = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
    10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
SLICE: Final = 1 << 16
"""Blocks that are dequantized at a time."""


class Kind(NamedTuple):
    """How numbers are stored: so many at a time, in so many bytes."""

    name: str
    numbers: int
    size: int


KINDS: Final[Mapping[int, Kind]] = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2),
    2: Kind("Q4_0", 32, 18),
    3: Kind("Q4_1", 32, 20),
    6: Kind("Q5_0", 32, 22),
    7: Kind("Q5_1", 32, 24),
    8: Kind("Q8_0", 32, 34),
    10: Kind("Q2_K", 256, 84),
    11: Kind("Q3_K", 256, 110),
    12: Kind("Q4_K", 256, 144),
    13: Kind("Q5_K", 256, 176),
    14: Kind("Q6_K", 256, 210),
    30: Kind("BF16", 1, 2),
}
"""By number; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""


class Stored(NamedTuple):
    """A tensor as it is stored. ``shape`` is NumPy's: the last axis is contiguous, and is what is
    quantized. ``data``: its bytes, a view of the file."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    data: npt.NDArray[np.uint8]


class Gguf:
    """An open file. ``keys``: what it says of the model; strings are text, arrays are lists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = 0
        self.keys: dict[str, Any] = {}
        self.tensors: dict[str, Stored] = {}
        try:
            with path.open("rb") as self._file:
                self._size = os.fstat(self._file.fileno()).st_size
                self._read()
        except (OSError, ValueError) as error:
            raise ModelError(f"{path.name} cannot be read: {error}") from error

    def _read(self) -> None:
        if self._take(4) != MAGIC:
            raise self._wrong("it does not begin with GGUF")
        version = self._scalar("<I")
        if version not in VERSIONS:
            raise self._wrong(f"version {version:#x}; known are 2 and 3, little-endian")
        tensors, keys = self._count("tensors"), self._count("keys")
        for _ in range(keys):
            name = self._string()
            if name in self.keys:
                raise self._wrong(f"key {name!r} is there twice")
            self.keys[name] = self._value(self._scalar("<I"))
        infos = [self._info() for _ in range(tensors)]
        alignment = self.keys.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._wrong(f"general.alignment {alignment!r} is no power of 2")
        begin = -(-self._at // alignment) * alignment
        weights = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        for name, shape, kind, offset in infos:
            if name in self.tensors:
                raise self._wrong(f"tensor {name!r} is there twice")
            size = prod(shape) // kind.numbers * kind.size
            if offset % alignment or begin + offset + size > self._size:
                raise self._wrong(
                    f"tensor {name!r}: {size} bytes at {begin + offset} are not in the file, "
                    f"which has {self._size}, or not aligned to {alignment}"
                )
            data = np.frombuffer(weights, np.uint8, size, begin + offset)
            self.tensors[name] = Stored(name, shape, kind, data)

    def _info(self) -> tuple[str, tuple[int, ...], Kind, int]:
        name = self._string()
        dimensions = self._scalar("<I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self._wrong(f"tensor {name!r} has {dimensions} dimensions, not 1 to 4")
        shape = tuple(self._scalar("<Q") for _ in range(dimensions))[::-1]
        number, offset = self._scalar("<I"), self._scalar("<Q")
        kind = KINDS.get(number)
        if kind is None:
            known = ", ".join(each.name for each in KINDS.values())
            raise self._wrong(f"tensor {name!r} is of type {number}; known are {known}")
        if not all(shape) or shape[-1] % kind.numbers:
            raise self._wrong(
                f"tensor {name!r} of shape {shape}: no axis is 0, and {kind.name} comes in "
                f"{kind.numbers}s"
            )
        return name, shape, kind, offset

    # --- values -----------------------------------------------------------------------------

    def _value(self, kind: int, nested: bool = False) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or nested:
            raise self._wrong(f"a value of type {kind}{' in an array' * nested}")
        of, count = self._scalar("<I"), self._scalar("<Q")
        least = struct.calcsize(_SCALARS[of]) if of in _SCALARS else 8
        if count * least > self._size - self._at:
            raise self._wrong(f"an array of {count} values is longer than the file")
        if of in _SCALARS:
            code = _SCALARS[of]
            found = np.frombuffer(self._take(count * least), np.dtype(code), count)
            return found.tolist()
        return [self._value(of, nested=True) for _ in range(count)]

    def _string(self) -> str:
        length = self._scalar("<Q")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise self._wrong("a string is not UTF-8") from None

    def _scalar(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _count(self, what: str) -> int:
        count = self._scalar("<Q")
        if count > MOST_ENTRIES:
            raise self._wrong(f"{count} {what}; at most {MOST_ENTRIES} are read")
        return int(count)

    def _take(self, size: int) -> bytes:
        if size > self._size - self._at:
            raise self._wrong("it ends in the middle")
        self._at += size
        found = self._file.read(size)
        if len(found) < size:
            raise self._wrong("it was cut off while it was read")
        return found

    def _wrong(self, what: str) -> ModelError:
        return ModelError(f"{self.path.name} is damaged or no GGUF file: at {self._at}: {what}")


def floats(tensor: Stored) -> npt.NDArray[np.float32]:
    """A tensor as FP32, of its shape. Raises ModelError for a type that is not dequantized."""
    unpack = _UNPACK.get(tensor.kind.name)
    if unpack is None:
        raise ModelError(
            f"{tensor.name} is {tensor.kind.name}; dequantized are {', '.join(_UNPACK)}"
        )
    blocks = tensor.data.reshape(-1, tensor.kind.size)
    found = np.empty((len(blocks), tensor.kind.numbers), np.float32)
    for at in range(0, len(blocks), SLICE):  # what is made on the way stays small
        part = blocks[at : at + SLICE]
        found[at : at + SLICE] = unpack(part).reshape(len(part), -1)
    return found.reshape(tensor.shape)


Blocks = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def _half(blocks: Blocks, at: int) -> Floats:
    """The FP16 number at a byte of each block, as a column."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Blocks) -> Floats:
    """The low halves, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.float32)


def _bf16(blocks: Blocks) -> Floats:
    halves = np.ascontiguousarray(blocks).view(np.uint16).astype(np.uint32)
    return (halves << 16).view(np.float32)


def _q4_0(blocks: Blocks) -> Floats:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]) - 8)


def _q4_1(blocks: Blocks) -> Floats:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _fifth(blocks: Blocks, at: int) -> Floats:
    """The fifth bits of 32 numbers, worth 16 each."""
    bits = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    return bits.astype(np.float32) * 16


def _q5_0(blocks: Blocks) -> Floats:
    return _half(blocks, 0) * (_nibbles(blocks[:, 6:]) + _fifth(blocks, 2) - 16)


def _q5_1(blocks: Blocks) -> Floats:
    return _half(blocks, 0) * (_nibbles(blocks[:, 8:]) + _fifth(blocks, 4)) + _half(blocks, 2)


def _q8_0(blocks: Blocks) -> Floats:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def scales_k(packed: Blocks) -> tuple[Floats, Floats]:
    """Eight scales and eight minima of six bits each, from twelve bytes."""
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | ((middle >> 6) << 4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _spread_k(blocks: Blocks, numbers: Floats) -> Floats:
    scales, minima = scales_k(blocks[:, 4:16])
    scales, minima = scales * _half(blocks, 0), minima * _half(blocks, 2)
    return scales[:, :, None] * numbers - minima[:, :, None]


def _q4_k(blocks: Blocks) -> Floats:
    packed = blocks[:, 16:].reshape(-1, 4, 1, 32)
    numbers = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(-1, 8, 32)
    return _spread_k(blocks, numbers.astype(np.float32))


def _q5_k(blocks: Blocks) -> Floats:
    packed = blocks[:, 48:].reshape(-1, 4, 1, 32)
    numbers = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(-1, 8, 32)
    fifth = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    return _spread_k(blocks, numbers.astype(np.float32) + 16 * fifth.astype(np.float32))


def _q6_k(blocks: Blocks) -> Floats:
    low = blocks[:, :128].reshape(-1, 2, 2, 32)
    low = np.concatenate([low & 15, low >> 4], axis=2)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    numbers = (low | (high << 4)).astype(np.float32).reshape(-1, 16, 16) - 32
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32) * _half(blocks, 208)
    return scales[:, :, None] * numbers


_UNPACK: Final[dict[str, Callable[[Blocks], npt.NDArray[Any]]]] = {
    "F32": lambda blocks: np.ascontiguousarray(blocks).view(np.float32),
    "F16": lambda blocks: np.ascontiguousarray(blocks).view(np.float16),
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
