"""Distillation: small networks of a general kind, of several widths, learn what the parent says.

A student that disagrees with the parent even on the rows that it was trained with, by soft answers
and by hard ones, while a wider one learned more in the same time, is too small (J. H. Cho,
B. Hariharan, "On the efficacy of knowledge distillation", ICCV 2019: better teachers do not help
students without the capacity). That is said, with a width between both. Where wider ones learned no
more either, time was short.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from cotenant.domain.errors import ModelError
from cotenant.optimize.parent import Parent, Told
from cotenant.optimize.recipes.base import Made
from cotenant.optimize.recipes.trained import NEEDS, agreement, with_int8

if TYPE_CHECKING:
    from cotenant.optimize.torchwork.training import Lesson

WIDTHS: Final = (8, 16, 32)
"""Channels of the first layer of networks for images; an eighth of the units of others."""
_HIDDEN: Final = 8


class _Student(msgspec.Struct):
    """One that was trained. ``agrees``: with the parent, on the rows that it was trained with."""

    width: int
    path: Path
    how: str
    agrees: float


class Student:
    """See the module's text."""

    name = "student"
    needs = NEEDS
    trains = True

    def make(self, parent: Parent, work: Path, seconds: float, told: Told) -> Iterator[Made]:
        from cotenant.optimize.torchwork import training

        given = training.lesson(parent)
        _check(parent)
        floor = 1 - parent.asked.max_drop
        found = []
        for width in WIDTHS:
            told(f"a student of width {width}")
            found.append(_taught(given, width, work, seconds / len(WIDTHS), told))
        for student in found:
            name = f"{self.name}-{student.width}"
            said = f"a student of width {student.width}, trained on {student.how}"
            note = ""
            if student.agrees < floor:
                note = _short(student.agrees)
                note += _too_small(student, found)
            yield from with_int8(parent, Made(name, said, student.path, note), work)


def _check(parent: Parent) -> None:
    inputs, outputs = parent.meta.inputs, parent.meta.outputs
    fixed = all(-1 not in t.shape[1:] for t in (*inputs, *outputs))
    if len(inputs) != 1 or len(outputs) != 1 or not fixed:
        raise ModelError("students have one input and one output of fixed sizes")
    if len(inputs[0].shape) not in (2, 4) or len(outputs[0].shape) != 2:
        raise ModelError("students take images or vectors, and give a vector")


def _taught(given: Lesson, width: int, work: Path, seconds: float, told: Told) -> _Student:
    """By soft answers, and where that does not reach the parent on the rows, by hard ones too."""
    parent = given.parent
    folder = work / f"width-{width}"
    folder.mkdir()
    soft = _trained(given, width, folder / "soft.onnx", seconds / 2, told, None)
    best = _Student(width, soft, "the parent's scores", agreement(parent, soft))
    if best.agrees < 1 - parent.asked.max_drop and given.classes:
        labels = np.concatenate(
            [
                given.answer([array[at : at + 256] for array in given.rows])[0].argmax(dim=1)
                for at in range(0, given.samples, 256)
            ]
        )
        hard = _trained(given, width, folder / "hard.onnx", seconds / 2, told, labels)
        reached = agreement(parent, hard)
        if reached > best.agrees:
            best = _Student(width, hard, "the parent's choices", reached)
    best.path = best.path.rename(folder / "model.onnx")
    return best


def _trained(
    given: Lesson, width: int, path: Path, seconds: float, told: Told, labels: Any
) -> Path:
    from cotenant.optimize.torchwork import exporting, training
    from cotenant.optimize.torchwork.importing import Graph

    model = network(given, width)
    module = Graph(model)
    training.train(module, given, seconds, told, labels)
    return exporting.write(model, module, path)


def _short(agrees: float) -> str:
    return (
        "on the rows that it was trained with too it agrees with the original in no more than "
        f"{agrees:.4f}"
    )


def _too_small(student: _Student, found: list[_Student]) -> str:
    """With a width between it and the next one that learned more in the same time, if there is."""
    better = [s.width for s in found if s.width > student.width and s.agrees > student.agrees]
    if not better:
        return ": it needs more time (--seconds)"
    between = round(math.sqrt(student.width * better[0]))
    return f": too small, a width of {better[0]} learned more; try about {between}"


def network(given: Lesson, width: int) -> Any:
    """An untrained network as an ONNX graph: convolutions that halve images, or hidden layers."""
    from onnx import TensorProto, helper

    source, sink = given.parent.meta.inputs[0], given.parent.meta.outputs[0]
    build = _Builder(given.rows[0], source.name)
    if len(source.shape) == 4:
        channels, halvings = (
            width,
            max(1, min(4, int(math.log2(max(8, min(source.shape[2:])) / 4)))),
        )
        for _ in range(halvings):
            build.conv(channels, 2)
            channels *= 2
        build.conv(channels, 1)
        build.pooled()
    else:
        build.dense(_HIDDEN * width, True)
        build.dense(_HIDDEN * width, True)
    build.dense(sink.shape[1], False)
    if given.shares:
        build.node("Softmax", axis=1)
    build.nodes[-1].output[0] = sink.name
    graph = helper.make_graph(
        build.nodes,
        "student",
        [helper.make_tensor_value_info(source.name, TensorProto.FLOAT, ["n", *source.shape[1:]])],
        [helper.make_tensor_value_info(sink.name, TensorProto.FLOAT, ["n", *sink.shape[1:]])],
        build.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


class _Builder:
    """Appends nodes to a graph, each of which takes what the one before gives. It begins with the
    rows' own mean and spread, by channel."""

    def __init__(self, rows: Any, name: str) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self._random = np.random.default_rng(5)
        self._last, self.size = name, rows.shape[1]
        axes = (0, *range(2, rows.ndim))
        ones = np.ones(self.size)
        mean, spread = rows.mean(axis=axes), rows.var(axis=axes) + 1e-3
        self.node("BatchNormalization", ones, 0 * ones, mean, spread)

    def node(self, kind: str, *weights: Any, **attributes: Any) -> None:
        """Append one with these weights."""
        from onnx import helper, numpy_helper

        name = f"{kind.lower()}_{len(self.nodes)}"
        names = [f"{name}.w{number}" for number in range(len(weights))]
        self.weights += [
            numpy_helper.from_array(np.asarray(w, dtype=np.float32), n)
            for w, n in zip(weights, names, strict=True)
        ]
        made = helper.make_node(kind, [self._last, *names], [f"{name}.out"], name, **attributes)
        self.nodes.append(made)
        self._last = f"{name}.out"

    def conv(self, channels: int, stride: int) -> None:
        """3 by 3, then ReLU; He's scale of weights."""
        shape = (channels, self.size, 3, 3)
        weight = self._random.normal(0, math.sqrt(2 / (9 * self.size)), shape)
        pads, strides = [1, 1, 1, 1], [stride, stride]
        self.node("Conv", weight, np.zeros(channels), pads=pads, strides=strides)
        self.node("Relu")
        self.size = channels

    def pooled(self) -> None:
        """The mean over an image."""
        self.node("GlobalAveragePool")
        self.node("Flatten", axis=1)

    def dense(self, units: int, active: bool) -> None:
        """All to all, then ReLU if ``active``."""
        weight = self._random.normal(0, math.sqrt(2 / self.size), (self.size, units))
        self.node("Gemm", weight, np.zeros(units))
        if active:
            self.node("Relu")
        self.size = units
