"""Jobs that are to give memory: asked first, then taken from, and told about when it matters."""

from __future__ import annotations

from typing import Any

import pytest

from cotenant.domain import events as e
from cotenant.runtime import jobgiving
from cotenant.runtime.jobgiving import LEAST, JobGiving
from tests.builders import cpu

MIB = 2**20


class Desk:
    """A fleet of one device, a clock that is set by hand, and what was fed and asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, evicts: bool = True) -> None:
        self.specs = (cpu(2, evicts=evicts),)
        self.held: dict[str, int] = {}
        self.away_bytes = 0
        self.could_take: int | None = None
        """None: all that it has."""
        self.fed: list[e.Held] = []
        self.asked: list[tuple[str, int]] = []
        self.taken: list[int] = []
        self.now = 0.0
        monkeypatch.setattr(jobgiving.time, "monotonic", lambda: self.now)
        fleet: Any = self
        self.giving = JobGiving(fleet, self.feed, self.ask)

    def memory(self, _: str) -> dict[str, int]:
        return self.held

    def evictable(self, _: str) -> dict[str, int]:
        if not self.specs[0].evicts:
            return {}
        return {j: n if self.could_take is None else self.could_take for j, n in self.held.items()}

    def away(self, _: str) -> dict[str, int]:
        return {"j": self.away_bytes}

    def evict(self, device: str, job: str, size: int) -> None:
        self.taken.append(size)

    def feed(self, event: e.Event) -> None:
        assert isinstance(event, e.Held)
        self.fed.append(event)

    def ask(self, job: str, most: int) -> bool:
        self.asked.append((job, most))
        return True

    def look(self, held: int, asked: bool = False) -> list[e.Held]:
        self.fed.clear()
        self.held["j"] = held
        self.giving.look("j", ("cpu",), asked)
        return list(self.fed)


def test_what_was_taken_from_a_job_is_wanted_back(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    desk.look(64 << 20)
    desk.away_bytes = 48 << 20
    (held,) = desk.look(16 << 20)
    assert (held.held, held.wanted) == (16 << 20, 64 << 20)


def test_what_a_job_has_is_told_when_it_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    desk.giving.look("j", ("cpu",), False)
    assert not desk.fed, "nobody has looked at it yet"
    assert desk.look(100 * MIB) == [e.Held("j", 100 * MIB, 100 * MIB, 100 * MIB, 0)]
    assert not desk.look(100 * MIB + LEAST // 2)
    assert desk.look(130 * MIB)


def test_what_it_can_be_made_to_give_depends_on_it_and_its_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch, evicts=False)
    assert desk.look(10 * MIB)[0].evictable == 0
    assert desk.look(10 * MIB, asked=True)[0].evictable == 10 * MIB


def test_what_a_device_cannot_take_from_it_is_not_what_it_could_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    desk.could_take = 30 * MIB
    assert desk.look(100 * MIB) == [e.Held("j", 100 * MIB, 100 * MIB, 30 * MIB, 0)]
    assert not desk.look(100 * MIB)
    desk.could_take = 20 * MIB
    assert desk.look(100 * MIB)[0].evictable == 20 * MIB
    assert desk.look(100 * MIB, asked=True)[0].evictable == 100 * MIB


def test_no_more_is_taken_than_can_be_and_nothing_where_nothing_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch)
    desk.giving.order("j", 60 * MIB)
    for could, taken in ((30 * MIB, [30 * MIB]), (0, []), (50 * MIB, [40 * MIB])):
        desk.now += 2 * jobgiving.ASKED_S
        desk.taken.clear()
        desk.could_take = could
        desk.look(100 * MIB)
        assert desk.taken == taken


def test_it_is_asked_first_and_taken_from_a_while_later(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    desk.look(100 * MIB)
    desk.giving.order("j", 60 * MIB)
    assert desk.asked == [("j", 60 * MIB)]
    desk.look(100 * MIB)
    assert not desk.taken, "it has a while"
    desk.now += 2 * jobgiving.ASKED_S
    desk.look(80 * MIB)
    assert desk.taken == [20 * MIB]
    assert desk.look(60 * MIB), "that it is done is told, however little changed"
    desk.giving.order("j", -1)
    desk.now += 2 * jobgiving.ASKED_S
    desk.look(100 * MIB)
    assert desk.taken == [20 * MIB]


def test_a_program_that_comes_late_hears_of_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch, evicts=False)
    desk.giving.order("j", 60 * MIB)
    desk.giving.listens("j")
    desk.giving.listens("another")
    assert desk.asked == [("j", 60 * MIB)] * 2
    desk.giving.gone("j")
    desk.giving.listens("j")
    assert len(desk.asked) == 2
