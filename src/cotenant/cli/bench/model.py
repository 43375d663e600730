"""The served model of the benchmark: a convolutional network of fixed random weights."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np

from cotenant.engines.onnx import OnnxEngine

INPUT = (3, 64, 64)
_BASE = ((48, 1), (80, 1), (112, 2), (160, 2))
"""Width and stride of the layers of a model that takes some 2 to 6 ms on one core."""
_PROBE = 8
"""Layers that are added to see how long one takes."""


def write_model_of(path: Path, seconds: float) -> None:
    """Write a model whose execution takes about so long on one core of this machine: with more
    layers than the base, or narrower ones."""
    write_model(path)
    base = _took(path)
    if seconds < base:
        write_model(path, scale=(seconds / base) ** 0.5)
        return
    write_model(path, more=_PROBE)
    layer = max(1e-6, (_took(path) - base) / _PROBE)
    write_model(path, more=round((seconds - base) / layer))


def _took(path: Path) -> float:
    """Median seconds of an execution on one thread."""
    engine = OnnxEngine(path, (1,))
    image = np.random.default_rng(1).random((1, *INPUT), dtype=np.float32)
    times = []
    for _ in range(25):
        began = time.perf_counter()
        engine.run(1, {"image": image})
        times.append(time.perf_counter() - began)
    return statistics.median(times[5:])


def write_model(path: Path, more: int = 0, scale: float = 1.0) -> None:
    """Write the ONNX file: 3x64x64 image in, 10 scores out, batch axis free; with so many layers
    more than the base, all of them so many times as wide."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(7)
    nodes, weights = [], []
    name, channels = "image", INPUT[0]
    layers = [(max(8, round(scale * width)), stride) for width, stride in _BASE]
    layers += [(layers[-1][0], 1)] * more
    for index, (width, stride) in enumerate(layers):
        kernel = random.standard_normal((width, channels, 3, 3)) / (9 * channels) ** 0.5
        weights.append(numpy_helper.from_array(kernel.astype(np.float32), f"w{index}"))
        nodes.append(
            helper.make_node(
                "Conv",
                [name, f"w{index}"],
                [f"c{index}"],
                strides=[stride, stride],
                pads=[1, 1, 1, 1],
            )
        )
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"]))
        name, channels = f"r{index}", width
    head = random.standard_normal((channels, 10)).astype(np.float32)
    weights.append(numpy_helper.from_array(head, "head"))
    nodes.append(helper.make_node("GlobalAveragePool", [name], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    nodes.append(helper.make_node("MatMul", ["flat", "head"], ["scores"]))
    graph = helper.make_graph(
        nodes,
        "colocate",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", *INPUT])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 10])],
        weights,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)


def request(model: str, port: int) -> bytes:
    """The bytes of one HTTP inference request, image in binary form."""
    image = np.random.default_rng(1).random((1, *INPUT), dtype=np.float32)
    head = (
        '{"inputs":[{"name":"image","datatype":"FP32","shape":[1,3,64,64],"parameters":'
        f'{{"binary_data_size":{image.nbytes}}}}}],'
        '"outputs":[{"name":"scores","parameters":{"binary_data":true}}]}'
    ).encode()
    body = head + image.tobytes()
    return (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: {len(head)}"
        f"\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
