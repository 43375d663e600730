"""Engines for NVIDIA GPUs: ONNX Runtime, by its own kernels, and by TensorRT if asked for."""

from __future__ import annotations

from typing import Final

from cotenant.engines.base import Engine, EngineKind, Opening


class OnnxCuda:
    """``engines.onnx_cuda``."""

    suffixes = (".onnx",)
    drafts = False

    def __init__(self, name: str, rank: int, *, tensorrt: bool) -> None:
        self.name = name
        self.rank = rank
        self._tensorrt = tensorrt

    def refuses(self, opening: Opening) -> str:
        if not opening.target.on_cuda:
            return "it runs on an NVIDIA GPU alone"
        if self._tensorrt and opening.settings.engine != self.name:
            return f"it is used if engine: {self.name} says so"
        return ""

    def open(self, opening: Opening) -> Engine:
        from cotenant.engines.onnx_cuda import OnnxCudaEngine

        path, units, target = opening.path, opening.units, opening.target
        return OnnxCudaEngine(path, units, target, tensorrt=self._tensorrt)


CUDA: Final[EngineKind] = OnnxCuda("onnxruntime", 11, tensorrt=False)
TENSORRT: Final[EngineKind] = OnnxCuda("tensorrt", 80, tensorrt=True)
