"""Inputs to try a model with before it serves: rows of its check data, or made-up ones.

Made-up numbers show how long an execution takes. Whether rows may be joined they show only where
any number is a legal input: integers are often tokens or indices, and strings one of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import msgspec
import numpy as np

from cotenant.domain.errors import ModelError
from cotenant.domain.port import TensorMeta
from cotenant.engines.base import NUMPY, Array, Engine, EngineMeta, size_of
from cotenant.engines.checkdata import CheckData

ROWS: Final = 8
_LENGTHS: Final = (1, 16, 64, 256, 32, 8)
"""Tried for free axes that nothing is said of: 1 is what most models take; the others are for
those that halve their input again and again."""
_SCALES: Final = (1.0, 0.0, 1e4, -1.0, 1e-3, 10.0, 1e3, -300.0)
"""Rows of all kinds, lest a model that counts what it finds find one thing in each."""


class Samples(msgspec.Struct):
    """``rows``: requests of one row each, inputs by name. ``doubt``: why joining cannot be judged
    by them, or ""."""

    rows: list[dict[str, Array]]
    doubt: str = ""

    def size(self, meta: EngineMeta) -> int:
        """Of the first row, as ``size_of`` counts it; 1 without any."""
        if not self.rows:
            return 1
        return size_of(meta, {name: a.shape for name, a in self.rows[0].items()})

    def batch(self, engine: Engine, rows: int) -> dict[str, Array]:
        """So many rows as one input, each of the samples in turn."""
        if not engine.meta.batchable:
            return self.rows[0]
        return joined([self.rows[i % len(self.rows)] for i in range(rows)])


def joined(rows: list[dict[str, Array]]) -> dict[str, Array]:
    """Rows as one input."""
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def check_samples(engine: Engine, units: int, data: CheckData) -> Samples:
    """Rows of the check data and, after each, one made up of what the check data say is legal, if
    the model takes it. Raises ModelError if it does not take the check data."""
    random = np.random.default_rng(0)
    rows: list[dict[str, Array]] = []
    for number in range(0, ROWS, 2):
        at = number * data.samples // ROWS
        row = data.part(engine.meta.inputs, at, at + 1)
        if engine.meta.batchable:  # a sample may be a request of several rows
            row = {name: array[:1] for name, array in row.items()}
        if not rows:
            engine.run(units, row)
        rows.append(row)
        other = {
            name: _like(array, data.inputs[name], number, random) for name, array in row.items()
        }
        try:
            engine.run(units, other)
        except ModelError:
            continue
        rows.append(other)
    return Samples(rows)


def _like(row: Array, seen: Array, number: int, random: np.random.Generator) -> Array:
    """A made-up tensor of a row's shape, of values such as were seen."""
    if not row.size:
        return row
    if row.dtype.kind == "f":
        return (random.random(row.shape) * _SCALES[number % len(_SCALES)]).astype(row.dtype)
    if row.dtype.kind in "iu":
        low, high = int(seen.min()), int(seen.max())
        return random.integers(low, high, size=row.shape, dtype=row.dtype, endpoint=True)
    return random.choice(seen.reshape(-1), size=row.shape)


def make_samples(
    engine: Engine,
    units: int,
    shapes: Mapping[str, tuple[int, ...]],
    ranges: Mapping[str, tuple[int, int]],
) -> Samples:
    """Made-up rows that the model takes. ``shapes`` says how long free axes are, ``ranges`` which
    integers are legal (both ends included), by input. Without any row that it takes ``rows`` is
    empty.

    Raises ModelError if ``shapes`` does not fit the model or the model does not take it.
    """
    unknown = sorted({*shapes, *ranges} - {t.name for t in engine.meta.inputs})
    if unknown:
        known = ", ".join(t.name for t in engine.meta.inputs)
        raise ModelError(f"model.yaml speaks of the input {unknown[0]!r}; the inputs are: {known}")
    doubt = _doubt(engine, ranges)
    problem: ModelError | None = None
    for lengths in _choices(engine, shapes):
        random = np.random.default_rng(0)
        rows = [
            {
                t.name: _tensor(t, lengths[t.name], ranges.get(t.name), i, random)
                for t in engine.meta.inputs
                if not t.optional
            }
            for i in range(ROWS)
        ]
        try:
            engine.run(units, rows[0])
        except ModelError as error:
            problem = error
            continue
        return Samples(rows, doubt)
    if shapes and problem is not None:
        raise problem
    return Samples([], "no made-up input is one that it takes; give warmup_shapes or a check.npz")


def _doubt(engine: Engine, ranges: Mapping[str, tuple[int, int]]) -> str:
    for tensor in engine.meta.inputs:
        if tensor.datatype == "BYTES":
            return f"which strings {tensor.name!r} may hold only a check.npz could show"
        if "INT" in tensor.datatype and tensor.name not in ranges:
            return (
                f"which numbers {tensor.name!r} may hold neither a check.npz nor ranges in "
                "model.yaml say"
            )
    return ""


def _choices(
    engine: Engine, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shapes of one row of each input to try, in turn."""
    first = 1 if engine.meta.batchable else 0
    free = any(-1 in t.shape[first:] for t in engine.meta.inputs if t.name not in shapes)
    for length in _LENGTHS if free else _LENGTHS[:1]:
        found = {}
        for tensor in engine.meta.inputs:
            given = shapes.get(tensor.name, tensor.shape)
            if len(given) != len(tensor.shape):
                raise ModelError(
                    f"warmup_shapes of {tensor.name!r} has {len(given)} axes, the model "
                    f"{len(tensor.shape)}"
                )
            shape = [length if d < 0 else d for d in given]
            if engine.meta.batchable:
                shape[0] = 1
            found[tensor.name] = tuple(shape)
        yield found


def _tensor(
    meta: TensorMeta,
    shape: tuple[int, ...],
    legal: tuple[int, int] | None,
    number: int,
    random: np.random.Generator,
) -> Array:
    """Of the row of this number; the first is an ordinary one."""
    kind = NUMPY[meta.datatype]
    if meta.datatype == "BYTES":
        return np.full(shape, "cotenant", dtype=np.object_)
    if meta.datatype == "BOOL":
        return random.random(shape) < 0.5
    if meta.datatype.startswith("FP"):
        return (random.random(shape) * _SCALES[number % len(_SCALES)]).astype(kind)
    if legal is None:
        return np.zeros(shape, dtype=kind)
    return random.integers(legal[0], legal[1], size=shape, endpoint=True).astype(kind)
