"""Quantization-aware training by NNCF: while it is trained the module rounds as its int8 build
does, and gradients pass by the rounding (B. Jacob and others, "Quantization and training of neural
networks for efficient integer-arithmetic-only inference", CVPR 2018). Ranges are trained too. Batch
norms are folded before. One file is written, for ONNX Runtime and OpenVINO."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cotenant.domain.errors import ModelError
from cotenant.engines.base import first_line
from cotenant.optimize.parent import Parent, Told
from cotenant.optimize.recipes.base import Made
from cotenant.optimize.recipes.int8 import batches_of
from cotenant.optimize.recipes.nncf import library
from cotenant.optimize.recipes.trained import NEEDS, imported


class Qat:
    """See the module's text."""

    name = "qat"
    needs = (*NEEDS, "nncf")
    trains = True

    def make(self, parent: Parent, work: Path, seconds: float, told: Told) -> Iterator[Made]:
        from cotenant.optimize.torchwork import quantizing, training

        told("quantization-aware training")
        given = training.lesson(parent)
        _, module = imported(parent, given, work)
        requests = batches_of(parent)
        nncf = library(work)
        try:
            rounds = quantizing.rounded(nncf, module, requests)
            loss = training.train(rounds, given, seconds, told, rate=training.TUNING_RATE)
            path = quantizing.write(rounds, module, requests[0], work / "model.onnx")
        except ModelError:
            raise
        except Exception as error:  # NNCF and the exporter raise whatever their parts do
            raise ModelError(f"NNCF cannot train it: {first_line(error)}") from error
        said = f"int8 by NNCF, trained for {seconds:.0f} s while it rounds (loss {loss:.4f})"
        yield Made(self.name, said, path)
