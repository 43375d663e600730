"""Which rows a variant is made with, and which it is judged by: never the same.

With data of its own for making, all of ``check.npz`` judges; without, a third of it makes. A row
for making that equals one that judges is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from cotenant.domain.config import CheckSettings
from cotenant.domain.errors import ModelError
from cotenant.domain.port import TensorMeta
from cotenant.engines.base import Array
from cotenant.engines.checkdata import CheckData, checked, read_arrays

MADE_WITH: Final = 1 / 3
"""Of ``check.npz``, where nothing else is given to make variants with."""
LEAST: Final = 8
"""Rows on either side."""
CALIBRATION: Final = 256
"""The most rows by which ranges of activations are found."""
_SEED: Final = 7


class Rows(msgspec.Struct):
    """``making``: for calibration and training. ``judging``: for the comparison. ``labelled``:
    whether the judging rows have labels; else agreement with the parent counts."""

    making: CheckData
    judging: CheckData
    labelled: bool

    @property
    def calibration(self) -> CheckData:
        """Rows by which ranges are found."""
        return picked(self.making, np.arange(min(CALIBRATION, self.making.samples)))


def read_rows(
    check: Path | None, data: Path | None, inputs: tuple[TensorMeta, ...], settings: CheckSettings
) -> Rows:
    """Read and divide. Raises ModelError if a file is wrong, or there are too few rows."""
    if check is None and data is None:
        raise ModelError(
            "there are no rows to make a variant with or to judge it by: put a check.npz into the "
            "version's directory, or give --data FILE.npz (inputs by name, and labels)"
        )
    if check is None:
        judging, labelled = _read(data, inputs, settings)
        making = None
    else:
        judging, labelled = _read(check, inputs, settings)
        making = _read(data, inputs, settings)[0] if data is not None else None
    if making is None:
        order = np.random.default_rng(_SEED).permutation(judging.samples)
        count = int(judging.samples * MADE_WITH)
        making = picked(judging, order[:count])
        judging = picked(judging, np.sort(order[count:]))
    making = _without(making, judging)
    if min(making.samples, judging.samples) < LEAST:
        raise ModelError(
            f"{making.samples} rows to make a variant with and {judging.samples} to judge it by "
            f"are too few; at least {LEAST} of each are needed, and some thousands to tell small "
            "losses. Give more with --data FILE.npz"
        )
    return Rows(making, judging, labelled)


def _read(
    path: Path | None, inputs: tuple[TensorMeta, ...], settings: CheckSettings
) -> tuple[CheckData, bool]:
    assert path is not None
    arrays = read_arrays(path)
    labelled = "labels" in arrays
    if not labelled and inputs and inputs[0].name in arrays and arrays[inputs[0].name].ndim:
        arrays["labels"] = np.zeros(len(arrays[inputs[0].name]), dtype=np.int64)
    found = checked(path, arrays, inputs, settings)
    for tensor in inputs:
        _check_shape(path, tensor, found.inputs[tensor.name])
    return found, labelled


def _check_shape(path: Path, tensor: TensorMeta, array: Array) -> None:
    """Rows as the model takes them, or requests stacked."""
    wanted = tensor.shape
    shape = array.shape[1:] if array.ndim == len(wanted) + 1 else array.shape
    first = 0 if array.ndim == len(wanted) + 1 else 1
    fits = len(shape) == len(wanted) and all(
        w in (-1, h) for h, w in zip(shape[first:], wanted[first:], strict=True)
    )
    if not fits:
        raise ModelError(
            f"{path.name}: {tensor.name!r} has the shape {list(array.shape)}, and the model takes "
            f"{list(wanted)} (-1: any)"
        )


def picked(data: CheckData, which: Array) -> CheckData:
    """Some of the rows, in that order."""
    return CheckData(
        data.name,
        {name: array[which] for name, array in data.inputs.items()},
        data.labels[which],
        data.output,
        data.measure,
    )


def _without(making: CheckData, judging: CheckData) -> CheckData:
    """Without the rows whose inputs are those of a judging row."""
    taken = {_key(judging, row) for row in range(judging.samples)}
    kept = [row for row in range(making.samples) if _key(making, row) not in taken]
    return picked(making, np.array(kept, dtype=np.int64))


def _key(data: CheckData, row: int) -> bytes:
    arrays = (data.inputs[name][row] for name in sorted(data.inputs))
    return b"\0".join(
        repr(a.tolist()).encode() if a.dtype.hasobject else np.ascontiguousarray(a).tobytes()
        for a in arrays
    )
