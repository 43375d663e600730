"""A node of one's own on loopback, with one small model, and what is seen of it from outside."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper

_PATIENCE_S = 90.0
_CONFIG = """\
node:
  models: ./models
  http: 127.0.0.1:{http}
  grpc: 127.0.0.1:{grpc}
services:
- {{name: small, objective: {{latency: 1s}}}}
"""


class Node:
    """``cotenant serve`` in ``directory``; ``http`` and ``grpc`` are its ports."""

    def __init__(self, directory: Path) -> None:
        self.http, self.grpc = _free_port(), _free_port()
        self._log = directory / "node.log"
        version = directory / "models" / "small" / "1"
        version.mkdir(parents=True)
        onnx.save(_model(), version / "model.onnx")
        config = directory / "cotenant.yaml"
        config.write_text(_CONFIG.format(http=self.http, grpc=self.grpc))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cotenant", "serve", str(config)],
                stdout=log,
                stderr=log,
                cwd=directory,
                start_new_session=True,
            )

    def __enter__(self) -> Node:
        end = time.monotonic() + _PATIENCE_S
        while "serving on" not in self.said:
            if not self.alive or time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"the node did not start:\n{self.said}")
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def memory(self) -> int:
        """Bytes that the node's own process holds."""
        rss: int = psutil.Process(self._process.pid).memory_info().rss
        return rss


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _model() -> onnx.ModelProto:
    weights = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(weights, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
