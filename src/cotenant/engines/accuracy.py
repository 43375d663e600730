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


class Judged(msgspec.Struct):
    """What an output is beside the labels, by a ``measure``. ``right``: of each label whether it
    was met, in the labels' shape; None for ``r2``, which is of ``output`` as a whole. ``output``
    has the labels' shape, or that of scores of classes."""

    name: str
    measure: str
    output: Array
    right: Array | None


def measure(engine: Engine, units: int, data: CheckData, step: int) -> Accuracy:
    """Run the check data, ``step`` samples at a time, and compare; raises ModelError."""
    found = judge(engine, data, answers(engine, units, data, step))
    value, how = _accuracy(found, data.labels)
    return Accuracy(value, f"{how} of output {found.name!r}")


def answers(engine: Engine, units: int, data: CheckData, step: int) -> list[list[Array]]:
    """By output, what the engine says to the check data, in parts; raises ModelError."""
    inputs = engine.meta.inputs
    rows = engine.meta.batchable and not data.whole(inputs)
    step = step if rows else 1
    found: list[list[Array]] = [[] for _ in engine.meta.outputs]
    for start in range(0, data.samples, step):
        stop = min(start + step, data.samples)
        outputs = engine.run(units, data.part(inputs, start, stop))
        for kept, output in zip(found, outputs, strict=True):
            kept.append(output if rows else np.asarray(output)[np.newaxis])
    return found


def judge(engine: Engine, data: CheckData, answered: list[list[Array]]) -> Judged:
    """Compare what it said (see ``answers``) with the labels; raises ModelError."""
    names = [t.name for t in engine.meta.outputs]
    if data.output and data.output not in names:
        known = ", ".join(names)
        raise ModelError(f"{data.name} names the output {data.output!r}; there are: {known}")
    if data.measure and data.measure not in MEASURES:
        known = ", ".join(MEASURES)
        raise ModelError(f"{data.name} names the measure {data.measure!r}; there are: {known}")
    refusals = []
    for name, parts in zip(names, answered, strict=True):
        if data.output in ("", name):
            found = _judge(name, data, parts)
            if isinstance(found, Judged):
                return found
            refusals.append(f"{name!r} {found}")
    raise ModelError(
        f"{data.name}: no output can be compared with labels of {_kind(data.labels)}, shape "
        f"{list(data.labels.shape)}: {'; '.join(refusals)}. Name output and measure in it"
    )


def _judge(name: str, data: CheckData, parts: list[Array]) -> Judged | str:
    """One output beside the labels; or why it is none to compare."""
    labels = data.labels
    try:
        output = np.concatenate(parts)
    except ValueError:
        return "has another shape for each sample"
    if len(output) != len(labels):
        return f"has {len(output)} entries for {len(labels)} samples"
    chosen = data.measure or _fitting(output, labels)
    if chosen == "argmax":
        right = _argmax(output, labels)
        return right if isinstance(right, str) else Judged(name, chosen, output, right)
    if not chosen:
        return f"holds {_kind(output)}"
    if _without_ones(output) != _without_ones(labels):
        return f"has the shape {list(output.shape)}"
    output = output.reshape(labels.shape)
    if chosen == "exact":
        if output.dtype.kind not in "biuOUS":
            return f"holds {_kind(output)}, which are never equal to labels but by chance"
        return Judged(name, chosen, output, _comparable(output) == _comparable(labels))
    if output.dtype.kind not in "biuf" or labels.dtype.kind not in "biuf":
        return f"holds {_kind(output)}, and labels are {_kind(labels)}: {chosen} is of numbers"
    if chosen == "threshold":
        return Judged(name, chosen, output, (output > 0.5) == (labels > 0.5))
    if not np.isfinite(output.astype(np.float64)).all():
        return "holds NaN or infinity"
    return Judged(name, chosen, output.astype(np.float64), None)


_HOW: Final = {"argmax": "largest score", "exact": "equal labels", "threshold": "above one half"}


def _accuracy(found: Judged, labels: Array) -> tuple[float, str]:
    """The share of labels that were met, or r2; and what was compared."""
    count = f"{len(labels)} samples"
    if found.right is not None:
        return float(found.right.mean()), f"{count}, {_HOW[found.measure]}"
    truth = labels.astype(np.float64)
    mean = float(np.abs(found.output - truth).mean())
    return r2(found.output, truth), f"{count}, r2 (mean absolute error {mean:.4g})"


def r2(output: Array, labels: Array) -> float:
    """1 less the squared error over the variance of the labels, both FP64 of one shape."""
    spread = float(((labels - labels.mean()) ** 2).sum())
    wrong = float(((output - labels) ** 2).sum())
    return 1.0 - wrong / spread if spread else float(wrong == 0.0)


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


def _argmax(output: Array, labels: Array) -> Array | str:
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
                found: Array = squeezed.argmax(axis=axis) == labels.reshape(shape)
                found &= ~np.isnan(squeezed).any(axis=axis)
                return found
    return f"has the shape {list(output.shape)}"


def _comparable(array: Array) -> Array:
    """Strings as such, however they are kept."""
    if array.dtype.kind not in "OUS":
        return array
    words = [x.decode("utf-8", "replace") if isinstance(x, bytes) else str(x) for x in array.flat]
    return np.array(words, dtype=object).reshape(array.shape)


def _kind(array: Array) -> str:
    return _KINDS.get(array.dtype.kind, "whole numbers")
