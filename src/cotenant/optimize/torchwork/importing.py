"""An ONNX graph as a torch module, whose layers can be trained, and read back by their names.

Common operators of feed-forward networks are known. Names of nodes are those of the graph's: where
a node computes with weights, the module of that name has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from onnx import helper, numpy_helper
from torch import nn

from cotenant.domain.errors import ModelError

Values = dict[str, Any]


class Graph(nn.Module):
    """The nodes in their order. ``layers``: by the name of a node, the module with its weights.
    ``forward`` takes the inputs in the graph's order, and gives a tuple of outputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        graph = model.graph
        self.constants: dict[str, Any] = {
            t.name: np.array(numpy_helper.to_array(t)) for t in graph.initializer
        }
        self.taken = [i.name for i in graph.input if i.name not in self.constants]
        self.given = [o.name for o in graph.output]
        self.layers = nn.ModuleDict()
        self.steps: list[tuple[Any, dict[str, Any], list[str]]] = []
        """Nodes, their attributes, and what they take: of layers the first input alone."""
        for node in graph.node:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = _constant(node)
            else:
                self._add(node)

    def _add(self, node: Any) -> None:
        build = _LAYERS.get(node.op_type)
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        weights = [self.constants.get(name) for name in node.input[1:] if name]
        if build is not None and weights and all(w is not None for w in weights):
            self.layers[key_of(node)] = build(given, *weights)
            self.steps.append((node, given, [node.input[0]]))
        elif node.op_type in _PLAIN:
            self.steps.append((node, given, list(node.input)))
        else:
            raise ModelError(f"its operator {node.op_type} cannot be trained here")

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the class."""
        values: Values = dict(zip(self.taken, inputs, strict=True))
        for node, given, names in self.steps:
            taken = [self._value(values, name) for name in names]
            key = key_of(node)
            values[node.output[0]] = (
                self.layers[key](*taken)
                if key in self.layers
                else _PLAIN[node.op_type](given, *taken)
            )
        return tuple(values[name] for name in self.given)

    def last(self) -> list[nn.Module]:
        """The layers from which the outputs follow without another layer between."""
        made = {node.output[0]: (node, names) for node, _, names in self.steps}
        found, left = [], list(self.given)
        while left:
            name = left.pop()
            if name not in made:
                continue
            node, names = made[name]
            if key_of(node) in self.layers:
                found.append(self.layers[key_of(node)])
            else:
                left += names
        return found

    def _value(self, values: Values, name: str) -> Any:
        if name in values:
            return values[name]
        return self.constants[name] if name else None


def key_of(node: Any) -> str:
    """The name of a node's module: torch allows no points in it."""
    return str(node.name or node.output[0]).replace(".", "_")


def _constant(node: Any) -> Any:
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        return np.array(numpy_helper.to_array(value) if attribute.name == "value" else value)
    raise ModelError("a constant of its graph has no value")


# --- layers with weights ------------------------------------------------------------------------


def _conv(given: dict[str, Any], weight: Any, bias: Any = None) -> nn.Module:
    dims = weight.ndim - 2
    pads = list(given.get("pads", [0] * 2 * dims))
    if dims not in (1, 2) or given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise ModelError("its convolutions are of a kind that cannot be trained here")
    if pads[:dims] != pads[dims:]:
        raise ModelError("its convolutions are padded unevenly, which cannot be trained here")
    kind = nn.Conv1d if dims == 1 else nn.Conv2d
    group = given.get("group", 1)
    layer = kind(
        weight.shape[1] * group,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=tuple(given.get("strides", [1] * dims)),
        padding=tuple(pads[:dims]),
        dilation=tuple(given.get("dilations", [1] * dims)),
        groups=group,
        bias=bias is not None,
    )
    return _filled(layer, weight=weight, bias=bias)


def _gemm(given: dict[str, Any], weight: Any, bias: Any = None) -> nn.Module:
    if given.get("transA") or given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0:
        raise ModelError("its Gemm is of a kind that cannot be trained here")
    matrix = weight if given.get("transB") else weight.T
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None)
    return _filled(layer, weight=matrix, bias=None if bias is None else bias.reshape(-1))


def _matmul(given: dict[str, Any], weight: Any) -> nn.Module:
    del given
    if weight.ndim != 2:
        raise ModelError("its MatMul is of more than matrices, which cannot be trained here")
    return _filled(nn.Linear(weight.shape[0], weight.shape[1], bias=False), weight=weight.T)


def _norm(given: dict[str, Any], scale: Any, bias: Any, mean: Any, variance: Any) -> nn.Module:
    layer = _Norm(len(scale), eps=given.get("epsilon", 1e-5))
    return _filled(layer, weight=scale, bias=bias, running_mean=mean, running_var=variance)


