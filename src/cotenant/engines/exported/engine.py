"""PyTorch exported programs on the CPU, executed by PyTorch's own operators.

No gradients, no compilation. An input is a view of the caller's memory, or a copy where some
operator of the program writes in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch

from cotenant.domain.errors import ModelError
from cotenant.domain.port import TensorMeta
from cotenant.engines.base import NUMPY, Array, EngineMeta, Room, first_line
from cotenant.engines.exported.archive import DTYPES, Archive
from cotenant.engines.exported.routine import changing, compile_graph
from cotenant.engines.exported.schema import (
    GraphModule,
    TensorValue,
    Union,
    name_of,
    one,
    places,
)
from cotenant.engines.exported.shapes import Axis, Shapes, axes

PLATFORM: Final = "pytorch_exported"
DATATYPES: Final = {
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.uint16: "UINT16",
    torch.uint32: "UINT32",
    torch.uint64: "UINT64",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float16: "FP16",
    torch.float32: "FP32",
    torch.float64: "FP64",
}
_NUMBERS: Final = {"as_sym_int": "INT64", "as_sym_float": "FP64", "as_sym_bool": "BOOL"}
_CONSTANTS: Final = ("as_none", "as_int", "as_float", "as_bool", "as_string")


class ExportedEngine:
    """A program, loaded once: the number of threads is said before each execution."""

    def __init__(self, path: Path) -> None:
        with contextlib.suppress(RuntimeError):  # it can be said once in a process
            torch.set_num_interop_threads(1)
        try:
            with Archive(path) as archive:
                self._load(archive)
        except OSError as error:
            raise ModelError(f"{path.name} cannot be read: {error.strerror}") from error
        except ModelError as error:
            raise ModelError(f"{path.name}: {error}") from error
        except (msgspec.DecodeError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{path.name}: the program cannot be read: {error}") from error
        except RecursionError as error:
            raise ModelError(f"{path.name}: the program is nested too deep") from error

    def _load(self, archive: Archive) -> None:
        module = archive.program.graph_module
        inputs = _Inputs(module, archive)
        outputs = _Outputs(module)
        self._given = inputs.given
        self._weights = [tensor for tensor in inputs.given if isinstance(tensor, torch.Tensor)]
        self._shapes = Shapes(inputs.axes, archive.program.range_constraints)
        self._routine = compile_graph(module.graph, inputs.weights)
        self._kept = outputs.kept
        self._versions = self._version()
        self._spoiled = False
        tensors = {**inputs.axes, **outputs.axes}
        self._axes = {
            name: tuple(axis if isinstance(axis, str) else "" for axis in shape)
            for name, shape in tensors.items()
        }
        # A formula of sizes is no batch axis.
        batchable = all(shape and isinstance(shape[0], str) for shape in tensors.values())
        self._meta = EngineMeta(PLATFORM, tuple(inputs.metas), tuple(outputs.metas), batchable)
        self._dtypes = [np.dtype(NUMPY[t.datatype]) for t in outputs.metas]

    @property
    def meta(self) -> EngineMeta:
        return self._meta

    @property
    def axes(self) -> Mapping[str, tuple[str, ...]]:
        return self._axes

    def run(self, units: int, inputs: dict[str, Array]) -> list[Array]:
        self._shapes.check({name: array.shape for name, array in inputs.items()})
        if self._spoiled:
            raise ModelError("the program changed its own weights; export it as model.eval()")
        if torch.get_num_threads() != units > 0:
            torch.set_num_threads(units)
        given = [
            self._tensor(inputs[entry]) if isinstance(entry, str) else entry
            for entry in self._given
        ]
        try:
            with torch.inference_mode():
                found = self._routine.run(given)
                outputs = [_array(found[index]) for index in self._kept]
        except Exception as error:  # PyTorch raises a dozen kinds
            raise ModelError(first_line(error)) from error
        if self._routine.writes and self._version() != self._versions:
            self._spoiled = True
            raise ModelError("the program changed its own weights; export it as model.eval()")
        for tensor, array, dtype in zip(self._meta.outputs, outputs, self._dtypes, strict=True):
            if array.dtype != dtype:
                raise ModelError(f"output {tensor.name!r} came as {array.dtype}, not {dtype}")
        return outputs

    def run_into(self, units: int, inputs: dict[str, Array], room: Room) -> list[Array]:
        found = self.run(units, inputs)
        outputs = room.take([(array.shape, array.dtype) for array in found])
        if outputs is None:
            return found
        for output, array in zip(outputs, found, strict=True):
            np.copyto(output, array)  # whatever the order of its axes in memory is
        return outputs

    def _tensor(self, array: Array) -> torch.Tensor:
        """The input where it lies, unless the program might write there."""
        if self._routine.writes:
            return torch.from_numpy(array.copy())
        if not array.flags.writeable or any(stride < 0 for stride in array.strides):
            array = _as_if_writeable(array)
        return torch.from_numpy(array)

    def _version(self) -> int:
        """Grows when a weight is written to, through whatever view."""
        return sum(weight._version for weight in self._weights)


class _Inputs:
    """What the graph is given: weights, and inputs of a request."""

    def __init__(self, module: GraphModule, archive: Archive) -> None:
        self.given: list[Any] = []
        """In the order of the graph: a weight, the name of an input, or None for a constant."""
        self.weights: list[str] = []
        self.metas: list[TensorMeta] = []
        self.axes: dict[str, tuple[Axis, ...]] = {}
        specs = module.signature.input_specs
        for spec, argument in zip(specs, module.graph.inputs, strict=True):
            kind, said = one(spec)
            name = name_of(argument)
            if kind == "user_input":
                self._input(module, name, one(argument)[0])
            elif kind == "constant_input":
                self.given.append(None)
            elif kind == "parameter":
                self._weight(name, archive.weight(said["parameter_name"]))
            elif kind == "buffer":
                stored = archive.weight if said["persistent"] else archive.constant
                self._weight(name, stored(said["buffer_name"]))
            elif kind == "tensor_constant":
                self._weight(name, archive.constant(said["tensor_constant_name"]))
            else:
                raise ModelError(f"the program takes a {kind}, which is never loaded")

    def _weight(self, name: str, tensor: torch.Tensor) -> None:
        self.weights.append(name)
        self.given.append(tensor)

    def _input(self, module: GraphModule, name: str, kind: str) -> None:
        if kind in _CONSTANTS:
            self.given.append(None)
            return
        if kind != "as_tensor":
            raise ModelError(
                f"input {name!r} is a number; export the model with a tensor in its place, or with "
                "the number fixed"
            )
        value = module.graph.tensor_values[name]
        self.given.append(name)
        self.axes[name] = axes(value)
        self.metas.append(_meta(name, value, "input"))


class _Outputs:
    """What is answered: tensors, and numbers as tensors without axes. Constants are left out."""

    def __init__(self, module: GraphModule) -> None:
        self.kept: list[int] = []
        self.metas: list[TensorMeta] = []
        self.axes: dict[str, tuple[Axis, ...]] = {}
        found: list[tuple[int, Union]] = []
        specs = module.signature.output_specs
        for index, (spec, union) in enumerate(zip(specs, module.graph.outputs, strict=True)):
            kind, said = one(spec)
            if kind == "user_output":
                found.append((index, union))
            elif kind in ("buffer_mutation", "parameter_mutation"):
                raise changing(said.get("buffer_name") or said["parameter_name"])
            elif kind != "user_input_mutation":
                raise ModelError(f"the program has a {kind}: it is one for training")
        names = places(module)
        if len(names) != len(found):
            names = [f"output{number}" for number in range(len(found))]
        taken = {name_of(union) for union in module.graph.inputs}
        for name, (index, union) in zip(names, found, strict=True):
            self._output(module, f"{name}.output" if name in taken else name, index, union)
        if not self.kept:
            raise ModelError("the program has no outputs")

    def _output(self, module: GraphModule, name: str, index: int, union: Union) -> None:
        kind, _ = one(union)
        if kind == "as_tensor":
            value = module.graph.tensor_values[name_of(union)]
            self.axes[name] = axes(value)
            self.metas.append(_meta(name, value, "output"))
        elif kind in _NUMBERS:
            self.axes[name] = ()
            self.metas.append(TensorMeta(name, _NUMBERS[kind], ()))
        elif kind in _CONSTANTS:
            return
        else:
            raise ModelError(f"output {name!r} is no tensor")
        self.kept.append(index)


def _meta(name: str, value: TensorValue, what: str) -> TensorMeta:
    dtype = DTYPES.get(value.dtype)
    if dtype not in DATATYPES:
        said = str(dtype).removeprefix("torch.")
        raise ModelError(
            f"{what} {name!r} has the type {said}, which is not served; convert it in the model"
        )
    shape = tuple(axis if isinstance(axis, int) else -1 for axis in axes(value))
    return TensorMeta(name, DATATYPES[dtype], shape)


def _array(value: Any) -> Array:
    if isinstance(value, torch.Tensor):
        array: Array = value.numpy()
        return array
    return np.asarray(value)


class _Writeable:
    """The memory of an array that only reads it, for a reader that asks for more."""

    def __init__(self, array: Array) -> None:
        self._array = array
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _as_if_writeable(array: Array) -> Array:
    """PyTorch warns of memory that it may only read, and takes no reversed axes."""
    if any(stride < 0 for stride in array.strides):
        return array.copy()
    return np.asarray(_Writeable(array))
