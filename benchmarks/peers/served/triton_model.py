"""Triton Python backend: ONNX Runtime on the requests Triton hands over, one batch at a time."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from onnx_session import open_session


class TritonPythonModel:
    """One instance per stub process; parameter ``path`` names the model file."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self._session = open_session(config["parameters"]["path"]["string_value"])

    def execute(self, requests: list[Any]) -> list[Any]:
        inputs = [pb_utils.get_input_tensor_by_name(r, "x").as_numpy() for r in requests]
        batch = inputs[0] if len(inputs) == 1 else np.concatenate(inputs)
        outputs = self._session.run(None, {"x": batch})[0]
        replies, at = [], 0
        for x in inputs:
            y = pb_utils.Tensor("y", outputs[at : at + len(x)])
            at += len(x)
            replies.append(pb_utils.InferenceResponse([y]))
        return replies
