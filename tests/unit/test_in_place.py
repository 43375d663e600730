"""Outputs that are written where they are wanted, and how often tensors are copied in a worker."""

from __future__ import annotations

import socket
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotenant.engines.base import InPlace, Opening
from cotenant.runtime.messages import Done, Item, Open, Opened, Place, Run
from cotenant.runtime.worker import Room, Worker
from tests.builders import open_engine

onnx = pytest.importorskip("onnx")
LARGE = 300_000


def graph(path: Path, axes_in: list[Any], axes_out: list[Any], *nodes: Any) -> Path:
    """A model of FP32 from x to y."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    made = helper.make_graph(
        list(nodes) or [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", kind, axes_in)],
        [helper.make_tensor_value_info("y", kind, axes_out)],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=9), path)
    return path


class Counting(Worker):
    """Counts the bytes of outputs that it copies."""

    copied = 0

    def _store(self, item: Item, parts: list[Any], *, placed: bool = False) -> Any:
        self.copied += 0 if placed else sum(part.nbytes for part in parts)
        return super()._store(item, parts, placed=placed)


class Rig:
    """A worker with a model, and an arena that a test writes to and reads from."""

    def __init__(self, path: Path, size: int) -> None:
        self.arena = bytearray(size)
        ours, self._theirs = socket.socketpair()
        ours.close()
        self.worker = Counting(self._theirs, memoryview(self.arena))
        opened = self.worker._open(Open(str(path), units=(1,), max_batch=4))
        assert isinstance(opened, Opened), opened

    def ask(self, x: Any, room: int) -> tuple[Any, int]:
        """The answer, and how many bytes were copied for it: of outputs, and of inputs or anything
        else the most that Python allocated."""
        offset = -(-x.nbytes // 64) * 64
        self.arena[: x.nbytes] = x.tobytes()
        item = Item(len(x), (Place(x.shape, 0, x.nbytes),), offset, room)
        self.worker.copied = 0
        tracemalloc.start()
        try:
            done = self.worker._run(Run(1, (0,), 1, 0, (item,)))
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert isinstance(done, Done), done
        assert not done.items[0].error, done.items[0].error
        (place,) = done.items[0].places
        if place.offset < 0:
            data = done.items[0].spilled[0]
        else:
            assert place.offset == offset
            data = bytes(self.arena[place.offset : place.offset + place.nbytes])
        copied = self.worker.copied + (most if most >= x.nbytes else 0)
        return np.frombuffer(data, np.float32).reshape(place.shape), copied

    def close(self) -> None:
        self._theirs.close()


def values(*shape: int) -> Any:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("of_x", "of_y", "copied"), [("b", "b", False), (1, 1, False), ("b", "c", True)]
)
def test_a_large_output_is_copied_only_where_its_shape_is_not_known(
    tmp_path: Path, of_x: Any, of_y: Any, copied: bool
) -> None:
    path = graph(tmp_path / "model.onnx", [of_x, LARGE], [of_y, LARGE])
    rig = Rig(path, 2 * 4 * LARGE + 4096)
    x = values(1, LARGE)
    rig.ask(x, x.nbytes)
    answer, bytes_copied = rig.ask(x, x.nbytes)
    assert np.array_equal(answer, np.maximum(x, 0))
    assert bytes_copied == (x.nbytes if copied else 0)
    rig.close()


def test_what_does_not_fit_is_given_all_the_same(tmp_path: Path) -> None:
    axes = ["b", LARGE]
    rig = Rig(graph(tmp_path / "model.onnx", axes, axes), 2 * 4 * LARGE)
    x = values(1, LARGE)
    answer, _ = rig.ask(x, 1024)
    assert np.array_equal(answer, np.maximum(x, 0))
    rig.close()


def test_names_of_axes_that_are_not_true_cost_a_copy_and_no_answer(tmp_path: Path) -> None:
    """The model says that its output is as long as its input, and doubles it."""
    nodes = [onnx.helper.make_node("Concat", ["x", "x"], ["y"], axis=0)]
    path = graph(tmp_path / "model.onnx", ["n", LARGE], ["n", LARGE], *nodes)
    rig = Rig(path, 3 * 4 * LARGE + 4096)
    x = values(1, LARGE)
    for _ in range(2):
        answer, _ = rig.ask(x, 2 * x.nbytes)
        assert np.array_equal(answer, np.concatenate([x, x]))
    rig.close()


class _Room:
    """Room of its own."""

    def __init__(self) -> None:
        self.taken = 0

    def take(self, outputs: Any) -> Any:
        self.taken += 1
        return [np.full(shape, -1, dtype) for shape, dtype in outputs]


@pytest.mark.parametrize("same", [False, True])
def test_an_input_that_is_an_output_as_well_is_in_its_place(tmp_path: Path, same: bool) -> None:
    nodes = [onnx.helper.make_node("Identity", ["x"], ["y"])] if same else []
    path = graph(tmp_path / "model.onnx", ["b", LARGE], ["b", LARGE], *nodes)
    engine, room = open_engine(Opening(path, (1,))), _Room()
    assert isinstance(engine, InPlace)
    x = values(2, LARGE)
    (y,) = engine.run_into(1, {"x": x}, room)
    assert room.taken == 1
    assert np.array_equal(y, x if same else np.maximum(x, 0))


def test_a_wrong_input_is_the_inputs_fault_and_later_ones_are_bound(tmp_path: Path) -> None:
    from cotenant.domain.errors import ModelError

    path = graph(tmp_path / "model.onnx", ["b", LARGE], ["b", LARGE])
    engine, room = open_engine(Opening(path, (1,))), _Room()
    assert isinstance(engine, InPlace)
    with pytest.raises(ModelError):
        engine.run_into(1, {"x": values(1, LARGE + 1)}, room)
    before = room.taken
    engine.run_into(1, {"x": values(1, LARGE)}, room)
    assert room.taken == before + 1


@given(
    st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=4), st.integers(0, 900)
)
@settings(max_examples=200, deadline=None)
def test_room_is_given_within_its_bounds_and_without_overlap(
    shapes: list[tuple[int, ...]], size: int
) -> None:
    arena = bytearray(1024)
    given_room = Room(memoryview(arena), 64, size)
    arrays = given_room.take([(shape, np.float32) for shape in shapes])
    if arrays is None:
        assert sum(max(1, int(np.prod(s))) * 4 for s in shapes) > size - 64 * len(shapes)
        return
    for array, shape in zip(arrays, shapes, strict=True):
        assert array.shape == shape
        np.add(array, 1, out=array)
    assert np.frombuffer(arena, np.float32).sum() == sum(a.size for a in arrays)
    assert not any(arena[:64]) and not any(arena[64 + size :])
