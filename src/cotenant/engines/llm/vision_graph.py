"""The vision tower as an ONNX graph, and its sessions: pixels of tiles to rows of the decoder.

| input | is |
| --- | --- |
| ``pixels`` FP32 [N, side, side, 3] | normalized |

| output | is |
| --- | --- |
| ``rows`` FP32 [N, rows, out] | what stands in the places of tokens |

Weights are FP32, whatever the build of the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from cotenant.domain.errors import ModelError
from cotenant.engines.base import first_line
from cotenant.engines.llm.checkpoint import Checkpoint
from cotenant.engines.llm.families.base import Floats
from cotenant.engines.llm.graph import MICROSOFT, Graph, Weights, finished, session_of
from cotenant.engines.llm.vision import PREFIX, Vision


class VisionRunner:
    """A tower that is ready, with a session for each number of threads in ``units``. Raises
    ModelError if the files are damaged or ONNX Runtime refuses the graph."""

    def __init__(self, checkpoint: Checkpoint, units: Sequence[int]) -> None:
        assert checkpoint.vision is not None
        self.vision = checkpoint.vision
        made = _Tower(checkpoint, self.vision)
        graph, weights = made.run()
        try:
            self._sessions = {n: session_of(graph, weights, n) for n in sorted(units)}
        except Exception as error:  # ONNX Runtime raises a dozen kinds of its own
            raise ModelError(f"ONNX Runtime refuses the tower: {first_line(error)}") from error

    def encode(self, units: int, pixels: Floats) -> Floats:
        """The rows [rows, out] of one tile [side, side, 3], on so many threads. Raises
        ModelError."""
        fitting = [n for n in self._sessions if n <= units]
        session: ort.InferenceSession = self._sessions[max(fitting, default=min(self._sessions))]
        try:
            (found,) = session.run(["rows"], {"pixels": pixels[None]})
        except Exception as error:
            raise ModelError(first_line(error)) from error
        return np.asarray(found[0], np.float32)


class _Tower:
    """Builds the graph from the bottom up."""

    def __init__(self, checkpoint: Checkpoint, vision: Vision) -> None:
        self._checkpoint = checkpoint
        self._vision = vision
        self._graph = Graph()

    def run(self) -> tuple[onnx.ModelProto, Weights]:
        graph, vision = self._graph, self._vision
        stream = self._patches()
        for layer in range(vision.layers):
            normed = self._norm(stream, f"{layer}.first_norm")
            stream = graph.node("Add", stream, self._attention(normed, layer))
            normed = self._norm(stream, f"{layer}.second_norm")
            bent = graph.node("FastGelu", self._multiply(normed, f"{layer}.up"), domain=MICROSOFT)
            stream = graph.node("Add", stream, self._multiply(bent, f"{layer}.down"))
        rows = self._connect(self._norm(stream, "norm"))
        graph.node("Identity", rows, to="rows")
        value = helper.make_tensor_value_info
        inputs = [value("pixels", TensorProto.FLOAT, ("N", vision.side, vision.side, 3))]
        outputs = [value("rows", TensorProto.FLOAT, ("N", vision.rows, vision.out))]
        return finished(graph, "tower", inputs, outputs), graph.weights

    def _patches(self) -> str:
        """[N, patches, hidden]: each patch and its position, row by row.

        The reference looks positions up by shares of the side in FP32. For some numbers of patches
        (19, 25, 29 ...; not those of published models) that rounds a patch into its neighbour's
        place; this is not followed."""
        graph, vision = self._graph, self._vision
        pixels = graph.node("Transpose", "pixels", perm=[0, 3, 1, 2])
        found = graph.node(
            "Conv",
            pixels,
            self._weight("patches"),
            self._weight("patches_bias"),
            strides=[vision.patch] * 2,
        )
        found = graph.reshape(found, 0, vision.hidden, -1)
        found = graph.node("Transpose", found, perm=[0, 2, 1])
        return graph.node("Add", found, self._weight("positions"))

    def _attention(self, normed: str, layer: int) -> str:
        graph, vision = self._graph, self._vision
        queries, keys, values = (
            self._heads(self._multiply(normed, f"{layer}.{name}")) for name in ("q", "k", "v")
        )
        scale = float(vision.hidden // vision.heads) ** -0.5
        scores = graph.node("FusedMatMul", queries, keys, domain=MICROSOFT, alpha=scale, transB=1)
        found = graph.node("MatMul", graph.node("Softmax", scores, axis=-1), values)
        found = graph.node("Transpose", found, perm=[0, 2, 1, 3])
        return self._multiply(graph.reshape(found, 0, 0, vision.hidden), f"{layer}.o")

    def _heads(self, value: str) -> str:
        heads, hidden = self._vision.heads, self._vision.hidden
        value = self._graph.reshape(value, 0, 0, heads, hidden // heads)
        return self._graph.node("Transpose", value, perm=[0, 2, 1, 3])

    def _connect(self, value: str) -> str:
        """Squares of patches to rows: pixel shuffle (Shi et al., CVPR 2016) backwards."""
        graph, vision, shuffle = self._graph, self._vision, self._vision.shuffle
        less = vision.across // shuffle
        value = graph.reshape(value, 0, less, shuffle, less, shuffle * vision.hidden)
        value = graph.node("Transpose", value, perm=[0, 1, 3, 2, 4])
        value = graph.reshape(value, 0, vision.rows, shuffle**2 * vision.hidden)
        return graph.node("MatMul", value, self._transposed("connector"))

    def _norm(self, value: str, name: str) -> str:
        return self._graph.node(
            "LayerNormalization",
            value,
            self._weight(name),
            self._weight(f"{name}_bias"),
            axis=-1,
            epsilon=self._vision.epsilon,
        )

    def _multiply(self, value: str, name: str) -> str:
        found = self._graph.node("MatMul", value, self._transposed(name))
        return self._graph.node("Add", found, self._weight(f"{name}_bias"))

    def _transposed(self, name: str) -> str:
        return self._graph.weight(self._floats(name).T)

    def _weight(self, name: str) -> str:
        return self._graph.weight(self._floats(name))

    def _floats(self, name: str) -> Floats:
        return self._checkpoint.floats(PREFIX + name)
