"""Laws of the dispatcher about jobs: what is idle is lent, taken back at once, and divided."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import msgspec
import pytest

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import Partition, PreemptLevel
from cotenant.domain.plan import Plan
from cotenant.domain.request import Refusal
from cotenant.domain.units import MS, US, S
from cotenant.policy import lending
from cotenant.policy.dispatcher import Dispatcher
from cotenant.policy.state import DispatcherState, PartitionState, ServiceState
from tests.builders import World, cpu, one, only

EVERY_LEVEL = pytest.mark.parametrize("level", list(PreemptLevel))
BELOW_PRIORITY = pytest.mark.parametrize(
    "level", [PreemptLevel.NONE, PreemptLevel.GATE, PreemptLevel.PAUSE]
)


def lent(level: PreemptLevel = PreemptLevel.PRIORITY, **service: int) -> World:
    """A service on one core, idle, its core lent to a job."""
    world = World(level).service(**service).worker()
    world.planned({"s": (0,)})
    one(world.job(), a.Grant)
    world.send(e.Granted("j", "p0"))
    return world


def run_for(world: World, duration: int) -> Counter[str]:
    """Let time pass; orders about jobs are carried out at once. Ns held, by job."""
    held: Counter[str] = Counter()
    since: dict[tuple[str, str], int] = {
        (p.job, p.id): world.now for p in world.d.state.partitions.values() if p.job
    }
    end = world.now + duration
    while world.d.state.armed and world.d.state.armed <= end:
        world.now = world.d.state.armed
        actions = world.send(e.Woke())
        while actions:
            action = actions.pop(0)
            if isinstance(action, a.Grant):
                since[action.job, action.partition] = world.now
                actions += world.send(e.Granted(action.job, action.partition))
            elif isinstance(action, a.Revoke):
                held[action.job] += world.now - since.pop((action.job, action.partition))
                actions += world.send(e.Revoked(action.job, action.partition, 0))
    world.now = end
    for (job, _), start in since.items():
        held[job] += end - start
    return held


# --- taking back ----------------------------------------------------------------------------


def test_with_priority_a_batch_starts_in_the_turn_that_takes_the_core_back() -> None:
    actions = lent().arrive()
    assert [type(x) for x in actions[:2]] == [a.Revoke, a.Dispatch]
    assert one(actions, a.Dispatch).preempting


@BELOW_PRIORITY
def test_below_priority_a_batch_waits_until_the_job_is_off(level: PreemptLevel) -> None:
    world = lent(level)
    actions = world.arrive()
    assert one(actions, a.Revoke).job == "j"
    assert not only(actions, a.Dispatch)
    dispatch = one(world.send(e.Revoked("j", "p0", 50 * US), after=50 * US), a.Dispatch)
    assert not dispatch.preempting


@EVERY_LEVEL
def test_a_grant_under_way_is_taken_back_too(level: PreemptLevel) -> None:
    world = World(level).service().worker()
    world.planned({"s": (0,)})
    one(world.job(), a.Grant)
    assert only(world.arrive(), a.Revoke)
    assert not world.send(e.Granted("j", "p0")), "the late answer changes nothing"


@BELOW_PRIORITY
def test_a_second_arrival_does_not_revoke_twice(level: PreemptLevel) -> None:
    world = lent(level)
    world.arrive()
    assert not only(world.arrive(), a.Revoke)
    assert one(world.send(e.Revoked("j", "p0", 0)), a.Dispatch).batch.requests == (1, 2)


@EVERY_LEVEL
def test_a_job_that_will_not_yield_is_stopped_and_the_batch_goes(level: PreemptLevel) -> None:
    world = lent(level)
    first = only(world.arrive(), a.Dispatch)
    assert one(world.send(e.ActionFailed("Revoke", "p0", "j", "stuck")), a.Stop).job == "j"
    first += only(world.send(e.JobExited("j")), a.Dispatch)
    assert [d.batch.requests for d in first] == [(1,)]


def test_only_as_many_lent_cores_are_taken_back_as_there_are_idle_instances() -> None:
    world = World(PreemptLevel.PAUSE, units=3).service(max_batch=1).worker("w0").worker("w1")
    world.planned({"s": (0, 1, 2)})
    for grant in only(world.job(), a.Grant):
        world.send(e.Granted("j", grant.partition))
    revoked = [r.partition for _ in range(4) for r in only(world.arrive(), a.Revoke)]
    assert len(revoked) == 2


# --- lending --------------------------------------------------------------------------------


def test_what_is_idle_is_lent_again_when_the_queue_has_drained() -> None:
    world = lent()
    batch = one(world.arrive(), a.Dispatch).batch.id
    world.send(e.Revoked("j", "p0", 0))
    actions = world.send(e.BatchDone(batch, 2 * MS), after=2 * MS)
    assert one(actions, a.Grant).partition == "p0"


def test_a_partition_that_is_not_lendable_is_never_lent() -> None:
    world = World().service().worker()
    world.planned({"s": (0,)}, lendable=())
    assert not only(world.job(), a.Grant)
    assert run_for(world, S) == {}


def test_nothing_is_lent_while_the_node_drains() -> None:
    world = World().service().worker()
    world.planned({"s": (0,)})
    world.send(e.Draining())
    assert not only(world.job(), a.Grant)


@EVERY_LEVEL
def test_what_is_idle_is_lent_at_once(level: PreemptLevel) -> None:
    world = lent(level)
    world.arrive()
    world.send(e.Revoked("j", "p0", 50 * MS))
    batch = world.d.state.partitions["p0"].batch
    one(world.send(e.BatchDone(batch, 1 * MS), after=1 * MS), a.Grant)


# --- slices ---------------------------------------------------------------------------------


def partition(slice_ns: int) -> tuple[DispatcherState, PartitionState]:
    state = DispatcherState()
    return state, PartitionState("p0", "cpu", "cpu", (0,), 1, slice_ns, ["s"], [], True)


def after_window(slice_ns: int, headroom_permille: int) -> int:
    state, p = partition(slice_ns)
    lending.note_headroom(p, headroom_permille)
    lending.adjust_slice(state, p, S)
    return p.slice_ns


def test_a_slice_grows_while_there_is_headroom_up_to_what_the_plan_allows() -> None:
    most = DispatcherState().plan.slice_max
    assert 10 * MS < after_window(10 * MS, 300) < most
    assert after_window(most - 1, 300) == most


def test_a_slice_shrinks_near_the_objective_down_to_what_the_plan_allows() -> None:
    least = DispatcherState().plan.slice_min
    assert least < after_window(40 * MS, lending.NEAR) < 40 * MS
    assert after_window(least, lending.NEAR) == least


def test_a_slice_is_zero_beyond_the_objective_and_recovers() -> None:
    state, p = partition(40 * MS)
    lending.note_headroom(p, 1000)
    lending.adjust_slice(state, p, 1 * S)
    assert p.slice_ns == 0
    sizes = []
    for n in range(1, 5):
        lending.adjust_slice(state, p, S + n * lending.ADJUST_EVERY)
        sizes.append(p.slice_ns)
    assert sizes[0] == state.plan.slice_min
    assert all(later > before for before, later in pairwise(sizes))


def test_slices_change_once_a_window() -> None:
    state, p = partition(10 * MS)
    lending.adjust_slice(state, p, S)
    size = p.slice_ns
    lending.adjust_slice(state, p, S + lending.ADJUST_EVERY - 1)
    assert p.slice_ns == size


def test_an_objective_that_is_missed_pauses_lending_for_a_while() -> None:
    world = lent(objective=5 * MS)
    for _ in range(40):
        if only(world.arrive(), a.Revoke):
            world.send(e.Revoked("j", "p0", 0))
        batch = world.d.state.partitions["p0"].batch
        actions = world.send(e.BatchDone(batch, 8 * MS), after=8 * MS)
        for grant in only(actions, a.Grant):
            world.send(e.Granted("j", grant.partition))
    assert world.d.state.partitions["p0"].slice_ns == 0
    assert not world.d.state.jobs["j"].held
    assert run_for(world, 3 * lending.ADJUST_EVERY)["j"] > 0, "it is lent again"


def test_an_objective_that_no_execution_meets_does_not_pause_lending_for_ever() -> None:
    """Pausing would not help it: each answer is late, however free the partition was."""
    world = World().service(objective=5 * MS).worker(exec_ns=8 * MS)
    world.planned({"s": (0,)})
    world.job()
    world.send(e.Granted("j", "p0"))
    lent = 0
    for _ in range(50):
        actions = world.arrive(slo=5 * MS, after=100 * MS)
        if only(actions, a.Revoke):
            actions += world.send(e.Revoked("j", "p0", 50 * US))
        batch = world.d.state.partitions["p0"].batch
        for grant in only(world.send(e.BatchDone(batch, 8 * MS), after=8 * MS), a.Grant):
            world.send(e.Granted("j", grant.partition))
            lent += 1
    assert lent > 40


def test_a_request_takes_another_partition_rather_than_wait_for_a_job_that_is_stopped() -> None:
    world = World(PreemptLevel.PAUSE).service().worker()
    world.planned({"s": (0, 1)})
    for name in ("a", "b"):
        for grant in only(world.job(name, units=1), a.Grant):
            world.send(e.Granted(grant.job, grant.partition))
    stuck = one(world.arrive(), a.Revoke)
    others = {p.id for p in world.d.state.partitions.values()} - {stuck.partition}
    actions = world.send(e.ActionFailed("Revoke", stuck.partition, stuck.job, "no"))
    assert one(actions, a.Stop).job == stuck.job
    assert {r.partition for r in only(actions, a.Revoke)} == others


@pytest.mark.parametrize("comes", ["before", "while"])
def test_a_grant_that_took_longer_than_its_slice_rotates_all_the_same(comes: str) -> None:
    world = World()
    world.planned({}, {"a": (0,), "b": (0,)})
    if comes == "before":
        world.send(e.JobQueued("b"))
        world.send(e.JobQueued("a"))
        grant = one(world.send(e.JobReady("a")), a.Grant)
        world.send(e.JobReady("b"))
    else:
        grant = one(world.job("a"), a.Grant)
        world.job("b")
    world.send(e.Woke(), after=2 * DispatcherState().plan.slice_max)
    world.send(e.Granted(grant.job, grant.partition))
    assert one(world.send(e.Woke(), after=1), a.Revoke).job == "a"


# --- shares ---------------------------------------------------------------------------------


def test_weights_divide_a_partition_between_two_jobs() -> None:
    world = World()
    world.planned({}, {"a": (0,), "b": (0,)})
    for name, weight in (("a", 2.0), ("b", 1.0)):
        for grant in only(world.job(name, weight=weight), a.Grant):
            world.send(e.Granted(grant.job, grant.partition))
    held = run_for(world, 20 * S)
    assert held["a"] + held["b"] == 20 * S
    assert held["a"] / held["b"] == pytest.approx(2.0, rel=0.1)


TWO_OWN = {"a": (1,), "b": (2,)}


def two_jobs(targets: dict[str, float], **service: int) -> World:
    """Each has a core of its own; the service's is lent."""
    world = World(units=3).service(**service).worker()
    world.planned({"s": (0,)}, TWO_OWN, targets=targets)
    for name in ("a", "b"):
        for grant in only(world.job(name), a.Grant):
            world.send(e.Granted(grant.job, grant.partition))
    return world


