"""Answers for people: each says what happened, why, when, and with which numbers."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import PreemptLevel
from cotenant.domain.plan import Plan
from cotenant.domain.snapshot import Snapshot
from cotenant.domain.units import MS, S
from cotenant.policy.planner import Planner
from cotenant.telemetry.explain import Explanation, ago, explain, layout, moment
from cotenant.telemetry.journal import checkpoint
from cotenant.telemetry.records import Entry, Gap, PlanRecord, Record
from tests.builders import World, cpu, plan

EPOCH = 1_700_000_000.0
"""Wall time at monotonic zero in these tests."""


class Told(World):
    """A world whose history can be explained."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.entries: list[Entry] = []
        self.header()

    def header(self) -> None:
        header = checkpoint(self.d, Planner(), self.now, EPOCH + self.now / S)
        self.entries.append(header)

    def send(self, event: e.Event, after: int = 0) -> list[a.Action]:
        actions = super().send(event, after)
        self.entries.append(Record(self.now, event, tuple(actions)))
        return actions

    def worker(self, *args: Any, **kwargs: Any) -> Told:
        super().worker(*args, **kwargs)
        self.entries.clear()
        self.header()
        return self

    def told(self, last: int = 10) -> Explanation:
        return explain(self.entries, EPOCH + self.now / S + 12, last)


def serving(**kwargs: Any) -> Told:
    world = Told(**kwargs)
    world.service()
    world.worker()
    world.planned({"s": (0,)})
    return world


def dispatch(actions: list[a.Action]) -> a.Dispatch:
    return next(x for x in actions if isinstance(x, a.Dispatch))


def test_plans_tell_reasons_and_both_layouts_newest_kept() -> None:
    world = Told()
    before, after = plan({"s": (0,)}), plan({"s": (0,)}, {"j": (1,)}, version=2, reasons=("job j",))
    for version in range(5):
        chosen = Plan(version, after.partitions, after.services, after.jobs, (), reasons=("why",))
        snapshot = Snapshot(version * S, (cpu(2),), before, (), ())
        world.entries.append(PlanRecord(version * S, snapshot, chosen))
        world.entries.append(PlanRecord(version * S, snapshot, None))
    told = world.told(last=2)
    assert [(p.version, p.reasons, p.wall) for p in told.plans] == [
        (3, ("why",), EPOCH + 3),
        (4, ("why",), EPOCH + 4),
    ]
    assert told.plans[0].before == "p0 (1 unit) for s, lent when idle"
    assert told.plans[0].after == "p0 (1 unit) for s; p1 (1 unit) for job j"


def test_an_overload_is_worked_out_with_what_was_ahead() -> None:
    world = serving()
    world.arrive(slo=20 * MS)
    for _ in range(200):
        world.arrive(slo=20 * MS, after=10_000)
    (group,) = world.told().refusals
    assert (group.service, group.reason) == ("s", "OVERLOADED")
    rejected = [x for r in world.entries if isinstance(r, Record) for x in r.actions]
    assert group.count == sum(isinstance(x, a.Reject) for x in rejected) > 10
    assert group.share == pytest.approx(group.count / 201)
    assert group.per_s == pytest.approx(group.count / 2e-3, rel=0.1)
    assert "batch 1 of s had p0" in group.example
    assert "told to retry after" in group.example


def test_a_deadline_too_short_is_set_against_the_execution_time() -> None:
    world = serving()
    world.arrive(timeout=1 * MS, rows=8)
    (group,) = world.told().refusals
    assert "came with 1ms to its deadline, but 8 rows alone would take" in group.example


def test_other_refusals_name_their_cause() -> None:
    world = Told()
    world.service(max_queue=1)
    world.arrive()
    world.worker()
    world.planned({"s": (0,)})
    batch = dispatch(world.arrive()).batch.id
    world.arrive()
    world.arrive()
    world.send(e.BatchFailed(batch, "shape (3,) is not (4,)"))
    world.send(e.WorkerDown("w0", "killed by signal 9"))
    told = world.told()
    examples = {g.reason: g.example for g in told.refusals}
    assert "1 requests were queued already" in examples["QUEUE_FULL"]
    assert "(shape (3,) is not (4,))" in examples["FAILED"]
    assert "since w0 had gone after it waited" in examples["UNAVAILABLE"]


def test_a_lost_worker_is_told_with_what_became_of_its_requests() -> None:
    world = serving()
    world.worker("w1")
    world.arrive()
    world.send(e.WorkerDown("w0", "exit code 3"), after=5 * MS)
    (lost,) = world.told().workers
    assert lost.subject == "w0"
    assert lost.text == (
        "instance of s version 1 lost: exit code 3; of its 1 requests 1 went back to the queue, "
        "0 refused"
    )


def test_a_worker_that_was_told_to_go_is_no_loss() -> None:
    world = serving()
    world.send(e.VersionGone("s", "1"))
    world.send(e.WorkerDown("w0"))
    assert world.told().workers == []


def test_jobs_that_would_not_yield_and_their_end_are_told() -> None:
    world = serving()
    world.job()
    world.send(e.Woke(), after=1 * S)
    world.send(e.Granted("j", "p0"))
    assert any(isinstance(x, a.Revoke) for x in world.arrive())
    world.send(e.ActionFailed("Revoke", "p0", "j", "no answer in 1 s"))
    world.send(e.JobExited("j"))
    told = world.told().jobs
    assert [incident.subject for incident in told] == ["j"] * 3
    assert all("no answer in 1 s" in incident.text for incident in told[:2])


