"""Language models in virtual time: leases, memory, what came of answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.errors import ConfigError
from cotenant.domain.plan import Plan
from cotenant.domain.request import Batch, Lease, Request
from cotenant.domain.snapshot import Snapshot
from cotenant.domain.units import MS, S
from cotenant.policy.invariants import check
from cotenant.policy.iterations import IterationCosts, Load
from cotenant.policy.planner import Planner
from cotenant.policy.planstate import Tuning
from cotenant.sim.generates import Fixed, Generates, TurnCost
from cotenant.sim.outcome import Outcome, TokenTally
from cotenant.sim.physics import Talk
from cotenant.sim.policies import POLICIES, simulate
from cotenant.sim.scenario import Scenario
from cotenant.sim.scenario_file import parse_scenario
from cotenant.sim.talker import Talker
from cotenant.sim.world import World

BLOCK = 1024
MODEL = Generates(
    prompt=Fixed(32),
    answer=Fixed(10),
    most=16,
    turn=TurnCost(fixed=5 * MS, token=100_000, cv=0.0),
    block=BLOCK,
    tokens=16,
)


def talker(blocks: int = 100, host: int = 0) -> Talker:
    model = Generates(
        prompt=MODEL.prompt,
        answer=MODEL.answer,
        most=MODEL.most,
        turn=MODEL.turn,
        block=BLOCK,
        host=host * BLOCK,
        offload=1000,
        restore=1000,
    )
    return Talker("w", model, blocks * BLOCK, TokenTally())


class Leased:
    """A talker that executes one lease after the other."""

    def __init__(self, found: Talker) -> None:
        self.talker = found
        self.now = 0
        self.said: dict[int, int] = {}

    def lease(self, keys: tuple[int, ...], turns: int = 64, budget: int = 0) -> None:
        batch = Batch(1, "s", "1", keys, len(keys))
        order = a.Dispatch("", batch, "w", "p", lease=Lease(turns, S, budget))
        begun = {k: (Request(k, "s", 0, S, prompt=32, most=16), 10) for k in keys}
        self.talker.lease(order, begun, self.now)

    def turn(self) -> tuple[list[e.Held], e.BatchDone]:
        self.now += self.talker.turn(1, 1.0)
        news, done = self.talker.ended(self.now, 0)
        self.talker.check()
        for key, tokens in done.said:
            self.said[key] = self.said.get(key, 0) + tokens
        return news, done


def test_a_turn_says_one_token_of_each_and_a_lease_goes_on_until_all_are_over() -> None:
    world = Leased(talker())
    world.lease((1, 2))
    done = [world.turn()[1] for _ in range(10)]
    assert world.said == {1: 10, 2: 10}
    assert [d.more for d in done] == [True] * 9 + [False]
    assert done[0].work == (64, 2 * 32 * 33 // 2)
    assert done[0].exec_ns == 5 * MS + 64 * 100_000
    assert done[1].exec_ns == 5 * MS + 2 * 100_000
    assert done[-1].unfinished == ()


def test_a_lease_ends_with_its_turns_and_when_it_is_recalled() -> None:
    world = Leased(talker())
    world.lease((1,), turns=2)
    assert [world.turn()[1].more for _ in range(2)] == [True, False]
    world.lease((1,))
    assert world.turn()[1].more
    world.talker.recall(1)
    last = world.turn()[1]
    assert not last.more and last.unfinished == (1,)
    assert world.said == {1: 4}


def test_a_budget_cuts_prompts_into_chunks() -> None:
    world = Leased(talker())
    for key in range(1, 30):  # what turns cost is learned first
        world.lease((key,), turns=1)
        world.turn()
    world.lease((50,), turns=1, budget=6 * MS)
    _, done = world.turn()
    assert done.exec_ns < 5 * MS + 32 * 100_000


def test_what_others_say_in_a_turn_is_kept_for_their_next() -> None:
    world = Leased(talker())
    world.lease((1,), turns=1)
    world.turn()
    world.lease((2,), turns=1)
    world.turn()
    world.lease((1, 2), turns=1)
    _, done = world.turn()
    assert dict(done.said) == {1: 2, 2: 1}


def test_a_smaller_pool_puts_sequences_aside_and_nothing_is_lost() -> None:
    found = talker(blocks=12, host=12)
    world = Leased(found)
    world.lease((1, 2, 3, 4))
    news, _ = world.turn()
    assert news[-1].held == 12 * BLOCK
    assert not found.resize(4 * BLOCK), "it is taken up at the end of the turn"
    sizes = []
    for _ in range(60):
        news, done = world.turn()
        sizes += [held.held for held in news]
        if not done.more:
            break
    assert world.said == dict.fromkeys((1, 2, 3, 4), 10)
    assert sizes[-1] == 4 * BLOCK
    assert found._tally.put_aside > 0
    assert found._tally.restored + found._tally.again > 0


def test_without_room_for_one_it_does_nothing_and_says_so() -> None:
    found = talker()
    assert found.resize(0)[0].held == 0
    world = Leased(found)
    world.lease((1,))
    news, done = world.turn()
    assert done.work == (0, 0) and not done.more and done.unfinished == (1,)
    assert news[-1].wanted == news[-1].least == 3 * BLOCK


def test_an_answer_is_in_time_if_its_first_token_is_and_its_last() -> None:
    request = Request(1, "s", 0, 100)
    for times, in_time in (
        ((100, 200, 120), True),  # the middle one may be late
        ((101, 102, 103), False),
        ((50, 60, 121), False),
    ):
        talk = Talk(request, 10)
        for at in times:
            talk.spoke(at, 1)
        assert talk.in_time is in_time


# --- whole runs -------------------------------------------------------------------------------

YAML = """
name: s
duration: 6s
device: {kind: sm, units: 1, kv: {budget: %(budget)s, split: %(split)s}}
services:
  - name: one
    objective: &objective {ttft: 2s, tpot: 50ms, percentile: 95}
    batch: &batch {max: 16}
    kv: &kv {limit: 64MiB, guaranteed: %(guaranteed)s}
    generates: &model
      prompt: {kind: lognormal, mean: 100, cv: 0.5, most: 400}
      answer: {kind: uniform, least: 5, most: 60}
      most: 60
      turn: {fixed: 4ms, token: 20us, pair: 5ns}
      block: 1MiB
      host: 16MiB
      offload: 50us
      restore: 50us
    arrivals: {kind: steps, rates: {0s: 12, 3s: 1}}
  - name: two
    objective: *objective
    batch: *batch
    kv: *kv
    generates: *model
    arrivals: {kind: steps, rates: {0s: 1, 3s: 12}}
