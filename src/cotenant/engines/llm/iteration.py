"""Iterations: which tokens of which sequences a model computes next (continuous batching).

Its laws:

1. Who generates goes before who reads a prompt, and who is due first before the others (Orca, Yu et
   al., OSDI 2022). Prompts are read in chunks beside them (Sarathi-Serve, Agrawal et al., OSDI
   2024): as many tokens as fit the limit and the time that there is.
2. An iteration has work wherever a sequence could have a block, however short the time is: at least
   one chunk of one block, or one tile of an image.
3. A sequence begins only if its whole prompt finds room, and each that runs a block more. So nobody
   is put aside for who begins.
4. Where there is no room for who generates, who is due last is put aside, and comes back when there
   is. Its blocks wait on the host, or are computed again, whichever takes less time.
5. A sequence that is alone gets all there is. What could not run even then is refused when it
   comes.
6. A tile of an image is encoded within the same time, before what reads it, one an iteration
   (``tiles``). So an iteration takes longer than it should by one tile at most.
7. Who generates may have a draft: of what was said before, else of a draft model. It takes what
   those who still have to go on do not need, and is verified in the same iteration.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from collections.abc import Sequence as Tokens
from typing import NamedTuple

import msgspec

from cotenant.domain.errors import TooLarge
from cotenant.engines.llm.blocks import BlockPool, Move, Offload, Restore
from cotenant.engines.llm.drafting import Ask, Drafting, Terms
from cotenant.engines.llm.lookup import PROBE, Acceptance
from cotenant.engines.llm.plan import Plan, Work
from cotenant.engines.llm.sequence import End, Sequence
from cotenant.engines.llm.tiles import Tiles
from cotenant.policy.iterations import IterationCosts as Costs
from cotenant.policy.iterations import Load, load


class Limits(msgspec.Struct, frozen=True):
    """Of an iteration. ``sequences`` that run, ``tokens`` that are computed, ``drafts`` of one
    sequence that are verified at once (0: none)."""

    sequences: int = 64
    tokens: int = 512
    drafts: int = 7

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.tokens < 1 or self.drafts < 0:
            raise ValueError(f"{self}: sequences and tokens are 1 or more, drafts not negative")


class Iteration(NamedTuple):
    """``moves`` first, one after the other; then the ``tile`` is encoded; then all ``works`` are
    computed together. ``expected``: ns. If there are ``asks`` they are carried out before the
    works, which go on with what was ``drafted``."""

    moves: tuple[Move, ...]
    works: tuple[Work, ...]
    load: Load
    expected: int
    asks: tuple[Ask, ...] = ()
    tile: int | None = None

    def drafted(self, drafts: Mapping[int, Tokens[int]]) -> Iteration:
        """The same with what the draft model proposed, by key: as many as were asked for."""
        return self._replace(works=tuple(w.verifying(drafts.get(w.key, ())) for w in self.works))


class Said(NamedTuple):
    """What a sequence said in an iteration; ``end``: why it is over, if it is."""

    key: int
    tokens: tuple[int, ...]
    end: End | None


class Iterations:
    """See the module's text. ``drafting``: where there is a draft model."""

    def __init__(
        self,
        pool: BlockPool,
        limits: Limits,
        costs: Costs | None = None,
        drafting: Drafting | None = None,
    ) -> None:
        self.pool = pool
        self.limits = limits
        self.costs = costs or Costs()
        self.acceptance = Acceptance()
        """Of drafts of what was said before."""
        self.drafting = drafting
        self.tiles = Tiles()
        self.put_aside = 0
        """How often a sequence had to make room."""
        self._sequences: dict[int, Sequence] = {}
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        """By urgency, which does not change while they wait."""
        self._passed = 0

    # --- who there is -----------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Sequences that have blocks."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that have none yet, or none at the moment."""
        return len(self._waiting)

    @property
    def waits(self) -> tuple[Sequence, ...]:
        """Those, the most urgent first."""
        return tuple(self._waiting)

    @property
    def blocks(self) -> tuple[int, int, int, int, int]:
        """How many there are, are wanted for all answers at their longest, could be given at once,
        are read by nobody, and are what the most urgent answer needs alone."""
        pool = self.pool
        wanted = sum(pool.needed(s.prompt + s.most) for s in self._sequences.values())
        spare = pool.available
        return pool.capacity, wanted, spare, spare, self.least

    @property
    def least(self) -> int:
        """Blocks for the most urgent one alone."""
        first = min(self._sequences.values(), key=_urgency, default=None)
        return 0 if first is None else self.pool.needed(first.prompt + first.most)

    def add(self, sequence: Sequence) -> None:
        """Take a sequence up. Raises TooLarge if not even the largest pool could hold it, and
        ValueError if there is one of that key."""
        if sequence.key in self._sequences:
            raise ValueError(f"there is a sequence {sequence.key} already")
        need = self.pool.needed(sequence.prompt + sequence.most)
        if need > self.pool.most:
            raise TooLarge(
                f"{sequence.prompt} tokens and {sequence.most} more fill {need} blocks; "
                f"there are {self.pool.most}"
            )
        self._sequences[sequence.key] = sequence
        self.tiles.hold(sequence.tiles)
        insort(self._waiting, sequence, key=_urgency)

    def find(self, key: int) -> Sequence | None:
        """The sequence of this key, if it has not ended."""
        return self._sequences.get(key)

    def end(self, key: int, why: End = End.CANCELLED) -> None:
        """A sequence is over; unknown ones are passed over. If it is part of an iteration that is
        under way, what that says of it is passed over too."""
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return
        sequence.end = why
        self.tiles.drop(sequence.tiles)
        if sequence.table is not None:
            self._running.remove(sequence)
            self.pool.close(sequence.table)
            self._forget_drafts(key)
        else:
            self._waiting.remove(sequence)
            self.pool.drop(sequence.claim)
        sequence.table, sequence.claim = None, ()

    # --- the next iteration -----------------------------------------------------------------

    def next(self, within: int | None = None) -> Iteration:
        """What to compute now, in about ``within`` ns (None: however long it takes)."""
        self._make_room()
        plan = Plan(self.limits.tokens, within, self.costs, self.drafting, self.tiles)
        self._running.sort(key=_urgency)
        generate = [s for s in self._running if s.generates]
        rate = self._rate(generate)
        for index, sequence in enumerate(generate):
            if sequence.table is not None:  # else it has made room meanwhile
                self._go_on(sequence, plan, rate, others=len(generate) - index - 1)
        for sequence in [s for s in self._running if not s.generates]:
            if sequence.table is not None:
                self._read(sequence, plan)
        self._let_in(plan)
        works, asks, expected = tuple(plan.works), tuple(plan.asks), plan.expected
        self.tiles.put_by(within, expected, plan.lacking and plan.tile is None)
        return Iteration(self.pool.moves(), works, plan.load, expected, asks, plan.tile)

    def _make_room(self) -> None:
        """Put sequences aside until the pool is as small as it should be."""
        while self.pool.excess and self._running:
            self._put_aside(max(self._running, key=_urgency))
        self.pool.spill = self._spills()

    def _spills(self) -> bool:
        """Whether blocks that nobody is known to want are worth a copy. Now and then one is made
        though they are not, or it would never be seen that they are by now."""
        if self.costs.worth_aside(0, self.pool.size, self.pool.chance):
            return True
        self._passed = (self._passed + 1) % PROBE
        return not self._passed

    def _let_in(self, plan: Plan) -> None:
        """Take up who waits, in order. Who fits only into a larger pool than there is now is passed
        over; for who fits into this one all others wait."""
        if self.pool.excess:
            return
        for sequence in list(self._waiting):
            if len(self._running) >= self.limits.sequences:
                return
            if self.pool.needed(len(sequence.tokens) + 1) > self.pool.target:
                continue
            if plan.room(0, 1, 1) < 1 or not self._begin(sequence):
                return
            if not self._read(sequence, plan):
                return

    def _rate(self, generate: list[Sequence]) -> float:
        """Tokens a ns of an iteration without drafts."""
        plain = Load()
        for sequence in generate:
            plain += load(sequence.computed, 1)
        took = self.costs.predict(plain)
        return len(generate) / took if took else 0.0

    def _draft(
        self, sequence: Sequence, plan: Plan, rate: float, others: int
    ) -> tuple[tuple[int, ...], Ask | None]:
        """What is worth verifying, or asking the draft model for, of time, tokens and blocks that
        the ``others`` do not need."""
        at, table, pool = len(sequence.tokens), sequence.table, self.pool
        assert table is not None
        most = min(self.limits.drafts, plan.left - others - 1, sequence.ahead)
        most = min(most, plan.room(at - 1, most + 1, 1) - 1)
        spare = max(0, pool.available - others - 1) + len(table)
        most = min(most, spare * pool.size - at)
        token = self.costs.token + self.costs.pair * sequence.computed
        step = 0.0 if plan.works or others else self.costs.step
        draft = sequence.draft(most)
        if draft:
            draft = draft[: self.acceptance.worth(token, rate, len(draft), step)]
        if draft or self.drafting is None or sequence.tiles:  # a draft model sees no images
            return draft, None
        rest = plan.rest(at - 1, 1, others)
        prompts = self._waiting or not all(s.generates for s in self._running)
        chunk = pool.size if prompts else self.limits.tokens
        together = len(plan.asks) + 1 + others
        terms = Terms(most, token, step, rate, together, chunk, rest)
        return (), self._fitting(self.drafting.ask(sequence, terms), plan, at, others)

    @staticmethod
    def _fitting(ask: Ask | None, plan: Plan, at: int, others: int) -> Ask | None:
        """What of it there is time for: fewer drafts, or nothing."""
        if ask is None:
            return None
        for count in range(ask.wanted, min(ask.wanted, 1) - 1, -1):
            fewer = ask._replace(wanted=count)
            rest = plan.rest(at - 1, 1 + count, others, fewer)
            if rest is None or rest >= 0:
                return fewer
        return None

    def _go_on(self, sequence: Sequence, plan: Plan, rate: float, others: int) -> None:
        """The next token, and with it a draft if it pays. ``others`` are still to go on."""
        at, table = len(sequence.tokens), sequence.table
        assert table is not None
        if plan.room(at - 1, 1, 1) < 1:
            return
        draft, ask = self._draft(sequence, plan, rate, others)
        more = len(draft) + (ask.wanted if ask else 0)
        if more and not self.pool.extend(table, at + more):
            draft, ask = (), None
        while not self.pool.extend(table, at):
            last = self._last(plan)
            if last is None or last is sequence:
                self._put_aside(sequence)
                return
            self._put_aside(last)
        tokens = (sequence.tokens[-1], *draft)
        plan.add(Work(sequence.key, at - 1, tokens, table.blocks, len(tokens)), ask)

    def _last(self, plan: Plan) -> Sequence | None:
        """Who is due last of those that are not part of the iteration."""
        working = {work.key for work in plan.works}
        others = [s for s in self._running if s.key not in working]
        return max(others, key=_urgency, default=None)

    def _put_aside(self, sequence: Sequence) -> None:
        """It comes back when there is room, behind nobody who is due later."""
        table, pool = sequence.table, self.pool
        assert table is not None
        wanted = self.costs.worth_aside(sequence.computed // 2, pool.size)
        sequence.claim = pool.close(table, wanted)
        sequence.table, sequence.computed = None, 0
        self._running.remove(sequence)
        insort(self._waiting, sequence, key=_urgency)
        self._forget_drafts(sequence.key)
        self.put_aside += 1

    def _forget_drafts(self, key: int) -> None:
        if self.drafting is not None:
            self.drafting.drop(key)

    def _begin(self, sequence: Sequence) -> bool:
        """Take a sequence up that waits; False if there is no room for it."""
        pool = self.pool
        lacking = pool.needed(len(sequence.tokens) + 1) + len(self._running) - pool.available
        if lacking > 0 and lacking > pool.held(sequence.tokens, sequence.salt):
            return False
        table = pool.open(sequence.tokens, sequence.salt)
        found = pool.extend(table, len(sequence.tokens))
        assert found, "what is needed was counted"
        pool.drop(sequence.claim)
        sequence.claim, sequence.table = (), table
        sequence.computed = len(table.nodes) * pool.size
        if sequence.known is None:
            sequence.known = sequence.computed
        self._waiting.remove(sequence)
        self._running.append(sequence)
        return True

    def _read(self, sequence: Sequence, plan: Plan) -> bool:
        """A chunk of what is not computed, or a tile that it needs; False if there is no time for
        it."""
        start, end, table = sequence.computed, len(sequence.tokens), sequence.table
        assert table is not None
        before = plan.tile
        seen = plan.look(sequence.tiles, start, end)
        count = plan.room(start, seen - start, self.pool.size)
        if count < 1:
            return plan.tile != before
        chunk = tuple(sequence.tokens[start : start + count])
        plan.add(Work(sequence.key, start, chunk, table.blocks, int(start + count == end)))
        return True

    # --- what came of it --------------------------------------------------------------------

    def done(self, iteration: Iteration, chosen: Mapping[int, Tokens[int]]) -> list[Said]:
        """Take up what an iteration gave. ``chosen``: by key, for each sampled token what the model
        says comes next, as if all drafts before it had been said (so they count for penalties and
        grammars); missing where nothing was sampled. Drafts that it would have said itself are
        kept, and the first token that it says instead."""
        said = []
        self.tiles.done(iteration.tile)
        asks = {ask.key: ask for ask in iteration.asks}
        for work in iteration.works:
            sequence = self._sequences.get(work.key)
            if sequence is None or sequence.table is None:
                continue
            drafts, ask, right = work.drafts, asks.get(work.key), 0
            sequence.computed = work.start + len(work.tokens) - len(drafts)
            if work.sampled:
                picked = chosen[work.key]
                while right < len(drafts) and picked[right] == drafts[right]:
                    right += 1
                if drafts and ask is None:
                    self.acceptance.note(len(drafts), right)
                tokens = sequence.say(tuple(picked[: right + 1]))
                sequence.computed += min(right, len(tokens))
                said.append(Said(work.key, tokens, sequence.end))
            self.pool.publish(sequence.table, sequence.tokens, sequence.computed)
            if ask is not None and self.drafting is not None:
                self.drafting.settle(sequence, ask, right)
            if sequence.end is not None:
                self.end(work.key, sequence.end)
        return said

    def took(
        self,
        iteration: Iteration,
        ns: int,
        offload_ns: int = 0,
        restore_ns: int = 0,
        tile_ns: int = 0,
    ) -> None:
        """How long its works took, its moves (those to the host, and those back) and its tile."""
        if iteration.tile is not None:
            self.tiles.took(tile_ns)
        if iteration.works:
            self.costs.observe(iteration.load, ns)
        kinds = [type(move) for move in iteration.moves]
        self.costs.moved(kinds.count(Offload), offload_ns, back=False)
        self.costs.moved(kinds.count(Restore), restore_ns, back=True)

    # --- for tests --------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError naming the law that is broken."""
        self.pool.check(s.claim for s in self._waiting)
        self.tiles.check(s.tiles for s in self._sequences.values())
        if self.drafting is not None:
            self.drafting.check(self._running)
        both = [*self._running, *self._waiting]
        assert sorted(s.key for s in both) == sorted(self._sequences), "each runs or waits"
        assert self._waiting == sorted(self._waiting, key=_urgency), "who waits is in order"
        assert len(self._running) <= self.limits.sequences, "no more run than may"
        assert all(s.table is not None for s in self._running), "who runs has blocks"
        assert all(s.table is None for s in self._waiting), "who waits has none"
        for sequence in both:
            assert sequence.computed < len(sequence.tokens), "the newest token is not computed"
            assert self._sequences[sequence.key] is sequence
            if sequence.table is not None:
                room = len(sequence.table) * self.pool.size
                assert sequence.computed <= room, "what is computed has blocks"
                assert not sequence.claim, "who runs has no claim"


def _urgency(sequence: Sequence) -> tuple[int, int]:
    return sequence.due, sequence.key
