"""ONNX Runtime on the CPU: one session for each core count that the model may get.

A change of partition picks another session and loads nothing. Threads of a session wait
without spinning: what spins is taken from the training beside it. Large outputs whose shapes the
model's own names of axes tell from those of its inputs are written where they are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from cotenant.domain.errors import ModelError
from cotenant.domain.port import TensorMeta
from cotenant.engines.base import (
    BOUND_FROM,
    NUMPY,
    Array,
    Engine,
    EngineKind,
    EngineMeta,
    Opening,
    Room,
    first_line,
    nearest,
)
from cotenant.engines.placement import RECORDS, Executed, by_provider

if TYPE_CHECKING:
    import onnxruntime as ort

CPU_PROVIDER: Final = "CPUExecutionProvider"
_TYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}


_Output: TypeAlias = "tuple[tuple[int | str, ...], np.dtype[Any]]"


class OnnxEngine:
    """A model file opened once per unit count; ``session``: how, if not on the CPU alone."""

    def __init__(
        self,
        path: Path,
        units: Sequence[int],
        session: Callable[[Path, int], ort.InferenceSession] | None = None,
    ) -> None:
        import onnxruntime as ort

        ort.set_default_logger_severity(4)
        try:
            self._sessions = {n: (session or _session)(path, n) for n in units}
        except ModelError:
            raise
        except Exception as error:  # ONNX Runtime raises a dozen kinds of its own
            raise ModelError(f"{path.name} cannot be loaded: {first_line(error)}") from error
        first = next(iter(self._sessions.values()))
        self._meta = described(first)
        self._names = [o.name for o in self._meta.outputs]
        self._axes = axes_of(first)
        self._bindings = {n: session.io_binding() for n, session in self._sessions.items()}
        self._outputs = _outputs(self._meta, self._axes)
        self._binds = self._may_bind()

    @property
    def meta(self) -> EngineMeta:
        return self._meta

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return self._axes

    def run(self, units: int, inputs: dict[str, Array]) -> list[Array]:
        session = self._sessions[nearest(self._sessions, units)]
        try:
            outputs: list[Array] = session.run(self._names, inputs)
        except Exception as error:
            raise ModelError(first_line(error)) from error
        return outputs

    def run_into(self, units: int, inputs: dict[str, Array], room: Room) -> list[Array]:
        wanted = self._known(inputs) if self._binds else None
        outputs = room.take(wanted) if wanted is not None else None
        if outputs is None:
            return self.run(units, inputs)
        threads = nearest(self._sessions, units)
        binding = self._bindings[threads]
        try:
            for name, array in inputs.items():
                where = (array.dtype, array.shape, array.ctypes.data)
                binding.bind_input(name, "cpu", 0, *where)
            for name, array in zip(self._names, outputs, strict=True):
                binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            self._sessions[threads].run_with_iobinding(binding)
        except Exception:
            # The input's fault, or names of axes that are not true: which of the two, it says here.
            found = self.run(units, inputs)
            self._binds = False
            return found
        finally:
            binding.clear_binding_inputs()
            binding.clear_binding_outputs()
        return outputs

    def executed(self) -> tuple[Executed, ...]:
        return by_provider(next(iter(self._sessions.values())))

    def _may_bind(self) -> bool:
        """Whether some input tells the shapes of all outputs, and they may be large."""
        if any(t.datatype == "BYTES" for t in (*self._meta.inputs, *self._meta.outputs)):
            return False
        free = {axis for axes, _ in self._outputs for axis in axes if isinstance(axis, str)}
        if free:
            told = {axis for t in self._meta.inputs for axis in self._axes[t.name]}
            return free <= told - {""}
        sizes = ((o.shape, NUMPY[o.datatype]) for o in self._meta.outputs)
        return sum(prod(shape) * np.dtype(kind).itemsize for shape, kind in sizes) >= BOUND_FROM

    def _known(self, inputs: dict[str, Array]) -> list[tuple[tuple[int, ...], Any]] | None:
        """Shapes and types of the outputs, if the model says them and they are large."""
        sizes: dict[str, int] = {}
        for name, array in inputs.items():
            if not array.flags.c_contiguous:
                return None
            for axis, size in zip(self._axes[name], array.shape, strict=True):
                if sizes.setdefault(axis, size) != size and axis:
                    return None
        found: list[tuple[tuple[int, ...], Any]] = []
        total = 0
        for axes, dtype in self._outputs:
            shape = tuple(axis if isinstance(axis, int) else sizes.get(axis, -1) for axis in axes)
            if -1 in shape:
                return None
            found.append((shape, dtype))
            total += prod(shape) * dtype.itemsize
        return found if total >= BOUND_FROM else None


def session_options(threads: int) -> ort.SessionOptions:
    """For so many threads, which wait without spinning."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    options.add_session_config_entry(*RECORDS)
    return options


def _session(path: Path, threads: int) -> ort.InferenceSession:
    import onnxruntime as ort

    options = session_options(threads)
    return ort.InferenceSession(str(path), options, providers=[CPU_PROVIDER])


def described(session: Any) -> EngineMeta:
    """What the model of a session takes and gives; raises ModelError for what no protocol
    carries."""
    inputs = tuple(_meta(i) for i in session.get_inputs())
    outputs = tuple(_meta(o) for o in session.get_outputs())
    batchable = all(t.shape and t.shape[0] == -1 for t in (*inputs, *outputs))
    return EngineMeta("onnxruntime_onnx", inputs, outputs, batchable)


def _outputs(meta: EngineMeta, axes: dict[str, tuple[str, ...]]) -> list[_Output]:
    """Of each output, every axis as its size or, if it is free, its name; and the type."""
    return [
        (
            tuple(s if s >= 0 else name for s, name in zip(o.shape, axes[o.name], strict=True)),
            np.dtype(NUMPY[o.datatype]),
        )
        for o in meta.outputs
    ]


def axes_of(session: Any) -> dict[str, tuple[str, ...]]:
    """By tensor, the model's own names of its axes; "" for those that have none."""
    nodes = (*session.get_inputs(), *session.get_outputs())
    return {n.name: tuple(d if isinstance(d, str) else "" for d in n.shape) for n in nodes}


def _meta(node: ort.NodeArg) -> TensorMeta:
    if "map(" in node.type:
        raise ModelError(
            f"tensor {node.name} is a list of maps ({node.type}), which no protocol carries; export"
            " the classifier with plain probabilities (skl2onnx: options={id(model): {'zipmap': "
            "False}})"
        )
    if node.type not in _TYPES:
        raise ModelError(f"tensor {node.name} has the type {node.type}, which is not served")
    shape = tuple(d if isinstance(d, int) and d >= 0 else -1 for d in node.shape)
    return TensorMeta(node.name, _TYPES[node.type], shape)


class OnnxRuntime:
    """See the module's text."""

    name = "onnxruntime"
    suffixes = (".onnx",)
    rank = 10
    drafts = False

    def refuses(self, opening: Opening) -> str:
        return "" if opening.target.on_cpu else "it runs on the CPU alone"

    def open(self, opening: Opening) -> Engine:
        return OnnxEngine(opening.path, opening.units)


KIND: Final[EngineKind] = OnnxRuntime()
