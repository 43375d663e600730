"""Results that are kept: found again, bounded, given back, and gone with the files."""

from __future__ import annotations

from cotenant.domain import events as e
from cotenant.domain.port import TensorOut
from cotenant.runtime.results import ENTRY_BYTES, Results

LIMIT = 4 * (ENTRY_BYTES + 100)


def answer(byte: int, size: int = 100) -> list[TensorOut]:
    return [TensorOut("y", "FP32", (size,), memoryview(bytes([byte]) * size))]


class Desk:
    def __init__(self) -> None:
        self.told: list[int] = []
        self.results = Results(self.feed)

    def feed(self, event: e.Event) -> None:
        assert isinstance(event, e.Held)
        assert event.holder == "s/results"
        assert event.held == event.evictable
        self.told.append(event.held)

    def keep(self, asked: bytes, byte: int = 1, size: int = 100) -> None:
        self.results.keep("s", self.results.key("s", LIMIT, [asked]), answer(byte, size))

    def find(self, *asked: bytes) -> bytes | None:
        found = self.results.find("s", self.results.key("s", LIMIT, asked))
        return found[0].data if found is not None else None


def test_the_same_request_finds_its_result_and_no_other_does() -> None:
    desk = Desk()
    desk.keep(b"a", 7)
    assert desk.find(b"a") == bytes([7]) * 100
    assert desk.find(b"b") is None
    assert desk.find(b"", b"a") is None, "where one part ends counts"
    assert desk.results.counts() == {"s": (3, 1, ENTRY_BYTES + 100)}


def test_what_was_not_asked_for_longest_goes_first() -> None:
    desk = Desk()
    for name in (b"a", b"b", b"c", b"d"):
        desk.keep(name)
    desk.find(b"a")
    desk.keep(b"e")
    assert desk.find(b"b") is None
    assert desk.find(b"a") and desk.find(b"e")
    assert max(desk.told) <= LIMIT


def test_a_result_that_is_larger_than_all_that_may_be_kept_is_not() -> None:
    desk = Desk()
    desk.keep(b"a", size=LIMIT)
    assert desk.find(b"a") is None


def test_what_is_to_be_given_is_given_at_once_and_told() -> None:
    desk = Desk()
    for name in (b"a", b"b", b"c"):
        desk.keep(name)
    desk.results.resize("s/results", ENTRY_BYTES + 100)
    assert desk.told[-1] == ENTRY_BYTES + 100
    desk.keep(b"d")
    assert desk.find(b"c") is None and desk.find(b"d")
    desk.results.resize("s/results", -1)
    desk.keep(b"e")
    assert desk.find(b"d") and desk.find(b"e")
    desk.results.resize("another/results", 0)
    desk.results.resize("s", 0)
    assert desk.find(b"e"), "that was meant for others"


def test_other_files_give_other_results() -> None:
    desk = Desk()
    desk.keep(b"a", 1)
    late = desk.results.key("s", LIMIT, [b"b"])
    desk.results.forget("s")
    assert desk.told[-1] == 0
    assert desk.find(b"a") is None
    desk.results.keep("s", late, answer(1))
    assert desk.find(b"b") is None, "computed with the files before"