@pytest.mark.parametrize(
    ("targets", "ratio"), [({}, 1.0), ({"a": 2.0, "b": 1.0}, 2.0), ({"a": 1.2, "b": 1.8}, 2 / 3)]
)
def test_what_is_lent_goes_to_whom_the_plan_says(targets: dict[str, float], ratio: float) -> None:
    held = run_for(two_jobs(targets), 20 * S)
    assert held["a"] + held["b"] == pytest.approx(60 * S, rel=0.01)
    assert held["a"] / held["b"] == pytest.approx(ratio, rel=0.1)


def test_who_holds_what_changes_with_the_plan() -> None:
    world = two_jobs({})
    run_for(world, 10 * S)
    for version, targets, ratio in (
        (2, {"a": 1.2, "b": 1.8}, 1.5),
        (3, {"a": 1.8, "b": 1.2}, 2 / 3),
        (4, {}, 1.0),
    ):
        world.planned({"s": (0,)}, TWO_OWN, version=version, targets=targets)
        held = run_for(world, 10 * S)
        assert held["b"] / held["a"] == pytest.approx(ratio, rel=0.05), targets


def test_a_job_that_comes_back_does_not_cash_in_the_time_it_was_away() -> None:
    world = World()
    world.planned({}, {"a": (0,), "b": (0,)})
    for grant in only(world.job("a"), a.Grant):
        world.send(e.Granted(grant.job, grant.partition))
    run_for(world, 10 * S)
    world.job("b")
    held = run_for(world, 4 * S)
    assert held["b"] / held["a"] == pytest.approx(1.0, rel=0.2)


