"""Tensor memory: blocks never overlap, and all of it comes back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.runtime.arena import SMALLEST, Arena, ArenaFull, map_arena


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena("test", 2**20)
    yield made
    made.close()


@given(
    st.lists(st.one_of(st.integers(0, 2**18), st.tuples(st.integers(0, 50))), max_size=80),
)
def test_blocks_never_overlap_and_all_merges_back(steps: list[int | tuple[int]]) -> None:
    """A number allocates as many bytes; a tuple frees one of the blocks that are taken."""
    arena = Arena("test", 2**20)
    taken: dict[int, int] = {}
    for step in steps:
        if isinstance(step, tuple):
            if taken:
                chosen = sorted(taken)[step[0] % len(taken)]
                del taken[chosen]
                arena.free(chosen)
            continue
        try:
            offset = arena.alloc(step)
        except ArenaFull:
            continue
        assert offset % SMALLEST == 0
        assert offset >= 0 and offset + step <= arena.size
        for other, size in taken.items():
            assert offset + max(1, step) <= other or other + max(1, size) <= offset
        taken[offset] = step
        assert arena.used >= sum(taken.values())
    for offset in taken:
        arena.free(offset)
    assert arena.used == 0
    assert arena.alloc(arena.size) == 0, "it did not merge back into one"
    arena.close()


def test_the_size_is_rounded_up_to_a_power_of_two() -> None:
    for asked in (1, 4096, 5000, 2**20 - 1, 2**20):
        arena = Arena("test", asked)
        assert arena.size >= asked
        assert arena.size & (arena.size - 1) == 0
        arena.close()


def test_more_than_is_free_is_refused(arena: Arena) -> None:
    arena.alloc(arena.size // 2 + 1)
    with pytest.raises(ArenaFull, match="bytes free"):
        arena.alloc(1)


def test_a_block_is_given_back_once(arena: Arena) -> None:
    offset = arena.alloc(10)
    arena.free(offset)
    with pytest.raises(KeyError):
        arena.free(offset)


def test_the_other_side_sees_what_was_written(arena: Arena) -> None:
    offset = arena.alloc(5)
    arena.memory[offset : offset + 5] = b"hello"
    other = map_arena(os.dup(arena.fd))
    assert bytes(other[offset : offset + 5]) == b"hello"
    assert len(other) == arena.size


def test_it_has_no_name_that_could_be_left_behind(arena: Arena) -> None:
    assert "memfd:cotenant-test (deleted)" in str(Path(f"/proc/self/fd/{arena.fd}").readlink())
