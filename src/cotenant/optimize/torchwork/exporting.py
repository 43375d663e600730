"""Weights of a module back in the graph that it was imported from, also where there are fewer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from torch import nn

from cotenant.optimize.torchwork.importing import Graph, key_of


def write(model: Any, module: Graph, path: Path) -> Path:
    """The graph ``model`` with the module's weights, as a file."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    constants = {t.name: t for t in made.graph.initializer}
    for node in list(made.graph.node):
        key = key_of(node)
        if key not in module.layers:
            continue
        arrays = _arrays(node, module.layers[key])
        for position, array in enumerate(arrays, 1):
            name = f"{key}.{position}"  # its own: two nodes may have had one together
            tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
            made.graph.initializer.append(tensor)
            node.input[position] = name
        for attribute in node.attribute:
            if attribute.name == "group":
                attribute.i = int(getattr(module.layers[key], "groups", 1))
    used = {name for node in made.graph.node for name in node.input}
    for name, tensor in constants.items():
        if name not in used:
            made.graph.initializer.remove(tensor)
    del made.graph.value_info[:]  # sizes there may be those of before
    onnx.save(made, str(path))
    return path


def _arrays(node: Any, layer: Any) -> list[Any]:
    """In the order of the node's inputs after the first."""
    found = [layer.weight]
    if isinstance(layer, nn.BatchNorm2d):
        found += [layer.bias, layer.running_mean, layer.running_var]
    elif layer.bias is not None:
        found.append(layer.bias)
    arrays = [tensor.detach().cpu().numpy() for tensor in found]
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    if node.op_type in ("Gemm", "MatMul") and not transposed:
        arrays[0] = arrays[0].T
    return arrays
