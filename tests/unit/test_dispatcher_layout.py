"""Laws of the dispatcher about space: a layout changes when what changes is idle."""

from __future__ import annotations

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import Partition
from cotenant.domain.plan import Plan
from cotenant.domain.units import MS
from cotenant.policy.dispatcher import Dispatcher
from tests.builders import World, cpu, one, only, plan


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
    assert one(world.send(e.BatchDone(second.batch.id, MS)), a.Repartition).version == 2


def test_what_arrives_while_the_layout_changes_is_served_on_the_new_one() -> None:
    world = serving()
    first = one(world.arrive(), a.Dispatch)
    world.send(e.Planned(whole(2)))
    assert not only(world.arrive(), a.Dispatch)
    one(world.send(e.BatchDone(first.batch.id, MS)), a.Repartition)
    assert not only(world.arrive(), a.Reject)
    assert one(world.send(e.Repartitioned("cpu", 2)), a.Dispatch).partition == "all"


def test_a_lent_partition_that_changes_is_taken_back() -> None:
    world = serving()
    for grant in only(world.job(), a.Grant):
        world.send(e.Granted("j", grant.partition))
    revokes = only(world.send(e.Planned(whole(2))), a.Revoke)
    assert {r.partition for r in revokes} == {"p0", "p1"}
    assert not only(world.send(e.Revoked("j", "p0", 0)), a.Repartition)
    assert only(world.send(e.Revoked("j", "p1", 0)), a.Repartition)
    assert one(world.send(e.Repartitioned("cpu", 2)), a.Grant).partition == "all"


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
    actions = world.send(e.ActionFailed("Repartition", "cpu", "", "busy"))
    assert one(actions, a.Dispatch).partition in ("p0", "p1")
    assert world.d.state.plan.version == 1


def test_a_plan_that_comes_while_the_device_changes_follows_it() -> None:
    world = serving()
    one(world.send(e.Planned(whole(2))), a.Repartition)
    assert not world.send(e.Planned(plan({"s": (0, 1)}, version=3)))
    assert one(world.send(e.Repartitioned("cpu", 2)), a.Repartition).version == 3
    world.send(e.Repartitioned("cpu", 3))
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


def two_devices() -> World:
    """``s`` on two devices of two units each; on each the partition of the one is to change."""
    world = World()
    world.d = Dispatcher((cpu(2, id="a"), cpu(2, id="b")))
    world.service(max_batch=1)
    for device in "ab":
        world.send(e.WorkerUp(f"w-{device}", "s", "1", device, ((1, 1, MS),)))
    return world


def on_both(version: int, a_units: tuple[int, ...], b_units: tuple[int, ...]) -> Plan:
    parts = tuple(
        Partition(f"{d}:{units}", d, units) for d, units in (("a", a_units), ("b", b_units))
    )
    names = tuple(p.id for p in parts)
    return Plan(version, parts, {"s": names}, {}, names)


def test_a_device_that_changes_slowly_holds_back_no_other() -> None:
    world = two_devices()
    orders = only(world.send(e.Planned(on_both(1, (0,), (0,)))), a.Repartition)
    assert {o.device for o in orders} == {"a", "b"}
    for order in orders:
        world.send(e.Repartitioned(order.device, 1))
    world.send(e.Planned(on_both(2, (0, 1), (0, 1))))
    world.send(e.Repartitioned("b", 2))
    assert one(world.arrive(), a.Dispatch).partition == "b:(0, 1)"
    assert set(world.d.state.changes) == {"a"}
    follows = world.send(e.Planned(on_both(3, (0, 1), (1,))))
    assert not only(follows, a.Repartition)
    done = world.send(e.BatchDone(1, MS))
    assert {o.device for o in only(done, a.Repartition)} == {"b"}
    world.send(e.Repartitioned("b", 3))
    world.send(e.Repartitioned("a", 2))
    assert not world.d.state.changes
    assert world.d.state.plan == on_both(3, (0, 1), (1,))


def test_a_device_that_refuses_keeps_its_layout_and_the_other_has_the_new_one() -> None:
    world = two_devices()
    for order in only(world.send(e.Planned(on_both(1, (0,), (0,)))), a.Repartition):
        world.send(e.Repartitioned(order.device, 1))
    world.send(e.Planned(on_both(2, (0, 1), (0, 1))))
    world.send(e.ActionFailed("Repartition", "a", "", "busy"))
    world.send(e.Repartitioned("b", 2))
    assert [p.units for p in world.d.state.plan.partitions] == [(0,), (0, 1)]
