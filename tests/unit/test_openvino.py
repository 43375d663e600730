"""OpenVINO answers as ONNX Runtime does, and refuses what it would get wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cotenant.domain.config import ModelSettings
from cotenant.domain.device import CUDA
from cotenant.domain.errors import ModelError
from cotenant.domain.npu import Emulated
from cotenant.engines.base import ON_CPU, Array, Engine, Noted, Opening, Target
from cotenant.engines.joining import judge
from cotenant.engines.onnx import OnnxEngine
from cotenant.engines.openvino import KIND, OpenVinoEngine, imported, shared_core
from cotenant.engines.registry import choose
from cotenant.engines.samples import make_samples
from cotenant.runtime.messages import Open, Opened
from cotenant.runtime.worker import Worker

if importlib.util.find_spec("openvino") is None:
    pytest.skip("the extra openvino is not installed", allow_module_level=True)
onnx = pytest.importorskip("onnx")
helper, numpy_helper, Kind = onnx.helper, onnx.numpy_helper, onnx.TensorProto
FLOAT = Kind.FLOAT
random = np.random.default_rng(0)


def tensor(name: str, shape: list[Any], kind: int = FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def weights(name: str, *shape: int) -> Any:
    scale = np.sqrt(np.prod(shape[1:]) or 1)
    return numpy_helper.from_array((random.normal(size=shape) / scale).astype(np.float32), name)


def node(kind: str, inputs: str, outputs: str = "y", **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def graph(path: Path, inputs: list[Any], outputs: list[Any], nodes: list[Any], *known: Any) -> Path:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("elsewhere", 1)]
    made = helper.make_graph(nodes, "g", inputs, outputs, list(known))
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=9), path)
    return path


def unary(path: Path, kind: str = "Relu", axes: Any = ("n", 4), of: int = FLOAT) -> Path:
    shape = list(axes)
    return graph(path, [tensor("x", shape, of)], [tensor("y", shape, of)], [node(kind, "x")])


def network(path: Path) -> Path:
    """A convolution, a pool and a product, of images of any size."""
    nodes = [
        node("Conv", "x w", "c", pads=[1, 1, 1, 1]),
        node("Relu", "c", "r"),
        node("GlobalAveragePool", "r", "p"),
        node("Flatten", "p", "f"),
        node("MatMul", "f v"),
    ]
    shapes = [tensor("x", ["n", 3, "h", "w"])], [tensor("y", ["n", 5])]
    return graph(path, *shapes, nodes, weights("w", 8, 3, 3, 3), weights("v", 8, 5))


def as_ir(path: Path) -> Path:
    """The same model in OpenVINO's own format, beside it."""
    ir = path.with_suffix(".xml")
    imported().save_model(shared_core().read_model(path), ir, compress_to_fp16=False)
    return ir


def both(path: Path) -> tuple[Engine, Engine]:
    return OpenVinoEngine(path, (1,)), OnnxEngine(path, (1,))


def close(got: list[Array], wanted: list[Array], tolerance: float = 1e-5) -> bool:
    return all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and np.allclose(a, b, rtol=tolerance, atol=tolerance)
        for a, b in zip(got, wanted, strict=True)
    )


