"""OpenVINO's outputs, written where they are wanted.

1. A tensor of ours as an output is right only where an operator computes it. Where an input is
   passed on, OpenVINO writes into that input; where two outputs are one, only one is written. The
   compiled model says which operators those are.
2. OpenVINO keeps no names of axes. So the shapes of outputs are those that inputs of the same
   shapes had before; a model whose outputs then have others is not bound for these shapes again.
3. The first bound execution is compared with one that is not. If they differ, none is bound again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from cotenant.engines.base import BOUND_FROM, Array

SHAPES: Final = 256
"""Shapes of inputs whose outputs are remembered."""
_PASSING: Final = frozenset(
    ("Concatenation", "Convert", "Reorder", "Reshape", "Split", "StridedSlice", "Transpose")
)
"""Kinds of operators that may have their output in the memory of their input."""
_GIVEN: Final = frozenset(("Const", "Input", "MemoryInput"))

Shape = tuple[tuple[int, ...], np.dtype[Any]]


class Bound:
    """A compiled model that writes outputs to tensors of ours. ``tensor``: OpenVINO's type."""

    def __init__(self, compiled: Any, tensor: Any) -> None:
        self._request = compiled.create_infer_request()
        self._tensor = tensor
        self._may = all_computed(compiled.get_runtime_model())
        self.compared = False
        """Whether a bound execution was right."""
        self._known: OrderedDict[tuple[tuple[int, ...], ...], list[Shape] | None] = OrderedDict()

    def wanted(self, inputs: Sequence[Array]) -> list[Shape] | None:
        """Shapes and types of the outputs, where they are to be bound."""
        return self._known.get(_key(inputs)) if self._may else None

    def learn(self, inputs: Sequence[Array], found: Sequence[Array]) -> None:
        """What an execution that was not bound gave."""
        key = _key(inputs)
        if self._may and key not in self._known:
            large = sum(array.nbytes for array in found) >= BOUND_FROM
            self._known[key] = [(array.shape, array.dtype) for array in found] if large else None
            if len(self._known) > SHAPES:
                self._known.popitem(last=False)

    def refuse(self, inputs: Sequence[Array]) -> None:
        """Inputs of such shapes are not bound again."""
        self._known[_key(inputs)] = None

    def judge(self, wanted: Sequence[Array], outputs: Sequence[Array]) -> bool:
        """Whether the first bound execution gave what one that is not did; if not, it was the
        last."""
        pairs = zip(wanted, outputs, strict=True)
        self.compared = self._may = all(a.tobytes() == b.tobytes() for a, b in pairs)
        return self.compared

    def run(self, inputs: Sequence[Array], outputs: Sequence[Array]) -> bool:
        """Execute; False if the outputs are not there, for whatever reason: then another execution
        says which."""
        request, tensor = self._request, self._tensor
        try:
            for index, array in enumerate(inputs):
                request.set_input_tensor(index, tensor(array, shared_memory=True))
            for index, array in enumerate(outputs):
                request.set_output_tensor(index, tensor(array, shared_memory=True))
            request.start_async()
            request.wait()
            there = [request.get_output_tensor(index).data for index in range(len(outputs))]
        except Exception:  # OpenVINO raises whatever its parts do
            return False
        return all(map(_is_same, there, outputs))


def all_computed(executed: Any) -> bool:
    """Whether each output of a runtime model is what an operator computes for it alone."""
    seen = set()
    for op in executed.get_ops():
        if _kind(op) != "Output":
            continue
        source = op.input_value(0)
        place = (source.get_node().get_friendly_name(), source.get_index())
        if place in seen or not _computed(source.get_node()):
            return False
        seen.add(place)
    return True


def _computed(op: Any) -> bool:
    while (kind := _kind(op)) in _PASSING:
        op = op.input_value(0).get_node()
    return kind not in _GIVEN


def _kind(op: Any) -> str:
    return str(op.get_rt_info()["layerType"].value)


def _key(inputs: Sequence[Array]) -> tuple[tuple[int, ...], ...]:
    return tuple(array.shape for array in inputs)


def _is_same(there: Array, output: Array) -> bool:
    """Whether these are one memory and one shape."""
    return there.ctypes.data == output.ctypes.data and there.shape == output.shape