def test_a_job_holds_no_more_than_its_limit() -> None:
    world = World(units=3)
    world.planned({}, {"j": (0, 1, 2)})
    grants = only(world.job("j", units=2), a.Grant)
    assert len(grants) == 2


def test_what_one_job_may_not_take_another_gets() -> None:
    world = World(units=3)
    world.planned({"s": (0, 1, 2)})
    world.job("a", units=1)
    assert len(only(world.job("b", units=3), a.Grant)) == 2


def test_a_job_that_is_gone_makes_room_for_the_next() -> None:
    world = lent()
    assert not only(world.job("k"), a.Grant)
    assert one(world.send(e.JobExited("j")), a.Grant).job == "k"


def test_a_grant_that_fails_is_not_tried_again_at_once() -> None:
    world = World().service().worker()
    world.planned({"s": (0,)})
    one(world.job("j"), a.Grant)
    actions = world.send(e.ActionFailed("Grant", "p0", "j", "gone"))
    assert not only(actions, a.Grant)
    wake = one(actions, a.WakeAt)
    world.now = wake.at
    assert one(world.send(e.Woke()), a.Grant).job == "j"


def test_a_partition_of_its_own_is_not_kept_by_a_guest() -> None:
    world = World()
    world.planned({}, {"owner": (0,), "other": ()})
    assert only(world.job("guest"), a.Grant)
    world.send(e.Granted("guest", "p0"))
    for grant in only(world.job("owner"), a.Grant):
        world.send(e.Granted(grant.job, grant.partition))
    run_for(world, S)
    assert world.d.state.partitions["p0"].job == "owner"


