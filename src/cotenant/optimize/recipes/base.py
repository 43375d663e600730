"""What a recipe is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from cotenant.optimize.parent import Parent, Told


class Made(msgspec.Struct, frozen=True):
    """A model file (an OpenVINO one has its ``.bin`` beside it), and in words how it was made.
    ``note``: what else was seen of it."""

    name: str
    recipe: str
    path: Path
    note: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        """All of its files."""
        weights = self.path.with_suffix(".bin")
        return (self.path, weights) if self.path.suffix == ".xml" else (self.path,)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(path.stat().st_size for path in self.files)


class Recipe(Protocol):
    """``needs``: modules that it imports. ``trains``: whether it takes a part of the time for
    training."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> tuple[str, ...]: ...

    @property
    def trains(self) -> bool: ...

    def make(self, parent: Parent, work: Path, seconds: float, told: Told) -> Iterator[Made]:
        """Make candidates in ``work``, training for at most so many ``seconds`` of CPU time a core.
        Raises ModelError, before or after some, where it cannot."""
