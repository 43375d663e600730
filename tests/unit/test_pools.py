"""How large which pool is: the room of the dispatcher that lends memory."""

from __future__ import annotations

import msgspec

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import PreemptLevel
from cotenant.domain.units import MS, S
from cotenant.policy.dispatcher import Dispatcher
from tests.builders import World, cpu, load, one, only

BYTES = 10
"""A token takes so many."""
MOST = 100 * BYTES


class Lending(World):
    """Two services with a pool each, of a budget that is too small for both."""

    def __init__(self, budget: int = MOST, guaranteed: int = 0, block: int = 1) -> None:
        super().__init__(units=1)
        device = msgspec.structs.replace(cpu(1, PreemptLevel.PRIORITY), kv=budget)
        self.d = Dispatcher((device,))
        self.sizes: dict[str, int] = {}
        for name in ("s", "t"):
            self.service(name, objective=60 * S, kv=guaranteed)
            load(self.d.state, f"{name}0", name)
            up = e.WorkerUp(f"{name}0", name, "1", "cpu", ((1, 1, MS),), turns=True)
            self.send(msgspec.structs.replace(up, room=100, pool=MOST, block=block))
        self.planned({"s": (0,), "t": (0,)})

    def send(self, event: e.Event, after: int = 0) -> list[a.Action]:
        actions = super().send(event, after)
        for order in only(actions, a.Resize):
            self.sizes[order.holder] = order.size
        for ledger in self.d._pools._ledgers.values():
            ledger.check()
            assert sum(self.sizes.values()) <= ledger.usable + ledger.coming
        return actions

    def report(self, name: str, wanted: int, used: int = 0) -> list[a.Action]:
        """It has taken what it may have, or gives what it must not, as far as that is unused."""
        held = max(self.sizes[name], used)
        spare = held - used
        return self.send(e.Held(name, held, wanted, spare, spare), after=S)

    def wake(self) -> None:
        self.send(e.Woke(), after=S)


def test_a_pool_that_nobody_uses_has_nothing_and_grows_when_it_is_wanted() -> None:
    world = Lending()
    assert world.sizes == {"s0": 0, "t0": 0}
    world.report("s0", 40 * BYTES)
    world.wake()
    assert 40 * BYTES <= world.sizes["s0"] <= MOST


def test_what_waits_in_the_queue_is_wanted_before_the_instance_knows_of_it() -> None:
    world = Lending()
    world.arrive("s", slo=60 * S, prompt=10, most=20)
    world.arrive("t", slo=60 * S, prompt=30, most=20)
    world.wake()
    assert world.sizes["t0"] >= 50 * BYTES


def test_two_that_want_all_share_it_and_who_wants_less_lends_the_rest() -> None:
    world = Lending()
    world.report("s0", MOST)
    world.wake()
    assert world.sizes["s0"] == MOST
    world.report("s0", MOST)
    for _ in range(4):
        world.report("t0", MOST)
        world.report("s0", MOST)
        world.wake()
    assert world.sizes == {"s0": MOST // 2, "t0": MOST // 2}


def test_what_is_in_use_is_waited_for_and_a_guarantee_gets_it() -> None:
    world = Lending(guaranteed=MOST // 2)
    world.report("s0", MOST)
    world.wake()
    world.report("s0", MOST, used=MOST)
    world.report("t0", MOST // 2)
    world.wake()
    assert world.sizes["s0"] == MOST // 2, "it is asked to put work aside"
    assert world.sizes["t0"] == 0, "nothing is given twice"
    world.report("s0", MOST, used=MOST // 2)
    assert world.sizes["t0"] == MOST // 2


def test_the_memory_of_an_instance_that_died_is_the_others() -> None:
    world = Lending()
    world.report("s0", MOST)
    world.wake()
    world.report("s0", MOST)
    world.report("t0", MOST)
    del world.sizes["s0"]
    world.send(e.WorkerDown("s0"))
    world.wake()
    assert world.sizes["t0"] == MOST


def test_who_can_do_nothing_for_want_of_memory_gets_no_turns_until_there_is() -> None:
    world = Lending()
    world.report("t0", MOST)
    world.wake()
    world.report("t0", MOST, used=MOST)
    batch = one(world.arrive("s", slo=60 * S, prompt=50, most=20), a.Dispatch).batch
    done = e.BatchDone(batch.id, MS, unfinished=batch.requests)
    assert not only(world.send(done), a.Dispatch)
    world.report("s0", 70 * BYTES)
    for _ in range(5):
        world.report("t0", MOST, used=world.sizes["t0"])
        world.wake()
    assert world.d.state.running, "it has a turn again"


def test_without_a_budget_each_has_its_limit() -> None:
    world = Lending(budget=0)
    assert not world.sizes
    world.arrive("s", slo=60 * S, prompt=10, most=20)
    assert world.d.state.workers["s0"].room == 100


def test_a_newcomer_is_admitted_by_what_its_pool_could_be_lent() -> None:
    world = Lending()
    for _ in range(3):
        assert not only(world.arrive("s", slo=60 * S, prompt=10, most=20), a.Reject)
    assert world.d.state.workers["s0"].reach == 100
    world.report("s0", MOST)
    world.report("t0", MOST)
    assert world.d.state.workers["s0"].reach == 50, "its even part, where others want all"


def test_pools_are_whole_blocks_and_a_part_of_one_holds_up_nobody() -> None:
    world = Lending(block=30)
    ledger = world.d._pools._ledgers["cpu"]
    world.report("s0", MOST)
    world.wake()
    assert world.sizes["s0"] == 990
    world.send(e.Held("s0", 990, MOST, 0, 0), after=S)
    world.report("t0", MOST)
    for _ in range(4):
        world.wake()
        for name in ("s0", "t0"):
            world.send(e.Held(name, world.sizes[name], MOST, 0, 0), after=S)
    assert world.sizes == {"s0": 480, "t0": 480}
    for pool in ledger.account.holders.values():
        assert (pool.promised, pool.asked) == (0, 0)