# --- guaranteed shares ----------------------------------------------------------------------


def under_pressure(strict: bool) -> tuple[World, Counter[Refusal]]:
    """One core, a job that is owed half of it, and requests that would take all of it."""
    world = World(units=1).service(max_batch=1, strict=strict).worker()
    world.planned({"s": (0,)})
    for grant in only(world.job("j", units=1, guaranteed=0.5), a.Grant):
        world.send(e.Granted("j", grant.partition))
    refused: Counter[Refusal] = Counter()
    end = world.now + 4 * S
    pending: list[a.Action] = []
    due: dict[int, int] = {}
    next_arrival = world.now
    while world.now < end:
        while pending:
            action = pending.pop(0)
            match action:
                case a.Dispatch(batch=batch):
                    due[batch.id] = world.now + 2 * MS
                case a.Reject(refusal=refusal):
                    refused[refusal] += 1
                case a.Grant(job=job, partition=p):
                    pending += world.send(e.Granted(job, p))
                case a.Revoke(job=job, partition=p):
                    pending += world.send(e.Revoked(job, p, 20 * US))
        times = [*due.values(), next_arrival]
        if world.d.state.armed:
            times.append(world.d.state.armed)
        world.now = max(world.now, min(times))
        for batch in [b for b, at in due.items() if at <= world.now]:
            del due[batch]
            pending += world.send(e.BatchDone(batch, 2 * MS))
        if next_arrival <= world.now:
            pending += world.arrive(slo=20 * MS)
            next_arrival = world.now + 1500 * US
        if world.d.state.armed and world.d.state.armed <= world.now:
            pending += world.send(e.Woke())
    return world, refused


