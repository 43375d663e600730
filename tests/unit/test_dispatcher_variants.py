"""Laws of the dispatcher about variants: another takes over without a gap, or not at all."""

from __future__ import annotations

from typing import Any

import msgspec

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.units import MS
from cotenant.domain.workload import Variant
from tests.builders import World, one, only, plan

FAST, FASTER = Variant(name="fast", accuracy=0.9), Variant(name="faster", accuracy=0.8)


def serving(*variants: Variant, **service: Any) -> World:
    """A service whose original serves, and whose version has these variants."""
    world = World().service(**service)
    world.planned({"s": (0, 1)})
    world.send(e.VariantsKnown("s", "1", {"cpu": variants}))
    world.offer("1")
    return world


def choose(world: World, variant: str, version: int = 2) -> list[a.Action]:
    chosen = plan({"s": (0, 1)}, version=version, variants={"s": {"cpu": variant}})
    return world.send(e.Planned(chosen))


def stand_by(world: World, variant: str, version: int = 2) -> list[a.Action]:
    chosen = plan({"s": (0, 1)}, version=version, ready={"s": {"cpu": variant}})
    return world.send(e.Planned(chosen))


def up(world: World, load: a.Load, took: int = MS) -> list[a.Action]:
    profile = ((1, 1, took), (1, 8, took))
    return world.send(e.WorkerUp(load.worker, load.service, load.version, load.device, profile))


def variant_of(world: World, dispatch: a.Dispatch) -> str:
    return world.d.state.workers[dispatch.worker].variant


def test_the_original_serves_as_long_as_the_plan_names_no_other() -> None:
    world = serving(FAST)
    assert variant_of(world, one(world.arrive(), a.Dispatch)) == "original"


def test_what_the_plan_chooses_is_loaded_beside_what_serves_and_takes_over() -> None:
    world = serving(FAST)
    load = one(choose(world, "fast"), a.Load)
    assert load.variant == "fast"
    first = one(world.arrive(), a.Dispatch)
    assert variant_of(world, first) == "original"
    world.send(e.BatchDone(first.batch.id, MS))
    gone = one(up(world, load), a.Unload)
    assert variant_of(world, one(world.arrive(), a.Dispatch)) == "fast"
    assert gone.worker != load.worker


def test_all_instances_are_up_before_another_variant_takes_over() -> None:
    world = serving(FAST, instances=2)
    first, second = only(choose(world, "fast"), a.Load)
    assert not only(up(world, first), a.Unload)
    assert len(only(up(world, second), a.Unload)) == 2


def test_one_that_executes_finishes_its_batch_before_it_goes() -> None:
    world = serving(FAST)
    load = one(choose(world, "fast"), a.Load)
    running = one(world.arrive(), a.Dispatch)
    assert not only(up(world, load), a.Unload)
    done = world.send(e.BatchDone(running.batch.id, MS))
    assert one(done, a.Unload).worker == running.worker
    assert one(done, a.Complete).requests == running.batch.requests


def test_a_variant_that_cannot_be_loaded_leaves_the_original() -> None:
    world = serving(FAST)
    load = one(choose(world, "fast"), a.Load)
    failed = world.send(e.LoadFailed(load.worker, "no good"))
    assert not only(failed, a.Load) and not only(failed, a.Unload) and not only(failed, a.Decline)
    assert variant_of(world, one(world.arrive(), a.Dispatch)) == "original"


def test_it_is_tried_again_once_its_files_are_others() -> None:
    world = serving(FAST)
    load = one(choose(world, "fast"), a.Load)
    world.send(e.LoadFailed(load.worker, "no good"))
    again = world.send(e.VariantsKnown("s", "1", {"cpu": (FAST, FASTER)}))
    assert one(again, a.Load).variant == "fast"


def test_where_the_original_cannot_be_loaded_another_serves() -> None:
    world = World().service()
    world.planned({"s": (0, 1)})
    world.send(e.VariantsKnown("s", "1", {"cpu": (FAST,)}))
    load = one(world.send(e.VersionOffered("s", "1")), a.Load)
    failed = world.send(e.LoadFailed(load.worker, "an operator is not supported"))
    other = one(failed, a.Load)
    assert other.variant == "fast" and not only(failed, a.Decline)
    assert one(up(world, other), a.Serve).version == "1"