def opened_by_worker(path: Path) -> Opened:
    """What a worker says of a model."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        worker = Worker(theirs, memoryview(bytearray(256)))
        order = Open(str(path), units=(1,), max_batch=2, settings=ModelSettings(engine="openvino"))
        opened = worker._open(order)
    assert isinstance(opened, Opened), opened
    return opened


@pytest.mark.parametrize("form", ["onnx", "ir"])
def test_it_answers_as_onnx_runtime_does_whatever_the_free_axes_are(
    tmp_path: Path, form: str
) -> None:
    path = network(tmp_path / "model.onnx")
    reference = OnnxEngine(path, (1,))
    engine = OpenVinoEngine(as_ir(path) if form == "ir" else path, (1, 2))
    assert engine.meta.inputs == reference.meta.inputs
    assert engine.meta.outputs == reference.meta.outputs
    assert engine.meta.batchable
    for units, shape in [(1, (2, 3, 8, 8)), (2, (1, 3, 16, 5)), (7, (3, 3, 8, 8))]:
        x = {"x": random.normal(size=shape).astype(np.float32)}
        assert close(engine.run(units, x), reference.run(1, x))


@pytest.mark.parametrize(
    ("kind", "of"),
    [
        ("Not", Kind.BOOL),
        *((each, of) for each in ("Identity", "Neg") for of in (Kind.INT8, Kind.INT16)),
        *((each, of) for each in ("Identity", "Neg") for of in (Kind.INT32, Kind.INT64)),
        *(("Identity", of) for of in (Kind.UINT8, Kind.UINT16, Kind.UINT32, Kind.UINT64)),
        *((each, of) for each in ("Identity", "Tanh") for of in (FLOAT, Kind.FLOAT16)),
        *((each, Kind.DOUBLE) for each in ("Identity", "Neg")),
    ],
)
def test_it_takes_and_gives_every_type_but_strings(tmp_path: Path, kind: str, of: int) -> None:
    ours, reference = both(unary(tmp_path / "model.onnx", kind, of=of))
    assert ours.meta.inputs == reference.meta.inputs
    dtype = helper.tensor_dtype_to_np_dtype(of)
    x = {"x": np.array([[0, 1, 5, 100], [1, 0, 0, 7]]).astype(dtype)}
    tolerance = 1e-2 if of == Kind.FLOAT16 else 1e-5
    assert close(ours.run(1, x), reference.run(1, x), tolerance)


def test_scalars_empty_tensors_and_read_only_ones_are_taken(tmp_path: Path) -> None:
    for axes, x in [
        ((), np.array(3, np.float32)),
        (("n", 4), np.zeros((0, 4), np.float32)),
        (("n", 4), np.broadcast_to(np.float32(2), (3, 4))),
        (("n", 4), np.arange(24, dtype=np.float32).reshape(3, 8)[:, ::2]),
    ]:
        ours, reference = both(unary(tmp_path / "model.onnx", axes=axes))
        x.flags.writeable = False
        assert close(ours.run(1, {"x": x}), reference.run(1, {"x": x}))


def test_outputs_are_kept_apart_from_inputs_and_from_later_answers(tmp_path: Path) -> None:
    shape = ["n", 2]
    nodes = [node("Identity", "x", "same"), node("Relu", "x", "y"), node("Identity", "y", "z")]
    path = tmp_path / "model.onnx"
    graph(path, [tensor("x", shape)], [tensor(n, shape) for n in ("same", "y", "z")], nodes)
    engine = OpenVinoEngine(path, (1,))
    assert [t.name for t in engine.meta.outputs] == ["same", "y", "z"]
    x = np.array([[-1, 2]], np.float32)
    first = engine.run(1, {"x": x})
    engine.run(1, {"x": x + 7})
    assert [y.tolist() for y in first] == [[[-1, 2]], [[0, 2]], [[0, 2]]]
    x[:] = 9
    assert first[0].tolist() == [[-1, 2]]


class Place:
    """Room for one output of four, if there is any."""

    def __init__(self, there: bool) -> None:
        self.given = [np.zeros((1, 4), np.float32)] if there else None

    def take(self, outputs: Any) -> list[Array] | None:
        assert [(shape, np.dtype(of)) for shape, of in outputs] == [((1, 4), np.dtype("f4"))]
        return self.given


def test_outputs_are_written_where_they_are_wanted_if_they_fit(tmp_path: Path) -> None:
    engine = OpenVinoEngine(unary(tmp_path / "model.onnx"), (1,))
    for there in (True, False):
        place = Place(there)
        found = engine.run_into(1, {"x": np.ones((1, 4), np.float32)}, place)
        assert found[0].tolist() == [[1, 1, 1, 1]]
        assert (found is place.given) == there


GRAPHS = {
    "rows": [node("Relu", "x")],
    "company": [node("CumSum", "x zero")],
    "mean": [node("ReduceMean", "x", "m", axes=[0], keepdims=1), node("Sub", "x m")],
}


@pytest.mark.parametrize("name", GRAPHS)
def test_whether_rows_may_be_joined_is_judged_alike(tmp_path: Path, name: str) -> None:
    zero = numpy_helper.from_array(np.array(0, np.int64), "zero")
    shapes = [tensor("x", ["n", 4])], [tensor("y", ["n", 4])]
    ours, reference = both(graph(tmp_path / "model.onnx", *shapes, GRAPHS[name], zero))
    found = [not judge(e, 1, make_samples(e, 1, {}, {}), 4) for e in (ours, reference)]
    assert found == [name == "rows"] * 2


def test_what_is_fp32_is_computed_in_fp32(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    shapes = [tensor("x", ["n", 256])], [tensor("y", ["n", 256])]
    known = weights("w", 256, 256)
    engine = OpenVinoEngine(graph(path, *shapes, [node("MatMul", "x w")], known), (1,))
    x = random.normal(size=(8, 256)).astype(np.float32)
    exact = x.astype(np.float64) @ numpy_helper.to_array(known).astype(np.float64)
    assert np.abs(engine.run(1, {"x": x})[0] - exact).max() < 1e-4, "BF16 is off by 1e-2"
    assert isinstance(engine, Noted) and not engine.notes


@pytest.mark.skipif(platform.machine() != "x86_64", reason="8-bit kernels are of x86")
def test_what_is_computed_in_less_is_noted(tmp_path: Path) -> None:
    scale = numpy_helper.from_array(np.float32(0.05), "s")
    zero = numpy_helper.from_array(np.int8(0), "z")
    nodes = [
        node("QuantizeLinear", "x s z", "q"),
        node("DequantizeLinear", "q s z", "d"),
        node("QuantizeLinear", "w s z", "wq"),
        node("DequantizeLinear", "wq s z", "wd"),
        node("Conv", "d wd", "c"),
        node("Relu", "c"),
    ]
    shapes = [tensor("x", ["n", 16, 8, 8])], [tensor("y", ["n", 16, 6, 6])]
    path = graph(tmp_path / "model.onnx", *shapes, nodes, scale, zero, weights("w", 16, 16, 3, 3))
    ours, reference = both(path)
    x = {"x": random.normal(size=(2, 16, 8, 8)).astype(np.float32)}
    assert close(ours.run(1, x), reference.run(1, x), 1e-3)
    assert any("Convolution" in note for note in ours.notes)
    assert opened_by_worker(path).notes == tuple(ours.notes), "its owner is told"


def test_a_condition_is_no_computation_in_less(tmp_path: Path) -> None:
    """A branch that is taken by a boolean, which OpenVINO keeps in 8 bits."""
    branches = {
        f"{name}_branch": helper.make_graph(
            [node(kind, "x", f"y_{name}")], name, [], [tensor(f"y_{name}", ["n", 4])]
        )
        for name, kind in (("then", "Relu"), ("else", "Neg"))
    }
    inputs = [tensor("x", ["n", 4]), tensor("if", [], Kind.BOOL)]
    path = tmp_path / "model.onnx"
    graph(path, inputs, [tensor("y", ["n", 4])], [node("If", "if", "y", **branches)])
    engine, reference = both(path)
    for taken in (True, False):
        given = {"x": np.ones((2, 4), np.float32), "if": np.array(taken)}
        assert close(engine.run(1, given), reference.run(1, given))
    assert isinstance(engine, Noted) and not engine.notes


def test_fp64_that_is_computed_in_less_is_noted(tmp_path: Path) -> None:
    assert OpenVinoEngine(unary(tmp_path / "model.onnx", of=Kind.DOUBLE), (1,)).notes


@pytest.mark.parametrize("units", [1, 2])
@pytest.mark.parametrize("kind", ["Add", "MatMul"])
def test_inputs_that_do_not_go_together_are_refused_and_the_next_are_answered(
    tmp_path: Path, kind: str, units: int
) -> None:
    shapes = [tensor("a", ["i", "j"]), tensor("b", ["k", "l"])], [tensor("y", ["m", "n"])]
    engine = OpenVinoEngine(graph(tmp_path / "model.onnx", *shapes, [node(kind, "a b")]), (1, 2))
    a, b = np.ones((3, 3), np.float32), np.ones((4, 4), np.float32)
    for _ in range(20):
        with pytest.raises(ModelError):
            engine.run(units, {"a": a, "b": b})
        assert engine.run(units, {"a": b, "b": b})[0].shape == (4, 4)


@pytest.mark.parametrize("units", [1, 2])
def test_nobody_gets_the_answer_of_the_request_before(tmp_path: Path, units: int) -> None:
    inputs = [tensor("x", ["i", "j"]), tensor("shape", [2], Kind.INT64)]
    path = tmp_path / "model.onnx"
    graph(path, inputs, [tensor("y", ["m", "n"])], [node("Reshape", "x shape")])
    engine = OpenVinoEngine(path, (1, 2))
    for value in range(20):
        x = np.full((2, 4), value, np.float32)
        assert (
            engine.run(units, {"x": x, "shape": np.array([4, 2])})[0].tolist() == [[value] * 2] * 4
        )
        with pytest.raises(ModelError):
            engine.run(units, {"x": x + 1, "shape": np.array([400, 2])})


@pytest.mark.parametrize(
    "x",
    [
        np.ones((1, 5), np.float32),
        np.ones(4, np.float32),
        np.ones((1, 4), np.int64),
        np.ones((1, 4), np.float64),
    ],
)
def test_inputs_of_another_shape_or_type_are_refused(tmp_path: Path, x: Any) -> None:
    engine = OpenVinoEngine(unary(tmp_path / "model.onnx"), (1,))
    with pytest.raises(ModelError):
        engine.run(1, {"x": x})
    assert engine.run(1, {"x": np.ones((2, 4), np.float32)})[0].shape == (2, 4)


@pytest.mark.parametrize("of", [Kind.INT64, Kind.UINT64, Kind.UINT32])
def test_integers_that_it_would_cut_are_refused(tmp_path: Path, of: int) -> None:
    ours, _ = both(unary(tmp_path / "model.onnx", "Identity", of=of))
    x = np.array([[1, 2, 3, 2**31]], helper.tensor_dtype_to_np_dtype(of))
    with pytest.raises(ModelError, match=str(2**31)):
        ours.run(1, {"x": x})
    assert ours.run(1, {"x": x - 1})[0].tolist() == [[0, 1, 2, 2**31 - 1]]


def test_what_cannot_be_loaded_is_refused_with_what_is_wrong(tmp_path: Path) -> None:
    whole = as_ir(network(tmp_path / "whole.onnx"))
    text, data = whole.read_bytes(), whole.with_suffix(".bin").read_bytes()
    cases: list[tuple[bytes, bytes | None]] = [
        (text, None),
        (text, data[: len(data) // 2]),
        (text[: len(text) // 2], data),
        (text.replace(b'type="Convolution"', b'type="Konvolution"'), data),
        (b"no model at all", b""),
        (b"", b""),
    ]
    path = tmp_path / "model.xml"
    for graph_of, weights_of in cases:
        path.write_bytes(graph_of)
        path.with_suffix(".bin").unlink(missing_ok=True)
        if weights_of is not None:
            path.with_suffix(".bin").write_bytes(weights_of)
        with pytest.raises(ModelError) as refused:
            OpenVinoEngine(path, (1,))
        assert path.name in str(refused.value)
        assert "Exception from" not in str(refused.value)
    path.write_bytes(text)
    path.with_suffix(".bin").write_bytes(data)
    assert OpenVinoEngine(path, (1,)).meta.inputs[0].name == "x"


def test_what_it_cannot_serve_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    shapes = [tensor("x", ["n"])], [tensor("y", ["n"])]
    with pytest.raises(ModelError, match="Strange"):
        OpenVinoEngine(graph(path, *shapes, [node("Strange", "x", domain="elsewhere")]), (1,))
    with pytest.raises(ModelError, match="string"):
        OpenVinoEngine(unary(path, "Identity", of=Kind.STRING), (1,))


def test_a_model_that_keeps_state_is_refused(tmp_path: Path) -> None:
    openvino = imported()
    from openvino import opset13 as op

    x = op.parameter([1, 4], openvino.Type.f32, name="x")
    kept = op.read_value(x, "kept")
    total = op.add(kept, x)
    model = openvino.Model([op.result(total)], [op.assign(total, "kept")], [x], "sums")
    openvino.save_model(model, tmp_path / "model.xml")
    with pytest.raises(ModelError, match="state"):
        OpenVinoEngine(tmp_path / "model.xml", (1,))


def opening(name: str, engine: str = "auto", target: Target = ON_CPU) -> Opening:
    return Opening(Path(name), (1,), ModelSettings(engine=engine), target=target)


def test_it_opens_its_own_format_and_onnx_where_it_is_asked_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose(opening("model.xml")) is KIND
    assert choose(opening("model.onnx", "openvino")) is KIND
    assert choose(opening("model.onnx")) is not KIND
    with pytest.raises(ModelError, match="CPU"):
        choose(opening("model.xml", target=Target(f"{CUDA}GPU-1")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'cotenant\[openvino\]'"):
        choose(opening("model.xml"))
    assert choose(opening("model.onnx")).name == "onnxruntime"


ALONE = """
import json, os, sys, time
from pathlib import Path
import numpy as np
from cotenant.engines.openvino import OpenVinoEngine

