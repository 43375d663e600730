"""Static int8 by ONNX Runtime's quantizer: what multiplies matrices, per channel.

Activations are unsigned, weights signed, 8 bits each, as Q and DQ operators around what is computed
(``onnxruntime.quantization``). Other operators stay in float.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from cotenant.domain.errors import ModelError
from cotenant.engines.base import Array, first_line
from cotenant.engines.checkdata import CheckData
from cotenant.optimize.parent import Parent, Told
from cotenant.optimize.recipes.base import Made

OPERATORS: Final = ("Conv", "MatMul", "Gemm")
_BIASES_IN_FLOAT: Final = {"QuantizeBias": False, "QDQDisableWeightAdjustForInt32Bias": True}


class Int8:
    """See the module's text."""

    name = "int8"
    needs = ("onnx",)
    trains = False

    def make(self, parent: Parent, work: Path, seconds: float, told: Told) -> Iterator[Made]:
        del seconds
        told("static int8")
        quantizer = Quantizer.of(parent, work)
        path = quantizer.write(work / "model.onnx")
        count = len(quantizer.nodes)
        yield Made(self.name, f"static int8 of {count} layers, per channel", path)


class Quantizer:
    """A graph prepared for quantizing, and the ranges of its activations once they were found.
    ``nodes``: names of what can be quantized."""

    def __init__(self, graph: Path, rows: list[dict[str, Array]]) -> None:
        import onnx

        self._graph = graph
        self._rows = rows
        self._ranges = graph.with_suffix(".ranges.json")
        model = onnx.load(str(graph))
        known = {tensor.name for tensor in model.graph.initializer}
        known |= {
            name for node in model.graph.node if node.op_type == "Constant" for name in node.output
        }
        self.nodes = [
            node.name
            for node in model.graph.node
            if node.op_type in OPERATORS and node.input[1] in known
        ]
        if not self.nodes:
            raise ModelError(f"it has no {', '.join(OPERATORS)} with fixed weights to quantize")

    @classmethod
    def of(cls, parent: Parent, work: Path) -> Quantizer:
        """Of the parent's graph; raises ModelError where it is none, or has no such layers."""
        graph = work / "prepared.onnx"
        prepare(parent.onnx(), graph)
        return cls(graph, batches_of(parent))

    def write(self, path: Path, only: Sequence[str] = (), without: Sequence[str] = ()) -> Path:
        """Quantize all layers, or ``only`` these, ``without`` those. Raises ModelError."""
        wanted = [name for name in (only or self.nodes) if name not in set(without)]
        try:
            self._quantize(path, wanted, {})
        except Exception:  # the quantizer raises whatever its parts do; some fails at biases alone
            try:
                self._quantize(path, wanted, _BIASES_IN_FLOAT)
            except Exception as error:
                raise ModelError(f"it cannot be quantized: {first_line(error)}") from error
        return path

    def _quantize(self, path: Path, nodes: list[str], options: dict[str, Any]) -> None:
        from onnxruntime import quantization

        with _without_advice():
            quantization.quantize_static(
                str(self._graph),
                str(path),
                _Reader(self._rows),
                op_types_to_quantize=list(OPERATORS),
                nodes_to_quantize=nodes,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                calibration_cache_path=self._ranges,
                extra_options=options,
            )


class _Reader:
    """Rows, as ``onnxruntime.quantization.CalibrationDataReader`` gives them."""

    def __init__(self, rows: list[dict[str, Array]]) -> None:
        self._left = iter(rows)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._left, None)


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """The quantizer gives advice on the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def prepare(model: Any, path: Path) -> None:
    """Write the graph with shapes and folded layers, as the quantizer wants it; where that cannot
    be, as it is. Every node gets a name."""
    import onnx
    from onnxruntime.quantization import shape_inference

    given = path.with_name("given.onnx")
    onnx.save(model, str(given))
    try:
        with _without_advice():
            shape_inference.quant_pre_process(str(given), str(path), skip_symbolic_shape=True)
    except Exception:  # whatever the optimizer does not know
        onnx.save(model, str(path))
    made = onnx.load(str(path))
    for number, node in enumerate(made.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    onnx.save(made, str(path))


def batches_of(parent: Parent) -> list[dict[str, Array]]:
    """The calibration rows as requests, of several rows where the model takes those."""
    return requests(parent.rows.calibration, parent, 16)


def requests(data: CheckData, parent: Parent, step: int) -> list[dict[str, Array]]:
    """Rows as requests of at most ``step``."""
    inputs = parent.meta.inputs
    whole = data.whole(inputs) or not parent.meta.batchable
    step = 1 if whole else step
    count = data.samples
    return [data.part(inputs, at, min(at + step, count)) for at in range(0, count, step)]
