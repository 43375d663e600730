"""OpenVINO on the CPU, or as an emulated NPU: one compiled model for each core count it may get.

1. Answers do not depend on the processor: all that is FP32 or wider is computed in FP32. By itself
   OpenVINO takes BF16 where the processor has it.
2. Threads stay where the node puts them. By itself oneTBB, which OpenVINO runs on, moves them to
   all cores of the process each time that they have work. It does that by hwloc, which is told to
   bind nothing.
3. Executions are asynchronous, and waited for. One that is not swallows errors where it has one
   thread, and gives the answer of the one before again.
4. On the CPU it has integers of 32 bits at most. Inputs that do not fit are refused.
5. An emulated NPU is the CPU, which takes of models what the NPU would: its operators, and weights
   up to its memory. Nothing else is emulated, and what it refuses is not computed some other way.
6. Importing it reports to its maker, unless the module for that is absent. Here it is.
7. There is one ``Core``, for the life of the process. Where the processor has AMX each gives the
   thread that loads its plugin another stack for signals, and takes that away when it goes, on
   whichever thread and in any order: after two that overlapped a handler had nowhere to run.

Sources: the page "CPU Device" of OpenVINO's documentation; ``hwloc_topology_is_thissystem`` and the
environment variables of hwloc's.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from cotenant.domain.errors import ModelError
from cotenant.domain.npu import FREE, Emulated, emulated, present
from cotenant.domain.port import TensorMeta
from cotenant.domain.units import format_bytes
from cotenant.engines.base import Array, Engine, EngineKind, EngineMeta, Opening, Room, nearest
from cotenant.engines.openvino_bound import Bound
from cotenant.engines.placement import Executed

IR: Final = ".xml"
PRECISION: Final = "f32"
KERNELS: Final = 1024
"""Kernels that are kept, one for each operator and each shape that it had. By itself OpenVINO keeps
more, and a model that sees many shapes goes on growing."""
_TYPES: Final = {
    "boolean": "BOOL",
    "u8": "UINT8",
    "u16": "UINT16",
    "u32": "UINT32",
    "u64": "UINT64",
    "i8": "INT8",
    "i16": "INT16",
    "i32": "INT32",
    "i64": "INT64",
    "f16": "FP16",
    "f32": "FP32",
    "f64": "FP64",
}
_WIDE: Final = ("UINT32", "UINT64", "INT64")
_LEAST, _MOST = -(2**31), 2**31 - 1
_COMPUTED: Final = ("f16", "bf16", "i8", "u8")
"""Precisions of an execution that are worth a word. Integers of 32 bits count shapes."""
_MOVES: Final = (
    "Const",
    "Input",
    "Output",
    "Reorder",
    "Convert",
    "Reshape",
    "Transpose",
    "Concat",
    "If",
)
"""Kinds of operators that compute nothing."""
_FRAME: Final = re.compile(
    r"(Caught exception: )?Exception from .*|Check '.*|FrontEnd API failed.*"
    r"|Model wasn't .*|Summary:"
)
"""What in an error only says where in OpenVINO it arose."""


class OpenVinoEngine:
    """A model file compiled once per unit count; for an emulated NPU once, for its cores."""

    def __init__(self, path: Path, units: Sequence[int], npu: Emulated | None = None) -> None:
        check_beside(path)
        openvino = imported()
        self._tensor = openvino.Tensor
        core = shared_core()
        try:
            model = core.read_model(path)
            self._meta = described(model, path)
            threads = {n: n if npu is None else npu.cores for n in units}
            if npu is not None:
                _check(model, npu)
            self._compiled = {
                n: core.compile_model(model, "CPU", _settings(count))
                for n, count in threads.items()
            }
            self._requests = {n: made.create_infer_request() for n, made in self._compiled.items()}
            self._bound = {n: Bound(made, self._tensor) for n, made in self._compiled.items()}
        except ModelError:
            raise
        except Exception as error:  # OpenVINO raises whatever its parts do
            raise ModelError(f"{path.name} cannot be loaded: {said(error)}") from error
        self._fp64 = _has_fp64(model)
        self._emulated = npu is not None
        tensors = (*self._meta.inputs, *self._meta.outputs)
        self._axes = {t.name: ("",) * len(t.shape) for t in tensors}

    @property
    def meta(self) -> EngineMeta:
        return self._meta

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """See ``Engine``. OpenVINO keeps no names of axes, so rows are joined by trial alone."""
        return self._axes

    @property
    def notes(self) -> Sequence[str]:
        """Where it computes in less than FP32, as the compiled model says. Some kernels are chosen
        at the first execution."""
        compiled = next(iter(self._compiled.values()))
        found = [_precisions(compiled.get_runtime_model())]
        if self._fp64:
            found.append("FP64 is computed in f32")
        if self._emulated:
            found.append("EMULATED NPU: computed by the CPU")
        return [note for note in found if note]

    def executed(self) -> tuple[Executed, ...]:
        """As the compiled model says; kernels are chosen at the first execution."""
        told = next(iter(self._compiled.values())).get_runtime_model().get_ops()
        info = (op.get_rt_info() for op in told)
        found = Counter((i["layerType"].value, i["runtimePrecision"].value) for i in info)
        where = "NPU, emulated" if self._emulated else "CPU"
        return tuple(
            Executed(where, kind, count, str(precision).upper())
            for (kind, precision), count in sorted(found.items())
        )

    def run(self, units: int, inputs: dict[str, Array]) -> list[Array]:
        arrays = self._arrays(inputs)
        return [np.array(output) for output in self._execute(units, arrays)]

    def run_into(self, units: int, inputs: dict[str, Array], room: Room) -> list[Array]:
        arrays = self._arrays(inputs)
        bound = self._bound[nearest(self._bound, units)]
        wanted = bound.wanted(arrays)
        outputs = room.take(wanted) if wanted is not None else None
        if outputs is None:
            found = self._execute(units, arrays)
            bound.learn(arrays, found)
            return copied(found, room)
        if bound.compared and bound.run(arrays, outputs):
            return outputs
        # The first bound execution is compared, and where one fails another says why.
        found = list(map(np.array, self._execute(units, arrays)))
        if bound.compared or not bound.run(arrays, outputs):
            bound.refuse(arrays)
        elif bound.judge(found, outputs):
            return outputs
        return copied(found, room)

    def _execute(self, units: int, arrays: list[Array]) -> list[Array]:
        """Outputs as views that are valid until the next execution."""
        request = self._requests[nearest(self._requests, units)]
        try:
            for index, array in enumerate(arrays):
                request.set_input_tensor(index, self._tensor(array, shared_memory=True))
            request.start_async()
            request.wait()
            return [request.get_output_tensor(i).data for i in range(len(self._meta.outputs))]
        except Exception as error:
            raise ModelError(said(error)) from error

    def _arrays(self, inputs: dict[str, Array]) -> list[Array]:
        return [self._array(inputs, tensor) for tensor in self._meta.inputs]

    def _array(self, inputs: dict[str, Array], tensor: TensorMeta) -> Array:
        """An input as OpenVINO takes it, copied only where it has to be; raises ModelError."""
        array = inputs.get(tensor.name)
        if array is None:
            raise ModelError(f"the input {tensor.name!r} is missing")
        if tensor.datatype in _WIDE and array.size:
            for value in (array.min(), array.max()):
                if not _LEAST <= value <= _MOST:
                    raise ModelError(
                        f"{tensor.name!r} holds {value}; OpenVINO computes {tensor.datatype} in 32 "
                        f"bits, so it must be from {_LEAST} to {_MOST}"
                    )
        return np.require(array, requirements=("C", "ALIGNED", "WRITEABLE"))


def copied(found: Sequence[Array], room: Room) -> list[Array]:
    """Copies of what is valid until the next execution, in ``room`` if they fit."""
    outputs = room.take([(array.shape, array.dtype) for array in found])
    if outputs is None:
        return [np.array(array) for array in found]
    for array, output in zip(found, outputs, strict=True):
        np.copyto(output, array)
    return outputs


def imported() -> Any:
    """The module, made ready for a worker before anything of it is loaded."""
    if "openvino" not in sys.modules:
        os.environ["HWLOC_THISSYSTEM"] = "0"
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


@functools.cache
def shared_core() -> Any:
    """OpenVINO itself, for all models of this process."""
    core = imported().Core()
    # A file that is mapped ends the process when somebody truncates it.
    core.set_property({"ENABLE_MMAP": False})
    return core


def _settings(threads: int) -> dict[str, Any]:
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
        "ENABLE_HYPER_THREADING": True,
        "INFERENCE_PRECISION_HINT": PRECISION,
        # Else activations are quantized where weights are, which is not in the model.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "CPU_RUNTIME_CACHE_CAPACITY": KERNELS,
    }


def check_beside(path: Path) -> None:
    """Raises ModelError if a model's weights are not where they belong."""
    if path.suffix == IR and not path.with_suffix(".bin").is_file():
        weights = path.with_suffix(".bin").name
        raise ModelError(f"{path.name} has its weights in {weights}, which is not beside it")


