"""Quantization-aware training: while it is trained the module rounds as its int8 build will, and
gradients pass by the rounding (B. Jacob and others, "Quantization and training of neural networks
for efficient integer-arithmetic-only inference", CVPR 2018). Batch norms are folded before, and the
weights then go through the quantizer of ``int8``, so engines run it as they run that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cotenant.optimize.parent import Parent, Told
from cotenant.optimize.recipes.base import Made
from cotenant.optimize.recipes.int8 import Quantizer, batches_of, prepare
from cotenant.optimize.recipes.trained import NEEDS, imported


class Qat:
    """See the module's text."""

    name = "qat"
    needs = NEEDS
    trains = True

    def make(self, parent: Parent, work: Path, seconds: float, told: Told) -> Iterator[Made]:
        import onnx

        from cotenant.optimize.torchwork import exporting, rounding, training

        told("quantization-aware training")
        given = training.lesson(parent)
        model, module = imported(parent, given, work)
        with rounding.rounded(module, given.rows):
            loss = training.train(module, given, seconds, told, rate=training.TUNING_RATE)
        trained = exporting.write(model, module, work / "trained.onnx")
        graph = work / "prepared.onnx"
        prepare(onnx.load(str(trained)), graph)
        path = Quantizer(graph, batches_of(parent)).write(work / "model.onnx")
        said = f"trained for {seconds:.0f} s to be rounded (loss {loss:.4f}), then static int8"
        yield Made(self.name, said, path)
