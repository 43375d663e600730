"""What engines say of where they execute a model's operators."""

from __future__ import annotations

from pathlib import Path

import pytest

from cotenant.domain.config import ModelSettings
from cotenant.engines.base import Opening, Tells
from cotenant.engines.placement import Executed, told
from tests.builders import open_engine
from tests.live.conftest import work_model


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_every_matrix_product_is_executed_somewhere(tmp_path: Path, engine: str) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    path = tmp_path / "model.onnx"
    work_model(path, layers=3)
    made = open_engine(Opening(path, (1,), ModelSettings(engine=engine)))
    assert isinstance(made, Tells)
    products = {"MatMul", "FusedMatMul", "FullyConnected"}
    assert sum(e.count for e in made.executed() if e.kind in products) == 6
    assert all(e.where for e in made.executed())


def test_it_is_told_a_line_for_each_part_of_the_engine_the_most_frequent_first() -> None:
    lines = told(
        (Executed("cpu", "Add", 1), Executed("npu", "Conv", 2, "INT8"), Executed("cpu", "Relu", 5))
    )
    assert lines == ["cpu: 5 Relu, 1 Add", "npu: 2 Conv in INT8"]
    assert told(()) == []
