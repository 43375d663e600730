"""``check.npz`` of a version: inputs by name and the labels that they should get."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from cotenant.domain.config import CheckSettings
from cotenant.domain.errors import ModelError
from cotenant.domain.port import TensorMeta
from cotenant.engines.base import NUMPY, Array


class CheckData(msgspec.Struct):
    """What ``check.npz`` holds: ``samples`` requests, and as many labels."""

    name: str
    inputs: dict[str, Array]
    labels: Array
    output: str
    measure: str

    @property
    def samples(self) -> int:
        """How many."""
        return len(self.labels)

    def whole(self, inputs: tuple[TensorMeta, ...]) -> bool:
        """Whether each sample is a request of its own, stacked along an axis that the model does
        not have; else samples are rows along the model's first axis."""
        return any(self.inputs[t.name].ndim == len(t.shape) + 1 for t in inputs)

    def part(self, inputs: tuple[TensorMeta, ...], start: int, stop: int) -> dict[str, Array]:
        """Inputs of some of the samples; of one (``stop`` is ``start + 1``) where they are whole
        requests."""
        found = {}
        for tensor in inputs:
            array = self.inputs[tensor.name]
            stacked = array.ndim == len(tensor.shape) + 1
            found[tensor.name] = array[start] if stacked else array[start:stop]
        return found


def read_check(path: Path, inputs: tuple[TensorMeta, ...], settings: CheckSettings) -> CheckData:
    """Read and check a ``check.npz``; raises ModelError that says what is wrong with it."""
    return checked(path, read_arrays(path), inputs, settings)


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of a ``.npz`` file, by name; nothing is unpickled. Raises ModelError."""
    try:
        with np.load(path, allow_pickle=False) as data:
            return {name: data[name] for name in data.files}
    except Exception as error:  # zip, pickle, key and value errors alike
        why = str(error)
        if "pickle" in why:  # NumPy would go on to say how to
            why = "it holds pickled objects, which are never read; write arrays by numpy.savez"
        raise ModelError(f"{path.name} cannot be read: {why}") from error


def checked(
    path: Path,
    arrays: dict[str, Array],
    inputs: tuple[TensorMeta, ...],
    settings: CheckSettings,
) -> CheckData:
    """The arrays of ``path`` as check data; raises ModelError that says what is wrong with them."""
    for name in (*(t.name for t in inputs), "labels"):
        if name not in arrays:
            have = ", ".join(arrays) or "nothing"
            raise ModelError(f"{path.name} holds no {name!r}; it holds: {have}")
        if arrays[name].ndim == 0:
            raise ModelError(f"{path.name}: {name!r} is one value; give an array of samples")
    labels = arrays["labels"]
    if not labels.size:
        raise ModelError(f"{path.name}: there are no labels; give one for each sample")
    if labels.dtype.kind not in "biufUS":
        raise ModelError(f"{path.name}: labels of {labels.dtype}; give numbers or strings")
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise ModelError(f"{path.name}: labels hold NaN or infinity; leave those samples out")
    taken = {t.name: _as_type(path.name, t, arrays[t.name]) for t in inputs}
    for name, array in taken.items():
        if len(array) != len(labels):
            raise ModelError(
                f"{path.name}: {name!r} has {len(array)} samples and 'labels' {len(labels)}; give "
                "as many of one as of the other"
            )
    words = {k: str(arrays[k]) for k in ("output", "measure") if k in arrays and k not in taken}
    return CheckData(
        path.name,
        taken,
        labels,
        settings.output or words.get("output", ""),
        settings.measure or words.get("measure", ""),
    )


def _as_type(file: str, tensor: TensorMeta, array: Array) -> Array:
    """The array in the type that the model takes, where no number is another one then."""
    if tensor.datatype == "BYTES":
        if array.dtype.kind not in "US":
            raise ModelError(f"{file}: {tensor.name!r} holds no strings, which the model takes")
        try:
            words = np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array
        except UnicodeDecodeError as error:
            raise ModelError(f"{file}: {tensor.name!r} is not UTF-8: {error.reason}") from None
        return words.astype(object)
    kind = np.dtype(NUMPY[tensor.datatype])
    if array.dtype == kind:
        return array
    if array.dtype.kind not in "biuf" or not np.can_cast(array.dtype, kind, "same_kind"):
        raise ModelError(
            f"{file}: {tensor.name!r} holds {array.dtype}, the model takes {tensor.datatype}"
        )
    with np.errstate(over="ignore"):
        found = array.astype(kind)
    lost = np.isfinite(found) != np.isfinite(array) if kind.kind == "f" else found != array
    if lost.any():
        raise ModelError(
            f"{file}: {tensor.name!r} holds numbers that {tensor.datatype}, which the model takes, "
            "has not"
        )
    return found
