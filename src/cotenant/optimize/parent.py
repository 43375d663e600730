"""The version that variants are made of, opened with every engine that can open it here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from cotenant.domain.config import ModelSettings
from cotenant.domain.errors import ModelError
from cotenant.engines.base import Engine, EngineMeta, Opening, Speaking, TurnEngine
from cotenant.engines.registry import choose, kinds
from cotenant.optimize.comparing import Seen
from cotenant.optimize.rows import Rows
from cotenant.runtime.repository import ModelFiles

ENGINES: Final = ("onnxruntime", "openvino")
"""Those that variants are made for."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What is wanted. ``recipes``, ``engines``: names, all where none is given. ``max_drop``: of
    accuracy, as a part of 1. ``seconds`` of CPU time for training; measuring adds some. ``units``:
    numbers of cores to measure on. ``data``: rows to make variants with."""

    recipes: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    units: tuple[int, ...] = (1,)
    max_drop: float = 0.01
    seconds: float = 300.0
    data: Path | None = None
    promote: bool = False


class Parent(msgspec.Struct, kw_only=True):
    """``engines``: by name, the version opened by each. ``seen``: what it says to the judging rows;
    ``making``: to those that variants are made with. ``work``: a directory for files."""

    files: ModelFiles
    settings: ModelSettings
    engines: dict[str, Engine]
    rows: Rows
    seen: Seen
    making: Seen
    work: Path
    asked: Asked

    @property
    def engine(self) -> Engine:
        """The one that it is served with here."""
        return next(iter(self.engines.values()))

    @property
    def meta(self) -> EngineMeta:
        """What it takes and gives."""
        return self.engine.meta

    @property
    def units(self) -> int:
        """Cores to compute answers on."""
        return max(self.asked.units)

    @property
    def is_onnx(self) -> bool:
        """Whether its file is an ONNX graph."""
        return self.files.path.suffix == ".onnx"

    def onnx(self) -> Any:
        """Its graph; raises ModelError where it is none."""
        if not self.is_onnx:
            raise ModelError(f"it is made of ONNX graphs, and this model is {self.files.path.name}")
        import onnx

        try:
            return onnx.load(str(self.files.path))
        except Exception as error:  # protobuf and onnx raise several kinds
            raise ModelError(f"{self.files.path.name} cannot be read: {error}") from error


class Budget:
    """Time for training, as CPU time over the cores used: being stopped does not count."""

    def __init__(self, seconds: float, cores: int) -> None:
        self._cores = cores
        self._seconds = seconds
        self._began = time.process_time()

    @property
    def spent(self) -> float:
        """How much of it, from 0 to 1."""
        return min(1.0, (time.process_time() - self._began) / self._cores / self._seconds)


Told = Callable[[str], None]
"""Told what is being done."""


def open_all(
    files: ModelFiles, settings: ModelSettings, units: Sequence[int], wanted: Sequence[str]
) -> dict[str, Engine]:
    """The version by each engine that opens it here, the one that serves it first. Raises
    ModelError if that one does not, or answers in turns."""
    opening = Opening(files.path, units, settings)
    first = choose(opening)
    if isinstance(first, Speaking):
        raise _in_turns(files)
    engine = first.open(opening)
    if isinstance(engine, TurnEngine):
        raise _in_turns(files)
    found = {first.name: engine}
    for name in wanted:
        if name in found:
            continue
        other = Opening(files.path, units, msgspec.structs.replace(settings, engine=name))
        try:
            opened = choose(other).open(other)
        except ModelError:  # it is not an engine for this file, or not installed
            continue
        if not isinstance(opened, TurnEngine):
            found[name] = opened
    return found


def open_variant(path: Path, engine: str, units: Sequence[int]) -> Engine:
    """A file that a recipe made; raises ModelError."""
    opening = Opening(path, units, ModelSettings(engine=engine))
    found = choose(opening).open(opening)
    assert not isinstance(found, TurnEngine)
    return found


def usable_engines(wanted: Sequence[str]) -> tuple[str, ...]:
    """Of the engines that variants are made for, those that can be used here."""
    found = []
    for kind in kinds():
        probe = Opening(Path(f"model{kind.suffixes[-1]}"), (1,))
        if kind.name in wanted and probe.target.on_cpu and not kind.refuses(probe):
            found.append(kind.name)
    return tuple(dict.fromkeys(found))


def _in_turns(files: ModelFiles) -> ModelError:
    return ModelError(
        f"{files.name} answers in turns, as language models do: those are not optimized here; "
        "quantized builds of language models have a check of their own (docs/llm.md)"
    )
