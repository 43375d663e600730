"""Laws of the dispatcher about what is loaded where, and which job runs."""

from __future__ import annotations

from typing import Any

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import Partition
from cotenant.domain.plan import Plan
from cotenant.domain.units import MS, S
from cotenant.policy.dispatcher import Dispatcher
from cotenant.policy.lending import REVOKE_WITHIN
from cotenant.policy.tenancy import KILL_AFTER
from tests.builders import World, cpu, one, only


def placed(**service: Any) -> World:
    """A service that the plan has a place for, of which nothing is loaded."""
    world = World().service(**service)
    world.planned({"s": (0, 1)})
    return world


def up(world: World, load: a.Load) -> list[a.Action]:
    profile = ((1, 1, MS),)
    return world.send(e.WorkerUp(load.worker, load.service, load.version, load.device, profile))


def test_a_version_serves_once_all_its_instances_are_up() -> None:
    world = placed(instances=2)
    first, second = only(world.send(e.VersionOffered("s", "1")), a.Load)
    assert not only(up(world, first), a.Serve)
    assert one(up(world, second), a.Serve).version == "1"


def test_a_version_that_cannot_be_loaded_is_declined_and_the_old_one_stays() -> None:
    world = placed()
    world.offer("1")
    load = one(world.send(e.VersionOffered("s", "2", 1)), a.Load)
    failed = world.send(e.LoadFailed(load.worker, "no good"))
    assert one(failed, a.Decline).version == "2" and not only(failed, a.Unload)
    assert one(world.arrive(), a.Dispatch).batch.version == "1"


def test_every_offer_is_answered_also_one_that_another_takes_the_place_of() -> None:
    for ends in (e.VersionOffered("s", "2", 2), e.VersionGone("s", "1"), e.ServiceRemoved("s")):
        world = placed()
        world.send(e.VersionOffered("s", "1", 1))
        assert one(world.send(ends), a.Decline).revision == 1


def test_an_instance_that_died_is_loaded_again_later_and_later() -> None:
    world, waits = placed(), []
    (load,) = only(world.offer("1"), a.Load)
    for _ in range(4):
        actions, died = world.send(e.WorkerDown(load.worker)), world.now
        while not only(actions, a.Load):
            actions = world.send(e.Woke(), after=50 * MS)
        load = one(actions, a.Load)
        waits.append(world.now - died)
        up(world, load)
    assert waits == sorted(waits) and waits[-1] > waits[0] > 0


def test_who_was_replaced_in_the_files_is_not_loaded_again_by_itself() -> None:
    world = placed()
    (load,) = only(world.offer("1"), a.Load)
    world.send(e.WorkerDown(load.worker))
    again = one(world.send(e.Woke(), after=1 * S), a.Load)
    world.send(e.LoadFailed(again.worker, "was replaced", final=True))
    assert not only(world.send(e.Woke(), after=60 * S), a.Load)
    assert one(world.offer("1", revision=1), a.Serve).revision == 1


def test_an_instance_that_is_up_outlives_one_that_cannot_be_loaded_again() -> None:
    world = placed(instances=2)
    first, _ = only(world.offer("1"), a.Load)
    world.send(e.WorkerDown(first.worker))
    again = one(world.send(e.Woke(), after=1 * S), a.Load)
    assert not only(world.send(e.LoadFailed(again.worker, "replaced", final=True)), a.Unload)
    assert one(world.arrive(), a.Dispatch)


def two_devices(version: int, *devices: str) -> Plan:
    parts = tuple(Partition(f"{device}:0", device, (0,)) for device in devices)
    names = tuple(p.id for p in parts)
    return Plan(version, parts, {"s": names}, {}, names)


def test_a_service_leaves_a_device_once_it_is_up_where_it_goes() -> None:
    world = World()
    world.d = Dispatcher((cpu(1, id="a"), cpu(1, id="b")))
    world.service()
    world.send(e.Planned(two_devices(1, "a")))
    world.send(e.Repartitioned("a", 1))
    world.offer("1")
    moving = world.send(e.Planned(two_devices(2, "b")))
    load = one(moving, a.Load)
    assert load.device == "b" and not only(moving, a.Unload)
    assert {r.device for r in only(moving, a.Repartition)} == {"b"}
    assert one(world.arrive(), a.Dispatch).partition == "a:0"
    world.send(e.BatchDone(1, MS))
    world.send(e.Repartitioned("b", 2))
    there = up(world, load)
    assert one(there, a.Unload) and one(there, a.Repartition).device == "a"
    world.send(e.Repartitioned("a", 2))
    assert one(world.arrive(), a.Dispatch).partition == "b:0"


def test_what_no_device_can_carry_is_declined_with_the_reason() -> None:
    world = World().service()
    world.send(e.VersionOffered("s", "1"))
    plan = Plan(1, (), {}, {}, (), unplaced={"s": "it is too large"})
    assert one(world.send(e.Planned(plan)), a.Decline).reason == "it is too large"


def test_no_more_jobs_run_than_may_and_the_next_starts_when_one_has_ended() -> None:
    world = World()
    world.d.state.most_jobs = 1
    world.job("first")
    assert not only(world.send(e.JobQueued("second")), a.Start)
    assert world.d.state.tenants["second"].waits
    assert one(world.send(e.JobExited("first")), a.Start).job == "second"


