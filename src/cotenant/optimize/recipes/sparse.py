"""Unstructured pruning: the smallest weights become 0. The file has as many numbers as before, and
kernels multiply by zeros as by others: what it saves shows when the file is compressed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from cotenant.domain.errors import ModelError
from cotenant.domain.units import format_bytes
from cotenant.optimize.parent import Parent, Told
from cotenant.optimize.recipes.base import Made

SHARE: Final = 0.3
"""Of the weights of each layer that becomes 0."""
LEAST: Final = 64
"""Smaller tensors are left alone."""


class Sparse:
    """See the module's text."""

    name = "sparse"
    needs = ("onnx",)
    trains = False

    def make(self, parent: Parent, work: Path, seconds: float, told: Told) -> Iterator[Made]:
        del seconds
        told("unstructured pruning")
        import onnx
        from onnx import numpy_helper

        model = parent.onnx()
        before = _compressed(model.SerializeToString())
        count = 0
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.dtype != np.float32 or array.ndim < 2 or array.size < LEAST:
                continue
            sizes = np.abs(array)
            kept = np.where(sizes > np.quantile(sizes, SHARE), array, np.float32(0))
            tensor.CopyFrom(numpy_helper.from_array(kept, tensor.name))
            count += 1
        if not count:
            raise ModelError("it has no weights in FP32 to prune")
        path = work / "model.onnx"
        onnx.save(model, str(path))
        after = _compressed(path.read_bytes())
        note = f"compressed, {format_bytes(after)} in place of {format_bytes(before)}"
        yield Made(self.name, f"{SHARE:.0%} of the weights of {count} layers are 0", path, note)


def _compressed(data: bytes) -> int:
    return len(zlib.compress(data, 6))
