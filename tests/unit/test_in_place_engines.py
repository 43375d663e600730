"""Each engine on its own: where what it reads and what it writes lies, and that answers stay right
whatever a model does with its inputs."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cotenant.domain.config import ModelSettings
from cotenant.engines.base import Array, InPlace, Opening
from cotenant.runtime.messages import Done, Item, Opened, Place, Run
from cotenant.runtime.messages import Open as Order
from cotenant.runtime.worker import Worker
from tests.builders import open_engine
from tests.unit.test_in_place import LARGE, graph, values

onnx = pytest.importorskip("onnx")
helper = onnx.helper
OPENVINO = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="the extra openvino is not installed"
)
TORCH = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="the extra torch is not installed"
)


def lies_in(array: Array, memory: bytearray) -> bool:
    """Whether all bytes of an array are within this memory."""
    begin = np.frombuffer(memory, np.uint8).ctypes.data
    low, high = np.lib.array_utils.byte_bounds(array)
    return begin <= low and high <= begin + len(memory)


class Watched:
    """An engine, and whether what it was given and what it gave lay in a memory."""

    def __init__(self, engine: Any, memory: bytearray) -> None:
        self._engine = engine
        self._memory = memory
        self.seen: list[tuple[bool, bool]] = []

    def run_into(self, units: int, inputs: dict[str, Array], room: Any) -> list[Array]:
        outputs: list[Array] = self._engine.run_into(units, inputs, room)
        given = all(lies_in(array, self._memory) for array in inputs.values())
        self.seen.append((given, all(lies_in(array, self._memory) for array in outputs)))
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def written(path: Path, engine: str) -> Path:
    """Twice the input, of rows of ``LARGE`` numbers."""
    if engine != "torch":
        two = onnx.numpy_helper.from_array(np.array([2], np.float32), "two")
        made = graph(path / "model.onnx", ["n", LARGE], ["n", LARGE], MUL)
        model = onnx.load(made)
        model.graph.initializer.append(two)
        onnx.save(model, made)
        return made
    import torch

    class Twice(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return {"y": x * 2}

    free = {0: torch.export.Dim("n")}
    program = torch.export.export(Twice(), (torch.ones(2, LARGE),), dynamic_shapes=(free,))
    torch.export.save(program, path / "model.pt2")
    return path / "model.pt2"


MUL = helper.make_node("Mul", ["x", "two"], ["y"])


@pytest.mark.filterwarnings("ignore")  # of PyTorch's export
@pytest.mark.parametrize(
    "engine",
    [
        "onnxruntime",
        pytest.param("openvino", marks=OPENVINO),
        pytest.param("torch", marks=TORCH),
    ],
)
def test_what_an_engine_reads_and_writes_lies_in_tensor_memory(tmp_path: Path, engine: str) -> None:
    x = values(1, LARGE)
    memory = bytearray(2 * x.nbytes + 8192)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        worker = Worker(theirs, memoryview(memory))
        settings = ModelSettings(engine=engine)
        opened = worker._open(Order(str(written(tmp_path, engine)), (1,), 4, settings=settings))
        assert isinstance(opened, Opened), opened
        watched = Watched(worker._engine, memory)
        worker._engine = worker._in_place = watched  # type: ignore[assignment]
        offset = -(-x.nbytes // 64) * 64
        memory[: x.nbytes] = x.tobytes()
        name = opened.meta.inputs[0].name
        item = Item(1, (Place(x.shape, 0, x.nbytes),), offset, x.nbytes + 64)
        for _ in range(4):  # the first ones of some engines show what may be bound
            done = worker._run(Run(1, (0,), 1, 0, (item,)))
            assert isinstance(done, Done), done
            (place,) = done.items[0].places
            assert place.offset == offset, name
            y = np.frombuffer(memory, np.float32, LARGE, place.offset)
            assert np.array_equal(y, 2 * x[0])
            assert memory[: x.nbytes] == x.tobytes(), "the input is as it was"
        assert watched.seen == [(True, True)] * 4


class Room:
    """A new array for each output, which nothing was written to."""

    def take(self, outputs: Any) -> list[Array]:
        return [np.full(shape, 77, dtype) for shape, dtype in outputs]


def has_bound(engine: Any) -> bool:
    """Whether an engine on OpenVINO wrote an output where it was wanted."""
    return any(bound.compared for bound in engine._bound.values())


SHAPE = ["n", LARGE]
GRAPHS: dict[str, tuple[list[Any], dict[str, list[Any]], bool]] = {
    "computed": ([helper.make_node("Relu", ["x"], ["y"])], {"y": SHAPE}, True),
    "copied": ([helper.make_node("Identity", ["x"], ["y"])], {"y": SHAPE}, True),
    "twice": (
        [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Identity", ["y"], ["z"])],
        {"y": SHAPE, "z": SHAPE},
        True,
    ),
    "turned": ([helper.make_node("Flatten", ["x"], ["y"], axis=0)], {"y": [1, None]}, False),
    "both": (
        [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["y"], ["z"])],
        {"y": SHAPE, "z": SHAPE},
        True,
    ),
    "found": (
        [helper.make_node("NonZero", ["x"], ["i"]), helper.make_node("Cast", ["i"], ["y"], to=1)],
        {"y": [2, "found"]},
        False,
    ),
}


@OPENVINO
@pytest.mark.parametrize("name", GRAPHS)
def test_openvino_binds_what_is_computed_and_answers_right_in_any_case(
    tmp_path: Path, name: str
) -> None:
    nodes, outputs, binds = GRAPHS[name]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, SHAPE)],
        [helper.make_tensor_value_info(name, 1, axes) for name, axes in outputs.items()],
    )
    path = tmp_path / "model.onnx"
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=9), path)
    engine = open_engine(Opening(path, (1,), ModelSettings(engine="openvino")))
    plain = open_engine(Opening(path, (1,)))
    assert isinstance(engine, InPlace)
    random = np.random.default_rng(1)
    for number in range(8):
        rows = (1, 2, 1, 1, 2, 2, 1, 1)[number]
        x = random.standard_normal((rows, LARGE)).astype(np.float32)
        x[:, : 1 + 1000 * number] = 0  # how many are found differs
        before = x.copy()
        found = engine.run_into(1, {"x": x}, Room())
        wanted = plain.run(1, {"x": before})  # type: ignore[union-attr]
        assert all(map(np.array_equal, found, wanted)), number
        assert np.array_equal(x, before)
    assert has_bound(engine) == binds


def compiled(outputs: str) -> Any:
    """A model of OpenVINO's whose outputs are its input ("x") and what is computed of it ("y")."""
    from cotenant.engines.openvino import imported, shared_core

    openvino = imported()
    x = openvino.opset13.parameter([-1, LARGE], openvino.Type.f32, name="x")
    known = {"x": x, "y": openvino.opset13.relu(x), "z": openvino.opset13.negative(x)}
    results = [openvino.opset13.result(known[name]) for name in outputs]
    return shared_core().compile_model(openvino.Model(results, [x]), "CPU")


@OPENVINO
@pytest.mark.parametrize(
    ("outputs", "binds"), [("y", True), ("yz", True), ("x", False), ("yx", False), ("yy", False)]
)
def test_openvino_binds_neither_an_input_nor_what_is_two_outputs(outputs: str, binds: bool) -> None:
    """It would write to the input, or to one of the two alone."""
    from cotenant.engines.openvino import imported
    from cotenant.engines.openvino_bound import Bound

    bound = Bound(compiled(outputs), imported().Tensor)
    x = values(1, LARGE)
    bound.learn([x], [x] * len(outputs))
    assert (bound.wanted([x]) is not None) == binds
