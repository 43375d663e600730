"""One session of ONNX Runtime on one stream of a GPU: buffers, bindings, CUDA graphs.

See ``engines.onnx_cuda`` for the laws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from cotenant.domain.port import TensorMeta
from cotenant.engines.base import NUMPY, Array, Room, first_line
from cotenant.engines.cuda.driver import Gpu
from cotenant.engines.cuda.staging import Staging
from cotenant.engines.cuda.subsets import Lane
from cotenant.engines.onnx import described
from cotenant.engines.placement import by_provider

GRAPHS: Final = 8
"""Graphs of a session: each keeps buffers of its own. The trial of a model sees batches of 1, 2,
4, …, so that these reach to batches of 128."""
GRAPH_ID: Final = "gpu_graph_id"
NO_GRAPH: Final = "-1"

Inputs = dict[str, Array]
Signature = tuple[tuple[str, str, tuple[int, ...]], ...]


def signature_of(inputs: Inputs) -> Signature:
    """What a graph is captured for: names, types, shapes."""
    return tuple((name, a.dtype.str, a.shape) for name, a in sorted(inputs.items()))


class NotCaptured(Exception):
    """The runtime refused to capture an execution."""


class _Bound(NamedTuple):
    """Buffers that are bound to inputs, and to outputs whose shapes are known (else None)."""

    binding: Any
    ins: dict[str, Staging]
    outs: dict[str, Staging]
    shapes: list[tuple[int, ...]] | None


class Session:
    """One session on one lane. ``options`` makes options of an execution, where it may be captured
    (None: it may not)."""

    def __init__(
        self, gpu: Gpu, lane: Lane, session: Any, options: Callable[[], Any] | None
    ) -> None:
        self._gpu = gpu
        self.lane = lane
        self.session = session
        self.meta = described(session)
        self.executed = by_provider(session)
        self._axes = [tuple(node.shape) for node in session.get_inputs()]
        self._out_axes = [tuple(node.shape) for node in session.get_outputs()]
        self._names = [tensor.name for tensor in self.meta.outputs]
        tensors = (*self.meta.inputs, *self.meta.outputs)
        self._plain = any(tensor.datatype == "BYTES" for tensor in tensors)
        self._known = True
        """Whether names of axes were never seen to lie about shapes of outputs."""
        self._new_options = options
        self._seen: set[Signature] = set()
        self._captured: dict[Signature, tuple[str, _Bound]] = {}
        self._loose = (self._stagings(self.meta.inputs), self._stagings(self.meta.outputs))

    def run(self, inputs: Inputs, capture: bool, room: Room | None = None) -> list[Array]:
        """Outputs in order, in ``room`` if they fit; raises what ONNX Runtime raises, and
        NotCaptured."""
        if self._plain:  # strings live in host memory alone
            outputs: list[Array] = self.session.run(self._names, inputs, self._options(NO_GRAPH))
            return outputs
        signature = signature_of(inputs)
        if signature in self._captured:
            number, bound = self._captured[signature]
            return self._execute(bound, inputs, number, room)
        if capture and self._new_options and self._may_capture(signature, inputs):
            return self._capture(signature, inputs, room)
        return self._once(inputs, room)

    def close(self) -> None:
        """Give its buffers back; the session goes first, since it may still use them."""
        self.session = None
        for _, bound in self._captured.values():
            _close(bound.ins, bound.outs)
        self._captured.clear()
        _close(*self._loose)

    # --- with graphs ------------------------------------------------------------------------

    def _may_capture(self, signature: Signature, inputs: Inputs) -> bool:
        """Whether it is worth it: what is seen twice is seen again."""
        if signature not in self._seen:
            self._seen.add(signature)
            return False
        return len(self._captured) < GRAPHS and self._shapes(inputs) is not None

    def _capture(self, signature: Signature, inputs: Inputs, room: Room | None) -> list[Array]:
        own = self._stagings(self.meta.inputs), self._stagings(self.meta.outputs)
        try:
            bound = self._bind(inputs, *own)
        except Exception as error:  # no room for buffers of its own
            _close(*own)
            raise NotCaptured(first_line(error)) from error
        number = str(len(self._captured) + 1)  # 0 is ONNX Runtime's own
        self._captured[signature] = (number, bound)
        try:
            # Within the runtime these are executions without a graph, a capture, and a replay.
            return self._execute(bound, inputs, number, room)
        except Exception as error:
            raise NotCaptured(first_line(error)) from error

    # --- without ----------------------------------------------------------------------------

    def _once(self, inputs: Inputs, room: Room | None) -> list[Array]:
        bound = self._bind(inputs, *self._loose)
        try:
            return self._execute(bound, inputs, NO_GRAPH, room)
        except Exception:
            if bound.shapes is None:
                raise
        # Perhaps the model's axes are not what their names say; if so it works without.
        self._known = False
        try:
            return self._execute(self._bind(inputs, *self._loose), inputs, NO_GRAPH, room)
        except Exception:
            self._known = True
            raise

    # --- both -------------------------------------------------------------------------------

    def _stagings(self, tensors: Sequence[TensorMeta]) -> dict[str, Staging]:
        return {tensor.name: Staging(self._gpu) for tensor in tensors}

    def _bind(self, inputs: Inputs, ins: dict[str, Staging], outs: dict[str, Staging]) -> _Bound:
        binding = self.session.io_binding()
        gpu = ("cuda", self._gpu.ordinal)
        for name, given in inputs.items():
            ins[name].reserve(given.nbytes)
            binding.bind_input(name, *gpu, given.dtype.type, given.shape, ins[name].device)
        shapes = self._shapes(inputs)
        for index, tensor in enumerate(self.meta.outputs):
            if shapes is None:
                binding.bind_output(tensor.name, *gpu)
                continue
            dtype, staging = np.dtype(NUMPY[tensor.datatype]), outs[tensor.name]
            staging.reserve(_size(dtype, shapes[index]))
            binding.bind_output(tensor.name, *gpu, dtype.type, shapes[index], staging.device)
        return _Bound(binding, ins, outs, shapes)

    def _execute(self, bound: _Bound, inputs: Inputs, graph: str, room: Room | None) -> list[Array]:
        stream = self.lane.stream
        for name, given in inputs.items():
            bound.ins[name].put(given, stream)
        self.session.run_with_iobinding(bound.binding, self._options(graph))
        shapes, sources = bound.shapes, [0] * len(self._names)
        if shapes is None:
            values = bound.binding.get_outputs()
            shapes = [tuple(value.shape()) for value in values]
            sources = [value.data_ptr() for value in values]
        found = []
        for tensor, shape, source in zip(self.meta.outputs, shapes, sources, strict=True):
            dtype, staging = np.dtype(NUMPY[tensor.datatype]), bound.outs[tensor.name]
            size = _size(dtype, shape)
            staging.reserve(size, on_device=bound.shapes is not None)
            staging.fetch(size, stream, source)
            found.append((staging, dtype, shape))
        self._gpu.synchronize(stream)
        places = room.take([(shape, dtype) for _, dtype, shape in found]) if room else None
        if places is None:
            places = [np.empty(shape, dtype) for _, dtype, shape in found]
        for (staging, _, _), place in zip(found, places, strict=True):
            staging.take(place)
        return places

    def _options(self, graph: str) -> Any:
        if self._new_options is None:
            return None
        options = self._new_options()
        options.add_run_config_entry(GRAPH_ID, graph)
        # All of it is on one stream, and the copies out are waited for.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def _shapes(self, inputs: Inputs) -> list[tuple[int, ...]] | None:
        """Shapes of the outputs, as the names of axes say; None where they do not."""
        if not self._known:
            return None
        axes: dict[str, int] = {}
        for tensor, names in zip(self.meta.inputs, self._axes, strict=True):
            if tensor.name in inputs:
                pairs = zip(names, inputs[tensor.name].shape, strict=False)
                axes.update((name, size) for name, size in pairs if isinstance(name, str))
        shapes = []
        for names in self._out_axes:
            shape = [axes.get(n, -1) if isinstance(n, str) else n for n in names]
            if any(not isinstance(size, int) or size < 0 for size in shape):
                return None
            shapes.append(tuple(shape))
        return shapes


def _close(*stagings: dict[str, Staging]) -> None:
    for some in stagings:
        for staging in some.values():
            staging.close()


def _size(dtype: np.dtype[Any], shape: Sequence[int]) -> int:
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))
