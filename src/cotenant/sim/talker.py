"""An instance of a language model in virtual time.

What to compute next, whose blocks those are and who is put aside the live core says
(``cotenant.engines.llm.iteration``); here is only what it takes. Its laws are those of the live
worker (``cotenant.runtime.worker``):

1. A turn is one iteration. What others than those of the batch say in it is kept for their next.
2. What is ordered during a turn (a size, a recall) is taken up at its end.
3. After each turn it says what its pool has and wants, if that changed, and then what came of the
   turn. ``more``: its lease goes on.
"""

from __future__ import annotations

from typing import Final

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.request import Request
from cotenant.engines.llm.blocks import BlockPool, Move, Offload, Restore
from cotenant.engines.llm.iteration import Iteration, Iterations, Limits
from cotenant.engines.llm.sequence import Sequence
from cotenant.policy.iterations import load
from cotenant.policy.memory.account import PoolUse
from cotenant.sim.generates import Generates
from cotenant.sim.outcome import TokenTally

STOP: Final = -1
"""The token that ends an answer. Any other is the number of its request: answers share nothing, and
nothing can be guessed."""


class Talker:
    """See the module's text. ``size``: bytes that its pool may have at most."""

    def __init__(self, worker: str, generates: Generates, size: int, tally: TokenTally) -> None:
        self._worker = worker
        self._generates = generates
        self._tally = tally
        blocks = BlockPool(
            size // generates.block, generates.tokens, generates.host // generates.block
        )
        self.core = Iterations(blocks, Limits(drafts=0))
        self._answers: dict[int, int] = {}
        """Tokens that answers will have, of those that have begun."""
        self._highest: dict[int, int] = {}
        """Tokens of them that were computed up to now: what lies below is computed again."""
        self._kept: dict[int, int] = {}
        """Tokens that were said and not given out yet."""
        self._over: set[int] = set()
        self._aside = 0
        """How often a sequence was put aside up to the last turn."""
        self._told: PoolUse | None = None
        self._moving = 0
        """Ns of copies that the next turn waits for."""
        self._lease: a.Dispatch | None = None
        self._members: tuple[int, ...] = ()
        self._began = self._turns = 0
        self._recalled = False
        self._resized: int | None = None
        self._iteration: Iteration | None = None
        self._took = 0

    @property
    def room(self) -> int:
        """Tokens that it can hold."""
        return self.core.pool.most * self._generates.tokens

    @property
    def pool(self) -> int:
        """Bytes of them."""
        return self.core.pool.most * self._generates.block

    @property
    def block(self) -> int:
        """Bytes of one."""
        return self._generates.block

    # --- orders -----------------------------------------------------------------------------

    def lease(self, order: a.Dispatch, begun: dict[int, tuple[Request, int]], at: int) -> None:
        """A batch begins to execute at this time (ns). ``begun``: its requests, and how many tokens
        their answers will have."""
        assert self._lease is None, "a worker has one batch at a time"
        self._lease, self._members = order, order.batch.requests
        self._began, self._turns, self._recalled = at, 0, False
        for key in self._members:
            if key not in self._answers:
                request, answer = begun[key]
                prompt = (key,) * request.prompt
                stops = frozenset({STOP})
                self.core.add(Sequence(key, prompt, request.most, stops=stops))
                self._answers[key], self._kept[key], self._highest[key] = answer, 0, 0

    def recall(self, batch: int) -> None:
        """Its lease ends with the turn under way."""
        if self._lease is not None and self._lease.batch.id == batch:
            self._recalled = True

    def resize(self, size: int) -> list[e.Held]:
        """Its pool may have so many bytes; what it says to that, if it is said at once."""
        if self._lease is not None:
            self._resized = size
            return []
        return self._resize(size)

    def _resize(self, size: int) -> list[e.Held]:
        pool = self.core.pool
        pool.resize(min(size // self._generates.block, pool.most))
        self._move(pool.moves())
        return self._news()

    # --- a turn -----------------------------------------------------------------------------

    def turn(self, units: int, factor: float) -> int:
        """A turn begins; how long (ns) it will take, its copies included. ``factor``: so much
        longer than the mean."""
        assert self._lease is not None and self._iteration is None
        iteration = self._iteration = self.core.next(self._lease.lease.budget or None)
        self._move(iteration.moves)
        for work in iteration.works:
            key, end = work.key, work.start + len(work.tokens)
            self._tally.read += self.core.pool.needed(end)
            self._tally.again += max(0, min(end, self._highest[key]) - work.start)
            self._highest[key] = max(end, self._highest[key])
        computing = round(self._generates.turn.mean(units, iteration.load) * factor)
        kinds = [type(move) for move in iteration.moves]
        self.core.took(
            iteration,
            computing,
            kinds.count(Offload) * self._generates.offload,
            kinds.count(Restore) * self._generates.restore,
        )
        self._took = max(1, computing + self._moving)
        self._moving = 0
        return self._took

    def _move(self, moves: tuple[Move, ...]) -> None:
        kinds = [type(move) for move in moves]
        out, back = kinds.count(Offload), kinds.count(Restore)
        self._moving += out * self._generates.offload + back * self._generates.restore
        self._tally.offloaded += out
        self._tally.restored += back

    def ended(self, now: int, waited: int) -> tuple[list[e.Held], e.BatchDone]:
        """A turn is over: what it says to that, in this order. ``waited``: ns from dispatch to its
        first turn."""
        iteration, lease = self._iteration, self._lease
        assert iteration is not None and lease is not None
        self._say(iteration)
        said, unfinished = [], []
        for key in self._members:
            tokens, self._kept[key] = self._kept[key], 0
            if tokens:
                said.append((key, tokens))
            if key in self._over:
                self._forget(key)
            else:
                unfinished.append(key)
        held = []
        if self._resized is not None:
            held, self._resized = self._resize(self._resized), None
        self._tally.put_aside += self.core.put_aside - self._aside
        self._aside = self.core.put_aside
        self._members, self._turns = tuple(unfinished), self._turns + 1
        work = iteration.load.tokens, iteration.load.pairs
        more = bool(unfinished) and not self._recalled and self._turns < lease.lease.turns
        more = more and now - self._began < lease.lease.ns and work != (0, 0)
        spoke = {key for key, _ in said}
        done = e.BatchDone(
            lease.batch.id,
            self._took,
            waited if self._turns == 1 else 0,
            unfinished=tuple(unfinished),
            emitted=tuple(key for key in unfinished if key in spoke),
            said=tuple(said),
            more=more,
            work=work,
        )
        self._iteration = None
        if not more:
            self._lease = None
        return [*held, *self._news()], done

    def _say(self, iteration: Iteration) -> None:
        chosen = {}
        for work in iteration.works:
            if work.sampled:
                sequence = self.core.find(work.key)
                last = sequence is not None and sequence.said + 1 >= self._answers[work.key]
                chosen[work.key] = (STOP if last else work.key,)
        for said in self.core.done(iteration, chosen):
            self._kept[said.key] += len(said.tokens)
            if said.end is not None:
                self._over.add(said.key)

    def _forget(self, key: int) -> None:
        self._over.discard(key)
        del self._answers[key], self._kept[key], self._highest[key]

    def _news(self) -> list[e.Held]:
        use = PoolUse(*(blocks * self.block for blocks in self.core.blocks))
        if not use.tells(self._told, self.pool):
            return []
        self._told = use
        return [e.Held(self._worker, *use)]

    # --- for tests --------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError naming the law that is broken."""
        self.core.check()
        assert self.core.running + self.core.waiting + len(self._over) == len(self._answers)


def first_turns(generates: Generates, units: int, rows: int) -> int:
    """Mean ns of a turn in which so many prompts of mean length are begun, as far as they are read
    in one: what an instance measures before it serves."""
    left, total = Limits().tokens, load(0, 0)
    for _ in range(rows):
        total += load(0, min(left, generates.prompt.mean))
        left = max(0, left - generates.prompt.mean)
    return generates.turn.mean(units, total)
