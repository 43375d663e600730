"""What the monitor learns from events and actions."""

from __future__ import annotations

import pytest

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.request import Refusal, Request
from cotenant.domain.units import MS, S
from cotenant.telemetry.meters import RECENT_NS, Recent
from cotenant.telemetry.monitor import Monitor
from tests.builders import World


class Watched(World):
    """A world whose every step a monitor sees."""

    def __init__(self, units: int = 2) -> None:
        super().__init__(units=units)
        self.monitor = Monitor()

    def send(self, event: e.Event, after: int = 0) -> list[a.Action]:
        actions = super().send(event, after)
        self.monitor.observe(self.now, event, actions)
        return actions

    def serve(self, took: int = 2 * MS, **request: int) -> None:
        """One request from arrival to answer."""
        for action in self.arrive(**request):
            if isinstance(action, a.Dispatch):
                self.send(e.BatchDone(action.batch.id, took), after=took)


def ready() -> Watched:
    world = Watched()
    world.service().worker()
    world.planned({"s": (0,)})
    return world


def test_answers_are_counted_with_their_latency() -> None:
    world = ready()
    for _ in range(10):
        world.serve(took=2 * MS)
    meter = world.monitor.service("s")
    assert (meter.arrived, meter.answered, meter.misses) == (10, 10, 0)
    assert meter.latency_ns == 10 * 2 * MS
    assert meter.exec_ns == 10 * 2 * MS
    assert sum(meter.latency.counts) == 10


def test_an_answer_after_its_deadline_is_a_miss() -> None:
    world = ready()
    world.serve(took=80 * MS, slo=50 * MS)
    assert world.monitor.service("s").misses == 1


def test_refusals_are_counted_by_reason() -> None:
    world = ready()
    world.serve(timeout=1)
    meter = world.monitor.service("s")
    assert meter.refused[Refusal.DEADLINE.name] == 1
    assert meter.answered == 0


def test_who_is_turned_away_before_the_dispatcher_counts_as_refused() -> None:
    world = ready()
    world.monitor.turned_away("s", Refusal.MEMORY)
    meter = world.monitor.service("s")
    assert (meter.arrived, dict(meter.refused)) == (1, {"MEMORY": 1})


def test_the_time_in_the_queue_counts_from_the_arrival() -> None:
    world = ready()
    batch = world.arrive()[0].batch.id
    world.arrive()
    world.send(e.BatchDone(batch, 3 * MS), after=3 * MS)
    assert world.monitor.service("s").queue_ns == 3 * MS


def test_a_batch_at_hand_is_under_way_from_the_end_of_the_one_before() -> None:
    world = Watched()
    world.service(max_batch=1).worker(exec_ns=1 * MS)
    world.planned({"s": (0,)})
    world.arrive()
    assert isinstance(world.arrive()[0], a.Dispatch)
    meter = world.monitor.service("s")
    assert (meter.batches, meter.queue_ns) == (1, 0)
    world.send(e.BatchDone(1, 1 * MS), after=3 * MS)
    assert (meter.batches, meter.queue_ns) == (2, 3 * MS)
    world.send(e.BatchDone(2, 1 * MS), after=2 * MS)
    assert world.monitor.partition("p0").busy == {"service:s": 5 * MS}
    assert not world.monitor.partition("p0").holder


def test_what_a_lost_worker_had_at_hand_is_not_under_way() -> None:
    world = Watched()
    world.service(max_batch=1).worker(exec_ns=1 * MS)
    world.planned({"s": (0,)})
    world.arrive()
    world.arrive()
    world.send(e.WorkerDown("w0"), after=MS)
    assert world.monitor.service("s").batches == 1
    assert not world.monitor.partition("p0").holder


def test_time_of_a_partition_is_booked_to_who_holds_it() -> None:
    world = ready()
    world.job("j")
    world.send(e.Granted("j", "p0"))
    world.now += 10 * MS
    for action in world.arrive():
        if isinstance(action, a.Revoke):
            world.send(e.Revoked("j", "p0", 5_000))
    world.send(e.BatchDone(1, 2 * MS), after=2 * MS)
    meter = world.monitor.partition("p0")
    assert meter.busy == {"job:j": 10 * MS, "service:s": 2 * MS}
    assert sum(meter.revoke.counts) == 1
    assert world.monitor.held_ns("j", world.now) == 10 * MS
    assert world.monitor.job("j").pauses == 1


def test_a_grant_that_failed_is_not_booked() -> None:
    world = ready()
    world.job("j")
    world.send(e.ActionFailed("Grant", "p0", "j", "gone"), after=MS)
    held = world.monitor.held_ns("j", world.now)
    assert world.monitor.held_ns("j", world.now + 3600 * S) == held
    assert not world.monitor.partition("p0").holder


def test_a_job_that_ends_is_booked_until_then() -> None:
    world = ready()
    world.job("j")
    world.send(e.Granted("j", "p0"))
    world.send(e.JobExited("j"), after=7 * MS)
    assert world.monitor.held_ns("j", world.now + S) == 7 * MS


