"""Matrices as the graph multiplies them: FP32, or numbers of 4 or 8 bits by groups of 32."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from cotenant.engines.llm.checkpoint import Checkpoint
from cotenant.engines.llm.families.base import Floats
from cotenant.engines.llm.gguf import Stored, scales_k

GROUP: Final = 32
"""Numbers that share a scale."""

Bits = Literal[4, 8, 32]
Packed = npt.NDArray[np.uint8]


class Build(msgspec.Struct, frozen=True):
    """How a model is made ready. ``bits``: of a weight (None: as the file has it, where that is 4
    or 8 bits by groups of 32; what else is quantized gets 8, what is not stays FP32).

    ``rounded``: activations are rounded to 8 bits before they are multiplied. Faster, and not
    the model's own arithmetic: it may change answers."""

    bits: Bits | None = None
    rounded: bool = False


class Quantized(NamedTuple):
    """``numbers`` are unsigned, [out, in]. A weight is its number less half of the range, times
    its group's of ``scales`` [out, in / 32], plus its group's of ``offsets``, if there are any."""

    bits: int
    numbers: Packed
    scales: Floats
    offsets: Floats | None = None

    def floats(self) -> Floats:
        """What it stands for."""
        grouped = self.numbers.reshape(*self.scales.shape, GROUP).astype(np.float32)
        grouped = (grouped - np.float32(1 << self.bits - 1)) * self.scales[:, :, None]
        if self.offsets is not None:
            grouped += self.offsets[:, :, None]
        return grouped.reshape(self.numbers.shape)


Matrix = Quantized | Floats


def matrix(checkpoint: Checkpoint, name: str, build: Build) -> Matrix:
    """A weight, as a build has it."""
    if build.bits == 32:
        return checkpoint.floats(name)
    stored = checkpoint.stored(name)
    bits = build.bits or _bits(stored)
    if stored is not None and _KINDS.get(stored.kind.name) == bits:
        return repack(stored)
    weight = checkpoint.floats(name)
    if bits == 32 or weight.shape[1] % GROUP:
        return weight
    return quantize(weight, bits)


_KINDS: Final[dict[str, Bits]] = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q8_0": 8}
"""What is taken as it is."""


def _bits(stored: Stored | None) -> Bits:
    return 32 if stored is None else _KINDS.get(stored.kind.name, 8)


def repack(stored: Stored) -> Quantized:
    """What ``_KINDS`` names, without a change of any weight."""
    rows, kind = stored.shape[0], stored.kind.name
    blocks = stored.data.reshape(rows, -1, stored.kind.size)
    if kind == "Q4_K":
        return _repack_k(blocks)
    scales = _half(blocks, 0)
    if kind == "Q8_0":
        numbers = blocks[:, :, 2:] ^ np.uint8(128)  # from -128..127 to 0..255
        return Quantized(8, numbers.reshape(rows, -1), scales)
    body = blocks[:, :, 2 if kind == "Q4_0" else 4 :]
    numbers = np.concatenate([body & 15, body >> 4], axis=2).reshape(rows, -1)
    offsets = None if kind == "Q4_0" else _half(blocks, 2) + 8 * scales
    return Quantized(4, numbers, scales, offsets)


def _repack_k(blocks: Packed) -> Quantized:
    rows = len(blocks)
    scales, minima = scales_k(blocks[:, :, 4:16].reshape(-1, 12))
    scales = scales.reshape(rows, -1, 8) * _half(blocks, 0)[:, :, None]
    minima = minima.reshape(rows, -1, 8) * _half(blocks, 2)[:, :, None]
    body = blocks[:, :, 16:].reshape(rows, -1, 1, 32)
    numbers = np.concatenate([body & 15, body >> 4], axis=2)
    scales, minima = scales.reshape(rows, -1), minima.reshape(rows, -1)
    return Quantized(4, numbers.reshape(rows, -1), scales, 8 * scales - minima)


def _half(blocks: Packed, at: int) -> Floats:
    """The FP16 number at a byte of each block, [rows, blocks]."""
    found = np.ascontiguousarray(blocks[:, :, at : at + 2]).view(np.float16)
    return found[:, :, 0].astype(np.float32)


def quantize(weight: Floats, bits: Bits) -> Quantized:
    """Round to the nearest of 4 or 8 bits, [out, in] by groups of 32 along ``in``. The number of
    the largest magnitude is met exactly."""
    grouped = weight.reshape(len(weight), -1, GROUP)
    half = 1 << bits - 1
    peak = np.take_along_axis(grouped, np.abs(grouped).argmax(2)[:, :, None], axis=2)
    scales = peak / np.float32(-half)
    with np.errstate(divide="ignore", invalid="ignore"):
        numbers = np.where(scales == 0, 0, np.rint(grouped / scales))
    numbers = np.clip(numbers + half, 0, 2 * half - 1).astype(np.uint8)
    return Quantized(bits, numbers.reshape(weight.shape), scales[:, :, 0])


def height(part: Matrix) -> int:
    """How many numbers it gives."""
    return len(part.numbers if isinstance(part, Quantized) else part)


def stack(parts: list[Matrix]) -> Matrix | None:
    """Several matrices below one another; None if they are not alike."""
    quantized = [part for part in parts if isinstance(part, Quantized)]
    if not quantized:
        return np.concatenate([part for part in parts if not isinstance(part, Quantized)])
    alike = {(part.bits, part.offsets is None) for part in quantized}
    if len(quantized) < len(parts) or len(alike) > 1:
        return None
    offsets = [part.offsets for part in quantized if part.offsets is not None]
    return Quantized(
        quantized[0].bits,
        np.concatenate([part.numbers for part in quantized]),
        np.concatenate([part.scales for part in quantized]),
        np.concatenate(offsets) if offsets else None,
    )


def nibbles(numbers: Packed) -> Packed:
    """Two numbers of 4 bits a byte, the first one lowest; [out, in / 2]."""
    return numbers[:, 0::2] | numbers[:, 1::2] << np.uint8(4)
