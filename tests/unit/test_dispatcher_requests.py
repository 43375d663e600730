"""Laws of the dispatcher about requests: order, batches, refusals, and what is lost."""

from __future__ import annotations

import pytest

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import Partition, PreemptLevel
from cotenant.domain.plan import Plan
from cotenant.domain.request import Refusal, Request
from cotenant.domain.units import MS, US, S
from cotenant.policy.estimate import size_class
from cotenant.policy.queues import AGEING
from tests.builders import World, load, one, only


def ready(level: PreemptLevel = PreemptLevel.PRIORITY, exec_ns: int = 2 * MS, **kw: int) -> World:
    """One service with one warm instance on one core."""
    world = World(level).service(**kw).worker(exec_ns=exec_ns)
    world.planned({"s": (0,)})
    return world


def predicted(world: World, rows: int = 1) -> int:
    return world.d.state.services["s"].exec["cpu"].predict(1, rows)


def finish(world: World, batch: int, after: int = 2 * MS) -> list[a.Action]:
    return world.send(e.BatchDone(batch, after), after=after)


# --- batches --------------------------------------------------------------------------------


def test_an_idle_partition_takes_a_request_at_once() -> None:
    dispatch = one(ready().arrive(), a.Dispatch)
    assert dispatch.batch.requests == (1,)
    assert not dispatch.preempting


def test_batches_grow_while_the_partition_is_busy() -> None:
    world = ready()
    first = one(world.arrive(), a.Dispatch)
    for _ in range(5):
        assert not only(world.arrive(), a.Dispatch)
    done = finish(world, first.batch.id)
    assert one(done, a.Complete).requests == (1,)
    assert one(done, a.Dispatch).batch.requests == (2, 3, 4, 5, 6)


def test_a_batch_holds_no_more_rows_than_the_service_takes() -> None:
    world = ready(max_batch=4)
    first = one(world.arrive(), a.Dispatch)
    for _ in range(3):
        world.arrive(rows=2)
    assert one(finish(world, first.batch.id), a.Dispatch).batch.rows == 4


def test_a_batch_is_the_largest_that_meets_the_tightest_deadline_in_it() -> None:
    world = ready()
    finish(world, one(world.arrive(), a.Dispatch).batch.id)
    first = one(world.arrive(after=1000 * MS), a.Dispatch)
    world.arrive(slo=9 * MS)
    for _ in range(7):
        world.arrive()
    tightest = world.now + 9 * MS
    batch = one(finish(world, first.batch.id, after=3 * MS), a.Dispatch).batch
    assert 1 < len(batch.requests) < 8
    assert batch.requests[0] == 3
    assert world.now + predicted(world, len(batch.requests)) <= tightest
    assert world.now + predicted(world, len(batch.requests) + 1) > tightest


def test_a_batch_is_not_cut_for_one_request_where_that_costs_more() -> None:
    """A batch of four takes hardly longer than one: to save the first of them, the others would
    wait for a batch of their own, and so would those that come meanwhile."""
    world = World().service(max_batch=4)
    load(world.d.state, "w0", "s")
    world.send(e.WorkerUp("w0", "s", "1", "cpu", ((1, 1, 14 * MS), (1, 4, 16 * MS))))
    world.planned({"s": (0,)})
    first = one(world.arrive(), a.Dispatch).batch.id
    world.arrive(slo=40 * MS)
    for _ in range(3):
        world.arrive(slo=100 * MS)
    stall = 40 * MS - predicted(world, 4) + 1
    batch = one(world.send(e.BatchDone(first, 10 * MS), after=stall), a.Dispatch).batch
    assert batch.requests == (2, 3, 4, 5)


def test_a_request_that_is_late_already_does_not_shrink_the_batch() -> None:
    world = ready()
    first = one(world.arrive(), a.Dispatch)
    world.arrive(slo=8 * MS)
    for _ in range(4):
        world.arrive(slo=500 * MS)
    batch = one(finish(world, first.batch.id, after=20 * MS), a.Dispatch).batch
    assert batch.requests == (2, 3, 4, 5, 6)


def test_requests_of_unlike_shape_do_not_share_a_batch() -> None:
    world = ready()
    first = one(world.arrive(shape="a"), a.Dispatch)
    for shape in ("a", "b", "a"):
        world.arrive(shape=shape)
    assert one(finish(world, first.batch.id), a.Dispatch).batch.requests == (2, 4)


