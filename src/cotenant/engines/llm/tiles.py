"""Tiles: the parts of images that a model looks at one by one, as they stand in a sequence.

A tile is encoded to rows, each in the place of a token. Its laws:

1. A row is a token below zero, made of the tile's key and the row's number. So the tree of prefixes
   takes two places for the same exactly if the same picture is there.
2. No model says such a token, and none is drafted.
3. A tile is encoded before the first iteration that reads one of its rows, and kept while a
   sequence that has it is there. So who is put aside reads its rows again without encoding them.
4. An iteration encodes one tile at most: that cannot be cut. One that takes longer than there is
   time goes alone, or once the time that iterations left for it is enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Final, NamedTuple

ROWS: Final = 1 << 16
"""More than a tile has."""
SHARE: Final = 8
"""This part (1/n) of an iteration's time is put by for a tile that waits, at the least."""
GAIN: Final = 1 / 8


class Span(NamedTuple):
    """Where rows of a ``tile`` stand in a sequence: from ``start`` up to ``end``."""

    tile: int
    start: int
    end: int


def token_of(tile: int, row: int) -> int:
    """What stands for a row of the tile with this key, 0 or more."""
    return -1 - (tile * ROWS + row)


def row_of(token: int) -> tuple[int, int]:
    """Key of the tile, and number of the row, that a token below zero stands for."""
    return divmod(-1 - token, ROWS)


def spans(tokens: Sequence[int]) -> tuple[Span, ...]:
    """Of the tiles in a prompt, in order."""
    if not tokens or min(tokens) >= 0:
        return ()
    rows = [(at, row_of(token)[0]) for at, token in enumerate(tokens) if token < 0]
    groups = [(tile, list(group)) for tile, group in groupby(rows, key=lambda row: row[1])]
    return tuple(Span(tile, group[0][0], group[-1][0] + 1) for tile, group in groups)


class Tiles:
    """Those of all sequences that there are, which of them are encoded, and what one takes."""

    def __init__(self) -> None:
        self.encoded: set[int] = set()
        self.cost = 0.0
        """Ns of one tile; 0 as long as none was measured."""
        self.saved = 0
        """Ns that iterations left for a tile that waits."""
        self._held: Counter[int] = Counter()

    @property
    def held(self) -> frozenset[int]:
        """Tiles of the sequences that there are."""
        return frozenset(self._held)

    def hold(self, found: Iterable[Span]) -> None:
        """A sequence has come."""
        self._held.update({span.tile for span in found})

    def drop(self, found: Iterable[Span]) -> None:
        """It is over: what nobody else has is no longer kept."""
        for tile in {span.tile for span in found}:
            self._held[tile] -= 1
            if not self._held[tile]:
                del self._held[tile]
                self.encoded.discard(tile)

    def done(self, tile: int | None) -> None:
        """This was encoded, perhaps for a sequence that is over by now."""
        if tile is not None and tile in self._held:
            self.encoded.add(tile)

    def took(self, ns: int) -> None:
        """To encode one took so long."""
        self.cost += (ns - self.cost) * (GAIN if self.cost else 1.0)

    def put_by(self, within: int | None, expected: int, waits: bool) -> None:
        """An iteration of ``within`` ns is to take ``expected``. ``waits``: there was no time for a
        tile."""
        if not waits or within is None:
            self.saved = 0
        else:
            self.saved += max(within - expected, within // SHARE)

    def check(self, found: Iterable[Iterable[Span]]) -> None:
        """Raise AssertionError naming the law that is broken. ``found``: of each sequence."""
        held = Counter(tile for each in found for tile in {span.tile for span in each})
        assert held == self._held, "tiles are those of the sequences that there are"
        assert self.encoded <= set(held), "what nobody has is not kept"
