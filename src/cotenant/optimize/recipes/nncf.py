"""Post-training quantization by NNCF, to OpenVINO's own format: activations and weights of all that
OpenVINO computes in 8 bits, with corrected biases (``nncf.quantize``)."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from cotenant.domain.errors import ModelError
from cotenant.engines.base import first_line
from cotenant.engines.openvino import imported
from cotenant.optimize.parent import Parent, Told
from cotenant.optimize.recipes.base import Made
from cotenant.optimize.recipes.int8 import batches_of


class Nncf:
    """See the module's text."""

    name = "nncf"
    needs = ("nncf", "openvino")
    trains = False

    def make(self, parent: Parent, work: Path, seconds: float, told: Told) -> Iterator[Made]:
        del seconds
        if parent.files.path.suffix not in (".onnx", ".xml"):
            raise ModelError(f"OpenVINO does not read {parent.files.path.name}")
        told("NNCF post-training quantization")
        # What it compiles goes here: a lock that a killed process left elsewhere would hold it up.
        os.environ["TORCH_EXTENSIONS_DIR"] = str(work / "extensions")
        path = work / "model.xml"
        try:
            _quantize(parent, path)
        except Exception as error:  # NNCF raises whatever its parts do
            raise ModelError(f"NNCF cannot quantize it: {first_line(error)}") from error
        yield Made(self.name, "int8 by NNCF after training, for OpenVINO", path)


def _quantize(parent: Parent, path: Path) -> None:
    openvino = imported()
    with contextlib.redirect_stdout(io.StringIO()):  # bars of progress
        import nncf

        logging.getLogger("nncf").setLevel(logging.ERROR)
        rows = batches_of(parent)
        model = openvino.Core().read_model(parent.files.path)
        made = nncf.quantize(model, nncf.Dataset(rows), subset_size=len(rows))
        openvino.save_model(made, path, compress_to_fp16=False)
