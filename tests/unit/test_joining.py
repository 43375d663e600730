"""When requests may share a batch: models that are row by row, and those that only look so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

from cotenant.domain.errors import ModelError
from cotenant.engines.base import Array, Opening, size_of
from cotenant.engines.joining import judge, same
from cotenant.engines.samples import Samples, make_samples
from tests.builders import open_engine

Io = tuple[str, int, list[int | str | None]]
X: Io = ("x", T.FLOAT, ["n", 4])
Y: Io = ("y", T.FLOAT, ["n", 4])


def write(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[Io],
    outputs: list[Io],
    constants: dict[str, object] | None = None,
) -> Path:
    graph = h.make_graph(
        nodes,
        "g",
        [h.make_tensor_value_info(*i) for i in inputs],
        [h.make_tensor_value_info(*o) for o in outputs],
        [nh.from_array(np.asarray(a), name) for name, a in (constants or {}).items()],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path / "model.onnx")
    return path / "model.onnx"


Made = tuple[list[onnx.NodeProto], list[Io], list[Io], dict[str, object]]


def scaled() -> Made:
    return [h.make_node("Mul", ["x", "two"], ["y"])], [X], [Y], {"two": np.float32(2)}


def named_differently() -> Made:
    nodes, inputs, _, constants = scaled()
    return nodes, inputs, [("y", T.FLOAT, ["m", 4])], constants


def cumulative() -> Made:
    """Time on the first axis: each entry builds on those before."""
    return [h.make_node("CumSum", ["x", "axis"], ["y"])], [X], [Y], {"axis": np.int64(0)}


def centred() -> Made:
    nodes = [
        h.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
        h.make_node("Sub", ["x", "mean"], ["y"]),
    ]
    return nodes, [X], [Y], {}


def finds() -> Made:
    """A detector: a line for each value above the threshold, with the row that it is in."""
    nodes = [
        h.make_node("Greater", ["x", "least"], ["hit"]),
        h.make_node("NonZero", ["hit"], ["where"]),
        h.make_node("Transpose", ["where"], ["y"]),
    ]
    return nodes, [X], [("y", T.INT64, ["found", 2])], {"least": np.float32(0.9)}


def numbers_rows() -> Made:
    """Each row is answered with its number in the batch."""
    nodes = [
        h.make_node("Greater", ["x", "least"], ["hit"]),
        h.make_node("NonZero", ["hit"], ["where"]),
        h.make_node("Gather", ["where", "first"], ["y"], axis=0),
    ]
    one: Io = ("x", T.FLOAT, ["n", 1])
    constants = {"least": np.float32(-1e9), "first": np.int64(0)}
    return nodes, [one], [("y", T.INT64, ["n"])], constants


def reshaped() -> Made:
    """Exported for one row."""
    nodes = [h.make_node("Reshape", ["x", "shape"], ["y"])]
    return nodes, [X], [Y], {"shape": np.array([1, 4], np.int64)}


def constant_second_output() -> Made:
    """One output is row by row, the other always has two entries."""
    nodes = [h.make_node("Identity", ["x"], ["y"]), h.make_node("Identity", ["c"], ["z"])]
    return nodes, [X], [Y, ("z", T.FLOAT, ["k", 4])], {"c": np.zeros((2, 4), np.float32)}


def noisy() -> Made:
    nodes = [h.make_node("RandomNormalLike", ["x"], ["r"]), h.make_node("Add", ["x", "r"], ["y"])]
    return nodes, [X], [Y], {}


def lifted() -> Made:
    """A small value that looks at its company, beside a large one that does not."""
    nodes = [
        h.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
        h.make_node("Sub", ["x", "mean"], ["centre"]),
        h.make_node("Mul", ["x", "zero"], ["none"]),
        h.make_node("Add", ["none", "million"], ["far"]),
        h.make_node("Concat", ["centre", "far"], ["y"], axis=1),
    ]
    constants: dict[str, object] = {"zero": np.float32(0), "million": np.float32(1e6)}
    return nodes, [X], [("y", T.FLOAT, ["n", 8])], constants


def two_batches() -> Made:
    """Two inputs that have nothing to do with each other, each with rows of its own."""
    nodes = [h.make_node("Identity", ["x"], ["y"]), h.make_node("Identity", ["q"], ["z"])]
    other: Io = ("q", T.FLOAT, ["m", 2])
    return nodes, [X, other], [Y, ("z", T.FLOAT, ["m", 2])], {}


def late() -> Made:
    """Rows behind the fortieth are answered otherwise."""
    nodes = [
        h.make_node("Shape", ["x"], ["shape"]),
        h.make_node("Gather", ["shape", "first"], ["count"]),
        h.make_node("Range", ["from", "count", "step"], ["numbers"]),
        h.make_node("Greater", ["numbers", "forty"], ["behind"]),
        h.make_node("Cast", ["behind"], ["more"], to=T.FLOAT),
        h.make_node("Unsqueeze", ["more", "axis"], ["column"]),
        h.make_node("Add", ["x", "column"], ["y"]),
    ]
    constants: dict[str, object] = {
        "first": np.int64(0),
        "from": np.int64(0),
        "step": np.int64(1),
        "forty": np.int64(40),
        "axis": np.array([1], np.int64),
    }
    return nodes, [X], [Y], constants


def verdict(made: Made, path: Path, **settings: dict[str, tuple[int, int]]) -> str:
    engine = open_engine(Opening(write(path, *made), (1,)))
    samples = make_samples(engine, 1, {}, settings.get("ranges", {}))
    return judge(engine, 1, samples, 64)


@pytest.mark.parametrize("made", [scaled, named_differently])
def test_rows_that_know_nothing_of_each_other_are_joined(
    made: Callable[[], Made], tmp_path: Path
) -> None:
    assert verdict(made(), tmp_path) == ""


@pytest.mark.parametrize(
    "made",
    [
        *(cumulative, centred, finds, numbers_rows, reshaped, constant_second_output, noisy),
        *(lifted, two_batches, late),
    ],
)
def test_rows_that_need_each_other_are_not(made: Callable[[], Made], tmp_path: Path) -> None:
    assert verdict(made(), tmp_path) != ""


def test_a_fixed_first_axis_is_no_batch(tmp_path: Path) -> None:
    nodes, _, _, constants = scaled()
    made = nodes, [("x", T.FLOAT, [1, 4])], [("y", T.FLOAT, [1, 4])], constants
    assert verdict(made, tmp_path) != ""  # type: ignore[arg-type]


def tokens() -> Made:
    """An embedding of ten words: other numbers are refused by the model."""
    nodes = [h.make_node("Gather", ["table", "ids"], ["y"], axis=0)]
    table = np.random.default_rng(0).random((10, 3)).astype(np.float32)
    ids: Io = ("ids", T.INT64, ["n", "t"])
    return nodes, [ids], [("y", T.FLOAT, ["n", "t", 3])], {"table": table}


def test_integers_are_tried_only_within_a_range_that_is_known(tmp_path: Path) -> None:
    assert verdict(tokens(), tmp_path) != ""
    assert verdict(tokens(), tmp_path, ranges={"ids": (0, 9)}) == ""


def test_settings_that_name_no_input_are_refused(tmp_path: Path) -> None:
    engine = open_engine(Opening(write(tmp_path, *scaled()), (1,)))
    for shapes, ranges in (({"q": (1, 4)}, {}), ({}, {"q": (0, 1)}), ({"x": (4,)}, {})):
        with pytest.raises(ModelError):
            make_samples(engine, 1, shapes, ranges)  # type: ignore[arg-type]


def test_one_sample_shows_nothing(tmp_path: Path) -> None:
    engine = open_engine(Opening(write(tmp_path, *scaled()), (1,)))
    one = make_samples(engine, 1, {}, {}).rows[:1]
    assert judge(engine, 1, Samples(one), 8) != ""


def test_answers_are_compared_to_the_tolerance_of_their_type() -> None:
    a: Array = np.array([1.0, 1e-9], np.float32)
    assert same(a, a * np.float32(1 + 1e-6))
    assert not same(a, a * np.float32(1.1))
    assert same(np.array([np.nan, np.inf], np.float32), np.array([np.nan, np.inf], np.float32))
    assert not same(np.array([np.nan], np.float32), np.array([0.0], np.float32))
    assert not same(np.array([1], np.int64), np.array([2], np.int64))
    assert not same(np.array(["a"], object), np.array(["b"], object))
    assert not same(a, a[:1])


def test_the_size_of_a_row_is_that_of_its_free_axes(tmp_path: Path) -> None:
    engine = open_engine(Opening(write(tmp_path, *tokens()), (1,)))
    assert size_of(engine.meta, {"ids": (4, 100)}) == 100
    fixed = open_engine(Opening(write(tmp_path, *scaled()), (1,)))
    assert size_of(fixed.meta, {"x": (4, 4)}) == 1
