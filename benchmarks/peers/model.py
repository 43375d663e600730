"""The two ONNX models every server answers with, the inputs sent and the answers expected.

Both are made from a seed, so two runs serve the same bytes. Both have a dynamic batch axis.

* ``tiny``: FP32 ``[n, 64]`` -> ``[n, 8]``, an unrolled recurrence: about 1 ms on one core for one
  row and 2 ms for eight, so batching pays. Its weights (0.6 MB) stay in a core's own cache, so a
  neighbour's memory traffic disturbs it little.
* ``image``: FP32 ``[n, 3, 224, 224]`` -> ``[n, 3]``, the mean of each channel: about 0.02 ms for
  an input of 602,112 bytes, so moving the bytes is all the work.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

SEED = 20250
TINY_INPUT, TINY_STATE, TINY_OUTPUT, TINY_STEPS = 64, 256, 8, 280
IMAGE_SHAPE = (3, 224, 224)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Model:
    """One model on disk, the single input sent to it and the answer that is right."""

    name: str
    path: Path
    sha256: str
    input: Floats
    expected: Floats


def make_models(folder: Path) -> dict[str, Model]:
    """Write ``NAME/1/model.onnx`` under `folder` for both models and return them by name."""
    rng = np.random.default_rng(SEED)
    # Three decimals keep the JSON body near 600 bytes; it is the same body for every server.
    row = np.round(rng.random((1, TINY_INPUT)), 3).astype(np.float32)
    image = rng.random((1, *IMAGE_SHAPE), dtype=np.float32)
    weights = _tiny_weights(rng)
    return {
        "tiny": _save(folder, "tiny", _tiny_graph(weights), row, _tiny_answer(weights, row)),
        "image": _save(folder, "image", _image_graph(), image, image.mean(axis=(2, 3))),
    }


def _tiny_weights(rng: np.random.Generator) -> dict[str, Floats]:
    """Way in, two alternating state matrices, way out.

    The state matrices are Hadamard matrices with rows permuted and columns signed, so orthogonal:
    with the absolute value as activation, the state's norm is kept over all steps, and rounding
    differences between servers are not amplified.
    """
    hadamard: npt.NDArray[np.float64] = np.ones((1, 1))
    while len(hadamard) < TINY_STATE:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    hadamard /= TINY_STATE**0.5
    weights = {"in": rng.standard_normal((TINY_INPUT, TINY_STATE)) / TINY_INPUT**0.5}
    for name in ("even", "odd"):
        signs = rng.choice([-1.0, 1.0], TINY_STATE)
        weights[name] = hadamard[rng.permutation(TINY_STATE)] * signs
    weights["out"] = rng.standard_normal((TINY_STATE, TINY_OUTPUT)) / TINY_STATE**0.5
    return {name: matrix.astype(np.float32) for name, matrix in weights.items()}


def _step_matrix(step: int) -> str:
    return "odd" if step % 2 else "even"


def _tiny_answer(weights: dict[str, Floats], row: Floats) -> Floats:
    state: Floats = row @ weights["in"]
    for step in range(TINY_STEPS):
        state = np.abs(state @ weights[_step_matrix(step)])
    answer: Floats = state @ weights["out"]
    return answer


def _tiny_graph(weights: dict[str, Floats]) -> onnx.GraphProto:
    nodes = [helper.make_node("MatMul", ["x", "in"], ["h0"])]
    for step in range(TINY_STEPS):
        product, state = f"z{step}", f"h{step + 1}"
        nodes.append(helper.make_node("MatMul", [f"h{step}", _step_matrix(step)], [product]))
        nodes.append(helper.make_node("Abs", [product], [state]))
    nodes.append(helper.make_node("MatMul", [f"h{TINY_STEPS}", "out"], ["y"]))
    return helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", TINY_INPUT])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", TINY_OUTPUT])],
        [numpy_helper.from_array(matrix, name) for name, matrix in weights.items()],
    )


def _image_graph() -> onnx.GraphProto:
    return helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["y"]),
        ],
        "image",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *IMAGE_SHAPE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", IMAGE_SHAPE[0]])],
    )


def _save(folder: Path, name: str, graph: onnx.GraphProto, sent: Floats, expected: Floats) -> Model:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    payload = model.SerializeToString(deterministic=True)
    path = folder / name / "1" / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(payload)
    return Model(name, path, hashlib.sha256(payload).hexdigest(), sent, expected)
