"""Drafts by a smaller model: what it is asked, what it has read, and whether that pays.

Its laws:

1. The draft model has blocks of its own, as many as the model and of as many tokens. They are a
   cache: whoever lacks one has no draft, and nothing else.
2. It is behind a sequence by what it has not read. It reads that before its first draft, and in
   chunks where time is short.
3. What it read of drafts that were wrong is forgotten; what it read of a sequence goes when that
   ends or is put aside.
4. It works in rounds: the first reads, each further one adds a token, all sequences together. A
   round takes time that only right drafts make up for, so it is part of what a draft costs
   (Leviathan, Kalman and Matias, ICML 2023, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from cotenant.engines.llm.blocks import BlockPool, Table
from cotenant.engines.llm.lookup import Acceptance
from cotenant.engines.llm.sequence import Sequence
from cotenant.policy.iterations import IterationCosts as Costs
from cotenant.policy.iterations import Load, load

Rounds = tuple[Load, ...]
"""What a draft model has to do in each round."""


class Ask(NamedTuple):
    """Have the draft model read ``tokens`` at the positions from ``start`` on, and propose the
    ``wanted`` that come next (0: it only reads). ``blocks``: its own of the sequence, in order."""

    key: int
    start: int
    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    wanted: int


class Terms(NamedTuple):
    """On which a sequence may have a draft of up to ``most`` tokens. To verify one takes ``token``
    ns, and any at all ``step`` ns besides; an iteration makes ``rate`` tokens a ns without drafts.
    ``together``: sequences that may share the rounds. At most ``chunk`` tokens are read at once,
    in ``spare`` ns (None: however long it takes)."""

    most: int
    token: float
    step: float
    rate: float
    together: int
    chunk: int
    spare: float | None


@dataclass(eq=False)
class _Read:
    """What the draft model knows of a sequence: ``computed`` tokens in the blocks of ``table``.
    ``reading``: it was found worth it, and is not yet through."""

    table: Table
    computed: int
    reading: bool = False


class Drafting:
    """See the module's text. ``pool``: the draft model's blocks, without any on the host.
    ``context``: the most tokens that it can look at."""

    def __init__(self, pool: BlockPool, context: int, costs: Costs | None = None) -> None:
        self.pool = pool
        self.context = context
        self.costs = costs or Costs()
        """Of a round."""
        self.acceptance = Acceptance()
        self._read: dict[int, _Read] = {}

    def ask(self, sequence: Sequence, terms: Terms) -> Ask | None:
        """What the draft model should do for a sequence that generates; None: nothing."""
        tokens = sequence.tokens
        at = len(tokens)
        most = min(terms.most, self.context + 1 - at)  # the last draft is not read
        if most < 1:
            return None
        read = self._read.get(sequence.key) or self._open(sequence)
        count = self._worth(sequence, read, most, terms) or min(most, int(read.reading))
        if not count or not self.pool.extend(read.table, at + count - 1):
            return None
        chunk = min(at - read.computed, self._chunk(read.computed, terms))
        if chunk < 1:
            return None
        read.reading = read.computed + chunk < at
        text = tuple(tokens[read.computed : read.computed + chunk])
        blocks = read.table.blocks
        return Ask(sequence.key, read.computed, text, blocks, 0 if read.reading else count)

    def _open(self, sequence: Sequence) -> _Read:
        table = self.pool.open(sequence.tokens, sequence.salt)
        read = _Read(table, len(table.nodes) * self.pool.size)
        self._read[sequence.key] = read
        return read

    def _worth(self, sequence: Sequence, read: _Read, most: int, terms: Terms) -> int:
        """How many tokens to draft. What there is to read first is spread over the drafts that may
        follow; a trial pays all of it."""
        at = len(sequence.tokens)
        shared = Load(terms.together, terms.together * at)
        token = terms.token + self.costs.predict(shared) / terms.together
        whole = self.costs.predict(load(read.computed, at - read.computed))
        behind = max(0, whole - self.costs.predict(load(at - 1, 1)))
        step = terms.step + behind * min(1.0, (most + 1) / (sequence.ahead + 1))
        trial = terms.rate * (token + terms.step + behind)
        return self.acceptance.worth(token, terms.rate, most, step, min(1.0, 1 / (trial or 1.0)))

    def _chunk(self, start: int, terms: Terms) -> int:
        """How many tokens to read at once."""
        if terms.spare is None:
            return terms.chunk
        spare = terms.spare - self.costs.fixed - self.costs.step
        return min(terms.chunk, self.costs.within(spare, start))

    def takes(self, rounds: Rounds) -> int:
        """How long (ns) they take, one after the other."""
        return sum(map(self.costs.predict, rounds))

    def settle(self, sequence: Sequence, ask: Ask, right: int) -> None:
        """An ask was carried out, and ``right`` of its drafts were."""
        read = self._read.get(sequence.key)
        if read is None:
            return
        read.computed = ask.start + len(ask.tokens)
        if ask.wanted:
            self.acceptance.note(ask.wanted, right)
            read.computed += min(right, ask.wanted - 1)
        self.pool.publish(read.table, sequence.tokens, read.computed)

    def drop(self, key: int) -> None:
        """The sequence has ended or was put aside; unknown ones are passed over."""
        read = self._read.pop(key, None)
        if read is not None:
            self.pool.close(read.table)

    def resize(self, blocks: int) -> None:
        """Have so many blocks at once. Who began to draft last is the first to lose them."""
        self.pool.resize(blocks)
        while self.pool.excess and self._read:
            self.drop(next(reversed(self._read)))

    def check(self, running: Iterable[Sequence]) -> None:
        """Raise AssertionError naming the law that is broken. ``running``: who has blocks of the
        model."""
        self.pool.check()
        assert not self.pool.excess, "what is to be given back is"
        sequences = {sequence.key: sequence for sequence in running}
        assert self._read.keys() <= sequences.keys(), "who does not run has no blocks"
        for key, read in self._read.items():
            assert read.computed < len(sequences[key].tokens), "the newest token is not read"
            assert read.computed <= len(read.table) * self.pool.size, "what is read has blocks"


def joined(rounds: Rounds, ask: Ask) -> Rounds:
    """What there is to do in each round with one ask more."""
    end = ask.start + len(ask.tokens)
    own = [load(ask.start, len(ask.tokens)), *(load(end + n, 1) for n in range(ask.wanted - 1))]
    return tuple(a + b for a, b in zip_longest(rounds, own, fillvalue=Load()))
