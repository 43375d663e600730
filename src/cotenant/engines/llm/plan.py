"""An iteration in the making: the work of each sequence, and the time and tokens that are left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cotenant.engines.llm.drafting import Ask, Drafting, Rounds, joined
from cotenant.engines.llm.tiles import Span, Tiles
from cotenant.policy.iterations import IterationCosts as Costs
from cotenant.policy.iterations import Load, load


class Work(NamedTuple):
    """Compute ``tokens`` at the positions from ``start`` on. ``blocks``: those of the sequence, in
    order. For each of the last ``sampled`` tokens the model says what comes next; the tokens
    behind the first of these are drafts."""

    key: int
    start: int
    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    sampled: int

    @property
    def drafts(self) -> tuple[int, ...]:
        """What is to be verified."""
        return self.tokens[len(self.tokens) - self.sampled + 1 :] if self.sampled else ()

    def verifying(self, drafts: Sequence[int]) -> Work:
        """The same with more drafts."""
        tokens, sampled = (*self.tokens, *drafts), self.sampled + len(drafts)
        return self._replace(tokens=tokens, sampled=sampled)


class Plan:
    """Of so many ``tokens``, within so many ns (None: however long it takes). ``seen``: the tiles
    that there are."""

    def __init__(
        self,
        tokens: int,
        within: int | None,
        costs: Costs,
        drafting: Drafting | None,
        seen: Tiles,
    ) -> None:
        self.left = tokens
        self.works: list[Work] = []
        self.asks: list[Ask] = []
        self.load = Load()
        self.tile: int | None = None
        """To be encoded before."""
        self.lacking = False
        """Whether there was no time for a tile."""
        self._rounds: Rounds = ()
        self._within = within
        self._costs = costs
        self._drafting = drafting
        self._seen = seen

    @property
    def expected(self) -> int:
        """How long (ns) it will take."""
        return self._computing + self._encoding

    @property
    def _computing(self) -> int:
        return self._costs.predict(self.load) + self._takes(self._rounds)

    @property
    def _encoding(self) -> int:
        return 0 if self.tile is None else round(self._seen.cost)

    def _takes(self, rounds: Rounds) -> int:
        return self._drafting.takes(rounds) if self._drafting else 0

    def room(self, start: int, wanted: int, least: int) -> int:
        """How many of the ``wanted`` tokens behind ``start`` others there is room for; with no work
        yet, at least some."""
        count = min(wanted, self.left)
        if self._within is not None:
            costs, tokens = self._costs, self.load.tokens
            spare = self._within - self._encoding - (self._computing or costs.fixed)
            spare -= costs.step_of(tokens + wanted) - costs.step_of(max(1, tokens))
            fits = costs.within(spare, start)
            some = self.works or self.tile is not None
            count = min(count, fits if some else max(fits, least))
        return count

    def rest(self, start: int, tokens: int, others: int, ask: Ask | None = None) -> int | None:
        """How much time (ns) is left with so many ``tokens`` behind ``start`` others, a token of
        each of the ``others``, and an ``ask``; None: any."""
        if self._within is None:
            return None
        whole = self.load + load(start, tokens) + Load(others, others * start)
        rounds = joined(self._rounds, ask) if ask else self._rounds
        return self._within - self._costs.predict(whole) - self._takes(rounds) - self._encoding

    def look(self, tiles: Iterable[Span], start: int, end: int) -> int:
        """Have the first of the ``tiles`` of a sequence encoded that it needs between ``start`` and
        ``end``, if there is time; the position up to which it can be read then. With nothing else
        to do, or enough time put by, there is time."""
        for span in tiles:
            if span.end <= start or span.start >= min(end, start + self.left):
                continue
            if span.tile in self._seen.encoded or span.tile == self.tile:
                continue
            if not self._encodes():
                self.lacking = True
                return max(start, span.start)
            self.tile = span.tile
        return end

    def _encodes(self) -> bool:
        """Whether there is time for one more tile: an iteration has one at most."""
        if self.tile is not None:
            return False
        if self._within is None or not self.works:
            return True
        cost = self._seen.cost
        return self.expected + cost <= self._within or self._seen.saved >= cost

    def add(self, work: Work, ask: Ask | None = None) -> None:
        """``ask``: what the draft model does for it before."""
        tokens = len(work.tokens)
        if ask is not None:
            self.asks.append(ask)
            self._rounds = joined(self._rounds, ask)
            tokens += ask.wanted
        self.works.append(work)
        self.left -= tokens
        self.load += load(work.start, tokens)
