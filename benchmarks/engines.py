"""ONNX Runtime and OpenVINO on one ONNX model, in turns: CPU time of an execution on one core.

``python benchmarks/engines.py [--rounds N] [--json OUT]``. The model is ResNet-18 without its
normalisations, with random weights. CPU time, so that others on the machine count for less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cotenant.engines.base import Engine
from cotenant.engines.onnx import OnnxEngine
from cotenant.engines.openvino import OpenVinoEngine

ENGINES: dict[str, Any] = {"onnxruntime": OnnxEngine, "openvino": OpenVinoEngine}
BATCHES = (1, 8)
STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))
"""Channels, and the stride of the first block; two blocks of two convolutions each."""


class Network:
    """A graph of FP32 images, 224 x 224, to 1,000 classes."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)
        self._nodes: list[Any] = []
        self._weights: list[Any] = []

    def write(self, path: Path) -> None:
        """Save it as ONNX."""
        x = self._relu(self._convolution("x", 3, 64, size=7, stride=2))
        x = self._node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        channels = 64
        for wanted, stride in STAGES:
            x = self._block(self._block(x, channels, wanted, stride), wanted, wanted, 1)
            channels = wanted
        x = self._node("Flatten", self._node("GlobalAveragePool", x))
        self._nodes.append(helper.make_node("MatMul", [x, self._weight(channels, 1000)], ["y"]))
        graph = helper.make_graph(
            self._nodes,
            "resnet18",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 224, 224])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1000])],
            self._weights,
        )
        opsets = [helper.make_opsetid("", 17)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)

    def _block(self, x: str, channels: int, wanted: int, stride: int) -> str:
        inner = self._relu(self._convolution(x, channels, wanted, size=3, stride=stride))
        inner = self._convolution(inner, wanted, wanted, size=3, stride=1)
        if channels != wanted:
            x = self._convolution(x, channels, wanted, size=1, stride=stride)
        return self._relu(self._node("Add", inner, x))

    def _convolution(self, x: str, channels: int, wanted: int, *, size: int, stride: int) -> str:
        weight = self._weight(wanted, channels, size, size)
        return self._node("Conv", x, weight, pads=[size // 2] * 4, strides=[stride] * 2)

    def _relu(self, x: str) -> str:
        return self._node("Relu", x)

    def _weight(self, *shape: int) -> str:
        name = f"w{len(self._weights)}"
        scale = np.sqrt(np.prod(shape) / max(shape[0], shape[1]))
        values = (self._random.normal(size=shape) / scale).astype(np.float32)
        self._weights.append(numpy_helper.from_array(values, name))
        return name

    def _node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"n{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name


def measure(engines: dict[str, Engine], batch: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of CPU time of each execution; who is first changes by the round."""
    x = np.random.default_rng(0).normal(size=(batch, 3, 224, 224)).astype(np.float32)
    answers = [engine.run(1, {"x": x})[0] for engine in engines.values()]
    assert np.allclose(*answers, rtol=1e-3, atol=1e-3 * np.abs(answers[0]).max())
    found: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 2):
        order = list(engines.items())
        for name, engine in order if turn % 2 else order[::-1]:
            began = time.process_time()
            engine.run(1, {"x": x})
            if turn >= 2:
                found[name].append(1e3 * (time.process_time() - began))
    return found


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="executions of one image each")
    parser.add_argument("--json", type=Path, help="where raw samples go")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        Network().write(path)
        engines = {name: opened(path, (1,)) for name, opened in ENGINES.items()}
    samples = {b: measure(engines, b, max(2, args.rounds // b)) for b in BATCHES}
    for batch, arms in samples.items():
        for name, times in arms.items():
            low, middle, high = statistics.quantiles(times, n=4)
            print(f"batch {batch}  {name:12} {middle:7.1f} ms [{low:.1f}-{high:.1f}]")
    if args.json:
        args.json.write_text(json.dumps(samples))


if __name__ == "__main__":
    main()
