"""Static int8, with the layers that suffer most left in float.

Each layer, or group of neighbours where there are many, is quantized alone, and what that does to
the outputs is measured. The worst are left out, a few more each time, until the rows for making
lose little. The judging rows have no part in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from cotenant.domain.errors import ModelError
from cotenant.engines.accuracy import answers
from cotenant.engines.base import Array, Engine
from cotenant.optimize.comparing import STEP, compare
from cotenant.optimize.parent import Parent, Told, open_variant
from cotenant.optimize.recipes.base import Made
from cotenant.optimize.recipes.int8 import Quantizer

GROUPS: Final = 24
"""Trials of a group alone, at most."""
LEFT_OUT: Final = (1, 2, 4, 8)
"""Groups that are left in float, in turn; at most half of them, or two."""
_ENGINE: Final = "onnxruntime"


class Mixed:
    """See the module's text."""

    name = "int8-mixed"
    needs = ("onnx",)
    trains = False

    def make(self, parent: Parent, work: Path, seconds: float, told: Told) -> Iterator[Made]:
        del seconds
        quantizer = Quantizer.of(parent, work)
        if len(quantizer.nodes) < 2:
            raise ModelError("it has one layer to quantize: there is none to choose")
        trial = work / "trial.onnx"
        if _drop(parent, quantizer.write(trial)) <= 0:
            raise ModelError("int8 of all layers loses nothing on the rows for making")
        order = _by_error(parent, quantizer, trial, told)
        for count in (n for n in LEFT_OUT if n < min(len(order), 1 + max(2, len(order) // 2))):
            left = [name for group in order[:count] for name in group]
            if len(left) >= len(quantizer.nodes):
                break
            told(f"static int8 without {len(left)} layers")
            if _drop(parent, quantizer.write(trial, without=left)) <= parent.asked.max_drop / 2:
                path = trial.rename(work / "model.onnx")
                kept = len(quantizer.nodes) - len(left)
                said = f"static int8 of {kept} layers, per channel; in float: {', '.join(left)}"
                yield Made(self.name, said, path)
                return
        raise ModelError("no few layers left in float make it lose little on the rows for making")


def _by_error(parent: Parent, quantizer: Quantizer, trial: Path, told: Told) -> list[list[str]]:
    """Groups of layers, the one that changes the outputs most first."""
    nodes = quantizer.nodes
    size = math.ceil(len(nodes) / GROUPS)
    groups = [nodes[at : at + size] for at in range(0, len(nodes), size)]
    truth = _outputs(parent, parent.engine)
    errors: list[float] = []
    for number, group in enumerate(groups, 1):
        told(f"how much int8 of single layers changes: {number} of {len(groups)}")
        made = open_variant(quantizer.write(trial, only=group), _ENGINE, (parent.units,))
        errors.append(_error(truth, _outputs(parent, made)))
    order = sorted(range(len(groups)), key=lambda number: -errors[number])
    return [groups[number] for number in order]


def _drop(parent: Parent, path: Path) -> float:
    """What a file loses on the rows for making."""
    return compare(parent.making, open_variant(path, _ENGINE, (parent.units,)), parent.units).drop


def _outputs(parent: Parent, engine: Engine) -> list[Array]:
    """Floating-point outputs for the calibration rows, flat."""
    found = answers(engine, parent.units, parent.rows.calibration, STEP)
    return [
        np.concatenate([p.reshape(-1) for p in parts]).astype(np.float64)
        for parts in found
        if parts[0].dtype.kind == "f"
    ]


def _error(truth: Sequence[Array], found: Sequence[Array]) -> float:
    """Squared error over the squares of what is right, the worst of all outputs; NaN is worst."""
    shares = [
        float(((a - b) ** 2).sum() / max(float((a**2).sum()), 1e-30))
        for a, b in zip(truth, found, strict=True)
    ]
    worst = max(shares, default=0.0)
    return worst if math.isfinite(worst) else math.inf