def test_a_lost_worker_frees_its_partition() -> None:
    world = ready()
    world.arrive()
    world.send(e.WorkerDown("w0"), after=MS)
    assert world.monitor.partition("p0").holder == ""
    assert world.monitor.service("s").refused[Refusal.UNAVAILABLE.name] == 1


def test_the_rate_is_of_arrivals_per_second() -> None:
    world = ready()
    world.monitor.tick(world.now)
    for _ in range(30):
        for _ in range(20):
            world.serve(took=2 * MS)
        world.now += 460 * MS
        world.monitor.tick(world.now)
    assert world.monitor.service("s").rate.level == pytest.approx(40.0, rel=0.05)


def test_a_tick_without_time_changes_nothing() -> None:
    world = ready()
    world.serve()
    world.monitor.tick(world.now)
    level = world.monitor.service("s").rate.level
    world.monitor.tick(world.now)
    world.monitor.tick(world.now - S)
    assert world.monitor.service("s").rate.level == level


def test_quantiles_are_of_what_is_recent() -> None:
    recent = Recent()
    assert recent.quantiles(0, 0.5) == [None]
    for n in range(100):
        recent.add(0, n)
    assert recent.quantiles(0, 0.0, 0.5, 0.99, 1.0) == [0, 50, 99, 99]
    recent.add(RECENT_NS, 7)
    assert recent.quantiles(RECENT_NS + 1, 0.5) == [7]


def test_late_news_of_what_is_over_is_ignored() -> None:
    monitor = Monitor()
    monitor.observe(S, e.BatchDone(9, MS), [])
    monitor.observe(S, e.Revoked("j", "p0", MS), [])
    monitor.observe(S, e.JobExited("j"), [])
    assert monitor.job("j").held_ns == 0


def test_nothing_is_kept_of_answered_requests() -> None:
    world = ready()
    for _ in range(50):
        world.serve()
    assert not world.monitor._open
    assert not world.monitor._running


def test_a_request_that_the_dispatcher_has_not_seen_is_no_refusal() -> None:
    monitor = Monitor()
    monitor.observe(S, e.Draining(), [a.Reject("x", 5, Refusal.SHUTTING_DOWN)])
    assert not monitor.services
    monitor.observe(S, e.Arrived(Request(1, "s", S, 2 * S)), [])
    assert monitor.service("s").arrived == 1


def test_a_request_that_failed_alone_in_its_batch_is_no_answer() -> None:
    world = ready()
    first = world.arrive()[0].batch.id
    assert world.arrive(more=True) == []
    assert world.arrive() == []
    second = world.send(e.BatchDone(first, MS), after=MS)[-1].batch
    world.send(e.BatchDone(second.id, MS, failed=second.requests[:1]), after=MS)
    meter = world.monitor.service("s")
    assert (meter.arrived, meter.answered, meter.failed) == (3, 2, 1)
    assert meter.refused[Refusal.FAILED.name] == 1
    assert not world.monitor._open


def test_the_rate_counts_rows_and_the_machines_uptime_does_not() -> None:
    monitor, uptime = Monitor(), 10 * 86_400 * S
    for i in range(10):
        request = Request(i + 1, "s", uptime, uptime + S, rows=8)
        monitor.observe(uptime + i * S // 10, e.Arrived(request), [])
    monitor.observe(uptime, e.JobReady("j"), [])
    monitor.job("j")
    monitor.tick(uptime + S)
    assert monitor.service("s").rate.level == pytest.approx(80.0)
    monitor.observe(uptime + S, e.Woke(), [a.Grant("", "j", "p", S)])
    monitor.tick(uptime + 2 * S)
    assert monitor.job("j").shares() == {0: 0.5, 1: 0.5}


def test_meters_of_jobs_that_are_no_more_are_dropped() -> None:
    monitor = Monitor()
    for name in "abc":
        monitor.job(name)
    monitor.forget_jobs({"b"})
    assert list(monitor.jobs) == ["b"]


def test_each_piece_of_an_answer_is_to_come_within_the_objective() -> None:
    for last, misses in ((40, 0), (80, 1)):
        world, monitor = World(units=1), Monitor()
        world.service(objective=50 * MS).worker()
        world.planned({"s": (0,)})

        def see(event: e.Event, after: int = 0, world=world, monitor=monitor) -> None:
            actions = world.send(event, after)
            monitor.observe(world.now, event, actions)

        see(e.Arrived(Request(1, "s", world.now, world.now + 50 * MS)))
        for batch in (1, 2, 3):
            done = e.BatchDone(batch, MS, unfinished=(1,), emitted=(1,), said=((1, 1),))
            see(done, after=40 * MS)
        see(e.BatchDone(4, MS, said=((1, 1),)), after=last * MS)
        assert (monitor.service("s").answered, monitor.service("s").misses) == (1, misses)


def test_it_is_kept_for_a_minute_who_held_what() -> None:
    world = ready()
    world.monitor.tick(world.now)
    for _ in range(70):
        start = world.now
        world.serve(took=100 * MS)
        world.now = start + S
        world.monitor.tick(world.now)
    past = world.monitor.past
    assert past[-1].end - past[0].end < 60 * S
    assert all(span.window == S for span in past)
    (held,) = past[-1].held.values()
    assert held == {"service:s": pytest.approx(0.1, rel=0.2)}
