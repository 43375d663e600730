"""A module that rounds as int8 does, by NNCF, and its file: a graph whose Q and DQ operators say
what is computed in 8 bits, which ONNX Runtime and OpenVINO both read.

* Activations are unsigned, with a zero of their own; weights signed, by output channel. ONNX
  Runtime is slow where both are signed.
* Weights use half of their range, so that sums of two products fit 16 bits: processors with AVX2
  and no VNNI would overflow otherwise.
* NNCF's quantizers write Q and DQ themselves (``QuantizerExportMode``). ``nncf.strip`` is another
  way to the same; it needs a package more, torchao.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from cotenant.engines.base import Array
from cotenant.optimize.torchwork.importing import Graph

_OPSET: Final = 17
_MOST: Final = 64
"""Of a weight, in steps: half of what 8 bits hold."""


def rounded(nncf: Any, module: Graph, requests: list[dict[str, Array]]) -> nn.Module:
    """A copy of the module that rounds, its ranges those of the requests (by names of inputs). It
    takes and gives what the module does."""
    rows = [_tensors(module, request) for request in requests]
    with contextlib.redirect_stdout(io.StringIO()):  # bars of progress
        made: nn.Module = nncf.quantize(
            _named(module),
            nncf.Dataset(rows),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(rows),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.ENABLE
            ),
        )
    return made.eval()


def write(made: nn.Module, module: Graph, request: dict[str, Array], path: Path) -> Path:
    """The graph of what ``rounded`` made of a module, as a file; its weights take a byte each."""
    from nncf.torch.quantization import layers

    for part in made.modules():
        if isinstance(part, layers.BaseQuantizer):
            part.set_export_mode(layers.QuantizerExportMode.ONNX_QUANTIZE_DEQUANTIZE_PAIRS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's age, and of what tracing cannot follow
        torch.onnx.export(
            made,
            _tensors(module, request),
            str(path),
            dynamo=False,
            opset_version=_OPSET,
            input_names=module.taken,
            output_names=module.given,
            dynamic_axes={name: {0: "rows"} for name in (*module.taken, *module.given)},
        )
    model = onnx.load(str(path))
    _in_bytes(model)
    onnx.save(model, str(path))
    return path


def _tensors(module: Graph, request: dict[str, Array]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(request[name]) for name in module.taken)


def _named(module: Graph) -> nn.Module:
    """The module with a parameter for each input: NNCF rounds no inputs of another kind."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = ["self", *(f"input_{number}" for number in range(len(module.taken)))]

    def forward(self: Any, *inputs: torch.Tensor) -> Any:
        return self.graph(*inputs)

    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind) for name in names]
    )
    made = type("Named", (nn.Module,), {"forward": forward})()
    made.graph = module
    return made  # type: ignore[no-any-return]


# --- the graph as engines want it -----------------------------------------------------------------


class _Stored:
    """What is fixed in a graph, and which node makes what."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                self.arrays[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)

    def nodes(self, kind: str) -> list[Any]:
        """Those of a kind, as a list that stays while nodes come and go."""
        return [node for node in self.graph.node if node.op_type == kind]

    def maker(self, name: str) -> Any:
        """The node that gives it; None if there is none."""
        return next((node for node in self.graph.node if name in node.output), None)

    def add(self, name: str, array: Array) -> str:
        """Store one."""
        self.arrays[name] = array
        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def replace(self, node: Any, other: Any) -> None:
        """Put one in a node's place."""
        self.graph.node.insert(list(self.graph.node).index(node), other)
        self.graph.node.remove(node)

    def sweep(self) -> None:
        """Take out what nothing needs, of constants and what only reads them."""
        used = {name for node in self.graph.node for name in node.input}
        for node in self.nodes("DequantizeLinear"):
            if node.output[0] not in used and node.input[0] in self.arrays:
                self.graph.node.remove(node)
        used = {name for node in self.graph.node for name in node.input}
        for tensor in [t for t in self.graph.initializer if t.name not in used]:
            self.graph.initializer.remove(tensor)


def _in_bytes(model: Any) -> None:
    """Weights as steps of 8 bits, and the forms of nodes of which engines see that they can be
    computed so."""
    stored = _Stored(model.graph)
    for node in stored.nodes("QuantizeLinear"):
        if node.input[0] in stored.arrays:
            weight, scale, zero = (stored.arrays[name] for name in node.input)
            stored.add(node.output[0], _steps(weight, scale, zero, _axis(node)))
            stored.graph.node.remove(node)
    for node in stored.nodes("Transpose"):
        _untransposed(stored, node)
    for node in stored.nodes("Flatten"):
        _reshaped(stored, node)
    for node in stored.nodes("Gemm"):
        _bias_in_steps(stored, node)
    stored.sweep()


def _axis(node: Any) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 1)


def _steps(weight: Array, scale: Array, zero: Array, axis: int) -> Array:
    if scale.ndim:
        shape = [-1 if number == axis else 1 for number in range(weight.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    found: Array = np.clip(np.rint(weight / scale) + zero, -_MOST, _MOST).astype(zero.dtype)
    return found


def _untransposed(stored: _Stored, node: Any) -> None:
    """A matrix is taken in 8 bits from a DQ alone, not from a transposition after it."""
    before = stored.maker(node.input[0])
    if before is None or before.op_type != "DequantizeLinear":
        return
    matrix = stored.arrays.get(before.input[0])
    if matrix is None or matrix.ndim != 2:
        return
    name = stored.add(f"{node.output[0]}.steps", matrix.T)
    turned = helper.make_node(
        "DequantizeLinear", [name, *before.input[1:]], list(node.output), axis=1 - _axis(before)
    )
    stored.replace(node, turned)


def _reshaped(stored: _Stored, node: Any) -> None:
    """ONNX Runtime moves a DQ past a Reshape, not past a Flatten."""
    if _axis(node) == 1:
        shape = stored.add(f"{node.output[0]}.shape", np.array([0, -1], dtype=np.int64))
        stored.replace(
            node, helper.make_node("Reshape", [node.input[0], shape], list(node.output), node.name)
        )


def _bias_in_steps(stored: _Stored, node: Any) -> None:
    """ONNX Runtime computes a Gemm that gives floats in 8 bits only where its bias is in steps of
    the products."""
    source, weight = stored.maker(node.input[0]), stored.maker(node.input[1])
    if source is not None and source.op_type == "Reshape":
        source = stored.maker(source.input[0])
    if any(n is None or n.op_type != "DequantizeLinear" for n in (source, weight)):
        return
    if len(node.input) < 3 or node.input[2] not in stored.arrays:
        return
    bias = stored.arrays[node.input[2]]
    scale = stored.arrays[source.input[1]] * stored.arrays[weight.input[1]]
    found = np.rint(bias / scale)
    if np.abs(found).max() >= 2**31 - 1 or (scale.ndim and scale.shape != bias.shape):
        return
    name = stored.add(f"{node.output[0]}.bias", found.astype(np.int32))
    known = stored.add(f"{node.output[0]}.bias_scale", np.asarray(scale, dtype=np.float32))
    given = f"{node.output[0]}.bias_given"
    made = helper.make_node("DequantizeLinear", [name, known], [given], axis=0)
    stored.graph.node.insert(list(stored.graph.node).index(node), made)
    node.input[2] = given
