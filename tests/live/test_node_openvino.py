"""A node serves models by OpenVINO."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cotenant.engines.openvino import imported

if TYPE_CHECKING:
    from tests.live.conftest import Box, Boxes

if importlib.util.find_spec("openvino") is None:
    pytest.skip("the extra openvino is not installed", allow_module_level=True)
openvino = imported()
X = np.ones((1, 4), np.float32)
NAMES = ("ir", "asked", "lost", "pair")


def write_ir(directory: Path, *, inputs: int = 1) -> Path:
    """What doubles the sum of its inputs, of rows of any length, in OpenVINO's own format."""
    op = openvino.opset13
    taken = [op.parameter([-1, -1], openvino.Type.f32, name=f"x{i or ''}") for i in range(inputs)]
    total = taken[0]
    for other in taken[1:]:
        total = op.add(total, other)
    made = op.multiply(total, np.float32(2), name="y")
    aside = directory.with_name(".aside")
    openvino.save_model(openvino.Model([op.result(made)], taken, "doubles"), aside / "model.xml")
    aside.rename(directory)
    return directory / "model.xml"


@pytest.fixture(scope="module")
def box(module_boxes: Boxes) -> Box:
    box = module_boxes()
    for name in NAMES:
        (box.models / name).mkdir(parents=True)
    write_ir(box.models / "ir" / "1")
    write_ir(box.models / "pair" / "1", inputs=2)
    write_ir(box.models / "lost" / "1").with_suffix(".bin").unlink()
    (box.models / "asked" / "model.yaml").write_text("engine: openvino\n")
    box.model("scale", "asked")
    return box.configure([{"name": name} for name in NAMES]).start(ready=False)


def test_a_model_in_its_own_format_is_served(box: Box) -> None:
    box.until(lambda: box.infer("ir", x=X).status == 200)
    assert box.infer("ir", x=X).values == [2, 2, 2, 2]
    assert box.infer("ir", x=np.ones((3, 2), np.float32)).values == [2] * 6
    assert box.ask("GET", "/v2/models/ir").json["platform"] == "openvino_ir"


def test_onnx_is_served_by_it_where_that_is_asked_for(box: Box) -> None:
    box.until(lambda: box.infer("asked", x=X).status == 200)
    assert box.infer("asked", x=X).values == [2, 2, 2, 2]
    assert box.ask("GET", "/v2/models/asked").json["platform"] == "openvino_onnx"


def test_a_model_without_its_weights_says_which_file_is_missing(box: Box) -> None:
    box.until(lambda: "model.bin" in box.index().get(("lost", "1"), {}).get("reason", ""))


def test_inputs_that_do_not_go_together_cost_no_worker(box: Box) -> None:
    box.until(lambda: box.infer("pair", x=X, x1=X).status == 200)
    before = box.workers()
    for _ in range(5):
        assert box.infer("pair", x=X, x1=np.ones((1, 3), np.float32)).status == 400
    assert box.infer("pair", x=X, x1=X).values == [4, 4, 4, 4]
    assert box.workers() == before
