"""A variant beside its parent on the same rows."""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np

from cotenant.domain.errors import ModelError
from cotenant.domain.variant import Compared
from cotenant.engines.accuracy import Judged, answers, judge, r2
from cotenant.engines.base import Array, Engine, EngineMeta
from cotenant.engines.checkdata import CheckData
from cotenant.optimize import bounds

AGREEMENT: Final = "agreement"
STEP: Final = 32
"""Rows in an execution, where the model takes several."""
_CLASSES: Final = 1000
"""With more different labels than this no class is named."""


class Seen(msgspec.Struct):
    """What a parent says to some rows, and what is right: its answers, if there are no labels.
    ``finite``: of each output, whether it holds neither NaN nor infinity."""

    data: CheckData
    judged: Judged
    labelled: bool
    finite: tuple[bool, ...] = ()


def look(engine: Engine, units: int, data: CheckData, labelled: bool) -> Seen:
    """Run the parent. Raises ModelError if it cannot be compared with anything."""
    found = answers(engine, units, data, STEP)
    if not labelled:
        data = _as_labels(engine, data, found)
    return Seen(data, judge(engine, data, found), labelled, tuple(map(_finite, found)))


def _finite(parts: list[Array]) -> bool:
    return all(p.dtype.kind != "f" or bool(np.isfinite(p).all()) for p in parts)


def _as_labels(engine: Engine, data: CheckData, found: list[list[Array]]) -> CheckData:
    """The data, with what the parent says as labels: classes where an output looks like scores. Of
    several outputs the one that the data name, else the first that can be compared."""
    for tensor, parts in zip(engine.meta.outputs, found, strict=True):
        if data.output not in ("", tensor.name):
            continue
        try:
            output = np.concatenate(parts)
        except ValueError:
            continue
        measure = "exact"
        if output.dtype.kind == "f":
            if not np.isfinite(output).all():
                continue
            scores = output.ndim == 2 and output.shape[1] > 1
            measure = "argmax" if scores else "r2"
            output = output.argmax(axis=1) if scores else output
        return msgspec.structs.replace(data, labels=output, measure=measure, output=tensor.name)
    raise ModelError("no output of the model can be compared without labels; add labels")


def check_tensors(parent: EngineMeta, variant: EngineMeta) -> None:
    """Raises ModelError unless both take and give the same."""
    for what, old, new in (
        ("takes", parent.inputs, variant.inputs),
        ("gives", parent.outputs, variant.outputs),
    ):
        for tensor, other in zip(old, new, strict=False):
            if (tensor.name, tensor.datatype, tensor.shape) != (
                other.name,
                other.datatype,
                other.shape,
            ):
                raise ModelError(
                    f"it {what} {other.name} {other.datatype} {list(other.shape)}, the original "
                    f"{tensor.name} {tensor.datatype} {list(tensor.shape)}"
                )
        if len(old) != len(new):
            raise ModelError(f"it {what} {len(new)} tensors, the original {len(old)}")


def compare(seen: Seen, engine: Engine, units: int, confidence: float = 0.95) -> Compared:
    """Run the variant on what the parent saw. Raises ModelError if its answers are no numbers, or
    cannot be compared."""
    found = answers(engine, units, seen.data, STEP)
    for tensor, parts, finite in zip(engine.meta.outputs, found, seen.finite, strict=True):
        if finite and not _finite(parts):
            raise ModelError(f"its output {tensor.name!r} holds NaN or infinity")
    after = judge(engine, seen.data, found)
    before = seen.judged
    measure = before.measure if seen.labelled else AGREEMENT
    if before.right is None or after.right is None:
        return _of_numbers(measure, before.output, after.output, seen.data.labels, confidence)
    return _of_rights(measure, before.right, after.right, seen.data.labels, confidence)


def _of_numbers(
    measure: str, before: Array, after: Array, labels: Array, confidence: float
) -> Compared:
    truth = labels.astype(np.float64)
    axes = tuple(range(1, truth.ndim))
    old, new = (((a - truth) ** 2).sum(axis=axes) for a in (before, after))
    original, value = r2(before, truth), r2(after, truth)
    bound = bounds.of_r2(before, after, truth, confidence)
    return Compared(
        measure=measure,
        rows=len(truth),
        original=original,
        value=value,
        lost=int((new > old).sum()),
        won=int((new < old).sum()),
        drop=original - value,
        bound=max(bound, original - value),
        confidence=confidence,
    )


def _of_rights(
    measure: str, before: Array, after: Array, labels: Array, confidence: float
) -> Compared:
    rows = len(labels)
    old, new = (
        np.asarray(a, dtype=np.float64).reshape(rows, -1).mean(axis=1) for a in (before, after)
    )
    lost, won = int((new < old).sum()), int((new > old).sum())
    whole = np.isin(old, (0.0, 1.0)).all() and np.isin(new, (0.0, 1.0)).all()
    bound = (
        bounds.paired(lost, won, rows, confidence)
        if whole
        else bounds.of_means(old, new, confidence)
    )
    drop = float(old.mean() - new.mean())
    worst, worst_drop = _worst(old - new, labels)
    return Compared(
        measure=measure,
        rows=rows,
        original=float(old.mean()),
        value=float(new.mean()),
        lost=lost,
        won=won,
        drop=drop,
        bound=max(bound, drop),
        confidence=confidence,
        worst=worst,
        worst_drop=worst_drop,
    )


def _worst(lost: Array, labels: Array) -> tuple[str, float]:
    """The class whose rows lose most on average, where each row is of one; "" if none loses."""
    if labels.size != len(labels) or labels.dtype.kind == "f":
        return "", 0.0
    classes, which = np.unique(labels.reshape(-1), return_inverse=True)
    if not 1 < len(classes) <= _CLASSES:
        return "", 0.0
    means = np.bincount(which, lost) / np.bincount(which)
    at = int(means.argmax())
    return (str(classes[at]), float(means[at])) if means[at] > 0 else ("", 0.0)