def test_a_batch_is_held_back_for_company_only_as_long_as_the_service_says() -> None:
    world = ready(max_queue_delay=5 * MS, preferred=(4,))
    wake = one(world.arrive(), a.WakeAt)
    assert wake.at == world.now + 5 * MS
    assert not only(world.arrive(after=MS), a.Dispatch)
    assert one(world.send(e.Woke(), after=4 * MS), a.Dispatch).batch.rows == 2


def test_a_preferred_size_goes_at_once() -> None:
    world = ready(max_queue_delay=5 * MS, preferred=(3,))
    assert not only(world.arrive() + world.arrive(), a.Dispatch)
    assert one(world.arrive(), a.Dispatch).batch.rows == 3


def test_a_batch_is_never_held_back_beyond_its_slack() -> None:
    world = ready(max_queue_delay=50 * MS, preferred=(8,))
    wake = one(world.arrive(slo=20 * MS), a.WakeAt)
    assert wake.at + predicted(world, 8) <= world.now + 20 * MS


# --- order ----------------------------------------------------------------------------------


def queued_behind_one(*requests: dict[str, int]) -> list[int]:
    """The order in which requests that arrive while one runs are executed, one by one. It takes
    too long for any of them to be handed over before its turn."""
    world = ready(max_batch=1, exec_ns=4 * MS)
    batch = one(world.arrive(), a.Dispatch).batch.id
    for request in requests:
        world.arrive(**request)
    order = []
    for _ in requests:
        dispatch = one(finish(world, batch), a.Dispatch)
        order += dispatch.batch.requests
        batch = dispatch.batch.id
    return order


def test_least_slack_goes_first_within_a_class() -> None:
    requests = ({"slo": 90 * MS}, {"slo": 30 * MS}, {"slo": 60 * MS})
    assert queued_behind_one(*requests) == [3, 4, 2]


def test_a_higher_class_goes_first() -> None:
    requests = ({"priority": 2}, {"priority": 1}, {"priority": 0})
    assert queued_behind_one(*requests) == [4, 3, 2]


def test_equal_requests_go_in_the_order_of_their_arrival() -> None:
    assert queued_behind_one({}, {}, {}) == [2, 3, 4]


def test_the_lowest_class_is_not_starved() -> None:
    world = ready(max_batch=1, exec_ns=4 * MS)
    batch = one(world.arrive(priority=0), a.Dispatch).batch
    world.arrive(priority=2)
    low, since = world.next_id, world.now
    world.arrive(priority=0)
    while low not in batch.requests:
        assert world.now - since <= 2 * AGEING + 10 * MS
        batch = one(finish(world, batch.id, after=4 * MS), a.Dispatch).batch
        world.arrive(priority=0)
    assert world.now - since > AGEING


def test_the_more_urgent_of_two_services_on_a_partition_goes_first() -> None:
    world = World().service("slow").service("fast").worker("w0", "slow").worker("w1", "fast")
    world.planned({"slow": (0,), "fast": (0,)})
    first = one(world.arrive("slow"), a.Dispatch)
    world.arrive("slow", slo=100 * MS)
    world.arrive("fast", slo=20 * MS)
    assert one(finish(world, first.batch.id), a.Dispatch).batch.service == "fast"


def test_what_goes_back_to_the_queue_still_expires() -> None:
    world = ready(exec_ns=4 * MS, max_batch=1)
    world.worker("w1")
    world.arrive()
    world.arrive(expires=world.now + 10 * MS)
    batch = one(finish(world, 1), a.Dispatch).batch
    assert batch.requests == (2,)
    world.arrive(slo=20 * MS)  # goes first when both wait
    world.send(e.WorkerDown("w0"))
    assert one(world.send(e.Woke(), after=10 * MS), a.Reject).refusal is Refusal.EXPIRED


# --- order after a stall --------------------------------------------------------------------


def stalled(*slos: int, stall: int = 20 * MS) -> tuple[World, a.Dispatch]:
    """Requests with deadlines in so many ms, queued behind one that takes ``stall`` instead of
    4 ms, and what starts then."""
    world = ready(max_batch=1, exec_ns=4 * MS)
    batch = one(world.arrive(), a.Dispatch).batch.id
    for slo in slos:
        world.arrive(slo=slo * MS)
    return world, one(finish(world, batch, after=stall), a.Dispatch)