jobs: [{name: j, cost: {rate: 5}}]
"""


def scenario(
    budget: str = "80MiB", split: str = "elastic", guaranteed: str = "8MiB", **changes: str
) -> Scenario:
    text = YAML % {"budget": budget, "split": split, "guaranteed": guaranteed}
    for old, new in changes.values():
        text = text.replace(old, new)
    return parse_scenario(text, Path())


class Checked:
    """Sees that the policy's laws and the memory hold after each event, and who was answered."""

    def __init__(self, found: Scenario) -> None:
        self.world = World(found, Planner(None), (0, 0), observer=self)
        self.budget = found.device.spec.kv
        self.ends: list[int] = []

    def decided(self, now: int, event: e.Event, actions: list[a.Action]) -> None:
        check(self.world._dispatcher)
        for worker in self.world._talkers.values():
            pool = worker.core.pool
            assert pool.capacity <= pool.most
            if worker._iteration is None:
                worker.check()
        for action in actions:
            if isinstance(action, a.Complete):
                self.ends.extend(action.requests)
            elif isinstance(action, a.Reject):
                self.ends.append(action.request)

    def planned(self, now: int, snapshot: Snapshot, plan: Plan | None) -> None:
        pass

    def run(self) -> Outcome:
        return self.world.run()


@pytest.mark.parametrize("split", ["elastic", "fixed"])
def test_every_request_is_answered_once_and_laws_hold(split: str) -> None:
    checked = Checked(scenario(split=split))
    found = checked.run()
    assert len(checked.ends) == len(set(checked.ends))
    offered = sum(s.offered for s in found.services.values())
    assert len(checked.ends) + found.open == offered
    for tally in found.services.values():
        assert tally.answered and tally.tokens is not None
        assert tally.tokens.said >= 5 * tally.answered


def test_a_seed_fixes_a_run_and_both_splits_are_asked_the_same() -> None:
    found = scenario()
    one, other = (simulate(found, POLICIES["cotenant"].settings(found)[""], 0) for _ in range(2))
    assert one == other
    split = simulate(found, POLICIES["split_kv"].settings(found)[""], 0)
    assert split == simulate(scenario(split="fixed"), POLICIES["cotenant"].settings(found)[""], 0)
    for name, tally in split.services.items():
        assert tally.offered == one.services[name].offered


