"""Iterations of a language model: who goes on, who begins, who makes room, and what is drafted."""

from __future__ import annotations

import random

import pytest

from cotenant.domain.errors import TooLarge
from cotenant.engines.llm.blocks import BlockPool
from cotenant.engines.llm.iteration import Iteration, Iterations, Limits
from cotenant.engines.llm.lookup import PROBE, Acceptance, Lookup
from cotenant.engines.llm.sequence import End, Sequence
from cotenant.policy.iterations import IterationCosts as Costs
from cotenant.policy.iterations import Load, load

SIZE = 4
STEADY = Costs(fixed=100, token=10, pair=0.1)


def core(blocks: int = 64, host: int = 0, costs: Costs = STEADY, **limits: int) -> Iterations:
    return Iterations(BlockPool(blocks, SIZE, host), Limits(**{"drafts": 0} | limits), costs)


def sequence(key: int, prompt: int = 6, most: int = 8, **fields: int) -> Sequence:
    return Sequence(key, tuple(range(100 * key, 100 * key + prompt)), most, **fields)


def step(found: Iterations, within: int | None = None, says: int = 1) -> Iteration:
    """An iteration in which each that may says the same token."""
    iteration = found.next(within)
    found.done(iteration, {w.key: [says] * w.sampled for w in iteration.works})
    found.check()
    return iteration


def lengths(iteration: Iteration) -> dict[int, int]:
    return {work.key: len(work.tokens) for work in iteration.works}


def test_a_prompt_is_read_and_then_one_token_is_said_at_a_time() -> None:
    found = core()
    found.add(sequence(1, prompt=6, most=3))
    assert [lengths(step(found)) for _ in range(4)] == [{1: 6}, {1: 1}, {1: 1}, {}]


def test_prompts_are_read_beside_who_generates() -> None:
    found = core(tokens=8)
    found.add(sequence(1))
    step(found)
    found.add(sequence(2, prompt=10))
    assert [lengths(step(found)) for _ in range(3)] == [{1: 1, 2: 7}, {1: 1, 2: 3}, {1: 1, 2: 1}]


def test_chunks_fit_the_time_there_is() -> None:
    found = core()
    found.add(sequence(1, prompt=100))
    budget = 400
    iteration = step(found, budget)
    assert 1 < lengths(iteration)[1] < 100
    assert iteration.expected <= budget


def test_there_is_progress_however_short_the_time() -> None:
    found = core()
    found.add(sequence(1, prompt=40))
    while found.find(1) is not None:
        assert step(found, 1).works


def test_who_is_due_first_goes_first_where_not_all_fit() -> None:
    found = core(sequences=2)
    for key, due in ((1, 30), (2, 10), (3, 20)):
        found.add(sequence(key, due=due))
    assert set(lengths(step(found))) == {2, 3}


def test_who_has_said_more_is_due_later() -> None:
    found = core()
    for key in (1, 2):
        found.add(sequence(key, pace=10, most=20))
    step(found)
    tight = [next(iter(lengths(step(found, 1)))) for _ in range(6)]
    assert tight == [1, 2, 1, 2, 1, 2]


def test_who_is_due_last_makes_room_and_comes_back() -> None:
    found = core(blocks=5)
    for key in (1, 2):
        found.add(sequence(key, prompt=6, most=12, due=key))
    said: dict[int, int] = {1: 0, 2: 0}
    while found.running + found.waiting:
        for work in step(found).works:
            said[work.key] += work.sampled
    assert found.put_aside > 0
    assert said == {1: 12, 2: 12}


def test_nobody_begins_if_another_would_have_to_make_room_for_it() -> None:
    found = core(blocks=4)
    found.add(sequence(1, prompt=8, most=4))
    step(found)
    found.add(sequence(2, prompt=8, most=4))
    while found.find(1) is not None:
        assert 2 not in lengths(step(found))
    assert lengths(step(found)) == {2: 8}
    assert found.put_aside == 0


def test_who_fits_only_into_a_larger_pool_keeps_nobody_else_waiting() -> None:
    found = core(blocks=8)
    found.add(sequence(1, prompt=20, most=4, due=1))
    found.pool.resize(4)
    found.add(sequence(2, prompt=4, most=4, due=2))
    assert set(lengths(step(found))) == {2}
    found.pool.resize(8)
    while found.running + found.waiting:
        assert step(found).works


def test_one_key_is_one_sequence() -> None:
    found = core()
    found.add(sequence(1))
    with pytest.raises(ValueError, match="1"):
        found.add(sequence(1))


def test_drafts_take_no_block_that_another_needs() -> None:
    """One block is free. The first could draft into it; the second needs it for its next token."""
    found = core(blocks=5, drafts=4)
    found.add(Sequence(1, (1, 2, 3, 4, 1, 2), 9))
    found.add(Sequence(2, (5, 6, 7, 8, 9, 5, 6), 9))
    chosen = {1: [3], 2: [8]}
    found.done(found.next(), chosen)
    iteration = found.next()
    assert set(lengths(iteration)) == {1, 2}
    assert found.put_aside == 0
    assert lengths(iteration)[1] == 2


def test_what_even_the_whole_pool_cannot_hold_is_refused() -> None:
    found = core(blocks=4)
    with pytest.raises(TooLarge):
        found.add(sequence(1, prompt=10, most=7))
    found.add(sequence(2, prompt=10, most=6))


def test_a_prompt_that_is_known_is_not_read_again() -> None:
    found = core()
    found.add(Sequence(1, tuple(range(12)), 1))
    step(found)
    again = Sequence(2, (*range(12), 50), 1)
    found.add(again)
    assert lengths(step(found)) == {2: 1}
    assert again.known == 12


