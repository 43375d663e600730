"""When tiles of images are encoded, and how long they are kept."""

from __future__ import annotations

from cotenant.engines.llm.blocks import BlockPool
from cotenant.engines.llm.iteration import Iteration, Iterations, Limits
from cotenant.engines.llm.sequence import Sequence
from cotenant.engines.llm.tiles import Span, row_of, spans, token_of
from cotenant.policy.iterations import IterationCosts

TILE_NS = 1000


def rows(tile: int, count: int = 4) -> tuple[int, ...]:
    return tuple(token_of(tile, row) for row in range(count))


def test_rows_stand_below_all_tokens_and_say_what_they_are() -> None:
    tokens = [token_of(tile, row) for tile in (0, 1, 2**127) for row in (0, 1, 65_535)]
    assert max(tokens) < 0
    assert len(set(tokens)) == len(tokens)
    assert row_of(token_of(2**127, 3)) == (2**127, 3)


def test_tiles_are_found_in_a_prompt() -> None:
    assert spans((1, 2, 3)) == ()
    prompt = (7, *rows(5), 8, *rows(6), *rows(5))
    assert spans(prompt) == (Span(5, 1, 5), Span(6, 6, 10), Span(5, 10, 14))


class Core:
    """Iterations without a model: it says 1, whatever it is asked."""

    def __init__(self) -> None:
        costs = IterationCosts(fixed=10, token=1)
        self.core = Iterations(BlockPool(64, 4), Limits(), costs)
        self.core.tiles.took(TILE_NS)

    def step(self, within: int | None = None) -> Iteration:
        found = self.core.next(within)
        self.core.done(found, {work.key: [1] * work.sampled for work in found.works})
        self.core.check()
        return found


def test_a_tile_is_encoded_before_what_reads_it() -> None:
    core = Core()
    core.core.add(Sequence(1, (3, *rows(9), 4), 5))
    first = core.step(within=20)
    assert first.tile is None or not first.works, "one thing at a time, where time is short"
    found = [first, *(core.step(within=20) for _ in range(8))]
    read = [token for each in found for work in each.works for token in work.tokens]
    assert read[:6] == [3, *rows(9), 4]
    assert [each.tile for each in found if each.tile is not None] == [9]


def test_with_time_enough_there_is_still_one_tile_an_iteration() -> None:
    core = Core()
    core.core.add(Sequence(1, (3, *rows(8), *rows(9), 4), 5))
    found = [core.step(), core.step()]
    assert [each.tile for each in found] == [8, 9]
    assert [len(each.works[0].tokens) for each in found] == [5, 5]


def test_a_tile_that_never_fits_is_encoded_in_the_end_and_nobody_stands_still() -> None:
    core = Core()
    core.core.add(Sequence(1, (3,), 150))
    core.step()
    core.core.add(Sequence(2, (*rows(8), *rows(9), 4), 5))
    encoded: list[int] = []
    count = 0
    while len(encoded) < 2:
        found = core.step(within=100)
        assert any(work.key == 1 for work in found.works), "who generates goes on"
        encoded += [] if found.tile is None else [found.tile]
        count += 1
    assert count >= 2 * TILE_NS // 100 // 2, "not much sooner than the time for it was left"


def test_what_two_have_is_encoded_once_and_kept_for_both() -> None:
    core = Core()
    core.core.add(Sequence(1, (*rows(9), 4), 5))
    core.core.add(Sequence(2, (5, *rows(9), 4), 5))
    assert core.step().tile == 9
    core.core.end(1)
    assert core.core.tiles.encoded == {9}
    core.core.end(2)
    assert not core.core.tiles.encoded


def test_who_was_cancelled_meanwhile_leaves_nothing() -> None:
    core = Core()
    core.core.add(Sequence(1, (*rows(9), 4), 5))
    found = core.core.next()
    core.core.end(1)
    core.core.done(found, {work.key: [1] for work in found.works})
    core.core.check()
    assert not core.core.tiles.encoded


def test_rows_are_no_drafts() -> None:
    prompt = (1, 2, 3, *rows(9), 1, 2, 3)
    assert Sequence(1, prompt, 20).draft(5) == ()
    assert Sequence(1, (1, 2, 3, 7, *rows(9), 1, 2, 3), 20).draft(5) == (7,)
