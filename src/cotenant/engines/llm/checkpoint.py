"""A model's files: its shape, and its weights by the names that ``Decoder.tensors`` gives them.

``open_checkpoint`` reads a GGUF file, or safetensors with the ``config.json`` beside them. What is
missing, too much or of another shape than the model says is a ModelError that names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from cotenant.domain.errors import ModelError
from cotenant.engines.llm.decoder import Decoder
from cotenant.engines.llm.families import FAMILIES
from cotenant.engines.llm.families.base import Family, Floats, Rows, family, gguf_tensor
from cotenant.engines.llm.gguf import Gguf, Stored, floats
from cotenant.engines.llm.keys import Keys, read_json
from cotenant.engines.llm.vision import PREFIX, Vision

INDEX: Final = ".safetensors.index.json"


class Checkpoint(Protocol):
    """An open model."""

    @property
    def decoder(self) -> Decoder:
        """What it looks like."""

    @property
    def vision(self) -> Vision | None:
        """What its vision tower looks like; None: it sees no images."""

    def floats(self, name: str) -> Floats:
        """A weight as FP32."""

    def stored(self, name: str) -> Stored | None:
        """A weight as it is quantized; None where it is stored as floating-point numbers."""


def open_checkpoint(path: Path) -> Checkpoint:
    """``path``: a GGUF file, a safetensors file or the index of several. Raises ModelError."""
    if path.suffix == ".gguf":
        return GgufCheckpoint(Gguf(path))
    return SafetensorsCheckpoint(path)


def vision_of(folder: Path) -> Vision | None:
    """The tower of the model in a folder, by its ``config.json``; None: it sees no images, or is of
    no family that is known here. Raises ModelError."""
    path = folder / "config.json"
    keys = Keys(read_json(path) if path.exists() else {})
    model_type = keys.text("model_type", "")
    for each in FAMILIES:
        if model_type in each.model_types and each.vision is not None:
            return each.vision(keys, model_type)
    return None


class GgufCheckpoint:
    """Of one GGUF file, which is mapped, not read."""

    vision = None

    def __init__(self, file: Gguf) -> None:
        self.file = file
        self._architecture = Keys(file.keys).text("general.architecture")
        self._family = family(FAMILIES, self._architecture, gguf=True)
        self.decoder = self._family.from_gguf(file, self._architecture)
        self._names = {name: gguf_tensor(name) for name in self.decoder.tensors()}
        _compare(
            file.path.name,
            self.decoder.tensors(),
            self._names,
            {name: tensor.shape for name, tensor in file.tensors.items()},
            ignored=re.compile(r"(rope_freqs|.*rope_factors_(long|short)|.*rope_freqs)\.weight"),
        )

    def floats(self, name: str) -> Floats:
        found = floats(self.file.tensors[self._names[name]])
        rows = self._rows(name)
        return found if rows is None else found[rows]

    def stored(self, name: str) -> Stored | None:
        found = self.file.tensors[self._names[name]]
        if found.kind.numbers == 1:
            return None
        rows = self._rows(name)
        if rows is None:
            return found
        data = found.data.reshape(found.shape[0], -1)[rows]
        return found._replace(data=data.ravel())

    def _rows(self, name: str) -> Rows | None:
        return self._family.rows(self.decoder, self._architecture, name)


class SafetensorsCheckpoint:
    """Of ``model.safetensors``, or of the files that ``model.safetensors.index.json`` lists."""

    def __init__(self, path: Path) -> None:
        keys = Keys(read_json(path.parent / "config.json"))
        model_type = keys.text("model_type")
        self._family: Family = family(FAMILIES, model_type, gguf=False)
        self.decoder = self._family.from_config(keys, model_type)
        needed = self.decoder.tensors()
        self._names = {name: self._family.tensor(name) for name in needed}
        self.vision = self._family.vision and self._family.vision(keys, model_type)
        if self.vision is not None:
            if self.vision.token >= self.decoder.vocab:
                raise ModelError(f"image_token_id {self.vision.token} is no token of the model")
            seeing = self.vision.tensors()
            needed |= seeing
            tensor = self._family.vision_tensor
            self._names |= {name: tensor(name.removeprefix(PREFIX)) for name in seeing}
        self._files: dict[str, Any] = {}
        """By tensor, the open file that has it."""
        for each in _files(path):
            try:
                file: Any = safe_open(each, framework="numpy")
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{each.name} cannot be read: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)
        if self.decoder.tied:
            self._files.pop(self._family.tensor("head"), None)
        _compare(path.name, needed, self._names, _Shapes(self._files), ignored=_INVERSE)

    def floats(self, name: str) -> Floats:
        tensor = self._names[name]
        kind = self._files[tensor].get_slice(tensor).get_dtype()
        if kind not in _DTYPES:
            raise ModelError(f"{tensor} is {kind}; read are {', '.join(_DTYPES)}")
        found = self._files[tensor].get_tensor(tensor).astype(np.float32)
        return self._family.given(name, found)

    def stored(self, name: str) -> None:  # noqa: ARG002
        return None


_DTYPES: Final = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
"""ml_dtypes makes NumPy know BF16."""
_INVERSE = re.compile(r".*rotary_emb\.inv_freq")


class _Shapes(Mapping[str, tuple[int, ...]]):
    """Shapes of the tensors in several files."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _files(path: Path) -> list[Path]:
    if not path.name.endswith(INDEX):
        return [path]
    weights = Keys(read_json(path)).table("weight_map")
    names = sorted({str(name) for name in weights.values.values()}) if weights else []
    strange = [name for name in names if Path(name).name != name]
    if strange or not names:
        what = f"{strange[0]!r} is no name of a file beside it" if strange else "it lists none"
        raise ModelError(f"weight_map of {path.name}: {what}")
    return [path.parent / name for name in names]


def _compare(
    file: str,
    needed: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    there: Mapping[str, tuple[int, ...]],
    ignored: re.Pattern[str],
) -> None:
    """Raise ModelError where the tensors that are there are not those that the model needs."""
    for name, shape in needed.items():
        found = there.get(names[name])
        if found is None:
            raise ModelError(f"{file} has no tensor {names[name]}")
        if found != shape:
            raise ModelError(f"{file}: {names[name]} has the shape {found}, not {shape}")
    more = set(there) - set(names.values())
    strange = sorted(name for name in more if not ignored.fullmatch(name))
    if strange:
        raise ModelError(
            f"{file} has {len(strange)} tensors that a model of this kind has no use for: "
            f"{', '.join(strange[:3])}"
        )
