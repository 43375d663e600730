"""Post-training quantization by NNCF, to OpenVINO's own format: activations and weights of all that
OpenVINO computes in 8 bits, with corrected biases (``nncf.quantize``)."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cotenant.domain.errors import ModelError
from cotenant.engines.base import first_line
from cotenant.engines.openvino import imported, shared_core
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
        path = work / "model.xml"
        try:
            _quantize(parent, library(work), path)
        except Exception as error:  # NNCF raises whatever its parts do
            raise ModelError(f"NNCF cannot quantize it: {first_line(error)}") from error
        yield Made(self.name, "int8 by NNCF after training, for OpenVINO", path)


def library(work: Path) -> Any:
    """NNCF, to be used in this directory. It reports nothing to its maker.

    With torch it compiles functions in C++ at their first use, and waits for the lock of whoever
    compiles in the same directory, also where that one was killed. So each job has its own. It may
    take its time, since a job is stopped now and then. Without a compiler or ninja NNCF computes
    with torch alone."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(work / "extensions")
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    with contextlib.suppress(ImportError):  # before NNCF does, which makes nothing ready
        imported()
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf


def _quantize(parent: Parent, nncf: Any, path: Path) -> None:
    openvino = imported()
    with contextlib.redirect_stdout(io.StringIO()):  # bars of progress
        rows = batches_of(parent)
        model = shared_core().read_model(parent.files.path)
        kind = nncf.ModelType.TRANSFORMER if _normalizes(model) else None
        made = nncf.quantize(model, nncf.Dataset(rows), subset_size=len(rows), model_type=kind)
        openvino.save_model(made, path, compress_to_fp16=False)


def _normalizes(model: Any) -> bool:
    """Whether it has layer norms, of one operator or of many. A variance in 8 bits may be 0, and is
    divided by: NNCF leaves norms in float only where it is told of a transformer."""
    return any(op.get_type_name() in ("MVN", "Sqrt") for op in model.get_ops())
