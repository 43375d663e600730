"""Whatever comes, goes, is put aside or taken away: each sequence says what it would say alone."""

from __future__ import annotations

from collections.abc import Sequence as Tokens

from hypothesis import given, settings
from hypothesis import strategies as st

from cotenant.engines.llm.blocks import BlockPool, Offload, Release, Restore
from cotenant.engines.llm.drafting import Ask, Drafting
from cotenant.engines.llm.iteration import Iteration, Iterations, Limits
from cotenant.engines.llm.lookup import Acceptance
from cotenant.engines.llm.sequence import End, Sequence
from cotenant.engines.llm.tiles import row_of, token_of
from cotenant.policy.iterations import IterationCosts

WORDS = 5
"""Few, so that prompts begin alike and drafts are often right."""
STOP = 4
TILE_NS = 30


def mark(tokens: Tokens[int], salt: str = "") -> int:
    """What the keys and values of the last of these tokens depend on: all of them."""
    return hash((salt, *tokens))


def says(tokens: Tokens[int], stutter: bool) -> int:
    """What the model says next."""
    if stutter and len(tokens) > 3 and hash((9, *tokens)) % 4:
        return (tokens[-2] + 1) % STOP
    return hash((7, *tokens)) % WORDS


def guesses(tokens: Tokens[int], stutter: bool, good: bool) -> int:
    """What the draft model says next: the same, most of the time, or hardly ever."""
    if good and hash((5, *tokens)) % 8:
        return says(tokens, stutter)
    return hash((6, *tokens)) % WORDS


def alone(sequence: Sequence, stutter: bool) -> list[int]:
    """What a sequence says if nothing is beside it."""
    tokens = list(sequence.tokens[: sequence.prompt])
    for _ in range(sequence.most):
        tokens.append(says(tokens, stutter))
        if tokens[-1] in sequence.stops:
            break
    return tokens[sequence.prompt :]