def share(world: World) -> float:
    """Share of the device that the job had, of the four seconds."""
    job = world.d.state.jobs["j"]
    state = world.d.state
    running = sum(state.now - state.partitions[p].held_since for p in job.held)
    return (job.vtime + running) / (4 * S)


def test_a_guaranteed_share_is_paid_by_admitting_less() -> None:
    world, refused = under_pressure(strict=False)
    assert refused[Refusal.RESERVED] > 0
    assert share(world) == pytest.approx(0.5, abs=0.1)


def test_a_strict_service_is_not_tightened() -> None:
    world, refused = under_pressure(strict=True)
    assert refused[Refusal.RESERVED] == 0
    assert share(world) < 0.2


def test_a_reserved_refusal_says_when_to_come_back() -> None:
    world = World(units=1).service(max_batch=1).worker()
    world.planned({"s": (0,)})
    world.job("j", units=1, guaranteed=0.5)
    world.send(e.ActionFailed("Grant", "p0", "j", "not now"))
    world.now += 200 * MS
    rejects: list[a.Reject] = []
    while not rejects:
        actions = world.arrive(slo=500 * MS)
        rejects = only(actions, a.Reject)
        for dispatch in only(actions, a.Dispatch):
            world.send(e.BatchDone(dispatch.batch.id, 2 * MS))
    assert rejects[0].refusal is Refusal.RESERVED
    assert not only(world.arrive(slo=500 * MS, after=rejects[0].retry_after), a.Reject)


def test_debt_is_bounded_by_one_window() -> None:
    world = World(units=1)
    world.job("j", units=1, guaranteed=0.5)
    job = world.d.state.jobs["j"]
    owed = lending.DEBT_WINDOW * job.guaranteed // 1_000_000
    assert lending.debt(world.d.state, job, world.now + 3600 * S, 1) == owed


def test_a_mean_gap_is_learned_from_arrivals() -> None:
    world = lent()
    for _ in range(50):
        world.arrive(after=3 * MS)
    service: ServiceState = world.d.state.services["s"]
    assert service.gap == pytest.approx(3 * MS, rel=0.01)


def test_nothing_of_a_device_that_only_serves_is_lent() -> None:
    world = World()
    world.d = Dispatcher((cpu(2), cpu(1, id="npu", kind="npu", trains=False)))
    world.service().worker().job()
    parts = (Partition("p0", "cpu", (0,)), Partition("n0", "npu", (0,)))
    actions = world.send(e.Planned(Plan(1, parts, {"s": ("p0",)}, {}, ("p0",))))
    while moves := [x for x in actions if isinstance(x, a.Repartition)]:
        actions = [y for m in moves for y in world.send(e.Repartitioned(m.device, m.version))]
        actions += world.send(e.Woke(), after=1 * S)
    run_for(world, 2 * S)
    assert world.d.state.partitions["p0"].job == "j"
    assert not world.d.state.partitions["n0"].job


# --- jobs that cannot be held back ----------------------------------------------------------


def test_a_job_that_is_seen_not_to_yield_leaves_the_services_and_stays_away() -> None:
    world = lent(PreemptLevel.GATE)
    stop = one(world.send(e.JobLevel("j", "cpu", PreemptLevel.NONE)), a.Stop)
    assert (stop.job, stop.again) == ("j", True)
    dispatched = world.send(e.JobExited("j")) + world.arrive()
    assert only(dispatched, a.Dispatch), "nothing of it is in the way"
    assert not only(world.send(e.JobQueued("j", apart=("cpu",))), a.Start)
    assert world.d.state.tenants["j"].waits
    assert only(world.job("other"), a.Start), "others are not"


def test_it_may_run_where_nothing_is_served() -> None:
    world = World(PreemptLevel.GATE).service().worker()
    world.planned({"nobody": (0,)})
    assert only(world.job(apart=("cpu",)), a.Grant)
    assert not only(world.send(e.JobLevel("j", "cpu", PreemptLevel.NONE)), a.Stop)
    stopped = world.planned({"s": (0,)}, version=2)
    assert one(stopped, a.Stop).job == "j"


