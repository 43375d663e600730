"""An exported program three ways: by the engine ``torch``, as ONNX by ONNX Runtime, and by OpenVINO
where that is installed. One thread, in turns; medians in ms.

``python benchmarks/exported.py [--rounds N]``
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cotenant.engines.base import Opening
from cotenant.engines.openvino import imported
from cotenant.engines.registry import open_engine

MODELS = ("convolutions", "transformer")
SHAPES = {"convolutions": (1, 3, 56, 56), "transformer": (1, 64, 256)}


def model(name: str) -> Any:
    """A net of 11 convolutions, or a Transformer encoder of 4 layers; weights at random."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    if name == "transformer":
        layer = nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True)
        return nn.TransformerEncoder(layer, 4).eval()
    layers: list[Any] = []
    for width in (3, *[32] * 10):
        layers += [nn.Conv2d(width, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()


def routes(name: str, x: Any, directory: Path) -> dict[str, Callable[[], Any]]:
    """By name, one execution."""
    import torch

    program = torch.export.export(model(name), (torch.from_numpy(x),))
    paths = {"torch": directory / f"{name}.pt2", "onnxruntime": directory / f"{name}.onnx"}
    torch.export.save(program, paths["torch"])
    torch.onnx.export(program, dynamo=True, verbose=False).save(str(paths["onnxruntime"]))
    found: dict[str, Callable[[], Any]] = {}
    for route, path in paths.items():
        engine = open_engine(Opening(path, (1,)))
        inputs = {engine.meta.inputs[0].name: x}
        found[route] = lambda engine=engine, inputs=inputs: engine.run(1, inputs)
    try:
        openvino = imported()
    except ImportError:
        return found
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()
    compiled = core.compile_model(openvino.convert_model(program), "CPU", settings)
    found["openvino"] = lambda: compiled(x)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    for name in MODELS:
        x = np.random.default_rng(0).random(SHAPES[name], np.float32)
        with tempfile.TemporaryDirectory() as directory:
            calls = routes(name, x, Path(directory))
            took: dict[str, list[float]] = {route: [] for route in calls}
            for _ in range(rounds):
                for route, call in calls.items():
                    began = time.perf_counter()
                    call()
                    took[route].append(time.perf_counter() - began)
        said = ", ".join(f"{r} {1e3 * statistics.median(t):.2f}" for r, t in took.items())
        print(f"{name}: {said}")


if __name__ == "__main__":
    main()