def test_a_device_that_takes_jobs_off_no_more_is_told_with_the_reason() -> None:
    world = Told(level=PreemptLevel.GATE)
    spec = world.d.devices[0]
    none = msgspec.structs.replace(spec, preempt=PreemptLevel.NONE, limits=("it let a call in",))
    world.send(e.DeviceChanged(none))
    world.send(e.DeviceChanged(msgspec.structs.replace(none, repartition_ns=7)))
    (fell,) = world.told().devices
    assert fell.subject == "cpu"
    assert all(word in fell.text for word in ("GATE", "NONE", "it let a call in"))


def test_a_layout_that_failed_is_told() -> None:
    world = Told()
    world.send(e.Planned(plan({"s": (0,)}, version=7)))
    world.send(e.ActionFailed("Repartition", "cpu", "", "busy"))
    (failed,) = world.told().layouts
    assert "cpu" in failed.text and "busy" in failed.text


def test_a_request_that_was_at_hand_waited_for_the_one_before_it() -> None:
    world = Told()
    world.service(max_batch=1)
    world.worker(exec_ns=1 * MS)
    world.planned({"s": (0,)})
    world.arrive()
    assert dispatch(world.arrive()).after == 1
    world.send(e.BatchDone(1, 3 * MS), after=3 * MS)
    world.header()  # a segment begins, which knows only when the second was begun
    world.send(e.BatchDone(2, 2 * MS, 3 * MS), after=2 * MS)
    said = "waited 0ns, 3ms to start on p0 after the batch before it, executed 2ms alone; in time"
    for entries in (world.entries, world.entries[-2:]):
        world.entries = entries
        assert [s.text for s in world.told().slowest if s.request == 2] == [said]


def test_the_slowest_requests_come_first_with_where_the_time_went() -> None:
    world = serving()
    for exec_ms in (3, 90, 5, 40):
        batch = dispatch(world.arrive()).batch.id
        world.send(e.BatchDone(batch, exec_ms * MS, 200_000), after=exec_ms * MS + 300_000)
    slowest = world.told(last=2).slowest
    assert [round(s.total_ms) for s in slowest] == [90, 40]
    assert slowest[0].request == 2
    assert slowest[0].text == (
        "waited 0ns, 200us to start on p0, executed 90ms alone; 40.3ms too late"
    )
    assert slowest[1].text.endswith("; in time")


def test_pauses_of_lending_have_a_length_and_a_reason() -> None:
    world = serving()
    for took in [80] * 40 + [2] * 500:
        batch = dispatch(world.arrive(slo=1 * S, after=20 * MS)).batch.id
        world.send(e.BatchDone(batch, took * MS), after=took * MS)
    (pause,) = world.told().pauses
    assert (pause.partition, pause.services) == ("p0", ("s",))
    assert " of s " in pause.text
    assert pause.seconds is not None and pause.seconds > 0


def test_a_pause_because_of_late_answers_names_the_percentile() -> None:
    world = serving()
    for _ in range(40):
        batch = dispatch(world.arrive(slo=1 * S)).batch.id
        world.send(e.BatchDone(batch, 80 * MS), after=80 * MS)
    (pause,) = world.told().pauses
    assert "p95 of s came to 5" in pause.text and pause.text.endswith("against 50ms")
    assert pause.seconds is None, "it lasts"


def test_a_journal_that_starts_in_the_middle_knows_what_was_queued() -> None:
    world = serving()
    batch = dispatch(world.arrive()).batch.id
    world.entries.clear()
    world.header()
    world.send(e.BatchDone(batch, 4 * MS), after=5 * MS)
    told = world.told()
    assert told.answered == 1 and told.arrived == 0
    assert [s.request for s in told.slowest] == [1]


def test_records_left_out_before_a_header_do_no_harm() -> None:
    world = serving()
    world.entries[1:] = []  # an old segment of which only the plans were read
    batch = dispatch(world.arrive(slo=20 * MS)).batch.id
    world.entries.pop()
    world.header()
    for _ in range(30):
        world.arrive(slo=20 * MS)
    world.send(e.BatchDone(batch, 2 * MS), after=2 * MS)
    told = world.told()
    assert (told.arrived, told.answered) == (30, 1)
    assert "batch 1 of s had p0" in told.refusals[0].example


def test_gaps_are_told_and_records_behind_them_still_counted() -> None:
    world = serving()
    world.entries.append(Gap(40, 1, 2, "the disk did not keep up"))
    world.arrive(timeout=1, rows=8)
    told = world.told()
    assert told.gaps == ["40 records were lost: the disk did not keep up"]
    assert told.refusals[0].count == 1


def test_nothing_is_explained_by_nothing() -> None:
    told = explain([], asked=EPOCH)
    assert (told.arrived, told.plans, told.refusals, told.until) == (0, [], [], 0.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0.0 s ago"),
        (0.42, "0.4 s ago"),
        (12.3, "12 s ago"),
        (130, "2 min ago"),
        (7200, "2.0 h ago"),
        (300_000, "3 days ago"),
    ],
)
def test_how_long_ago(seconds: float, text: str) -> None:
    assert ago(seconds) == text


def test_moments_have_a_date_only_if_it_is_another_day() -> None:
    assert moment(EPOCH - 86400 * 3, EPOCH).startswith("2023-11-1")
    assert moment(EPOCH - 0.5, EPOCH).endswith("(0.5 s ago)")
    assert moment(EPOCH, EPOCH).count(":") == 2


def test_a_layout_without_partitions_says_so() -> None:
    assert layout(plan({})) == "no partitions"