def test_a_reservation_is_on_its_device_alone_and_does_not_count_as_a_job() -> None:
    world = World()
    world.d = Dispatcher((cpu(2, id="a"), cpu(2, id="b")))
    world.d.state.most_jobs = 1
    world.job("first")
    assert one(world.send(e.JobQueued("r", device="b", own=1)), a.Start).devices == ("b",)
    parts = tuple(Partition(f"{d}:{n}", d, (n,)) for d in "ab" for n in (0, 1))
    plan = Plan(1, parts, {}, {"r": ("b:1",)}, ())
    for action in only(world.send(e.Planned(plan)), a.Repartition):
        world.send(e.Repartitioned(action.device, 1))
    world.send(e.JobExited("first"))
    given = only(world.send(e.JobReady("r")), a.Grant)
    assert {g.partition for g in given} <= {"b:0", "b:1"} and "b:1" in {g.partition for g in given}


def test_a_reservation_borrows_nothing_that_it_needs_to_have_its_own() -> None:
    world = World().service()
    world.planned({"s": (0,)})
    world.send(e.JobQueued("r", limit=0.5, device="cpu", own=1))
    assert not only(world.send(e.JobReady("r")), a.Grant), "its own is not there yet"
    given = world.planned({"s": (0,)}, {"r": (1,)}, version=2)
    assert one(given, a.Grant).partition == "p1"


def test_a_reservation_of_a_device_that_only_serves_starts_and_is_lent_nothing() -> None:
    world = World()
    world.d = Dispatcher((cpu(2), cpu(1, id="npu", kind="npu", trains=False)))
    start = one(world.send(e.JobQueued("r", kinds=("npu",), device="npu", own=1)), a.Start)
    assert start.devices == ()
    assert not only(world.send(e.JobReady("r")), a.Grant)


def test_a_job_waits_for_memory_and_goes_where_it_can_run() -> None:
    world = World()
    world.d = Dispatcher((cpu(8, memory=100), cpu(2, id="gpu", kind="gpu", memory=1000)))
    assert one(world.send(e.JobQueued("small")), a.Start).devices == ("cpu",)
    assert one(world.send(e.JobQueued("large", memory=600)), a.Start).devices == ("gpu",)
    assert not only(world.send(e.JobQueued("next", memory=600)), a.Start)
    assert not only(world.send(e.JobQueued("never", kinds=("tpu",))), a.Start)
    assert one(world.send(e.JobExited("large")), a.Start).job == "next"


def test_a_job_that_waits_for_memory_starts_when_an_instance_is_gone() -> None:
    world = World()
    world.d = Dispatcher((cpu(2, memory=100),))
    world.service()
    world.planned({"s": (0,)})
    load = one(world.send(e.VersionOffered("s", "1")), a.Load)
    world.send(e.WorkerUp(load.worker, "s", "1", "cpu", ((1, 1, MS),), memory=80))
    assert not only(world.send(e.JobQueued("j", memory=60)), a.Start)
    world.send(e.ServiceRemoved("s"))
    gone = world.send(e.WorkerDown(load.worker))
    assert one(gone, a.Start).job == "j"


def test_a_revocation_that_is_not_answered_stops_the_job_and_then_kills_it() -> None:
    world = World(units=1).service().worker()
    world.planned({"s": (0,)})
    world.job("stuck")
    world.send(e.Woke(), after=1 * S)
    world.send(e.Granted("stuck", "p0"))
    assert one(world.arrive(slo=60 * S), a.Revoke)
    stop = one(world.send(e.Woke(), after=REVOKE_WITHIN), a.Stop)
    assert (stop.job, stop.kill) == ("stuck", False)
    grace = world.d.state.tenants["stuck"].grace
    assert one(world.send(e.Woke(), after=grace + KILL_AFTER), a.Stop).kill
    world.send(e.JobExited("stuck"))
    assert not world.d.state.partitions["p0"].job


def test_a_job_whose_partition_goes_to_others_starts_again_elsewhere() -> None:
    gpu = cpu(2, id="gpu", kind="gpu", pins_jobs=True)
    world = World()
    world.d = Dispatcher((gpu,))
    parts = tuple(Partition(f"g{unit}", "gpu", (unit,)) for unit in (0, 1))

    def plan(version: int, place: str) -> list[a.Action]:
        return world.send(e.Planned(Plan(version, parts, {}, {"j": (place,)}, ())))

    assert not only(world.send(e.JobQueued("j")), a.Start), "no plan has a place for it yet"
    plan(1, "g0")
    assert one(world.send(e.Repartitioned("gpu", 1)), a.Start).partition == "g0"
    world.send(e.JobReady("j"))
    assert one(plan(2, "g1"), a.Stop).again
    world.send(e.JobExited("j"))
    assert one(world.send(e.JobQueued("j")), a.Start).partition == "g1"


def test_what_is_foretold_of_a_version_counts_until_an_instance_shows_more() -> None:
    world = placed()
    npu = e.Foretold("npu", ((1, 1, 1, 3 * MS),), 40, 1 * S)
    known = (e.Foretold("cpu", ((1, 1, 1, 7 * MS),), 50, 2 * S), npu)
    load = one(world.send(e.VersionOffered("s", "1", 0, known)), a.Load)
    state = world.d.state.services["s"]
    assert state.exec["cpu"].expected() == {1: {1: 7 * MS}} and state.load_ns == 2 * S
    assert state.exec["npu"].expected() == {1: {1: 3 * MS}} and state.occupies["npu"] == 40
    assert world.d.state.workers[load.worker].memory == 50
    up(world, load)
    assert state.exec["cpu"].expected()[1][1] == MS
    world.send(e.VersionOffered("s", "2", 1, known))
    assert state.exec["cpu"].expected()[1][1] == MS