def finishes(world: World, dispatch: a.Dispatch) -> dict[int, int]:
    """When each request is done, in this order, if executions take 4 ms from now on."""
    done = {}
    while True:
        actions = finish(world, dispatch.batch.id, after=4 * MS)
        done |= dict.fromkeys(one(actions, a.Complete).requests, world.now)
        following = only(actions, a.Dispatch)
        if not following:
            return done
        dispatch = following[0]


def test_a_stall_makes_as_many_late_as_it_took_the_time_of() -> None:
    # Each has 12 ms to spare, the stall takes 16 ms: in their order all six would be late.
    world, first = stalled(20, 24, 28, 32, 36, 40)
    began = world.now - 20 * MS
    done = finishes(world, first)
    assert list(done) == [4, 5, 6, 7, 2, 3]
    assert [i for i in done if done[i] > began + (12 + 4 * i) * MS] == [2, 3]


def test_what_was_put_off_goes_before_what_comes_after() -> None:
    world, first = stalled(20, 24, 28, 32, 36, 40)
    world.arrive(slo=80 * MS)
    assert list(finishes(world, first)) == [4, 5, 6, 7, 2, 3, 8]


def test_what_was_put_off_once_is_not_put_off_again() -> None:
    world, first = stalled(20, 24, 28, 32, 36, 40)
    world.arrive(slo=80 * MS)
    for _ in range(3):
        first = one(finish(world, first.batch.id, after=4 * MS), a.Dispatch)
    first = one(finish(world, first.batch.id, after=40 * MS), a.Dispatch)
    assert list(finishes(world, first)) == [2, 3, 8]


def test_where_all_are_late_their_order_stays() -> None:
    world, first = stalled(20, 24, 28, stall=60 * MS)
    assert list(finishes(world, first)) == [2, 3, 4]


def test_a_late_request_yields_to_another_service_that_can_be_in_time() -> None:
    world = World().service("s").service("t").worker("w0", "s").worker("w1", "t")
    world.planned({"s": (0,), "t": (0,)})
    first = one(world.arrive("s"), a.Dispatch)
    world.arrive("s", slo=10 * MS)
    world.arrive("t", slo=30 * MS)
    assert one(finish(world, first.batch.id, after=20 * MS), a.Dispatch).batch.service == "t"


def test_a_request_that_age_brought_to_the_front_is_not_put_off() -> None:
    world = ready(max_batch=1, exec_ns=4 * MS)
    batch = one(world.arrive(), a.Dispatch).batch.id
    world.arrive(priority=2)
    low = world.next_id
    world.arrive(after=2 * AGEING, priority=0, slo=1 * S)
    assert one(finish(world, batch), a.Dispatch).batch.requests == (low,)


# --- refusals -------------------------------------------------------------------------------


def refusal(actions: list[a.Action]) -> a.Reject:
    assert not only(actions, a.Dispatch)
    reject: a.Reject = one(actions, a.Reject)
    return reject


def test_a_deadline_below_the_execution_time_is_refused_for_good() -> None:
    reject = refusal(ready().arrive(timeout=1 * MS))
    assert (reject.refusal, reject.retry_after) == (Refusal.DEADLINE, 0)


def test_what_cannot_make_its_deadline_is_refused_and_may_come_back_when_it_is_told() -> None:
    world = ready(exec_ns=10 * MS)
    world.arrive()
    reject = refusal(world.arrive(slo=15 * MS))
    assert reject.refusal is Refusal.OVERLOADED
    assert reject.retry_after > 0
    assert not only(world.arrive(slo=15 * MS, after=reject.retry_after), a.Reject)


def test_the_whole_queue_counts_for_a_newcomer() -> None:
    world = ready(max_batch=1, max_queue=1000)
    admitted = 0
    while not only(world.arrive(slo=50 * MS), a.Reject):
        admitted += 1
    mean, _ = world.d.state.services["s"].exec["cpu"].moments(1, 1)
    assert 50 * MS / 2 < admitted * mean <= 50 * MS + mean


def serve(world: World, slo: int, took: int, rounds: int) -> None:
    """Fill the queue and work it off, ``rounds`` times: one execution of each holds the
    partition for ``took``, the others for 2 ms."""
    for _ in range(rounds):
        dispatched: list[a.Dispatch] = []
        while not only(actions := world.arrive(slo=slo), a.Reject):
            dispatched += only(actions, a.Dispatch)
        first = dispatched[0]
        while dispatched:
            batch = dispatched.pop(0).batch.id
            done = finish(world, batch, took if batch == first.batch.id else 2 * MS)
            dispatched += only(done, a.Dispatch)