def test_it_is_kept_apart_on_the_device_where_it_was_seen_and_on_no_other() -> None:
    gpus = tuple(cpu(1, PreemptLevel.GATE, g, kind="gpu", pins_jobs=True) for g in ("g0", "g1"))
    world = World()
    world.d = Dispatcher(gpus)
    world.service()
    parts = (Partition("p0", "g0", (0,)), Partition("p1", "g1", (0,)))

    def planned(version: int, place: str) -> list[a.Action]:
        services, jobs = {"s": ("p0", "p1")}, {"j": (place,)}
        actions = world.send(e.Planned(Plan(version, parts, services, jobs, ("p0", "p1"))))
        for move in only(actions, a.Repartition):
            actions += world.send(e.Repartitioned(move.device, move.version))
        return actions

    planned(1, "p0")
    assert one(world.send(e.JobQueued("j")), a.Start).partition == "p0"
    world.send(e.JobReady("j"))
    assert one(world.send(e.JobLevel("j", "g0", PreemptLevel.NONE)), a.Stop).again
    world.send(e.JobExited("j"))
    assert not only(world.send(e.JobQueued("j", apart=("g0",))), a.Start)
    assert one(planned(2, "p1"), a.Start).partition == "p1", "services are there too"
    assert only(world.send(e.JobReady("j")), a.Grant)


def test_a_job_that_comes_with_no_level_at_all_is_kept_apart_too() -> None:
    world = World(PreemptLevel.GATE).service().worker()
    world.planned({"s": (0,)})
    world.send(e.JobQueued("j"))
    actions = world.send(e.JobReady("j", {"cpu": PreemptLevel.NONE}))
    assert one(actions, a.Stop).job == "j" and not only(actions, a.Grant)


def test_where_a_device_falls_to_none_jobs_leave_the_services_there() -> None:
    world = lent(PreemptLevel.GATE)
    fallen = msgspec.structs.replace(world.d.devices[0], preempt=PreemptLevel.NONE)
    stop = one(world.send(e.DeviceChanged(fallen)), a.Stop)
    assert (stop.job, stop.again, stop.cause) == ("j", True, "DeviceChanged:cpu")
    assert world.d.devices == (fallen,)
    assert only(world.send(e.JobExited("j")) + world.arrive(), a.Dispatch)
    assert not only(world.send(e.JobQueued("j", apart=("cpu",))), a.Start)


def test_a_job_that_waits_is_not_started_where_its_device_fell_to_none() -> None:
    world = World(PreemptLevel.GATE).service().worker()
    world.d.state.most_jobs = 1
    world.planned({"s": (0,)})
    world.job("first")
    world.send(e.JobQueued("second"))
    fallen = msgspec.structs.replace(world.d.devices[0], preempt=PreemptLevel.NONE)
    world.send(e.DeviceChanged(fallen))
    assert not only(world.send(e.JobExited("first")), a.Start)


def test_a_device_that_says_something_else_than_its_level_keeps_its_jobs() -> None:
    world = lent(PreemptLevel.NONE)
    spec = msgspec.structs.replace(world.d.devices[0], limits=("it was tried",))
    assert not only(world.send(e.DeviceChanged(spec)), a.Stop)
    assert not only(world.send(e.DeviceChanged(cpu(1, id="unknown"))), a.Stop)
    assert world.d.devices == (spec,)


def test_another_level_than_none_is_no_reason_to_stop() -> None:
    world = lent(PreemptLevel.PRIORITY)
    assert not only(world.send(e.JobLevel("j", "cpu", PreemptLevel.GATE)), a.Stop)
    actions = world.arrive()
    assert one(actions, a.Revoke) and not only(actions, a.Dispatch), "it is waited for now"
    for late in (
        e.JobLevel("nobody", "cpu", PreemptLevel.NONE),
        e.JobLevel("j", "x", PreemptLevel.NONE),
    ):
        assert not world.send(late)