def threads():
    return [int(each) for each in os.listdir("/proc/self/task")]

engine = OpenVinoEngine(Path(sys.argv[1]), (1, 2))
x = np.ones((4, 3, 64, 64), np.float32)
engine.run(2, {"x": x})
core = max(os.sched_getaffinity(0))
for thread in threads():
    os.sched_setaffinity(thread, {core})
for _ in range(20):
    engine.run(2, {"x": x})
strays = [each for each in threads() if os.sched_getaffinity(each) != {core}]
time.sleep(0.1)
began, busy = time.monotonic(), time.process_time()
time.sleep(0.5)
idle = (time.process_time() - busy) / (time.monotonic() - began)
reports = [name for name, module in sys.modules.items() if "telemetry" in name and module]
print(json.dumps({"strays": strays, "idle": idle, "reports": reports}))
"""


def test_it_stays_on_its_cores_rests_when_idle_and_reports_nothing(tmp_path: Path) -> None:
    path = network(tmp_path / "model.onnx")
    home = tmp_path / "home"
    home.mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HWLOC")}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
        cwd=home,
        env=kept | {"HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    found = json.loads(done.stdout)
    assert found["strays"] == []
    assert found["idle"] < 0.5, "a thread that spins takes all of its core"
    assert all(name.startswith("openvino.tools") for name in found["reports"])
    assert list(home.iterdir()) == []


# --- an emulated NPU ------------------------------------------------------------------------


def on_npu(path: Path, npu: Emulated) -> Engine:
    return KIND.open(Opening(path, (1,), target=Target(npu.processor)))


def test_an_emulated_npu_answers_as_the_cpu_does_and_says_that_it_is_none(tmp_path: Path) -> None:
    path = unary(tmp_path / "model.onnx")
    assert choose(Opening(path, (1,), target=Target(Emulated(1).processor))) is KIND
    engine = on_npu(path, Emulated(1))
    x = np.array([[-1, 0, 2, 3]], np.float32)
    assert np.array_equal(engine.run(1, {"x": x})[0], np.maximum(x, 0))
    assert isinstance(engine, Noted)
    assert any("EMULATED" in note for note in engine.notes)


def test_an_emulated_npu_refuses_operators_that_it_does_not_have(tmp_path: Path) -> None:
    path = unary(tmp_path / "model.onnx", "Tan")
    with pytest.raises(ModelError, match="does not support Tan"):
        on_npu(path, Emulated(1))
    on_npu(path, Emulated(1, operators=("Tan",)))


def test_an_emulated_npu_refuses_weights_beyond_its_memory(tmp_path: Path) -> None:
    path = graph(
        tmp_path / "model.onnx",
        [tensor("x", ["n", 64])],
        [tensor("y", ["n", 64])],
        [node("MatMul", "x w")],
        weights("w", 64, 64),
    )
    on_npu(path, Emulated(1, memory=2**16))
    with pytest.raises(ModelError, match="its weights are"):
        on_npu(path, Emulated(1, memory=2**14 - 1))


ONE_BY_ONE = """
import signal, sys
from pathlib import Path
from cotenant.engines.openvino import OpenVinoEngine

handled = []
signal.signal(signal.SIGCONT, lambda *_: handled.append(1))
first, second = (OpenVinoEngine(Path(sys.argv[1]), (1,)) for _ in range(2))
del first
del second
signal.raise_signal(signal.SIGCONT)
assert handled
"""


def test_signals_are_handled_after_models_have_gone(tmp_path: Path) -> None:
    path = network(tmp_path / "model.onnx")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", ONE_BY_ONE, str(path)]
    assert subprocess.run(words, check=False, env=env, timeout=100).returncode == 0