def _check(model: Any, npu: Emulated) -> None:
    """Raises ModelError for what the NPU would not take."""
    ops = model.get_ops()
    if missing := {op.get_type_name() for op in ops} - FREE - set(npu.operators):
        raise ModelError(f"the emulated NPU does not support {', '.join(sorted(missing))}")
    weights = weigh(ops)
    if npu.memory and weights > npu.memory:
        raise ModelError(
            f"its weights are {format_bytes(weights)}, and the emulated NPU has "
            f"{format_bytes(npu.memory)}"
        )


def weigh(ops: Sequence[Any]) -> int:
    """Bytes of a model's constants."""
    return sum(op.data.nbytes for op in ops if op.get_type_name() == "Constant")


def described(model: Any, path: Path) -> EngineMeta:
    """What a model takes and gives; raises ModelError for what is not served."""
    if model.get_variables():
        raise ModelError(
            "it keeps state from one request to the next, which the requests of several clients"
            " would share; export it without (of language models: stateful=False)"
        )
    inputs = tuple(map(_meta, model.inputs))
    outputs = tuple(map(_meta, model.outputs))
    for tensors in (inputs, outputs):
        names = [tensor.name for tensor in tensors]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ModelError(f"two of its tensors are named {twice!r}")
    batchable = all(t.shape and t.shape[0] == -1 for t in (*inputs, *outputs))
    kind = "ir" if path.suffix == IR else "onnx"
    return EngineMeta(f"openvino_{kind}", inputs, outputs, batchable)