def admitted(world: World, slo: int) -> int:
    """Requests that a full queue holds."""
    before = world.d.state.services["s"].queued
    while not only(world.arrive(slo=slo), a.Reject):
        pass
    return world.d.state.services["s"].queued - before


def test_waits_that_turn_out_longer_than_predicted_make_admission_careful_for_a_while() -> None:
    slo = 50 * MS
    steady, stalled, recovered = (ready(max_batch=1, max_queue=1000) for _ in range(3))
    serve(steady, slo, 2 * MS, rounds=201)
    serve(stalled, slo, 30 * MS, rounds=1)
    serve(stalled, slo, 2 * MS, rounds=3)
    serve(recovered, slo, 30 * MS, rounds=1)
    serve(recovered, slo, 2 * MS, rounds=200)
    usual = admitted(steady, slo)
    assert usual / 2 < admitted(stalled, slo) < 0.95 * usual
    assert admitted(recovered, slo) == usual


def test_a_late_answer_to_what_did_not_queue_says_nothing_of_waits() -> None:
    world = ready(max_batch=1, max_queue=1000)
    for _ in range(40):
        finish(world, one(world.arrive(slo=4 * MS), a.Dispatch).batch.id, 5 * MS)
        for _ in range(30):  # the prediction comes down again
            finish(world, one(world.arrive(), a.Dispatch).batch.id)
    assert world.d.state.services["s"].margin == 0


def test_answers_in_time_narrow_the_margin_even_if_they_did_not_wait() -> None:
    """One answer in a hundred may be late; those that wait long are few where load is low."""
    world = ready(max_batch=1)
    first = one(world.arrive(), a.Dispatch).batch.id
    second = one(world.arrive(slo=10 * MS), a.Dispatch).batch.id
    finish(world, first, 6 * MS)
    finish(world, second, 6 * MS)  # late
    service = world.d.state.services["s"]
    assert service.margin > 0
    for _ in range(100):
        finish(world, one(world.arrive(after=100 * MS), a.Dispatch).batch.id)
    assert service.margin == 0


def test_an_urgent_request_does_not_queue_behind_lower_classes() -> None:
    world = ready(max_batch=1, max_queue=1000)
    while not only(world.arrive(slo=50 * MS, priority=1), a.Reject):
        pass
    assert not only(world.arrive(slo=50 * MS, priority=0), a.Reject)
    assert only(world.arrive(slo=50 * MS, priority=2), a.Reject)


def test_what_other_services_have_queued_counts_at_the_speed_of_the_partition() -> None:
    world = World(units=2)
    for worker, name in (("w0", "s"), ("w1", "other")):
        world.service(name, objective=1 * S, max_batch=1)
        profile = ((1, 1, 40 * MS), (2, 1, 10 * MS))
        load(world.d.state, worker, name)
        world.send(e.WorkerUp(worker, name, "1", "cpu", profile))
    whole = Partition("p0", "cpu", (0, 1))
    both = {"s": ("p0",), "other": ("p0",)}
    for action in world.send(e.Planned(Plan(1, (whole,), both, {}, ()))):
        if isinstance(action, a.Repartition):
            world.send(e.Repartitioned("cpu", 1))
    for _ in range(4):
        assert not only(world.arrive("other", slo=100 * MS), a.Reject)
    assert not only(world.arrive("s", slo=80 * MS), a.Reject)
    assert only(world.arrive("s", slo=50 * MS), a.Reject)


def test_one_more_than_the_queue_holds_is_refused() -> None:
    world = ready(max_queue=2, max_batch=1, exec_ns=4 * MS)
    for _ in range(3):
        assert not only(world.arrive(), a.Reject)
    reject = refusal(world.arrive())
    assert reject.refusal is Refusal.QUEUE_FULL
    assert reject.retry_after > 0


def test_without_an_instance_there_is_no_service() -> None:
    world = World().service()
    world.planned({"s": (0,)})
    assert refusal(world.arrive()).refusal is Refusal.UNAVAILABLE
    assert refusal(world.arrive("unheard-of")).refusal is Refusal.UNAVAILABLE


