"""Whether rows of several requests may be run as one batch: seen, not guessed from names.

A free first axis may be a batch axis, but also time, a count of what was found, or rows that look
at each other. So rows are run singly and together, in several sizes and positions: only where each
gets the same answer, to the tolerance of its type, are requests ever joined. Where inputs and
outputs call their first axis alike fewer trials do; where the names differ (or there are none) more
are made.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import numpy as np

from cotenant.domain.errors import ModelError
from cotenant.engines.base import Array, Engine
from cotenant.engines.samples import Samples, joined

TOLERANCE: Final = {"e": (2e-2, 4e-3), "f": (1e-3, 1e-5), "d": (1e-7, 1e-10)}
"""By NumPy's character of a type: by how much of itself, and of the largest value beside it,
another order of additions may change a value. All but floating-point answers must be equal."""
BUDGET_NS: Final = 4_000_000_000
"""After this the trials that must be made are enough."""
ONE_ROW: Final = "it takes one row, but not more"
_FEW, _MANY = 4, 8
_LEAST: Final = {_FEW: 2, _MANY: 4}
"""Trials made whatever they take, by the rows that are to be tried."""


def judge(engine: Engine, units: int, samples: Samples, limit: int) -> str:
    """Why rows must not be joined; "" if they may be, up to ``limit`` in a batch."""
    if not engine.meta.batchable:
        return "its first axis is not free in all inputs and outputs"
    if samples.doubt:
        return samples.doubt
    if len(samples.rows) < 2:
        return "the check data have one row; two are needed to see"
    if _apart(engine, units, samples):
        return "its inputs have first axes of their own"
    wanted = _FEW if named_alike(engine) else _MANY
    until = time.monotonic_ns() + BUDGET_NS
    rows = samples.rows[:wanted]
    alone: list[list[Array]] = []
    for row in rows:
        if len(alone) >= 2 and time.monotonic_ns() > until:
            break
        alone.append(engine.run(units, row))
        for tensor, answer in zip(engine.meta.outputs, alone[-1], strict=True):
            if answer.shape[:1] != (1,):
                return f"output {tensor.name!r} has {_entries(answer)} for one row"
    if not all(map(same, engine.run(units, rows[0]), alone[0])):
        return "it answers the same input differently each time"
    for done, group in enumerate(_groups(len(alone), max(2, limit))):
        if done >= _LEAST[wanted] and time.monotonic_ns() > until:
            break
        problem = _compare(engine, units, rows, group, alone)
        if problem:
            return problem
    return ""


def _apart(engine: Engine, units: int, samples: Samples) -> bool:
    """Whether inputs whose first axes have not one name may differ in rows: a batch axis is
    one of all inputs."""
    first, *others = (t.name for t in engine.meta.inputs)
    if len({engine.axes[name][0] for name in (first, *others)} - {""}) <= 1:
        return False
    two, three = samples.batch(engine, 2), samples.batch(engine, 3)
    try:
        engine.run(units, {first: two[first], **{name: three[name] for name in others}})
    except ModelError:
        return False
    return True


def _compare(
    engine: Engine,
    units: int,
    rows: list[dict[str, Array]],
    group: Sequence[int],
    alone: list[list[Array]],
) -> str:
    try:
        together = engine.run(units, joined([rows[i] for i in group]))
    except ModelError as error:
        return f"{ONE_ROW}: of {len(group)} it says {error}"
    for index, tensor in enumerate(engine.meta.outputs):
        answer = together[index]
        if answer.shape[:1] != (len(group),):
            return f"output {tensor.name!r} has {_entries(answer)} for {len(group)} rows"
        for position, row in enumerate(group):
            if not same(answer[position : position + 1], alone[row][index]):
                return f"output {tensor.name!r} of a row depends on the rows beside it"
    return ""


def same(a: Array, b: Array) -> bool:
    """Whether two answers are one, to the tolerance of their type."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.char not in TOLERANCE:
        return bool(np.array_equal(a, b))
    if not a.size:
        return True
    finite = np.abs(b[np.isfinite(b)])
    largest = float(finite.max()) if finite.size else 0.0
    own, beside = TOLERANCE[a.dtype.char]
    return bool(np.allclose(a, b, rtol=own, atol=beside * largest, equal_nan=True))


def named_alike(engine: Engine) -> bool:
    """Whether all inputs and outputs have one name for their first axis."""
    tensors = (*engine.meta.inputs, *engine.meta.outputs)
    names = {engine.axes[t.name][:1] for t in tensors}
    return len(names) == 1 and not names & {(), ("",)}


def _groups(count: int, limit: int) -> list[list[int]]:
    """Which rows are run together: pairs both ways round first, then more, each row in several
    positions."""
    whole = list(range(count))
    groups = [[0, 1], [1, 0], whole[::-1], [*whole[2:], *whole[:2]], whole[:3], whole]
    if count > _FEW:
        groups += [[*whole[3:], *whole[:3]], whole[1::2] + whole[::2], [0, 0, 1], [4, 2]]
    groups.append([i % count for i in range(limit)])
    cut = [group[:limit] for group in groups]
    return [g for i, g in enumerate(cut) if len(g) > 1 and g not in cut[:i]]


def _entries(answer: Array) -> str:
    return f"{answer.shape[0]} entries along its first axis" if answer.ndim else "no axis"
