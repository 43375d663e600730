"""Who may join whose turns, for how long a lease is, and whom admission turns away."""

from __future__ import annotations

import random
from itertools import count

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import Partition
from cotenant.domain.plan import Plan
from cotenant.domain.request import Refusal
from cotenant.domain.units import MS, S
from cotenant.policy.generation import peak
from cotenant.policy.iterations import IterationCosts, Load
from tests.builders import World, load, one, only

TTFT, PACE = 200 * MS, 40 * MS
FIXED, TOKEN = 8 * MS, MS // 2


def talking(room: int = 0, pace: int = PACE, workers: int = 1, **kwargs: object) -> World:
    """A service of a language model, nothing asked yet; what turns cost is known."""
    world = World(units=1).service(objective=TTFT, pace=pace, **kwargs)
    for index in range(workers):
        load(world.d.state, f"w{index}", "s")
        world.send(
            e.WorkerUp(f"w{index}", "s", "1", "cpu", ((1, 1, FIXED),), turns=True, room=room)
        )
    world.planned({"s": (0,)})
    costs = world.d.state.services["s"].turn_costs
    for partition in world.d.state.partitions.values():
        known = costs.setdefault(f"{partition.kind}:{partition.compute}", IterationCosts())
        for tokens in (1, 8, 64, 512) * 20:
            known.observe(Load(tokens, (1000 - tokens) ** 2), FIXED + tokens * TOKEN)
    return world


def ask(world: World, prompt: int = 10, most: int = 20, **kwargs: object) -> list[a.Action]:
    return world.arrive(slo=TTFT, prompt=prompt, most=most, **kwargs)


def turn(
    world: World, batch: int, stay: tuple[int, ...], more: bool = False, took: int = 10 * MS
) -> list[a.Action]:
    """Each says a token; those who do not ``stay`` are finished."""
    said = tuple((r, 1) for r in world.d.state.running[batch].batch.requests)
    done = e.BatchDone(batch, took, unfinished=stay, emitted=stay, said=said, more=more)
    return world.send(done, after=took)


def held_at_most(sequences: list[tuple[int, int]]) -> int:
    """By going through all turns."""
    most = 0
    for now in count():
        going = [(held, left) for held, left in sequences if left >= now]
        if not going:
            return most
        most = max(most, sum(held + now for held, _ in going))
    return most


def test_the_peak_is_that_of_going_through_all_turns() -> None:
    draw = random.Random(0)
    for _ in range(300):
        some = [(draw.randrange(50), draw.randrange(1, 30)) for _ in range(draw.randrange(1, 8))]
        assert peak(some) == held_at_most(some)
    assert peak([]) == 0


def test_newcomers_join_the_next_turn_of_those_who_go_on() -> None:
    world = talking()
    first = one(ask(world), a.Dispatch)
    assert first.lease.turns > 1
    assert one(ask(world), a.Recall).batch == first.batch.id
    assert not only(ask(world), a.Recall), "once is enough"
    again = one(turn(world, first.batch.id, (1,)), a.Dispatch)
    assert again.batch.requests == (1, 2, 3)


def test_a_lease_goes_on_without_the_dispatcher_and_ends_when_all_is_said() -> None:
    world = talking()
    batch = one(ask(world), a.Dispatch).batch.id
    for _ in range(3):
        actions = turn(world, batch, (1,), more=True)
        assert one(actions, a.Emit).requests == (1,)
        assert not only(actions, a.Dispatch)
    assert one(turn(world, batch, ()), a.Complete).requests == (1,)
    assert not world.d.state.residents and not world.d.state.running


def test_who_is_finished_or_goes_away_in_a_lease_leaves_it() -> None:
    world = talking()
    ask(world, more=True)
    ask(world, more=True)
    batch = one(ask(world), a.Dispatch).batch
    assert batch.requests == (1, 2, 3)
    assert one(turn(world, batch.id, (1, 2), more=True), a.Complete).requests == (3,)
    world.send(e.Cancelled(2))
    actions = turn(world, batch.id, (1, 2), more=True)
    assert one(actions, a.Reject).refusal is Refusal.CANCELLED
    assert one(actions, a.Emit).requests == (1,)
    assert world.d.state.running[batch.id].batch.requests == (1,)


def test_what_a_lost_worker_had_said_in_a_lease_is_known() -> None:
    world = talking(workers=2)
    dispatch = one(ask(world), a.Dispatch)
    turn(world, dispatch.batch.id, (1,), more=True)
    lost = world.send(e.WorkerDown(dispatch.worker))
    assert one(lost, a.Reject).refusal is Refusal.WORKER_LOST


def test_where_another_service_waits_a_lease_is_one_turn_and_it_ends_one_under_way() -> None:
    world = talking()
    world.service("other", objective=400 * MS).worker("o0", "other")
    world.planned({"s": (0,), "other": (0,)}, version=2)
    lease = one(ask(world), a.Dispatch).lease
    assert 0 < lease.budget < 400 * MS
    assert one(world.arrive("other", slo=400 * MS), a.Recall).batch == 1
    then = one(turn(world, 1, (1,)), a.Dispatch)
    assert then.batch.service == "s" and then.lease.turns == 1, "a token is due before"