def test_a_draining_node_admits_nothing_and_finishes_what_it_has() -> None:
    world = ready()
    first = one(world.arrive(), a.Dispatch)
    world.arrive()
    world.send(e.Draining())
    assert refusal(world.arrive()).refusal is Refusal.SHUTTING_DOWN
    assert one(finish(world, first.batch.id), a.Dispatch).batch.requests == (2,)


def test_a_request_that_expires_in_the_queue_is_refused() -> None:
    world = ready()
    world.arrive()
    actions = world.arrive(expires=world.now + 10 * MS)
    assert one(actions, a.WakeAt).at == world.now + 10 * MS
    reject = refusal(world.send(e.Woke(), after=10 * MS))
    assert (reject.request, reject.refusal) == (2, Refusal.EXPIRED)


def test_a_client_that_goes_away_takes_its_request_out_of_the_queue() -> None:
    world = ready()
    first = one(world.arrive(), a.Dispatch)
    world.arrive()
    assert refusal(world.send(e.Cancelled(2))).refusal is Refusal.CANCELLED
    assert not world.send(e.Cancelled(1)), "what runs is not stopped"
    assert not only(finish(world, first.batch.id), a.Dispatch)


def test_predictions_follow_the_time_that_a_batch_holds_its_partition() -> None:
    world = ready()
    before = predicted(world)
    for _ in range(30):
        batch = one(world.arrive(), a.Dispatch).batch.id
        world.send(e.BatchDone(batch, 2 * MS), after=6 * MS)
    assert predicted(world) > before
    assert predicted(world) >= 6 * MS


# --- failures -------------------------------------------------------------------------------


def test_a_batch_on_which_the_model_fails_is_refused_and_the_next_one_runs() -> None:
    world = ready()
    first = one(world.arrive(), a.Dispatch)
    world.arrive()
    actions = world.send(e.BatchFailed(first.batch.id, "no"))
    reject = one(actions, a.Reject)
    assert (reject.request, reject.refusal, reject.detail) == (1, Refusal.FAILED, "no")
    assert one(actions, a.Dispatch).batch.requests == (2,)


def test_requests_of_a_lost_worker_are_tried_once_more_elsewhere() -> None:
    world = ready().worker("w1").worker("w2")
    lost = one(world.arrive(), a.Dispatch)
    again = one(world.send(e.WorkerDown(lost.worker)), a.Dispatch)
    assert again.batch.requests == (1,)
    assert again.worker != lost.worker
    reject = refusal(world.send(e.WorkerDown(again.worker)))
    assert (reject.request, reject.refusal) == (1, Refusal.WORKER_LOST)


def test_without_another_instance_what_a_lost_worker_leaves_is_refused() -> None:
    world = ready()
    lost = one(world.arrive(), a.Dispatch)
    world.arrive()
    rejects = only(world.send(e.WorkerDown(lost.worker)), a.Reject)
    assert {r.request for r in rejects} == {1, 2}
    assert {r.refusal for r in rejects} == {Refusal.UNAVAILABLE}
    assert all(r.retry_after > 0 for r in rejects)


def test_a_new_version_takes_over_between_two_batches() -> None:
    world = ready()
    first = one(world.arrive(), a.Dispatch)
    world.arrive()
    offered = world.offer("2")
    assert one(offered, a.Serve).version == "2"
    assert not only(offered, a.Reject)
    done = finish(world, first.batch.id)
    assert one(done, a.Complete).requests == (1,)
    after = one(done, a.Dispatch)
    assert (after.worker, after.batch.version) == (one(offered, a.Load).worker, "2")
    assert one(done, a.Unload).worker == "w0"


def test_a_version_asked_for_by_name_is_served_as_long_as_it_is_kept() -> None:
    world = ready().service(keep=2)
    world.offer("2")
    assert one(world.arrive(version="1"), a.Dispatch).worker == "w0"
    world.arrive(version="1")
    reject = refusal(world.send(e.VersionGone("s", "1")))
    assert (reject.request, reject.refusal) == (2, Refusal.UNAVAILABLE)


def test_a_removed_service_refuses_what_waits_and_finishes_what_runs() -> None:
    world = ready()
    first = one(world.arrive(), a.Dispatch)
    world.arrive()
    assert refusal(world.send(e.ServiceRemoved("s"))).request == 2
    assert one(finish(world, first.batch.id), a.Complete).requests == (1,)
    world.send(e.WorkerDown("w0"))
    assert "s" not in world.d.state.services


