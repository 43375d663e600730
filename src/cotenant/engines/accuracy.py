"""How well a version reads its check data, and by what measure.

``check.npz`` holds the inputs by name and ``labels``. Which output is compared, and how, is said
there (``output``, ``measure``), in ``model.yaml``, or follows from the labels:

* ``exact``: an output of integers or strings equals the label;
* ``argmax``: the largest of an output's scores, along the axis that labels lack, is at the label;
* ``threshold``: a score is above one half where the label is 1 (never taken unless named: scores
  before a sigmoid look alike);
* ``r2``: for labels that are floating-point numbers, 1 less the squared error over the variance of
  the labels (the coefficient of determination), so 1 is perfect and 0 no better than their mean.
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np

from cotenant.domain.config import MEASURES
from cotenant.domain.errors import ModelError
from cotenant.engines.base import Array, Engine
from cotenant.engines.checkdata import CheckData

_KINDS: Final = {"U": "strings", "S": "strings", "O": "strings", "f": "numbers with fractions"}


class Accuracy(msgspec.Struct, frozen=True):
    """``value`` is at most 1; ``how`` says what was compared."""

    value: float
    how: str


def measure(engine: Engine, units: int, data: CheckData, step: int) -> Accuracy:
    """Run the check data, ``step`` samples at a time, and compare; raises ModelError."""
    inputs = engine.meta.inputs
    rows = engine.meta.batchable and not data.whole(inputs)
    step = step if rows else 1
    names = [t.name for t in engine.meta.outputs]
    if data.output and data.output not in names:
        known = ", ".join(names)
        raise ModelError(f"{data.name} names the output {data.output!r}; there are: {known}")
    if data.measure and data.measure not in MEASURES:
        known = ", ".join(MEASURES)
        raise ModelError(f"{data.name} names the measure {data.measure!r}; there are: {known}")
    answers: list[list[Array]] = [[] for _ in names]
    for start in range(0, data.samples, step):
        stop = min(start + step, data.samples)
        outputs = engine.run(units, data.part(inputs, start, stop))
        for kept, output in zip(answers, outputs, strict=True):
            kept.append(output if rows else np.asarray(output)[np.newaxis])
    refusals = []
    for name, parts in zip(names, answers, strict=True):
        if data.output in ("", name):
            found = _score(data, parts)
            if isinstance(found, Accuracy):
                return Accuracy(found.value, f"{found.how} of output {name!r}")
            refusals.append(f"{name!r} {found}")
    raise ModelError(
        f"{data.name}: no output can be compared with labels of {_kind(data.labels)}, shape "
        f"{list(data.labels.shape)}: {'; '.join(refusals)}. Name output and measure in it"
    )


def _score(data: CheckData, parts: list[Array]) -> Accuracy | str:
    """Accuracy of one output; or why it is none to compare."""
    labels = data.labels
    try:
        output = np.concatenate(parts)
    except ValueError:
        return "has another shape for each sample"
    if len(output) != len(labels):
        return f"has {len(output)} entries for {len(labels)} samples"
    chosen = data.measure or _fitting(output, labels)
    if chosen == "argmax":
        return _argmax(output, labels)
    if not chosen:
        return f"holds {_kind(output)}"
    if _without_ones(output) != _without_ones(labels):
        return f"has the shape {list(output.shape)}"
    output = output.reshape(labels.shape)
    count = f"{len(labels)} samples"
    if chosen == "exact":
        if output.dtype.kind not in "biuOUS":
            return f"holds {_kind(output)}, which are never equal to labels but by chance"
        right = float((_comparable(output) == _comparable(labels)).mean())
        return Accuracy(right, f"{count}, equal labels")
    if output.dtype.kind not in "biuf" or labels.dtype.kind not in "biuf":
        return f"holds {_kind(output)}, and labels are {_kind(labels)}: {chosen} is of numbers"
    if chosen == "threshold":
        return Accuracy(
            float(((output > 0.5) == (labels > 0.5)).mean()), f"{count}, above one half"
        )
    return _r2(output.astype(np.float64), labels.astype(np.float64), count)


def _r2(output: Array, labels: Array, count: str) -> Accuracy | str:
    if not np.isfinite(output).all():
        return "holds NaN or infinity"
    spread = float(((labels - labels.mean()) ** 2).sum())
    wrong = float(((output - labels) ** 2).sum())
    mean = float(np.abs(output - labels).mean())
    value = 1.0 - wrong / spread if spread else float(wrong == 0.0)
    return Accuracy(value, f"{count}, r2 (mean absolute error {mean:.4g})")


def _without_ones(array: Array) -> list[int]:
    return [length for length in array.shape if length != 1]


def _fitting(output: Array, labels: Array) -> str:
    """The measure that an output's and the labels' types allow; "" if none."""
    if labels.dtype.kind == "f":
        return "r2" if output.dtype.kind == "f" and output.size == labels.size else ""
    if labels.dtype.kind in "US":
        return "exact" if output.dtype.kind in "OUS" else ""
    if output.dtype.kind in "biu":
        return "exact" if output.size == labels.size else ""
    return "argmax" if output.dtype.kind == "f" and output.size > labels.size else ""


def _argmax(output: Array, labels: Array) -> Accuracy | str:
    """Scores of classes along the one axis that labels lack: the second, or the last."""
    if labels.dtype.kind not in "biu" or output.dtype.kind not in "biuf":
        return f"holds {_kind(output)}, and labels must be class numbers"
    shape = labels.shape
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    squeezed = output
    while squeezed.ndim > len(shape) + 1 and 1 in squeezed.shape[1:]:
        squeezed = squeezed.squeeze(1 + squeezed.shape[1:].index(1))
    for axis in (1, -1):
        if squeezed.ndim == len(shape) + 1:
            rest = list(squeezed.shape)
            del rest[axis]
            if tuple(rest) == shape and squeezed.shape[axis] > 1:
                found = squeezed.argmax(axis=axis) == labels.reshape(shape)
                found &= ~np.isnan(squeezed).any(axis=axis)
                return Accuracy(float(found.mean()), f"{len(labels)} samples, largest score")
    return f"has the shape {list(output.shape)}"


def _comparable(array: Array) -> Array:
    """Strings as such, however they are kept."""
    if array.dtype.kind not in "OUS":
        return array
    words = [x.decode("utf-8", "replace") if isinstance(x, bytes) else str(x) for x in array.flat]
    return np.array(words, dtype=object).reshape(array.shape)


def _kind(array: Array) -> str:
    return _KINDS.get(array.dtype.kind, "whole numbers")