def test_pieces_are_due_at_the_pace_from_when_the_first_was() -> None:
    world = talking()
    ask(world)
    due = world.now + TTFT
    for said in (1, 2, 3):
        turn(world, 1, (1,), more=True)
        assert world.d.state.running[1].requests[0].deadline == due + said * PACE


def test_no_more_join_than_a_batch_has_and_the_others_wait_for_an_end() -> None:
    world = talking(max_batch=2)
    ask(world, more=True, most=4)
    batch = one(ask(world, more=True, most=4), a.Dispatch).batch
    assert batch.requests == (1, 2)
    assert not only(ask(world, most=4), a.Recall), "there is no room"

    assert not only(turn(world, batch.id, (1, 2), more=True), a.Recall), "there is no room"
    assert one(turn(world, batch.id, (1,), more=True), a.Recall)
    assert one(turn(world, batch.id, (1,)), a.Dispatch).batch.requests == (1, 3)


def test_who_would_find_no_memory_waits_until_there_is() -> None:
    world = talking(room=60)
    ask(world, prompt=20, most=14)
    ask(world, prompt=20, most=14)
    assert world.d.state.queued.keys() == {2}
    turn(world, 1, (1,), more=True)
    assert one(turn(world, 1, ()), a.Dispatch).batch.requests == (2,)


def test_a_prompt_larger_than_all_memory_is_the_model_s_to_refuse() -> None:
    world = talking(room=60)
    assert one(ask(world, prompt=500, most=1), a.Dispatch)


def test_admission_counts_prompts_ahead_memory_and_places() -> None:
    def refused(world: World, **kwargs: int) -> bool:
        return bool(only(ask(world, **kwargs), a.Reject))

    assert not refused(talking(), prompt=100)
    world = talking(pace=0)
    assert not refused(world, prompt=250)
    assert refused(world, prompt=250), "two are longer"

    world = talking(room=100, pace=0)
    assert not refused(world, prompt=50, most=40)
    assert refused(world, prompt=50, most=40), "40 turns until there is memory"
    world = talking(room=100, pace=0)
    assert not refused(world, prompt=50, most=5)
    assert not refused(world, prompt=50, most=40), "but five are soon over"

    world = talking(max_batch=1, pace=0)
    assert not refused(world, most=100)
    assert refused(world, most=1)


def test_admission_keeps_the_pace_of_those_under_way() -> None:
    world = talking(pace=10 * MS, max_batch=64)
    outcomes = [ask(world, prompt=1, most=50, more=False) for _ in range(20)]
    refused = [bool(only(each, a.Reject)) for each in outcomes]
    assert not refused[0] and refused[-1]
    reject = one(outcomes[-1], a.Reject)
    assert reject.refusal is Refusal.OVERLOADED and 0 < reject.retry_after <= 10 * S


def test_long_prompts_alone_do_not_make_a_second_answer_look_too_dear() -> None:
    world = talking(pace=PACE, max_batch=8)
    for known in world.d.state.services["s"].turn_costs.values():
        for turn_number in range(400):
            tokens = 40 if turn_number % 16 == 0 else 1
            known.observe(Load(tokens, tokens), 10 * MS + 2 * MS * (tokens - 1))
    assert not only(ask(world, more=False), a.Reject)
    assert not only(ask(world, more=False), a.Reject)


def test_answers_that_were_short_are_expected_to_be() -> None:
    world = talking(room=1000)
    for _ in range(60):
        batch = one(ask(world, most=100), a.Dispatch).batch
        turn(world, batch.id, batch.requests)
        (running,) = world.d.state.running
        turn(world, running, ())
    service = world.d.state.services["s"]
    assert service.spoken < 200_000
    ask(world, prompt=400, most=500, more=True)
    batch = one(ask(world, prompt=400, most=500), a.Dispatch).batch
    assert len(batch.requests) == 2, "they fit as long as answers are short"


def test_a_time_out_is_for_the_queue_and_an_answer_that_began_goes_on() -> None:
    world = talking()
    world.service("other", objective=400 * MS).worker("o0", "other")
    world.planned({"s": (0,), "other": (0,)}, version=2)
    world.arrive(timeout=2 * S, prompt=10, most=50)
    world.arrive("other", slo=1 * MS)
    actions = turn(world, 1, (1,))
    assert not only(actions, a.Reject)
    assert not only(world.send(e.Woke(), after=3 * S), a.Reject)


def test_a_newcomer_for_another_version_does_not_end_a_lease() -> None:
    world = talking(keep=2)
    batch = one(ask(world), a.Dispatch).batch
    service = world.d.state.services["s"]
    service.versions["2"] = 0
    load(world.d.state, "w9", "s", "2")
    world.send(e.WorkerUp("w9", "s", "2", "cpu", ((1, 1, FIXED),), turns=True))
    assert not only(ask(world, version="2"), a.Recall)
    assert world.d.state.running[batch.id].turns > 1


def test_a_partition_that_is_to_go_does_not_wait_for_a_lease_to_end() -> None:
    world = talking()
    batch = one(ask(world), a.Dispatch).batch
    merged = Plan(
        version=2,
        partitions=(Partition("all", "cpu", (0,)),),
        services={"s": ("all",)},
        jobs={},
        lendable=("all",),
    )
    assert one(world.send(e.Planned(merged)), a.Recall).batch == batch.id
    assert one(turn(world, batch.id, (1,)), a.Repartition).version == 2
