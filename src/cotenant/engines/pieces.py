"""A stand-in for engines that answer in turns: says ``text`` back in ``pieces`` pieces.

It opens ``model.pieces.json``: ``{"pieces": 5, "turn_ms": 20}``, both optional. With each turn of
``turn_ms`` a request emits one piece: its number ``index`` INT64 [1], and ``text`` BYTES [1], a
part of the input ``text`` BYTES [1]. For trying streams out; it goes when a real one comes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from cotenant.domain.errors import ModelError
from cotenant.domain.port import TensorMeta
from cotenant.engines.base import (
    Array,
    EngineKind,
    EngineMeta,
    Opening,
    Turn,
    TurnEngine,
    Turns,
)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    pieces: int = 5
    turn_ms: float = 10.0


class PiecesEngine:
    """A ``TurnEngine``; see the module's text."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = msgspec.json.decode(path.read_bytes(), type=_File)
        except (OSError, msgspec.DecodeError) as error:
            raise ModelError(f"{path.name} cannot be loaded: {error}") from error
        if self._file.pieces < 1 or self._file.turn_ms < 0:
            raise ModelError(f"{path.name}: pieces is 1 or more, turn_ms not negative")
        self._texts: dict[int, str] = {}
        self._said: dict[int, int] = {}

    @property
    def meta(self) -> EngineMeta:
        text = TensorMeta("text", "BYTES", (1,))
        outputs = (text, TensorMeta("index", "INT64", (1,)))
        return EngineMeta("cotenant_pieces", (text,), outputs, batchable=False, turns=True)

    def begin(self, key: int, inputs: dict[str, Array], due: int = 0, pace: int = 0) -> None:  # noqa: ARG002
        self._texts[key], self._said[key] = str(inputs["text"][0]), 0

    def turn(self, units: int, keys: Sequence[int], budget: int) -> Turns:  # noqa: ARG002
        time.sleep(self._file.turn_ms / 1000)
        return Turns([self._piece(key) for key in keys])

    def _piece(self, key: int) -> Turn:
        text, number, pieces = self._texts[key], self._said[key], self._file.pieces
        self._said[key] += 1
        begin, end = (len(text) * n // pieces for n in (number, number + 1))
        finished = number + 1 == pieces
        if finished:
            self.forget((key,))
        part = np.array([text[begin:end]], np.object_)
        return Turn([part, np.array([number], np.int64)], finished, said=1)

    def forget(self, keys: Sequence[int]) -> None:
        for key in keys:
            self._texts.pop(key, None)
            self._said.pop(key, None)


class Pieces:
    """See the module's text. It computes nothing, so that any processor will do."""

    name = "pieces"
    suffixes = (".pieces.json",)
    rank = 50
    drafts = False

    def refuses(self, opening: Opening) -> str:  # noqa: ARG002
        return ""

    def open(self, opening: Opening) -> TurnEngine:
        return PiecesEngine(opening.path)


KIND: Final[EngineKind] = Pieces()
