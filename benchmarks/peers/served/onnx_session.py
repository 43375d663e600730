"""The same ONNX Runtime session for every server: one thread, no spinning."""

from __future__ import annotations

import onnxruntime as ort


def open_session(path: str) -> ort.InferenceSession:
    """Open the model on the CPU with one intra-op thread; more instances give parallelism."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
