"""KV memory in blocks: shared where sequences begin alike, put aside where there is no room."""

from __future__ import annotations

import pytest

from cotenant.engines.llm.blocks import BlockPool, Offload, Release, Restore, Table

SIZE = 4
A = tuple(range(100, 112))
"""Three blocks and one token more make a chain of three."""
B = tuple(range(200, 212))


def filled(pool: BlockPool, tokens: tuple[int, ...], salt: str = "") -> Table:
    """A table whose tokens are all computed."""
    table = pool.open(tokens, salt)
    assert pool.extend(table, len(tokens))
    pool.publish(table, tokens, len(tokens))
    pool.check()
    return table


def test_who_begins_alike_shares_blocks() -> None:
    pool = BlockPool(8, SIZE)
    first = filled(pool, A)
    second = pool.open((*A, 1))
    assert second.blocks == first.blocks
    assert pool.available == 5
    pool.check()


def test_the_last_token_is_always_left_to_compute() -> None:
    pool = BlockPool(8, SIZE)
    filled(pool, A)
    assert len(pool.open(A)) == 2


def test_what_nobody_holds_is_found_again() -> None:
    pool = BlockPool(8, SIZE)
    pool.close(filled(pool, A))
    assert pool.available == 8
    assert len(pool.open((*A, 1))) == 3


def test_another_salt_shares_nothing() -> None:
    pool = BlockPool(8, SIZE)
    pool.close(filled(pool, A, "one"))
    assert len(pool.open((*A, 1), "two")) == 0


def test_two_that_compute_the_same_at_once_keep_it_once() -> None:
    pool = BlockPool(8, SIZE)
    both = [pool.open(A) for _ in range(2)]
    for table in both:
        pool.extend(table, len(A))
    for table in both:
        pool.publish(table, A, len(A))
    assert both[0].blocks == both[1].blocks
    assert pool.available == 5
    pool.check()


def test_the_least_recently_used_goes_first_and_leaves_before_their_parents() -> None:
    pool = BlockPool(6, SIZE)
    pool.close(filled(pool, A))
    pool.close(filled(pool, B))
    pool.open((*A, 1))
    third = pool.open((1,) * 4)
    assert pool.extend(third, 4)
    assert len(pool.open((*B, 1))) == 2
    pool.check()


def test_there_is_no_room_where_all_is_held() -> None:
    pool = BlockPool(3, SIZE)
    filled(pool, A)
    table = pool.open(B)
    assert not pool.extend(table, 1)
    assert len(table) == 0


def test_what_must_go_is_put_on_the_host_and_comes_back() -> None:
    pool = BlockPool(3, SIZE, host=3)
    first = filled(pool, A)
    blocks = first.blocks
    pool.close(first)
    pool.close(filled(pool, B))
    away = pool.moves()
    assert [type(move) for move in away] == [Offload] * 3
    assert {move.block for move in away if isinstance(move, Offload)} == set(blocks)
    again = pool.open((*A, 1))
    assert len(again) == 3
    back = [move for move in pool.moves() if isinstance(move, Restore)]
    slots = {move.block: move.slot for move in away if isinstance(move, Offload)}
    assert [move.slot for move in back] == [slots[block] for block in blocks]
    pool.check()


def test_what_is_not_worth_it_is_dropped() -> None:
    pool = BlockPool(3, SIZE, host=3)
    pool.spill = False
    pool.close(filled(pool, A))
    filled(pool, B)
    assert pool.moves() == ()
    pool.check()


def test_what_somebody_wants_back_outlives_what_nobody_does() -> None:
    pool = BlockPool(6, SIZE, host=3)
    pool.spill = False
    claim = pool.close(filled(pool, A), wanted=True)
    pool.close(filled(pool, B))
    other = pool.open((1,))
    assert pool.extend(other, 6 * SIZE)
    assert len(pool.moves()) == 3
    pool.close(other)
    assert len(pool.open((*A, 1))) == 3
    assert len(pool.open((*B, 1))) == 0
    pool.drop(claim)
    pool.check()


def test_memory_is_given_back_as_soon_as_nobody_holds_it() -> None:
    pool = BlockPool(8, SIZE)
    table = filled(pool, A)
    pool.resize(2)
    assert (pool.capacity, pool.excess, pool.available) == (3, 1, 0)
    pool.close(table)
    assert (pool.capacity, pool.available) == (2, 2)
    assert sum(isinstance(move, Release) for move in pool.moves()) == 6
    pool.resize(8)
    assert pool.available == 8
    pool.check()


def test_sizes_that_make_no_sense_are_refused() -> None:
    for wrong in ((0, 4, 0), (4, 0, 0), (4, 4, -1)):
        with pytest.raises(ValueError, match=r"blocks|size|host"):
            BlockPool(*wrong)
    with pytest.raises(ValueError, match="blocks"):
        BlockPool(4, 4).resize(5)