class Marks:
    """Memory of blocks that holds a mark for each token."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.blocks: dict[int, dict[int, int]] = {}

    def compute(self, blocks: Tokens[int], start: int, tokens: Tokens[int], salt: str) -> None:
        """Read the marks before ``start``, see that they are right, and write those behind."""
        for at in range(start):
            there = self.blocks[blocks[at // self.size]]
            assert there[at % self.size] == mark(tokens[: at + 1], salt), "another's memory"
        for at in range(start, len(tokens)):
            block = self.blocks.setdefault(blocks[at // self.size], {})
            block[at % self.size] = mark(tokens[: at + 1], salt)


class Erratic(Acceptance):
    """Drafts however much, or not at all, whatever it costs."""

    drawn = 0

    def worth(self, token_ns: float, rate: float, most: int, *costs: float) -> int:
        self.drawn += 1
        return hash((8, self.drawn, token_ns, rate)) % (most + 1)


class Machine:
    """Carries iterations out with memory that holds marks, and sees that what is read is right.
    ``draft``: how good the draft model is; None: there is none."""

    def __init__(
        self,
        blocks: int,
        size: int,
        host: int,
        limits: Limits,
        stutter: bool,
        draft: bool | None = None,
    ) -> None:
        self.pool = BlockPool(blocks, size, host)
        costs = IterationCosts(fixed=10, token=2, pair=0.01)
        self.drafting: Drafting | None = None
        if draft is not None:
            cheap = IterationCosts(fixed=1, token=0.2, pair=0.001)
            self.drafting = Drafting(BlockPool(blocks, size), 30, cheap)
            self.drafting.acceptance = Erratic()
        self.core = Iterations(self.pool, limits, costs, self.drafting)
        if draft is not None:
            self.core.acceptance = Erratic()
        self.core.tiles.took(TILE_NS)
        self.rows: set[int] = set()
        """Tiles that are encoded and kept."""
        self.stutter, self.draft = stutter, draft
        self.memory, self.small = Marks(size), Marks(size)
        self.host: dict[int, dict[int, int]] = {}
        self.expected: dict[int, list[int]] = {}
        self.said: dict[int, list[int]] = {}
        self.salts: dict[int, str] = {}
        self.ends: dict[int, End] = {}

    def add(self, sequence: Sequence) -> None:
        self.expected[sequence.key] = alone(sequence, self.stutter)
        self.said[sequence.key] = []
        self.salts[sequence.key] = sequence.salt
        self.core.add(sequence)

    def step(self, within: int | None = None, cancel: int | None = None) -> Iteration:
        iteration = self.core.next(within)
        self.core.check()
        assert self.pool.excess == 0, "memory is given back"
        assert iteration.load.tokens <= self.core.limits.tokens
        if within is not None and len(iteration.works) > 1:
            assert iteration.expected <= within + TILE_NS * (iteration.tile is not None)
        fits = [
            s for s in self.core.waits if self.pool.needed(len(s.tokens) + 1) <= self.pool.target
        ]
        does = iteration.works or iteration.tile is not None
        assert does or not fits, "somebody waits and nobody runs"
        assert iteration.tile not in self.rows, "what is kept is not encoded again"
        if iteration.tile is not None:
            self.rows.add(iteration.tile)
        for move in iteration.moves:
            match move:
                case Offload(block, slot):
                    self.host[slot] = dict(self.memory.blocks[block])
                case Restore(slot, block):
                    self.memory.blocks[block] = dict(self.host[slot])
                case Release(block):
                    self.memory.blocks.pop(block, None)
        iteration = iteration.drafted({ask.key: self.propose(ask) for ask in iteration.asks})
        assert sum(len(work.tokens) for work in iteration.works) == iteration.load.tokens
        chosen = {}
        for work in iteration.works:
            sequence = self.core.find(work.key)
            assert sequence is not None
            tokens = [*sequence.tokens[: work.start], *work.tokens]
            read = {row_of(token)[0] for token in work.tokens if token < 0}
            assert read <= self.rows, "what is read was encoded"
            assert min(work.drafts, default=0) >= 0, "no image is drafted"
            self.memory.compute(work.blocks, work.start, tokens, self.salts[work.key])
            first = len(tokens) - work.sampled
            chosen[work.key] = [
                says(tokens[: at + 1], self.stutter) for at in range(first, len(tokens))
            ]
        if cancel is not None:
            self.core.end(cancel)
        for key, tokens, end in self.core.done(iteration, chosen):
            self.said[key] += tokens
            if end is not None:
                self.ends[key] = end
        self.core.took(iteration, iteration.expected or 1, 5, 5, TILE_NS)
        self.rows &= self.core.tiles.held
        self.core.check()
        return iteration

    def propose(self, ask: Ask) -> list[int]:
        """What the draft model does, with memory of its own."""
        sequence = self.core.find(ask.key)
        assert sequence is not None
        assert not sequence.tiles, "a draft model sees no images"
        tokens = [*sequence.tokens[: ask.start], *ask.tokens]
        assert tokens == sequence.tokens[: len(tokens)]
        start, said = ask.start, len(tokens)
        for count in range(max(1, ask.wanted)):
            self.small.compute(ask.blocks, start, tokens, self.salts[ask.key])
            start = len(tokens)
            if count < ask.wanted:
                tokens.append(guesses(tokens, self.stutter, bool(self.draft)))
        return tokens[said:]

    def resize(self, blocks: int) -> None:
        self.pool.resize(blocks)
        if self.drafting is not None:
            self.drafting.resize(blocks)
            for move in self.drafting.pool.moves():
                assert isinstance(move, Release)
                self.small.blocks.pop(move.block, None)

    def finish(self) -> None:
        for _ in range(10_000):
            if not self.core.running + self.core.waiting:
                return
            iteration = self.step()
            assert iteration.works or iteration.tile is not None, "somebody waits and nobody runs"
        raise AssertionError("it does not end")


TILES = st.integers(0, 2).map(lambda tile: [token_of(tile, row) for row in range(2 + 2 * tile)])
PROMPTS = st.one_of(
    st.lists(st.integers(0, 2), min_size=1, max_size=20).map(tuple),
    st.lists(st.one_of(TILES, st.lists(st.integers(0, 2), max_size=6)), min_size=1, max_size=4)
    .map(lambda parts: (*(token for part in parts for token in part), 0)),
)  # fmt: skip
"""Of words alone, and of words and images."""
SEQUENCES = st.builds(
    Sequence,
    key=st.just(0),
    prompt=PROMPTS,
    most=st.integers(1, 20),
    stops=st.sampled_from([frozenset(), frozenset({STOP})]),
    due=st.integers(0, 100),
    pace=st.integers(0, 20),
    salt=st.sampled_from(["", "", "", "other"]),
)
STEPS = st.lists(
    st.one_of(
        SEQUENCES,
        st.tuples(st.just("step"), st.one_of(st.none(), st.integers(1, 200))),
        st.tuples(st.just("cancel"), st.integers(1, 12)),
        st.tuples(st.just("cancel under way"), st.integers(1, 12)),
        st.tuples(st.just("resize"), st.integers(0, 24)),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(10, 24),
    st.integers(4, 5),
    st.integers(0, 16),
    st.builds(Limits, st.integers(1, 6), st.integers(1, 40), st.integers(0, 4)),
    st.booleans(),
    st.sampled_from([None, True, False]),
    STEPS,
)
def test_each_says_what_it_says_alone(
    blocks: int,
    size: int,
    host: int,
    limits: Limits,
    stutter: bool,
    draft: bool | None,
    steps: list[object],
) -> None:
    machine = Machine(blocks, size, host, limits, stutter, draft)
    cancelled: set[int] = set()
    for step in steps:
        match step:
            case Sequence():
                step.key = len(machine.expected) + 1
                if machine.pool.needed(step.prompt + step.most) <= machine.pool.most:
                    machine.add(step)
            case ("step", within):
                machine.step(within)
            case ("cancel", key):
                machine.core.end(key)
                cancelled.add(key)
            case ("cancel under way", key):
                machine.step(cancel=key)
                cancelled.add(key)
            case ("resize", target):
                machine.resize(min(target, blocks))
                machine.pool.check()
    machine.resize(blocks)
    machine.finish()
    for key, expected in machine.expected.items():
        if key in cancelled:
            assert machine.said[key] == expected[: len(machine.said[key])]
        else:
            assert machine.said[key] == expected
            assert key in machine.ends
    assert machine.pool.available == blocks
    assert machine.drafting is None or machine.drafting.pool.available == blocks