class _Norm(nn.BatchNorm2d):
    """Of any number of axes; always by the statistics that were found in training."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        del input


def _filled(layer: nn.Module, **arrays: Any) -> nn.Module:
    for name, array in arrays.items():
        if array is not None:
            tensor = torch.from_numpy(np.array(array, dtype=np.float32))
            getattr(layer, name).data.copy_(tensor)
    return layer.eval()


_LAYERS: Final[dict[str, Callable[..., nn.Module]]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _norm,
}


# --- operators without --------------------------------------------------------------------------


def _tensor(value: Any) -> Any:
    return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value


def _pool(kind: str) -> Callable[..., Any]:
    def run(given: dict[str, Any], x: Any) -> Any:
        size = tuple(given["kernel_shape"])
        dims = len(size)
        pads = list(given.get("pads", [0] * 2 * dims))
        even = pads[:dims] == pads[dims:] and not given.get("ceil_mode")
        plain = given.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
        if not (even and plain) or dims not in (1, 2):
            raise ModelError("its pooling is of a kind that cannot be trained here")
        strides = tuple(given.get("strides", [1] * dims))
        function: Any = getattr(nn.functional, f"{kind}_pool{dims}d")
        if kind == "max":
            return function(x, size, strides, tuple(pads[:dims]))
        counted = bool(given.get("count_include_pad", 0))
        return function(x, size, strides, tuple(pads[:dims]), count_include_pad=counted)

    return run


def _flatten(given: dict[str, Any], x: Any) -> Any:
    if given.get("axis", 1) != 1:
        raise ModelError("it flattens in a way that cannot be trained here")
    return torch.flatten(x, 1)


def _reshape(given: dict[str, Any], x: Any, shape: Any) -> Any:
    del given
    if not isinstance(shape, np.ndarray):
        raise ModelError("it computes a shape, which cannot be trained here")
    sizes = [x.shape[i] if s == 0 else int(s) for i, s in enumerate(shape)]
    if len(sizes) == 2 and x.ndim > 2:
        return torch.flatten(x, 1)
    return x.reshape(sizes)


def _clip(given: dict[str, Any], x: Any, low: Any = None, high: Any = None) -> Any:
    low = given.get("min") if low is None else float(low)
    high = given.get("max") if high is None else float(high)
    return torch.clamp(x, low, high)


def _mean(given: dict[str, Any], x: Any, axes: Any = None) -> Any:
    over = given.get("axes") if axes is None else [int(a) for a in axes]
    return x.mean(dim=over, keepdim=bool(given.get("keepdims", 1)))


def _wide(how: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda _, x: how(x)


_PLAIN: Final[dict[str, Callable[..., Any]]] = {
    "Add": lambda _, a, b: _tensor(a) + _tensor(b),
    "AveragePool": _pool("avg"),
    "Clip": _clip,
    "Concat": lambda given, *parts: torch.cat([_tensor(p) for p in parts], dim=given["axis"]),
    "Div": lambda _, a, b: _tensor(a) / _tensor(b),
    "Dropout": lambda _, x, *_rest: x,
    "Elu": lambda given, x: nn.functional.elu(x, given.get("alpha", 1.0)),
    "Flatten": _flatten,
    "Gelu": lambda given, x: nn.functional.gelu(
        x, approximate=given.get("approximate", b"none").decode()
    ),
    "GlobalAveragePool": lambda _, x: x.mean(dim=tuple(range(2, x.ndim)), keepdim=True),
    "GlobalMaxPool": lambda _, x: x.amax(dim=tuple(range(2, x.ndim)), keepdim=True),
    "HardSigmoid": lambda given, x: torch.clamp(
        given.get("alpha", 0.2) * x + given.get("beta", 0.5), 0, 1
    ),
    "HardSwish": _wide(nn.functional.hardswish),
    "Identity": _wide(lambda x: x),
    "LeakyRelu": lambda given, x: nn.functional.leaky_relu(x, given.get("alpha", 0.01)),
    "LogSoftmax": lambda given, x: torch.log_softmax(x, given.get("axis", -1)),
    "MaxPool": _pool("max"),
    "Mul": lambda _, a, b: _tensor(a) * _tensor(b),
    "ReduceMean": _mean,
    "Relu": _wide(nn.functional.relu),
    "Reshape": _reshape,
    "Sigmoid": _wide(torch.sigmoid),
    "Softmax": lambda given, x: torch.softmax(x, given.get("axis", -1)),
    "Sub": lambda _, a, b: _tensor(a) - _tensor(b),
    "Tanh": _wide(torch.tanh),
    "Transpose": lambda given, x: x.permute(*given["perm"]),
}
