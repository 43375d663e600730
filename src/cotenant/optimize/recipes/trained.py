"""What recipes that train share: the parent as a module, and int8 of what they made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cotenant.domain.errors import ModelError
from cotenant.optimize.comparing import compare
from cotenant.optimize.parent import Parent, open_variant
from cotenant.optimize.recipes.base import Made
from cotenant.optimize.recipes.int8 import Quantizer, batches_of, prepare

if TYPE_CHECKING:
    from cotenant.optimize.torchwork.importing import Graph
    from cotenant.optimize.torchwork.training import Lesson

NEEDS = ("onnx", "torch")
_TRIED = 16
"""Rows by which an imported module is compared with its graph."""


def imported(parent: Parent, lesson: Lesson, work: Path) -> tuple[Any, Graph]:
    """The parent's graph, its layers folded, and a module that answers as it does. Raises
    ModelError where it cannot be had."""
    import onnx

    path = work / "folded.onnx"
    prepare(parent.onnx(), path)
    model = onnx.load(str(path))
    return model, same_module(model, lesson)


def same_module(model: Any, lesson: Lesson) -> Graph:
    """The graph as a module, seen to answer as the parent does."""
    import torch

    from cotenant.optimize.torchwork.importing import Graph

    module = Graph(model)
    rows = [array[:_TRIED] for array in lesson.rows]
    with torch.no_grad():
        found = module(*map(torch.from_numpy, rows))
    for mine, its in zip(found, lesson.answer(rows), strict=True):
        largest = float(its.abs().max())
        if mine.shape != its.shape or not np.allclose(mine, its, rtol=1e-3, atol=1e-4 * largest):
            raise ModelError("as a torch module it answers otherwise than its graph does")
    return module


def agreement(parent: Parent, path: Path) -> float:
    """On the rows for making, as a part of 1 (r2 where answers are numbers)."""
    engine = open_variant(path, "onnxruntime", (parent.units,))
    return compare(parent.making, engine, parent.units).value


def with_int8(parent: Parent, made: Made, work: Path) -> Iterator[Made]:
    """A candidate, and its int8 where it can be quantized."""
    import onnx

    yield made
    folder = work / f"{made.name}-int8"
    folder.mkdir()
    graph = folder / "prepared.onnx"
    prepare(onnx.load(str(made.path)), graph)
    try:
        path = Quantizer(graph, batches_of(parent)).write(folder / "model.onnx")
    except ModelError:
        return
    yield Made(f"{made.name}-int8", f"{made.recipe}; then static int8", path, made.note)