LATE = (
    e.BatchDone(99, MS),
    e.BatchFailed(99, "late"),
    e.Cancelled(99),
    e.WorkerDown("nobody"),
    e.LoadFailed("nobody", "late"),
    e.WorkerUp("w9", "nothing", "1", "cpu"),
    e.VersionOffered("nothing", "2"),
    e.VersionGone("nothing", "2"),
    e.JobReady("nobody"),
    e.ServiceRemoved("nothing"),
    e.JobExited("nobody"),
    e.Granted("nobody", "p0"),
    e.Revoked("nobody", "p0", MS),
    e.Granted("nobody", "p99"),
    e.ActionFailed("Grant", "p99", "nobody", "late"),
    e.ActionFailed("Revoke", "p0", "nobody", "late"),
    e.Repartitioned("cpu", 99),
)


@pytest.mark.parametrize("news", LATE, ids=lambda n: type(n).__name__)
def test_late_news_is_ignored(news: e.Event) -> None:
    world = ready()
    first = one(world.arrive(), a.Dispatch)
    assert world.send(news) == []
    assert one(finish(world, first.batch.id), a.Complete).requests == (1,)


def test_requests_that_arrive_together_become_one_batch() -> None:
    world = ready()
    assert world.arrive(more=True) == []
    assert world.arrive(more=True) == []
    assert one(world.arrive(), a.Dispatch).batch.requests == (1, 2, 3)


def together(world: World, count: int, **kw: int) -> list[tuple[str, tuple[int, ...]]]:
    """Workers and requests of the batches that this many arrivals in one turn start."""
    actions = [x for left in reversed(range(count)) for x in world.arrive(more=left > 0, **kw)]
    return [(d.worker, d.batch.requests) for d in only(actions, a.Dispatch)]


def two_idle(max_batch: int = 8) -> World:
    """One service with a warm instance on each of two cores."""
    world = World(units=2).service(max_batch=max_batch).worker("w0").worker("w1")
    world.planned({"s": (0, 1)})
    return world


def test_of_requests_that_arrive_together_each_idle_instance_gets_its_share() -> None:
    assert together(two_idle(), 8) == [("w0", (1, 2, 3, 4)), ("w1", (5, 6, 7, 8))]
    assert together(two_idle(), 5) == [("w0", (1, 2, 3, 4)), ("w1", (5,))]
    assert together(two_idle(), 4, rows=2) == [("w0", (1, 2)), ("w1", (3, 4))]
    assert together(two_idle(max_batch=1), 2) == [("w0", (1,)), ("w1", (2,))]


def test_fewer_than_a_share_that_arrive_together_stay_together() -> None:
    assert together(two_idle(), 3) == [("w0", (1, 2, 3))]


def test_the_share_of_the_only_idle_instance_is_a_full_batch() -> None:
    world = two_idle()
    world.arrive()
    assert together(world, 7) == [("w1", tuple(range(2, 9)))]
    # More instances than partitions: those without one cannot begin.
    world = World(units=2).service(max_batch=8).worker("w0").worker("w1")
    world.planned({"s": (0,)})
    assert together(world, 8) == [("w0", tuple(range(1, 9)))]


def test_nothing_is_taken_back_for_a_share() -> None:
    world = World(units=2).service(max_batch=8).worker("w0").worker("w1")
    world.planned({"s": (0, 1)}, lendable=("p1",))
    world.job("j")
    world.send(e.Woke(), after=S)
    assert world.d.state.partitions["p1"].job == "j"
    assert together(world, 8) == [("w0", tuple(range(1, 9)))]


def test_a_refusal_at_the_end_of_arrivals_holds_none_of_them_back() -> None:
    world = ready()
    world.arrive(more=True)
    actions = world.arrive(timeout=1)
    assert one(actions, a.Reject).request == 2
    assert one(actions, a.Dispatch).batch.requests == (1,)


def test_a_clock_that_goes_backwards_is_held_still() -> None:
    world = ready()
    first = one(world.arrive(), a.Dispatch)
    was = world.now
    world.now -= S
    request = Request(7, "s", was, was + 50 * MS)
    assert not only(world.send(e.Arrived(request)), a.Reject)
    assert world.d.state.now == was
    done = world.send(e.BatchDone(first.batch.id, 2 * MS))
    assert one(done, a.Dispatch).batch.requests == (7,)


def test_every_action_names_its_cause() -> None:
    world = ready()
    assert {x.cause for x in world.arrive()} == {"Arrived:1"}
    assert {x.cause for x in finish(world, 1)} == {"BatchDone:1"}


