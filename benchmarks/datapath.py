"""What it saves to have outputs written where they are wanted: 4.8 MB in and 4.8 MB out.

A worker executes requests as a node's worker does, in tensor memory, with and without the engine's
own way of writing there (``engines.base.InPlace``). Arms take turns, one thread; a request lies in
another place of tensor memory than the one before. CPU time of the process, since other processes
may have the cores as well: medians with quartiles, and of each pair of neighbours the ratio.

``python benchmarks/datapath.py [--rounds N] [--json OUT]``
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cotenant.domain.config import ModelSettings
from cotenant.runtime.arena import Arena
from cotenant.runtime.messages import Done, Item, Open, Opened, Place, Run
from cotenant.runtime.worker import Worker

SIDE = 632
SHAPE = (1, 3, SIDE, SIDE)
SIZE = 4 * 3 * SIDE * SIDE
PLACES = 8
"""Requests in tensor memory; more than a cache of 64 MB holds of inputs and outputs."""
PACKAGES = ("onnxruntime", "openvino")


def write(path: Path, kind: str) -> Path:
    """``scale``: next to no computation; ``convolution``: 3 × 3, on as many channels."""
    random = np.random.default_rng(0)
    axes: list[Any] = ["n", 3, "h", "w"]
    known = {
        "scale": (helper.make_node("Mul", ["x", "k"], ["y"]), np.array([2], np.float32)),
        "convolution": (
            helper.make_node("Conv", ["x", "k"], ["y"], pads=[1, 1, 1, 1]),
            random.standard_normal((3, 3, 3, 3)).astype(np.float32),
        ),
    }
    node, weights = known[kind]
    graph = helper.make_graph(
        [node],
        kind,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, axes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, axes)],
        [numpy_helper.from_array(weights, "k")],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


class Bench:
    """A worker with a model, within this process."""

    def __init__(self, path: Path, engine: str) -> None:
        self._arena = Arena("bench", PLACES * 4 * SIZE)
        ours, self._socket = socket.socketpair()
        ours.close()
        self._worker = Worker(self._socket, self._arena.memory)
        settings = ModelSettings(engine=engine, shapes={"x": SHAPE})
        opened = self._worker._open(Open(str(path), (1,), 1, settings=settings))
        assert isinstance(opened, Opened), opened
        self._in_place = self._worker._in_place
        assert self._in_place is not None
        x = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
        self._items = []
        for _ in range(PLACES):
            block = self._arena.alloc(2 * SIZE + 64)
            self._arena.memory[block : block + SIZE] = x.tobytes()
            self._items.append(Item(1, (Place(SHAPE, block, SIZE),), block + SIZE, SIZE + 64))
        for _ in range(4):  # until what may be bound is bound
            self.run(0, bound=True)

    def run(self, number: int, *, bound: bool) -> float:
        """Seconds of CPU time of one execution."""
        self._worker._in_place = self._in_place if bound else None
        order = Run(1, (0,), 1, 0, (self._items[number % PLACES],))
        began = time.process_time()
        done = self._worker._run(order)
        took = time.process_time() - began
        assert isinstance(done, Done), done
        return took


def spread(values: list[float], digits: int) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {k: round(v, digits) for k, v in (("p25", low), ("p50", middle), ("p75", high))}


def compare(bench: Bench, rounds: int) -> dict[str, Any]:
    """Both arms in turns, the first one changing."""
    took: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for place, bound in enumerate((number % 2 == 0, number % 2 == 1)):
            took[bound].append(1e3 * bench.run(2 * number + place, bound=bound))
    ratios = [a / b for a, b in zip(took[True], took[False], strict=True)]
    return {
        "bound_ms": spread(took[True], 4),
        "copied_ms": spread(took[False], 4),
        "ratio": spread(ratios, 3),
        "raw_ms": {"bound": took[True], "copied": took[False]},
    }


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    machine = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    results: dict[str, Any] = {"bytes": SIZE, "versions": versions, "machine": machine}
    for kind in ("scale", "convolution"):
        for engine in PACKAGES:
            with tempfile.TemporaryDirectory() as directory:
                path = write(Path(directory) / "model.onnx", kind)
                found = compare(Bench(path, engine), args.rounds)
            results[f"{kind} {engine}"] = found
            said = {k: found[k] for k in ("bound_ms", "copied_ms", "ratio")}
            print(f"{kind} {engine}: {json.dumps(said)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
