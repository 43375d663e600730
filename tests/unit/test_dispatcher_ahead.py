"""Handing a busy worker its next batch: when, and what becomes of it."""

from __future__ import annotations

import pytest

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.request import Refusal
from cotenant.domain.units import MS, US, S
from cotenant.policy.state import PartitionState
from tests.builders import World, load, one, only, plan


def busy(
    cores: tuple[int, ...] = (0,),
    max_batch: int = 1,
    exec_ns: int = 1 * MS,
    objective: int = 50 * MS,
) -> World:
    """A service with an instance on each core, all of which execute."""
    world = World(units=max(2, len(cores))).service(objective=objective, max_batch=max_batch)
    for core in cores:
        world.worker(f"w{core}", exec_ns=exec_ns)
    world.planned({"s": cores})
    for _ in cores:
        assert one(world.arrive(), a.Dispatch).after == 0
    return world


def partition(world: World, name: str = "p0") -> PartitionState:
    return world.d.state.partitions[name]


def done(world: World, batch: int, start_ns: int = 0) -> list[a.Action]:
    return world.send(e.BatchDone(batch, 1 * MS, start_ns), after=1 * MS)


def test_a_busy_worker_gets_one_batch_at_hand_and_goes_on_with_it() -> None:
    world = busy()
    ahead = one(world.arrive(), a.Dispatch)
    assert (ahead.after, ahead.worker, ahead.preempting) == (1, "w0", False)
    assert not only(world.arrive() + world.arrive(), a.Dispatch)
    then = one(done(world, 1), a.Dispatch)
    assert (partition(world).batch, then.after, partition(world).at_hand) == (2, 2, 3)
    done(world, 2)
    done(world, 3)
    assert not done(world, 4)[1:]
    assert not partition(world).batch and not partition(world).at_hand


def test_a_batch_is_handed_ahead_once_it_is_full() -> None:
    world = busy(max_batch=4)
    assert not only([x for _ in range(3) for x in world.arrive()], a.Dispatch)
    ahead = one(world.arrive(), a.Dispatch)
    assert ahead.batch.requests == (2, 3, 4, 5) and ahead.after == 1


def test_what_would_be_late_behind_the_batch_under_way_is_not_handed_ahead() -> None:
    world = busy()
    world.arrive()
    world.arrive(slo=8 * MS)
    world.arrive(slo=20 * MS)
    # The one under way will take 1 ms, the late one 1 ms more: 0.5 ms too much.
    actions = world.send(e.BatchDone(1, 1 * MS), after=6500 * US)
    assert one(actions, a.Dispatch).batch.requests == (4,)


@pytest.mark.parametrize(
    ("objective", "exec_ns", "ahead"),
    [(50 * MS, 2 * MS, 1), (50 * MS, 3 * MS, 0), (S, 15 * MS, 1), (S, 21 * MS, 0)],
)
def test_a_batch_that_takes_longer_waits_for_its_turn(
    objective: int, exec_ns: int, ahead: int
) -> None:
    world = busy(exec_ns=exec_ns, objective=objective)
    assert len(only(world.arrive(), a.Dispatch)) == ahead


def test_nothing_is_handed_ahead_where_another_service_may_run() -> None:
    world = World().service("s", max_batch=1).service("t", max_batch=1)
    world.worker("w0", "s", exec_ns=1 * MS).worker("w1", "t", exec_ns=1 * MS)
    world.planned({"s": (0,), "t": (0,)})
    world.arrive("s")
    assert not only(world.arrive("s") + world.arrive("s"), a.Dispatch)


def test_what_stays_queued_is_enough_for_the_partitions_that_have_none_at_hand() -> None:
    world = busy(cores=(0, 1))
    assert not only(world.arrive(), a.Dispatch)
    free = one(done(world, 2), a.Dispatch)
    assert (free.partition, free.after) == ("p1", 0)


def test_a_partition_that_has_one_at_hand_needs_none_that_stays_queued() -> None:
    world = busy(cores=(0, 1))
    actions = world.arrive() + world.arrive()
    assert [(d.partition, d.after) for d in only(actions, a.Dispatch)] == [("p0", 1), ("p1", 2)]
    assert not only(world.arrive(), a.Dispatch)