def slow_spell(world: World, took: int = 300 * MS) -> None:
    """Executions that take far longer than the objective, until predictions say so."""
    while predicted(world) < took:
        for dispatch in only(world.arrive(after=S), a.Dispatch):
            world.send(e.BatchDone(dispatch.batch.id, took), after=took)


@pytest.mark.parametrize("lag", [0, 100 * US, 3 * MS])
def test_a_slow_spell_does_not_close_a_service(lag: int) -> None:
    """However late the dispatcher hears of a request: live it always does."""
    world = ready(objective=10 * MS)
    slow_spell(world)
    for _ in range(20):
        dispatch = one(world.arrive(slo=10 * MS, after=20 * MS, lag=lag), a.Dispatch)
        world.send(e.BatchDone(dispatch.batch.id, 2 * MS), after=2 * MS)
    assert predicted(world) < 10 * MS


@pytest.mark.parametrize("lag", [0, 100 * US, 3 * MS])
def test_nor_does_it_for_clients_that_set_a_deadline(lag: int) -> None:
    world = ready(objective=10 * MS)
    slow_spell(world)
    answers = 0
    for _ in range(100):
        actions = world.arrive(timeout=10 * MS, after=100 * MS, lag=lag)
        for dispatch in only(actions, a.Dispatch):
            answers += 1
            world.send(e.BatchDone(dispatch.batch.id, 2 * MS), after=2 * MS)
    assert answers > 50, "nothing was tried again"


def test_a_deadline_that_no_execution_ever_met_is_no_reason_to_try_again() -> None:
    world = ready(objective=10 * MS)
    for _ in range(5):
        reject = refusal(world.arrive(timeout=1 * MS, after=10 * S))
        assert reject.refusal is Refusal.DEADLINE


def test_an_objective_below_one_execution_is_missed_and_not_refused() -> None:
    world = ready(objective=1 * MS, exec_ns=2 * MS)
    for _ in range(20):
        first = one(world.arrive(slo=1 * MS, after=MS, lag=100 * US), a.Dispatch)
        done = finish(world, first.batch.id)
        assert one(done, a.Complete)


def test_what_waits_for_others_is_still_refused_where_the_objective_is_below_one_execution() -> (
    None
):
    world = ready(objective=1 * MS, exec_ns=2 * MS, max_batch=1)
    world.arrive(slo=1 * MS)
    for _ in range(8):
        world.arrive(slo=1 * MS)
    assert refusal(world.arrive(slo=1 * MS)).refusal is Refusal.OVERLOADED


def test_a_stall_of_the_node_is_not_taken_for_an_execution() -> None:
    world = ready()
    before = predicted(world)
    for after in (2 * MS, 4 * S, 2 * MS, 4 * S):
        dispatch = one(world.arrive(after=S), a.Dispatch)
        world.send(e.BatchDone(dispatch.batch.id, 2 * MS), after=after)
    assert predicted(world) <= 1.2 * before


def test_long_requests_say_nothing_of_what_short_ones_cost() -> None:
    world = ready(objective=40 * MS)
    short = predicted(world)
    for _ in range(10):
        dispatch = one(world.arrive(after=S, shape="5000", size=5000), a.Dispatch)
        world.send(e.BatchDone(dispatch.batch.id, 130 * MS), after=130 * MS)
    costs = world.d.state.services["s"].exec["cpu"]
    assert costs.predict(1, 1, size_class(5000)) > 100 * MS
    assert costs.predict(1, 1, size_class(8)) < 40 * MS
    assert predicted(world) == short
    for _ in range(30):
        dispatch = one(world.arrive(slo=40 * MS, after=5 * MS, shape="8", size=8), a.Dispatch)
        world.send(e.BatchDone(dispatch.batch.id, 2 * MS), after=2 * MS)


def test_a_long_request_in_the_queue_counts_as_long() -> None:
    world = ready(objective=200 * MS)
    for _ in range(3):
        dispatch = one(world.arrive(slo=200 * MS, after=S, shape="long", size=5000), a.Dispatch)
        world.send(e.BatchDone(dispatch.batch.id, 100 * MS), after=100 * MS)
    world.arrive(slo=200 * MS, after=S)
    assert not only(world.arrive(slo=200 * MS, shape="long", size=5000), a.Reject)
    assert refusal(world.arrive(timeout=50 * MS)).refusal is Refusal.OVERLOADED
