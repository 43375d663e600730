"""Libraries that report to their makers do not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

onnx = pytest.importorskip("onnx")

OPENS = """
import sys
from pathlib import Path
from cotenant.engines.base import Opening
from cotenant.engines.registry import choose
opening = Opening(Path(sys.argv[1]), (1,))
choose(opening).open(opening)
"""


def test_onnx_runtime_leaves_nothing_in_the_home(tmp_path: Path) -> None:
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    tensors = [helper.make_tensor_value_info(name, kind, [4]) for name in "xy"]
    node = helper.make_node("Relu", ["x"], ["y"])
    made = helper.make_graph([node], "g", tensors[:1], tensors[1:])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(made, opset_imports=opset, ir_version=9), tmp_path / "model.onnx")
    home = tmp_path / "home"
    home.mkdir()
    quiet = {"CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "ORT_RUNNING_UNIT_TESTS"}
    env = {name: value for name, value in os.environ.items() if name not in quiet}
    subprocess.run(
        [sys.executable, "-c", OPENS, str(tmp_path / "model.onnx")],
        env={**env, "HOME": str(home)},
        check=True,
    )
    assert list(home.rglob("*")) == []
