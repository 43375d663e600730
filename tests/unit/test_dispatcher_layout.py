"""Laws of the dispatcher about space: a layout changes when what changes is idle."""

from __future__ import annotations

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import Partition
from cotenant.domain.plan import Plan
from cotenant.domain.units import MS
from tests.builders import World, one, only, plan


def whole(version: int, units: tuple[int, ...] = (0, 1)) -> Plan:
    """One partition of all cores instead of one each."""
    return Plan(
        version=version,
        partitions=(Partition("all", "cpu", units),),
        services={"s": ("all",)},
        jobs={},
        lendable=("all",),
    )


def serving() -> World:
    world = World().service(max_batch=1).worker("w0").worker("w1")
    world.planned({"s": (0, 1)})
    return world


def test_a_layout_waits_for_the_partitions_that_it_changes() -> None:
    world = serving()
    first, second = one(world.arrive(), a.Dispatch), one(world.arrive(), a.Dispatch)
    assert not world.send(e.Planned(whole(2)))
    assert not only(world.send(e.BatchDone(first.batch.id, MS)), a.Repartition)
    assert one(world.send(e.BatchDone(second.batch.id, MS)), a.Repartition).plan.version == 2


def test_what_arrives_while_the_layout_changes_is_served_on_the_new_one() -> None:
    world = serving()
    first = one(world.arrive(), a.Dispatch)
    world.send(e.Planned(whole(2)))
    assert not only(world.arrive(), a.Dispatch)
    one(world.send(e.BatchDone(first.batch.id, MS)), a.Repartition)
    assert not only(world.arrive(), a.Reject)
    assert one(world.send(e.Repartitioned(2)), a.Dispatch).partition == "all"


def test_a_lent_partition_that_changes_is_taken_back() -> None:
    world = serving()
    for grant in only(world.job(), a.Grant):
        world.send(e.Granted("j", grant.partition))
    revokes = only(world.send(e.Planned(whole(2))), a.Revoke)
    assert {r.partition for r in revokes} == {"p0", "p1"}
    assert not only(world.send(e.Revoked("j", "p0", 0)), a.Repartition)
    assert only(world.send(e.Revoked("j", "p1", 0)), a.Repartition)
    assert one(world.send(e.Repartitioned(2)), a.Grant).partition == "all"


def test_partitions_that_stay_keep_what_runs_on_them() -> None:
    world = serving()
    first = one(world.arrive(), a.Dispatch)
    actions = world.planned({"s": (0,)}, {"j": (1,)}, version=2)
    assert not only(actions, a.Repartition)
    assert world.d.state.plan.version == 2
    assert one(world.send(e.BatchDone(first.batch.id, MS)), a.Complete).requests == (1,)


def test_if_the_device_refuses_the_old_layout_stays() -> None:
    world = serving()
    one(world.send(e.Planned(whole(2))), a.Repartition)
    world.arrive()
    actions = world.send(e.ActionFailed("Repartition", "2", "", "busy"))
    assert one(actions, a.Dispatch).partition in ("p0", "p1")
    assert world.d.state.plan.version == 1


def test_a_plan_that_comes_while_the_device_changes_follows_it() -> None:
    world = serving()
    one(world.send(e.Planned(whole(2))), a.Repartition)
    assert not world.send(e.Planned(plan({"s": (0, 1)}, version=3)))
    assert one(world.send(e.Repartitioned(2)), a.Repartition).plan.version == 3
    world.send(e.Repartitioned(3))
    assert world.d.state.plan.version == 3


def test_a_plan_that_is_replaced_before_it_is_carried_out_is_forgotten() -> None:
    world = serving()
    first = one(world.arrive(), a.Dispatch)
    world.send(e.Planned(whole(2)))
    world.send(e.Planned(plan({"s": (0, 1)}, version=3)))
    assert world.d.state.plan.version == 3
    assert not only(world.send(e.BatchDone(first.batch.id, MS)), a.Repartition)


def test_a_partition_that_becomes_a_jobs_own_is_taken_from_a_guest() -> None:
    world = serving()
    for grant in only(world.job("guest"), a.Grant):
        world.send(e.Granted("guest", grant.partition))
    actions = world.planned({"s": (0,)}, {"owner": (1,)}, version=2)
    assert "p1" in {r.partition for r in only(actions, a.Revoke)}


def test_a_service_partition_that_may_no_longer_be_lent_is_taken_back() -> None:
    world = serving()
    for grant in only(world.job(), a.Grant):
        world.send(e.Granted("j", grant.partition))
    actions = world.planned({"s": (0, 1)}, version=2, lendable=())
    assert len(only(actions, a.Revoke)) == 2


def test_a_repartition_is_ordered_once() -> None:
    world = serving()
    one(world.send(e.Planned(whole(2))), a.Repartition)
    assert not only(world.arrive(), a.Repartition)
    assert not only(world.send(e.Woke()), a.Repartition)