def _meta(port: Any) -> TensorMeta:
    names = port.get_names()
    name = port.get_node().get_friendly_name().removesuffix("/sink_port_0")
    if names and name not in names:
        name = min(names)
    datatype = _TYPES.get(port.get_element_type().get_type_name())
    if datatype is None:
        kind = port.get_element_type().get_type_name()
        raise ModelError(f"tensor {name} has the type {kind}, which is not served by OpenVINO")
    if port.get_partial_shape().rank.is_dynamic:
        raise ModelError(f"tensor {name} has no fixed number of axes")
    shape = tuple(axis.get_length() if axis.is_static else -1 for axis in port.get_partial_shape())
    return TensorMeta(name, datatype, shape)


def _has_fp64(model: Any) -> bool:
    outputs = (output for op in model.get_ops() for output in op.outputs())
    return any(output.get_element_type().get_type_name() == "f64" for output in outputs)


def _precisions(executed: Any) -> str:
    """Which kinds of operators of a runtime model are executed in less than FP32."""
    found: dict[str, dict[str, None]] = {}
    for op in executed.get_ops():
        told = op.get_rt_info()
        kind, precision = told["layerType"].value, told["runtimePrecision"].value
        if precision in _COMPUTED and kind not in _MOVES:
            found.setdefault(precision, {})[kind] = None
    if not found:
        return ""
    listed = (f"{', '.join(sorted(kinds))} in {name}" for name, kinds in sorted(found.items()))
    return f"{'; '.join(listed)}; the rest in {PRECISION}"


def said(error: Exception) -> str:
    """What an error of OpenVINO says, without where in OpenVINO it arose."""
    lines = [_FRAME.sub("", line).strip(" -") for line in str(error).splitlines()]
    return " ".join(filter(None, lines))[:500] or str(error).strip()[:500] or type(error).__name__


class OpenVino:
    """See the module's text."""

    name = "openvino"
    suffixes = (IR, ".onnx")
    rank = 15
    drafts = False

    def refuses(self, opening: Opening) -> str:
        processor = opening.target.processor
        if not (opening.target.on_cpu or emulated(processor) or present(processor)):
            return "it runs on the CPU and on NPUs alone"
        if importlib.util.find_spec("openvino") is None:
            return "it needs the extra openvino: pip install 'cotenant[openvino]'"
        return ""

    def open(self, opening: Opening) -> Engine:
        try:
            if (npu := present(opening.target.processor)) is not None:
                from cotenant.engines.openvino_npu import OpenVinoNpuEngine

                return OpenVinoNpuEngine(opening.path, opening.settings, npu)
            emulation = emulated(opening.target.processor)
            return OpenVinoEngine(opening.path, opening.units, emulation)
        except ImportError as error:
            raise ModelError(f"OpenVINO cannot be imported: {error}") from error


KIND: Final[EngineKind] = OpenVino()