def test_a_token_that_ends_it_is_the_last() -> None:
    found = core(drafts=4)
    ending = Sequence(1, (1, 2, 3), 9, stops=frozenset({5}))
    found.add(ending)
    step(found, says=1)
    step(found, says=5)
    assert ending.end is End.STOP
    assert ending.tokens == [1, 2, 3, 1, 5]


def test_who_hangs_up_in_the_middle_leaves_nothing_behind() -> None:
    found = core(tokens=4)
    found.add(sequence(1, prompt=30))
    iteration = found.next()
    found.end(1)
    assert found.done(iteration, {}) == []
    found.check()
    assert found.pool.available == 64


def test_a_smaller_pool_puts_sequences_aside_and_a_larger_one_brings_them_back() -> None:
    found = core(blocks=9)
    for key in (1, 2):
        found.add(sequence(key, prompt=12, most=4))
    step(found)
    found.pool.resize(4)
    assert set(lengths(step(found))) == {1}
    found.pool.resize(9)
    assert set(lengths(step(found))) == {1, 2}


# --- drafts ---------------------------------------------------------------------------------


def test_what_followed_last_time_is_drafted() -> None:
    tokens = [1, 2, 3, 4, 5, 1, 2, 3]
    found = Lookup(tokens)
    assert found.draft(2) == (4, 5)
    tokens += [9, 1, 2, 3]
    found.grew()
    assert found.draft(1) == (9,)


def test_nothing_is_drafted_where_nothing_was_said_twice() -> None:
    assert Lookup([1, 2, 3, 4]).draft(3) == ()


def test_right_drafts_are_kept_and_the_first_wrong_one_is_replaced() -> None:
    found = core(drafts=3)
    repeats = Sequence(1, (1, 2, 3, 4, 5, 1, 2), 8)
    found.add(repeats)
    found.done(found.next(), {1: [3]})
    iteration = found.next()
    (work,) = iteration.works
    assert work.drafts == (4, 5, 1)
    (said,) = found.done(iteration, {1: [4, 5, 7, 9]})
    assert said.tokens == (4, 5, 7)
    found.check()


def test_drafts_that_are_never_right_are_given_up_but_for_a_probe() -> None:
    found = Acceptance()
    for _ in range(200):
        found.note(3, 0)
    tried = [found.worth(10, 0.01, 4) for _ in range(2 * PROBE)]
    assert sum(tried) == 2


def test_drafts_are_worth_less_where_others_fill_the_iteration() -> None:
    found = Acceptance()
    found.chance = 0.7
    few, many = (rows / STEADY.predict(Load(rows)) for rows in (1, 64))
    assert found.worth(STEADY.token, few, 8) > 0 == found.worth(STEADY.token, many, 8)


# --- costs ----------------------------------------------------------------------------------


def test_costs_are_learned_from_what_was_measured() -> None:
    truth, found = Costs(fixed=5e6, token=4e5, pair=300.0), Costs()
    for n in range(400):
        work = load((n * 37) % 900, 1 + (n * 13) % 200)
        found.observe(work, truth.predict(work))
    for work in (load(0, 1), load(500, 64), load(900, 8)):
        assert found.predict(work) == pytest.approx(truth.predict(work), rel=0.02)


def test_no_part_of_the_costs_is_negative() -> None:
    found = Costs()
    for _ in range(50):
        found.observe(Load(8, 100), 1000)
        found.observe(Load(16, 200), 900)
    assert min(found.fixed, found.token, found.pair) >= 0
    assert found.predict(Load(12, 150)) == pytest.approx(950, rel=0.05)


def test_as_many_tokens_fit_as_there_is_time_for() -> None:
    for start in (0, 100, 5000):
        count = STEADY.within(10_000, start)
        assert STEADY.again(start, count) <= 10_000 < STEADY.again(start, count + 1)


def test_copies_are_worth_it_where_computing_again_takes_longer() -> None:
    slow = Costs(token=10, pair=0.1, offload=200, restore=200)
    assert not slow.worth_aside(0, 16)
    assert slow.worth_aside(10_000, 16)
    assert not slow.worth_aside(10_000, 16, chance=0.01)


def test_a_step_behind_the_first_token_is_learned_and_counts_for_drafts() -> None:
    truth, found = Costs(fixed=3e7, token=5e6, pair=100.0, step=4e7), Costs()
    draw = random.Random(1)
    for _ in range(400):
        work = load(draw.randrange(500), draw.choice([1, 1, 1, 2, 8, 16, 64]))
        found.observe(work, round(truth.predict(work) * draw.uniform(0.95, 1.05)))
    for work in (load(200, 1), load(200, 2), load(0, 64)):
        assert found.predict(work) == pytest.approx(truth.predict(work), rel=0.1)

    sure = Acceptance()
    for _ in range(200):
        sure.note(7, 7)
    alone = 1 / truth.predict(load(100, 1))
    assert sure.worth(truth.token, alone, 7) == 7
    assert sure.worth(truth.token, alone, 7, step_ns=20 * truth.step) == 0


def test_together_tokens_never_seem_to_take_longer_than_one_by_one() -> None:
    found = Costs()
    for turn in range(400):
        work = load(0, 40) if turn % 16 == 0 else load(40 + turn % 16, 1)
        found.observe(work, 400_000_000 if work.tokens > 1 else 80_000_000)
    one, two = found.predict(load(50, 1)), found.predict(load(50, 1) + load(50, 1))
    assert two <= 2 * one
    assert found.predict(load(0, 40)) == pytest.approx(400_000_000, rel=0.1)
