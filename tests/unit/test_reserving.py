"""Reservations as the policy sees them: promised only where there is room, and then kept."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotenant.domain.reservation import Reservation
from cotenant.domain.snapshot import JobFacts, ServiceFacts, Snapshot
from cotenant.domain.units import MS, S
from cotenant.policy.layouts import job_layouts
from cotenant.policy.reserving import Room, find_room
from tests.unit import test_planner_mig as mig
from tests.unit.test_planner import Planning, job, service
from tests.unit.test_planner_even import Dividing, scaling

GIB = 2**30


def asks(id: str = "r", device: str = "cpu", **changes: Any) -> Reservation:
    return Reservation(id, device, **changes)


def reserved(wanted: Reservation, compute: int, kind: str = "cpu") -> JobFacts:
    """The job that stands for it."""
    share = wanted.units / compute if wanted.units else wanted.share
    return job(
        wanted.id, guaranteed=share, limit=wanted.limit, kind=kind, device=wanted.device,
        own=wanted.units, memory=wanted.memory,
    )  # fmt: skip


def room(world: Planning, wanted: Reservation, *facts: ServiceFacts | JobFacts) -> Room:
    return find_room(world.planner, world.snapshot(*facts), wanted)


def owned(world: Planning, name: str = "r") -> int:
    mine = set(world.present.jobs.get(name, ()))
    return sum(p.compute for p in world.present.partitions if p.id in mine)


def run(world: Planning, seconds: int, *facts: ServiceFacts | JobFacts) -> None:
    for _ in range(seconds):
        world.see(*facts)


# --- units of its own -----------------------------------------------------------------------


@pytest.mark.parametrize("units", [1, 3, 7])
def test_units_of_its_own_are_there_at_once_and_stay(units: int) -> None:
    world = Planning(8)
    busy = service(rate=10.0)
    run(world, 5, busy, job())
    wanted = asks(units=units)
    answer = room(world, wanted, busy, job())
    assert not answer.refusal and answer.would
    mine = reserved(wanted, 8)
    assert world.see(busy, job(), mine) is not None
    for _ in range(300):
        assert owned(world) == units
        serving = {p for there in world.present.services.values() for p in there}
        assert not serving & set(world.present.jobs["r"])
        world.see(busy, job(), mine)


def test_services_take_back_no_reserved_unit_however_many_requests_come() -> None:
    world = Planning(4)
    mine = reserved(asks(units=2), 4)
    run(world, 5, service(rate=10.0), mine)
    run(world, 120, service(rate=500.0, refused=10_000, answered=1), mine)
    assert owned(world) == 2 and world.service_cores <= 2


def test_what_was_reserved_goes_back_to_services_once_it_is_released() -> None:
    world = Planning(4)
    mine = reserved(asks(units=3), 4)
    run(world, 5, service(rate=10.0), mine)
    before = world.service_cores
    run(world, 120, service(rate=150.0))
    assert world.service_cores > before


def test_more_jobs_than_units_do_not_take_a_reserved_one() -> None:
    world = Planning(4)
    jobs = [job(f"j{n}") for n in range(6)]
    run(world, 3, service(rate=1.0), *jobs, reserved(asks(units=1), 4))
    assert owned(world) == 1


def test_there_is_no_room_where_a_service_would_not_hold_its_objective() -> None:
    world = Planning(4)
    busy = service(rate=120.0)
    run(world, 60, busy)
    assert room(world, asks(units=3), busy).refusal
    run(world, 5, service(rate=1.0))
    assert room(world, asks(units=3), service(rate=1.0)).refusal, "its peak was a moment ago"


def test_asking_changes_nothing() -> None:
    world = Planning(8)
    busy = service(rate=10.0)
    run(world, 5, busy)
    before = msgspec.json.encode(world.planner.state)
    for units in (1, 4, 8):
        room(world, asks(units=units), busy)
    assert msgspec.json.encode(world.planner.state) == before


# --- shares of time -------------------------------------------------------------------------


def test_guarantees_together_are_no_more_than_there_is() -> None:
    world = Planning(4)
    idle = service(rate=0.0, guaranteed=0.25)
    world.see(idle)
    mine: list[JobFacts] = []
    for number, (share, fits) in enumerate(
        [(0.5, True), (0.3, False), (0.25, True), (0.01, False)]
    ):
        wanted = asks(f"r{number}", share=share)
        assert bool(room(world, wanted, idle, *mine).refusal) is not fits
        if fits:
            mine.append(reserved(wanted, 4))
            world.see(idle, *mine)


def test_a_share_is_refused_if_services_need_the_time_at_their_peak() -> None:
    world = Planning(2)
    busy = service(rate=70.0)
    run(world, 60, busy)
    assert room(world, asks(share=0.9), busy).refusal
    assert not room(world, asks(share=0.05), busy).refusal


def test_who_cannot_wait_for_a_share_is_to_ask_for_units() -> None:
    world = Planning(4)
    world.see(service())
    soon = 20 * MS
    assert room(world, asks(share=0.5, within=soon), service()).refusal
    assert not room(world, asks(share=0.5, within=60 * S), service()).refusal
    assert not room(world, asks(units=2, within=soon), service()).refusal


def test_a_fixed_split_leaves_what_it_leaves() -> None:
    world = Planning(4, split=(3, 1))
    world.see(service())
    assert not room(world, asks(units=1), service()).refusal
    assert room(world, asks(units=2), service()).refusal


# --- MIG ------------------------------------------------------------------------------------


class Slicing(mig.Planning):
    """A GPU in MIG mode, whose jobs can be reservations."""

    def snapshot(self, *facts: ServiceFacts | JobFacts) -> Snapshot:
        services = tuple(f for f in facts if isinstance(f, ServiceFacts))
        jobs = tuple(f for f in facts if isinstance(f, JobFacts))
        return Snapshot(self.now, (self.device,), self.present, services, jobs)

    def own(self, name: str) -> list[str]:
        mine = set(self.present.jobs.get(name, ()))
        return [mig.profile(p.id) for p in self.present.partitions if p.id in mine]


def instance(name: str, units: int, gib: int = 0) -> JobFacts:
    return reserved(asks(name, "gpu0", units=units, memory=gib * GIB), 7, "mig")


def test_an_instance_is_reserved_for_one_alone() -> None:
    world = Slicing()
    model = mig.model(rate=20.0)
    world.settle(model, job("t", kind="mig"), seconds=20)
    wanted = asks("r", "gpu0", units=2, memory=15 * GIB)
    assert not find_room(world.planner, world.snapshot(model, job("t", kind="mig")), wanted).refusal
    mine = instance("r", 2, 15)
    world.settle(model, job("t", kind="mig"), mine, seconds=200)
    (profile,) = world.own("r")
    assert profile.startswith(("2g", "3g")) and not set(world.present.jobs["r"]) & set(
        world.present.jobs.get("t", ())
    )


def test_without_services_as_many_instances_are_formed_as_are_reserved() -> None:
    world = Slicing()
    mine = [instance("a", 3, 35), instance("b", 2), instance("c", 1)]
    world.settle(*mine, seconds=10)
    assert [world.own(name)[0][0] for name in "abc"] == ["3", "2", "1"]


def test_instances_beyond_the_gpu_are_refused() -> None:
    world = Slicing()
    there = [instance("a", 4)]
    world.settle(*there, seconds=10)
    snapshot = world.snapshot(*there)
    assert find_room(world.planner, snapshot, asks("b", "gpu0", units=4)).refusal
    assert not find_room(world.planner, snapshot, asks("b", "gpu0", units=3)).refusal


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_what_was_promised_is_kept(wishes: list[int], rng: random.Random) -> None:
    """Whatever is asked for in whatever order: who was promised an instance has it, until it lets
    go of it."""
    world = Slicing()
    model = mig.model(rate=rng.choice([0.0, 5.0, 60.0]))
    held: dict[str, JobFacts] = {}
    world.settle(model, seconds=3)
    for number, units in enumerate(wishes):
        name = f"r{number}"
        snapshot = world.snapshot(model, *held.values())
        if not find_room(world.planner, snapshot, asks(name, "gpu0", units=units)).refusal:
            held[name] = instance(name, units)
        world.settle(model, *held.values(), seconds=3)
        for mine in held.values():
            (profile,) = world.own(mine.id)
            assert int(profile[0]) >= mine.own
        if held and rng.random() < 0.3:
            del held[rng.choice(sorted(held))]


def test_there_is_a_layout_for_each_full_set_of_instances() -> None:
    for layout in job_layouts(mig.gpu()):
        assert layout.free and not layout.mine


# --- devices that only serve ----------------------------------------------------------------


def test_a_device_that_only_serves_is_reserved_as_a_whole_if_services_can_go_elsewhere() -> None:
    world = Dividing()
    (gpu,) = world.devices
    moves = scaling("s", rate=1.0)
    world.see(moves)
    part, whole = asks(device="cuda", units=1), asks(device="cuda", units=gpu.compute)
    assert room(world, part, moves).refusal
    assert room(world, asks(device="cuda", share=0.5), moves).refusal
    assert room(world, whole, moves).refusal, "the service has no other place"
    world = Dividing()
    world.devices = (gpu, *Planning(4).devices)
    times = moves.exec_ns | service().exec_ns
    moves = msgspec.structs.replace(moves, exec_ns=times)
    run(world, 5, moves)
    assert not room(world, whole, moves).refusal
    mine = job("r", guaranteed=1.0, kind="cuda", device="cuda", own=gpu.compute)
    world.planner.plan(world.snapshot(moves, mine))
    assert set(world.planner.state.parts["s"]) == {"cpu"}
    assert room(world, whole, moves, mine).refusal, "it is reserved"


def test_reservations_of_all_sizes_fit_as_long_as_units_are_left() -> None:
    rng = random.Random(7)
    for _ in range(30):
        world = Planning(rng.choice([2, 4, 16]))
        compute = world.devices[0].compute
        load = service(rate=rng.choice([0.0, 5.0, 40.0]))
        run(world, 3, load)
        held: dict[str, JobFacts] = {}
        for number in range(12):
            wanted = asks(
                f"r{number}",
                **rng.choice([{"units": rng.randint(1, compute)}, {"share": rng.random() or 0.5}]),
            )
            if not room(world, wanted, load, *held.values()).refusal:
                held[wanted.id] = reserved(wanted, compute)
            run(world, 2, load, *held.values())
            assert all(owned(world, name) >= mine.own for name, mine in held.items())
            assert sum(max(j.own / compute, j.guaranteed) for j in held.values()) <= 1 + 1e-9
            if held and rng.random() < 0.4:
                del held[rng.choice(sorted(held))]
