"""When a job's memory is looked at exactly, and what then counts."""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Iterator

import pytest

from cotenant.devices import proctree
from cotenant.runtime.jobmemory import MemoryLimit

LIMIT = 1000


class Memory:
    """A tree that occupies what a test says; exact looks are counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.resident = self.occupied = self.exact_looks = 0
        monkeypatch.setattr(proctree, "resident_bytes", lambda _: self.resident)
        monkeypatch.setattr(proctree, "proportional_bytes", self._exact)
        self.limit = MemoryLimit(LIMIT, lambda: [1])

    def _exact(self, _: list[int]) -> int:
        self.exact_looks += 1
        return self.occupied

    def look(self, resident: int, occupied: int) -> int:
        self.resident, self.occupied = resident, occupied
        return self.limit.look()


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    return Memory(monkeypatch)


def test_within_the_limit_nothing_is_looked_at_exactly(memory: Memory) -> None:
    assert memory.look(LIMIT, LIMIT) == 0
    assert memory.exact_looks == 0


def test_what_is_shared_counts_once(memory: Memory) -> None:
    for _ in range(5):
        assert memory.look(9 * LIMIT, LIMIT) == 0
    assert memory.exact_looks >= 1


def test_too_much_is_told_at_the_second_look(memory: Memory) -> None:
    assert memory.look(9 * LIMIT, LIMIT + 1) == 0
    assert memory.look(9 * LIMIT, LIMIT + 2) == LIMIT + 2


def test_a_look_that_processes_ended_under_does_not_convict(memory: Memory) -> None:
    for _ in range(5):
        assert memory.look(9 * LIMIT, 3 * LIMIT) == 0
        assert memory.look(9 * LIMIT, LIMIT) == 0
        assert memory.look(99 * LIMIT, LIMIT) == 0


def test_growth_beyond_what_was_left_is_looked_at_at_once(memory: Memory) -> None:
    assert memory.look(9 * LIMIT, LIMIT - 100) == 0
    memory.limit._exact_due = float("inf")
    looks = memory.exact_looks
    assert memory.look(9 * LIMIT + 100, 2 * LIMIT) == 0
    assert memory.exact_looks == looks
    assert memory.look(9 * LIMIT + 101, LIMIT + 1) == 0
    assert memory.look(9 * LIMIT + 101, LIMIT + 1) == LIMIT + 1


@pytest.fixture
def readers() -> Iterator[list[int]]:
    """This process's children: they share what it holds, and write nothing."""
    size = 64 << 20
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held.write(b"x" * size)
        pids = []
        for _ in range(4):
            pid = os.fork()
            if pid == 0:
                signal.pause()
                os._exit(0)
            pids.append(pid)
        yield pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_forked_readers_occupy_once_what_they_share(readers: list[int]) -> None:
    shared = 64 << 20
    tree = [os.getpid(), *readers]
    assert proctree.resident_bytes(readers) > 4 * shared
    before = proctree.proportional_bytes([os.getpid()])
    # The tests' own process is part of what they share, however large it is by now.
    own = proctree.proportional_bytes(readers[:1])
    assert shared / 8 < own < proctree.resident_bytes(readers[:1]) / 2
    assert proctree.proportional_bytes(tree) < 2 * shared + 5 * before
    assert proctree.proportional_bytes(tree) < proctree.resident_bytes(tree) - 3 * shared


def test_a_process_that_is_gone_occupies_nothing() -> None:
    assert proctree.proportional_bytes([2**22 + 1]) == 0