def test_a_version_none_of_whose_variants_can_be_loaded_is_declined() -> None:
    world = World().service()
    world.planned({"s": (0, 1)})
    world.send(e.VariantsKnown("s", "1", {"cpu": (FAST,)}))
    load = one(world.send(e.VersionOffered("s", "1")), a.Load)
    load = one(world.send(e.LoadFailed(load.worker, "no")), a.Load)
    assert one(world.send(e.LoadFailed(load.worker, "no")), a.Decline).version == "1"


def test_a_variant_that_is_gone_gives_way_to_the_original() -> None:
    world = serving(FAST)
    fast = one(choose(world, "fast"), a.Load)
    up(world, fast)
    back = one(world.send(e.VariantsKnown("s", "1", {})), a.Load)
    assert back.variant == "original"
    assert one(up(world, back), a.Unload).worker == fast.worker


def test_predictions_are_of_the_variant_that_serves() -> None:
    world = serving(FAST)
    state = world.d.state.services["s"]
    original = state.exec["cpu"].predict(1, 1)
    up(world, one(choose(world, "fast"), a.Load), took=original // 10)
    assert state.exec["cpu"].predict(1, 1) < original // 2
    up(world, one(choose(world, "original", 3), a.Load), took=original)
    assert state.exec["cpu"].predict(1, 1) >= original // 2


def test_what_an_outgoing_variant_took_is_not_learned_of_the_new_one() -> None:
    world = serving(FAST)
    load = one(choose(world, "fast"), a.Load)
    running = one(world.arrive(), a.Dispatch)
    up(world, load)
    costs = world.d.state.services["s"].exec["cpu"]
    before = costs.predict(1, 1)
    world.send(e.BatchDone(running.batch.id, 40 * MS), after=40 * MS)
    assert costs.predict(1, 1) == before


def test_a_new_version_serves_in_the_variant_that_was_chosen_if_it_has_it() -> None:
    world = serving(FAST)
    up(world, one(choose(world, "fast"), a.Load))
    world.send(e.VariantsKnown("s", "2", {"cpu": (FAST,)}))
    load = one(world.send(e.VersionOffered("s", "2", 1)), a.Load)
    assert (load.version, load.variant) == ("2", "fast")
    up(world, load)
    plain = one(world.send(e.VersionOffered("s", "3", 2)), a.Load)
    assert (plain.version, plain.variant) == ("3", "original")


def test_a_checkpoint_goes_on_as_the_dispatcher_would() -> None:
    from cotenant.policy.dispatcher import Dispatcher
    from cotenant.policy.state import DispatcherState

    world = serving(FAST)
    up(world, one(choose(world, "fast"), a.Load))
    kept = msgspec.msgpack.decode(msgspec.msgpack.encode(world.d.state), type=DispatcherState)
    other = Dispatcher(world.d.devices, kept)
    event = e.VariantsKnown("s", "1", {})
    assert other.handle(world.now, event) == world.d.handle(world.now, event)


def test_what_stands_by_is_given_nothing_and_takes_over_at_once() -> None:
    world = serving(FAST)
    load = one(stand_by(world, "fast"), a.Load)
    assert not only(up(world, load), a.Unload)
    first = one(world.arrive(), a.Dispatch)
    assert variant_of(world, first) == "original"
    world.send(e.BatchDone(first.batch.id, MS))
    assert not only(choose(world, "fast", 3), a.Load)
    assert variant_of(world, one(world.arrive(), a.Dispatch)) == "fast"


def test_what_served_may_stand_by_once_another_does() -> None:
    world = serving(FAST)
    up(world, one(stand_by(world, "fast"), a.Load))
    running = one(world.arrive(), a.Dispatch)
    both = plan(
        {"s": (0, 1)},
        version=3,
        variants={"s": {"cpu": "fast"}},
        ready={"s": {"cpu": "original"}},
    )
    assert not only(world.send(e.Planned(both)), a.Unload)
    world.send(e.BatchDone(running.batch.id, MS))
    assert variant_of(world, one(world.arrive(), a.Dispatch)) == "fast"
    assert not only(stand_by(world, "fast", 4), a.Load)
    (running,) = world.d.state.running
    world.send(e.BatchDone(running, MS))
    assert variant_of(world, one(world.arrive(), a.Dispatch)) == "original"


def test_what_is_to_stand_by_no_more_goes() -> None:
    world = serving(FAST)
    load = one(stand_by(world, "fast"), a.Load)
    up(world, load)
    gone = one(world.send(e.Planned(plan({"s": (0, 1)}, version=3))), a.Unload)
    assert gone.worker == load.worker
