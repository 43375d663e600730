"""A small model for images and its data, made without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

SIZE, CHANNELS, CLASSES = 16, 32, 4


def graph(channels: int = CHANNELS, classes: int = CLASSES) -> Any:
    """Two convolutions, each class one direction in what they find."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    arrays = {
        "w1": random.normal(0, 0.5, (channels, 1, 3, 3)),
        "b1": random.normal(0, 0.1, channels),
        "w2": random.normal(0, 0.1, (channels, channels, 3, 3)),
        "b2": random.normal(0, 0.1, channels),
        "w3": random.normal(0, 1, (channels, classes)),
        "b3": np.zeros(classes),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], "dense"),
    ]
    made = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, SIZE, SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", classes])],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def images(rows: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Gratings of several directions, with noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    turns = random.uniform(0, np.pi, rows)[:, None, None]
    waves = np.sin(0.8 * (np.cos(turns) * x + np.sin(turns) * y))
    noisy = waves * random.uniform(0.3, 2, rows)[:, None, None] + random.normal(0, 0.1, waves.shape)
    return noisy.astype(np.float32)[:, None]


def put(root: Path, rows: int = 900, labelled: bool = True) -> Path:
    """Version 1 of a model ``small`` in ``root``; its labels are what it says itself."""
    import onnx
    import onnxruntime as ort

    version = root / "small" / "1"
    version.mkdir(parents=True)
    onnx.save(graph(), str(version / "model.onnx"))
    x = images(rows)
    arrays = {"x": x}
    if labelled:
        session = ort.InferenceSession(str(version / "model.onnx"))
        arrays["labels"] = session.run(None, {"x": x})[0].argmax(axis=1)
    np.savez(version / "check.npz", **arrays)
    return version
