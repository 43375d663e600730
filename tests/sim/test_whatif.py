"""The last minutes of a journal told again: in the process that asks, and in one of its own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cotenant.cli.studies import JournalStudies
from cotenant.cli.whatif import compare
from cotenant.domain.errors import JournalError
from cotenant.domain.units import S
from cotenant.serving.web.studies import StudyFailed
from cotenant.telemetry.records import Gap, PlanRecord, Record
from tests.sim.test_recorded import JOB, Journaled, arrivals, write
from tests.sim.test_world import scenario


@pytest.fixture(scope="module")
def run() -> Journaled:
    return Journaled(scenario(units=4, rate=40, jobs=JOB, seconds=60))


@pytest.fixture
def journal(run: Journaled, tmp_path: Path) -> Path:
    return write(run.entries, tmp_path / "journal")


def test_the_last_seconds_are_told_as_they_were_and_under_two_policies(
    run: Journaled, journal: Path
) -> None:
    told = compare(journal, "temporal", 30, patience_s=30)
    assert told.seconds == pytest.approx(30, abs=1)
    until = max(entry.now for entry in run.entries if isinstance(entry, PlanRecord))
    asked = [at for at in arrivals(run) if until - 30 * S <= at < until]
    measured, ours, other = told.told
    for one in (measured, ours, other):
        (figures,) = one.services.values()
        assert figures.requests == len(asked)
        assert 0 <= figures.in_time <= 1
        assert one.jobs["j"] > 0
    assert ours.jobs["j"] == pytest.approx(measured.jobs["j"], rel=0.3)
    assert "temporal" in other.what


def test_settings_are_tried_while_there_is_patience(journal: Path) -> None:
    (note,) = compare(journal, "static", 10, patience_s=0).notes
    assert note.startswith("1 of ")


def test_a_service_that_did_nothing_is_left_out(run: Journaled, tmp_path: Path) -> None:
    idle = [e for e in run.entries if not isinstance(e, Record) or e.now < 20 * S]
    with pytest.raises(JournalError):
        compare(write(idle, tmp_path / "idle"), "temporal", 10, patience_s=0)


@pytest.mark.parametrize("entries", [[], [Gap(1, 0, 0, "lost")]])
def test_a_journal_that_tells_nothing_is_refused(entries: list[Gap], tmp_path: Path) -> None:
    with pytest.raises(JournalError):
        compare(write(list(entries), tmp_path / "journal"), "temporal", 10, patience_s=0)
    with pytest.raises(JournalError):
        compare(tmp_path / "nowhere", "temporal", 10, patience_s=0)


def test_a_process_of_its_own_says_the_same(journal: Path) -> None:
    async def scenario() -> None:
        studies = JournalStudies(journal)
        told, explained = await asyncio.gather(studies.compare("temporal", 10), studies.explain(5))
        assert told.policy == "temporal" and len(told.told) == 3
        assert explained.arrived > 0 and len(explained.plans) <= 5

    asyncio.run(scenario())


def test_why_a_study_failed_is_said(tmp_path: Path, journal: Path) -> None:
    async def scenario() -> None:
        for studies in (JournalStudies(None), JournalStudies(tmp_path / "nowhere")):
            with pytest.raises(StudyFailed):
                await studies.explain(5)
        with pytest.raises(StudyFailed):
            await JournalStudies(journal).compare("no such policy", 10)

    asyncio.run(scenario())


def test_one_study_of_a_kind_runs_at_a_time_and_ends_with_the_node(journal: Path) -> None:
    async def scenario() -> None:
        studies = JournalStudies(journal)
        first = asyncio.create_task(studies.explain(5))
        await asyncio.sleep(0)
        with pytest.raises(StudyFailed):
            await studies.explain(5)
        while not studies.running:
            await asyncio.sleep(0.01)
        studies.close()
        with pytest.raises(StudyFailed):
            await first
        assert not studies.running

    asyncio.run(scenario())
