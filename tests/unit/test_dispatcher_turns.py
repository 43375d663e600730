"""Laws of the dispatcher about turns: a request may take many, on the worker that has it."""

from __future__ import annotations

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.request import Refusal
from cotenant.domain.units import MS
from tests.builders import World, one, only


def talking(workers: int = 1) -> World:
    """A service whose first request has had its first turn, in which it emitted a piece."""
    world = World(units=1).service()
    for index in range(workers):
        world.worker(f"w{index}")
    world.planned({"s": (0,)})
    world.arrive()
    turn(world, 1, unfinished=(1,), emitted=(1,))
    return world


def turn(world: World, batch: int, **what: tuple[int, ...]) -> list[a.Action]:
    return world.send(e.BatchDone(batch, 2 * MS, **what), after=2 * MS)


def test_what_is_emitted_is_sent_and_the_next_turn_is_on_the_same_worker() -> None:
    world = World(units=1).service().worker("w0").worker("w1")
    world.planned({"s": (0,)})
    first = one(world.arrive(), a.Dispatch)
    actions = turn(world, 1, unfinished=(1,), emitted=(1,))
    assert one(actions, a.Emit).requests == (1,)
    assert not only(actions, a.Complete)
    again = one(actions, a.Dispatch)
    assert (again.worker, again.batch.requests) == (first.worker, (1,))
    assert one(turn(world, again.batch.id), a.Complete).requests == (1,)
    assert not world.d.state.residents


def test_a_turn_that_emits_nothing_sends_nothing() -> None:
    world = World(units=1).service().worker("w0")
    world.planned({"s": (0,)})
    world.arrive()
    assert not only(turn(world, 1, unfinished=(1,)), a.Emit)


def test_another_service_gets_the_partition_between_two_turns() -> None:
    world = talking()
    world.service("other", objective=10 * MS).worker("o0", "other")
    world.planned({"s": (0,), "other": (0,)}, version=2)
    assert not only(world.arrive("other", slo=10 * MS), a.Dispatch)
    assert one(turn(world, 2, unfinished=(1,)), a.Dispatch).batch.service == "other"
    assert one(turn(world, 3), a.Dispatch).batch.requests == (1,)


def test_who_goes_away_between_turns_or_in_one_has_no_further_turn() -> None:
    world = talking()
    world.send(e.Cancelled(1))
    actions = turn(world, 2, unfinished=(1,), emitted=(1,))
    assert one(actions, a.Reject).refusal is Refusal.CANCELLED
    assert not only(actions, a.Emit) and not only(actions, a.Dispatch)

    world = World(units=1).service().worker("w0").service("other").worker("o0", "other")
    world.planned({"s": (0,), "other": (0,)})
    world.arrive()
    world.arrive("other", slo=10 * MS)
    turn(world, 1, unfinished=(1,))
    assert one(world.send(e.Cancelled(1)), a.Reject).refusal is Refusal.CANCELLED


def test_who_goes_away_in_the_first_turn_has_no_second() -> None:
    world = World(units=1).service().worker("w0")
    world.planned({"s": (0,)})
    world.arrive()
    world.send(e.Cancelled(1))
    assert one(turn(world, 1, unfinished=(1,)), a.Reject).refusal is Refusal.CANCELLED


def test_a_lost_worker_loses_what_has_begun_to_answer_and_only_that() -> None:
    world = talking(workers=2)
    worker = world.d.state.running[2].worker
    assert one(world.send(e.WorkerDown(worker)), a.Reject).refusal is Refusal.WORKER_LOST

    world = World(units=1).service().worker("w0").worker("w1")
    world.planned({"s": (0,)})
    first = one(world.arrive(), a.Dispatch)
    turn(world, 1, unfinished=(1,))
    again = one(world.send(e.WorkerDown(first.worker)), a.Dispatch)
    assert again.worker != first.worker and again.batch.requests == (1,)


def test_a_retiring_worker_finishes_what_it_has_begun_and_takes_nothing_new() -> None:
    world = talking(workers=2)
    worker = world.d.state.running[2].worker
    world.send(e.WorkerRetiring(worker))
    assert one(turn(world, 2, unfinished=(1,)), a.Dispatch).worker == worker
    world.arrive()
    dispatched = only(turn(world, 3), a.Dispatch)
    assert [d.worker for d in dispatched] != [worker]


def test_a_batch_that_did_not_reach_its_worker_is_sent_once_more() -> None:
    world = World(units=1).service().worker("w0")
    world.planned({"s": (0,)})
    world.arrive()
    again = one(world.send(e.ActionFailed("Dispatch", "1", "", "busy")), a.Dispatch)
    assert again.batch.requests == (1,)
    refused = one(world.send(e.ActionFailed("Dispatch", "2", "", "busy")), a.Reject)
    assert refused.refusal is Refusal.WORKER_LOST