def test_a_worker_that_is_to_go_gets_nothing_more() -> None:
    world = busy()
    world.offer("1", exec_ns=1 * MS, revision=1)
    assert not only(world.arrive() + world.arrive(), a.Dispatch)


def test_a_version_is_handed_only_to_its_own_instances() -> None:
    world = busy()
    new = one(world.offer("2", exec_ns=1 * MS), a.Load).worker
    assert not only(world.arrive(), a.Dispatch)
    assert one(done(world, 1), a.Dispatch).worker == new


def test_a_layout_waits_for_both_batches() -> None:
    world = busy(cores=(0, 1))
    world.arrive()
    world.arrive()
    done(world, 2)
    assert partition(world).at_hand
    assert not only(world.planned({"s": (0, 1)}, version=2), a.Repartition)  # the same layout
    world.send(e.Planned(plan({"s": (1,)}, version=3)))
    done(world, partition(world, "p1").batch)
    assert not only(done(world, 1), a.Repartition)
    assert only(done(world, partition(world).batch), a.Repartition)


def test_a_failed_batch_does_not_take_the_next_along() -> None:
    world = busy()
    world.arrive()
    assert one(world.send(e.BatchFailed(1, "bad")), a.Reject).request == 1
    assert partition(world).batch == 2
    assert one(done(world, 2), a.Complete).requests == (2,)


def test_what_a_dead_worker_only_had_at_hand_is_not_blamed() -> None:
    world = busy()
    world.arrive()
    for name in ("w1", "w2"):
        world.worker(name, exec_ns=1 * MS)
    assert not only(world.send(e.WorkerDown("w0")), a.Reject)
    assert world.d.state.running[partition(world).at_hand].batch.requests == (2,)
    lost = one(world.send(e.WorkerDown("w1")), a.Reject)
    assert (lost.request, lost.refusal) == (1, Refusal.WORKER_LOST)
    assert one(done(world, partition(world).batch), a.Complete).requests == (2,)


def test_admission_counts_what_the_worker_has_at_hand() -> None:
    world = busy()
    world.arrive()
    state = world.d.state
    end = state.running[partition(world).at_hand].expected_end
    assert end >= 2 * 1 * MS + world.now
    own = state.services["s"].exec["cpu"].predict(1, 1)
    assert one(world.arrive(slo=end - world.now + own // 2), a.Reject)


def test_execution_is_counted_from_the_end_of_the_batch_before() -> None:
    world = busy()
    world.arrive()
    before = world.d.state.services["s"].exec["cpu"].predict(1, 1, deviations=0)
    done(world, 1)
    done(world, 2)
    assert world.d.state.services["s"].exec["cpu"].predict(1, 1, deviations=0) == before == 1 * MS


def test_nothing_waits_for_the_way_back_of_a_batch_that_another_follows() -> None:
    world = busy()
    world.arrive()
    # The node hears of both at once: the first is 1 ms of work all the same.
    world.send(e.BatchDone(1, 1 * MS), after=2 * MS)
    world.send(e.BatchDone(2, 1 * MS, 1 * MS))
    assert world.d.state.services["s"].exec["cpu"].predict(1, 1, deviations=0) == 1 * MS


def test_a_model_that_was_never_measured_is_not_taken_for_a_short_one() -> None:
    world = World().service(max_batch=1)
    load(world.d.state, "w0", "s")
    world.send(e.WorkerUp("w0", "s", "1", "cpu", ()))
    world.planned({"s": (0,)})
    world.arrive()
    assert not only(world.arrive(), a.Dispatch)


def test_a_worker_that_is_overdue_gets_nothing_more() -> None:
    world = busy()
    assert not only(world.arrive(after=3 * MS), a.Dispatch)


def test_a_batch_that_is_overdue_does_not_hide_the_one_behind_it() -> None:
    world = busy()
    world.arrive()
    own = world.d.state.services["s"].exec["cpu"].predict(1, 1)
    late = 5 * MS
    assert one(world.arrive(slo=own + own // 2, after=late), a.Reject)
