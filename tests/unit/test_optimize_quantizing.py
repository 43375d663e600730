"""Training that rounds, and its file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cotenant.optimize.parent import open_variant, usable_engines
from cotenant.optimize.recipes.int8 import prepare
from tests.unit import optimize_models as models

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
pytest.importorskip("nncf")

from cotenant.optimize.recipes.nncf import library  # noqa: E402
from cotenant.optimize.torchwork import quantizing  # noqa: E402
from cotenant.optimize.torchwork.importing import Graph  # noqa: E402

BARE = {"PATH": "/nonexistent"}
"""Without ninja and compilers NNCF computes with torch alone, which takes less time to begin."""


def with_norm() -> Any:
    """The small model with a batch norm after its second convolution."""
    model = models.graph()
    random = np.random.default_rng(1)
    arrays = {
        "scale": random.uniform(0.5, 2, models.CHANNELS),
        "shift": random.normal(0, 0.5, models.CHANNELS),
        "mean": random.normal(0, 0.5, models.CHANNELS),
        "variance": random.uniform(0.5, 2, models.CHANNELS),
    }
    for name, array in arrays.items():
        tensor = onnx.numpy_helper.from_array(array.astype(np.float32), name)
        model.graph.initializer.append(tensor)
    place = next(i for i, node in enumerate(model.graph.node) if node.name == "relu2")
    norm = onnx.helper.make_node("BatchNormalization", ["c2", *arrays], ["n2"], "norm")
    model.graph.node.insert(place, norm)
    model.graph.node[place + 1].input[0] = "n2"
    return model


def requests(rows: int = 160) -> list[dict[str, Any]]:
    x = models.images(rows)
    return [{"x": x[at : at + 16]} for at in range(0, rows, 16)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A module that rounds, and its file."""
    work = tmp_path_factory.mktemp("work")
    prepare(with_norm(), work / "folded.onnx")
    module = Graph(onnx.load(str(work / "folded.onnx")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", BARE["PATH"])
        patch.setenv("TORCH_EXTENSIONS_DIR", "")
        rounds = quantizing.rounded(library(work), module, requests())
        return rounds, quantizing.write(rounds, module, requests()[0], work / "model.onnx")


def test_batch_norms_are_folded_before(made: tuple[Any, Path]) -> None:
    _, path = made
    kinds = {node.op_type for node in onnx.load(str(path)).graph.node}
    assert "BatchNormalization" not in kinds


def test_activations_are_unsigned_and_weights_signed_bytes(made: tuple[Any, Path]) -> None:
    _, path = made
    graph = onnx.load(str(path)).graph
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            stored[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    zeros = [stored[n.input[2]].dtype for n in graph.node if n.op_type == "QuantizeLinear"]
    assert zeros and set(zeros) == {np.dtype(np.uint8)}
    makers = {name: node for node in graph.node for name in node.output}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == 3
    for layer in layers:
        weight = stored[makers[layer.input[1]].input[0]]
        assert weight.dtype == np.int8


def test_two_products_of_any_activation_and_weight_fit_16_bits(made: tuple[Any, Path]) -> None:
    _, path = made
    weights = [
        onnx.numpy_helper.to_array(t).astype(int)
        for t in onnx.load(str(path)).graph.initializer
        if t.data_type == onnx.TensorProto.INT8
    ]
    assert weights
    assert all(2 * 255 * np.abs(w).max() <= 2**15 - 1 for w in weights)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_both_engines_answer_as_the_module_that_rounds(made: tuple[Any, Path], engine: str) -> None:
    if engine not in usable_engines((engine,)):
        pytest.skip(f"the engine {engine} cannot be used here")
    rounds, path = made
    x = models.images(64, seed=5)
    with torch.no_grad():
        wanted = rounds(torch.from_numpy(x))[0].numpy()
    (found,) = open_variant(path, engine, (1,)).run(1, {"x": x})
    assert found.shape == wanted.shape
    spread = wanted.std()
    assert np.abs(found - wanted).mean() < 0.05 * spread
    assert (found.argmax(axis=1) == wanted.argmax(axis=1)).mean() > 0.9


_AFTER_A_KILLED_JOB = """
import sys
from pathlib import Path
import onnx
from torch.utils import cpp_extension
from nncf.torch.extensions import get_build_directory_for_extension
from tests.unit import optimize_models as models
from tests.unit.test_optimize_quantizing import requests
from cotenant.optimize.recipes.nncf import library
from cotenant.optimize.torchwork import quantizing
from cotenant.optimize.torchwork.importing import Graph

lock = get_build_directory_for_extension("quantized_functions_cpu") / "lock"
lock.touch()
quantizing.rounded(library(Path(sys.argv[1])), Graph(models.graph()), requests())
assert lock.exists()
"""


def test_a_lock_that_a_killed_job_left_holds_up_no_other(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        **BARE,
        "NNCF_CI": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "killed"),
    }
    words = [sys.executable, "-W", "ignore", "-c", _AFTER_A_KILLED_JOB, str(tmp_path / "next")]
    subprocess.run(words, env=environment, check=True, timeout=120, cwd=Path(__file__).parents[2])
