"""A journal replayed gives the same decisions, from wherever the replay starts."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings

from cotenant.domain import actions as a
from cotenant.domain.errors import JournalError
from cotenant.domain.plan import Plan
from cotenant.sim.replay import replay
from cotenant.telemetry.journal import Journal
from cotenant.telemetry.records import Entry, Gap, Header, PlanRecord, Record, read, segments
from tests.property.test_dispatcher_random import worlds
from tests.replay.histories import Recorded, record, tamper
from tests.replay.regenerate import GOLDEN, entries


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> list[Entry]:
    directory = tmp_path_factory.mktemp("journal")
    record(directory, seed=3)
    return list(read(directory))


def index_of(history: list[Entry], kind: type, nth: int) -> int:
    return [i for i, entry in enumerate(history) if isinstance(entry, kind)][nth]


@given(worlds)
@settings(max_examples=25, deadline=None)
def test_every_history_replays_identically_from_every_segment(world) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        made = record(directory, *world, steps=120, segment_bytes=1500)
        found = segments(directory)
        assert len(found) > 1
        report = replay(read(directory))
        assert report.difference is None
        assert (report.events, report.plans) == (len(made.history), len(made.planned))
        assert (report.segments, report.runs) == (len(found), 1)
        assert report.actions == sum(len(actions) for _, _, actions in made.history)
        for path in found:
            assert replay(read(path)).difference is None


def test_a_tampered_action_is_found(history: list[Entry]) -> None:
    chosen = [i for i, x in enumerate(history) if isinstance(x, Record) and x.actions]
    for index in chosen[:: len(chosen) // 10]:
        original = history[index]
        assert isinstance(original, Record)
        first, *rest = original.actions
        changed = [*history]
        changed[index] = Record(original.now, original.event, (tamper(first), *rest))
        report = replay(changed)
        found = report.difference
        assert found is not None and found.kind == "actions"
        assert (found.now, found.event) == (original.now, repr(original.event))
        assert found.expected != found.got == tuple(map(repr, original.actions))
        assert report.differing == 1, "it goes on from the next header"


def test_an_event_that_was_left_out_is_found(history: list[Entry]) -> None:
    for index, entry in enumerate(history):
        if isinstance(entry, Record) and any(isinstance(x, a.Dispatch) for x in entry.actions):
            assert not replay([*history[:index], *history[index + 1 :]]).identical


def test_a_tampered_plan_is_found(history: list[Entry]) -> None:
    index = next(
        i for i, x in enumerate(history) if isinstance(x, PlanRecord) and x.plan is not None
    )
    original = history[index]
    assert isinstance(original, PlanRecord) and isinstance(original.plan, Plan)
    other = msgspec.structs.replace(original.plan, slice_min=1)
    report = replay([*history[:index], PlanRecord(original.now, original.snapshot, other)])
    assert report.difference is not None and report.difference.kind == "plan"


def test_a_state_that_the_events_do_not_explain_is_found(history: list[Entry]) -> None:
    index = index_of(history, Header, 2)
    header = history[index]
    assert isinstance(header, Header)
    state = header.dispatcher_state()
    state.services["s1"].tail.value += 1
    changed = msgspec.structs.replace(header, dispatcher=msgspec.msgpack.encode(state))
    report = replay([*history[:index], changed])
    assert report.difference is not None and report.difference.kind == "state"
    assert "dispatcher.services['s1'].tail.value" in report.difference.event


def test_services_in_another_order_are_a_difference(history: list[Entry]) -> None:
    """Who comes first is decided by it."""
    index = index_of(history, Header, 2)
    header = history[index]
    assert isinstance(header, Header)
    state = header.dispatcher_state()
    assert len(state.services) > 1
    state.services = dict(reversed(state.services.items()))
    changed = msgspec.structs.replace(header, dispatcher=msgspec.msgpack.encode(state))
    report = replay([*history[:index], changed])
    assert report.difference is not None and report.difference.kind == "state"
    assert report.difference.event == "checkpoint: dispatcher.services"


def test_a_field_that_came_later_is_no_difference(history: list[Entry]) -> None:
    older = []
    for entry in history:
        if isinstance(entry, Header):
            state = msgspec.msgpack.decode(entry.dispatcher)
            for partition in state["partitions"].values():
                assert not partition.pop("at_hand")
            encoded = msgspec.msgpack.encode(state)
            older.append(msgspec.structs.replace(entry, dispatcher=encoded))
        else:
            older.append(entry)
    assert replay(older).identical


def test_behind_a_gap_nothing_is_replayed_until_the_next_header(history: list[Entry]) -> None:
    start, end = index_of(history, Record, 10), index_of(history, Header, 1)
    lost = Gap(5, 1, 2, "the disk did not keep up")
    report = replay([*history[:start], lost, *history[start + 5 :]])
    assert report.identical and report.gaps == [lost]
    assert report.skipped == end - start - 5
    assert report.events + report.plans + report.skipped + report.segments == len(history) - 5


def test_a_torn_segment_is_replayed_as_far_as_it_goes(tmp_path: Path) -> None:
    record(tmp_path, seed=5)
    path = segments(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:-3])
    report = replay(read(tmp_path))
    assert report.identical and len(report.gaps) == 1 and path.name in report.gaps[0].reason


def test_a_restart_of_the_node_begins_a_new_run(tmp_path: Path) -> None:
    events = sum(len(record(tmp_path, seed=seed).history) for seed in (1, 2))
    report = replay(read(tmp_path))
    assert report.identical and (report.runs, report.events) == (2, events)


def test_a_checkpoint_of_another_cotenant_is_an_error(history: list[Entry]) -> None:
    header = history[0]
    assert isinstance(header, Header)
    with pytest.raises(JournalError, match=r"written by Cotenant 9\.9 and does not fit"):
        replay([msgspec.structs.replace(header, cotenant="9.9", dispatcher=b"\xc0")])


def test_a_replay_of_nothing_reports_nothing() -> None:
    report = replay([])
    assert report.identical and report.segments == report.events == 0


def test_the_golden_journal_still_gives_the_same_decisions() -> None:
    report = replay(read(GOLDEN))
    assert report.difference is None, (
        f"the policy decides otherwise than before: {report.difference}; "
        "if that is meant, run: PYTHONPATH=src python -m tests.replay.regenerate"
    )
    assert report.events > 300 and report.plans > 10 and report.segments > 1


def test_regenerating_the_golden_journal_twice_changes_nothing() -> None:
    assert entries() == entries()


def test_the_writer_is_between_two_events_when_it_takes_a_checkpoint(tmp_path: Path) -> None:
    """Every segment's checkpoint equals the state behind the last record before it."""
    made = record(tmp_path, seed=11, segment_bytes=3000)
    assert isinstance(made, Recorded) and isinstance(made.journal, Journal)
    last = 0
    for entry in read(tmp_path):
        if isinstance(entry, Record):
            last = entry.now
        elif isinstance(entry, Header) and last:
            assert entry.dispatcher_state().now == last