def test_a_fixed_split_gives_each_its_equal_part() -> None:
    world = World(scenario(split="fixed"), Planner(None), (0, 0))
    world.run()
    assert {worker.pool for worker in world._talkers.values()} == {40 * 2**20}


# --- space ------------------------------------------------------------------------------------

ONE = """
name: s
duration: 20s
device: {kind: sm, units: 8, contention: 0, kv: 1GiB}
services:
  - name: one
    objective: {ttft: 1s, tpot: 100ms, percentile: 95}
    batch: {max: 16}
    kv: {limit: 1GiB}
    generates:
      prompt: {kind: fixed, tokens: 100}
      answer: {kind: fixed, tokens: 30}
      most: 30
      turn: {fixed: 40ms, token: 300us, pair: 20ns}
      block: 1MiB
    arrivals: {kind: poisson, rate: 24}
jobs: [{name: j, cost: {rate: 5}}]
"""


class Planned:
    """One run of ``ONE``; keeps what the planner saw, and the units of services in each plan."""

    def __init__(self, planner: Planner) -> None:
        self.snapshots: list[Snapshot] = []
        self.units: list[int] = []
        self.outcome = World(parse_scenario(ONE, Path()), planner, (0, 0), observer=self).run()
        self.tally = self.outcome.services["one"]

    def decided(self, now: int, event: e.Event, actions: list[a.Action]) -> None:
        pass

    def planned(self, now: int, snapshot: Snapshot, plan: Plan | None) -> None:
        self.snapshots.append(snapshot)
        if plan is not None:
            mine = plan.services.get("one", ())
            self.units.append(sum(p.compute for p in plan.partitions if p.id in mine))


def test_it_gets_the_space_that_its_turns_ask_for() -> None:
    found = Planned(Planner(None))
    for fewer in (1, 2):
        split = Planned(Planner(Tuning(split=(fewer, fewer))))
        assert split.tally.attainment < 0.95, "so many would not do"
        assert found.units[-1] > fewer
        assert found.tally.attainment > split.tally.attainment


def test_the_planner_sees_what_turns_take() -> None:
    found = Planned(Planner(Tuning(split=(2, 2))))
    turns = found.snapshots[-1].services[0].turns
    assert turns is not None
    assert (turns.prompt, turns.prompt_dev, turns.answer) == (100, 0, 30)
    assert turns.pace == 100 * MS and turns.together <= 16
    assert set(turns.costs["sm"]) == {2} < set(turns.warm["sm"])
    cost = turns.costs["sm"][2]
    real = parse_scenario(ONE, Path()).services[0].generates
    assert real is not None
    seen = IterationCosts(cost.fixed, cost.token, cost.pair, cost.step)
    for work in (Load(8, 8 * 115), Load(108, 8 * 115 + 5050)):
        assert seen.predict(work) == pytest.approx(real.turn.mean(2, work), rel=0.2)


def test_figures_of_tokens_are_there_only_for_language_models() -> None:
    found = scenario()
    figures = simulate(found, POLICIES["cotenant"].settings(found)[""], 0).figures()
    assert figures["tokens_s"] > 0
    assert 0 < figures["ttft_p99_s"] < 20
    assert figures["tpot_p99_s"] > 0.004
    plain = Outcome(S, 1, {}, {}).figures()
    assert "tokens_s" not in plain


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("name: s", "name: s", "services"),
        ("split: elastic", "split: half", "device.kv.split"),
        ("kind: uniform, least: 5", "kind: uniform, least: 500", "services[0].generates.answer"),
        ("mean: 100", "mean: 900", "services[0].generates.prompt.mean"),
        ("turn: {fixed: 4ms", "turn: {fixed: 4", "services[0].generates.turn.fixed"),
        ("turn: {fixed: 4ms", "turn: {fixed: 400ms", "services[0].objective"),
        ("limit: 64MiB", "limit: 8MiB", "services[0].generates"),
        ("block: 1MiB", "block: 0", "services[0].generates.block"),
        ("ttft: 2s", "latency: 2s", "services[0].objective.ttft"),
        ("host: 16MiB", "hosts: 16MiB", "services[0].generates.hosts"),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(old: str, new: str, where: str) -> None:
    budget = "12MiB" if where == "services" else "80MiB"
    with pytest.raises(ConfigError) as error:
        scenario(budget=budget, change=(old, new))
    assert str(error.value).startswith(where)
