"""What the planner makes of services whose answers take many turns."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.domain.plan import EMPTY_PLAN
from cotenant.domain.snapshot import ServiceFacts, TurnCost, TurnFacts
from cotenant.domain.units import MS, S
from cotenant.policy.continuous import Turning, turning
from cotenant.policy.iterations import IterationCosts, Load
from cotenant.policy.judging import judge
from cotenant.policy.layouts import unit_layout
from cotenant.policy.prospects import load
from cotenant.policy.views import Verdict, View
from tests.builders import cpu
from tests.unit.test_planner import Planning, job, service

COST = TurnCost(fixed=20.0 * MS, token=0.2 * MS, pair=50.0)
WARM = {units: 60 * MS // units for units in (1, 2, 4, 8)}


def model(rate: float = 0.0, **changes: Any) -> ServiceFacts:
    """100 tokens are read and 50 said; what a turn takes was seen on one core, and a warm-up was
    as much faster as there were more."""
    facts: dict[str, Any] = {
        "pace": 100 * MS, "prompt": 100.0, "prompt_dev": 50.0, "answer": 50.0, "together": 16,
        "costs": {"cpu": {1: COST}}, "warm": {"cpu": WARM},
    }  # fmt: skip
    own = {k: changes.pop(k) for k in list(changes) if k in facts}
    plain = {"name": "m", "objective": S, "max_batch": 16, "exec_ns": {}, "instances": 1}
    return service(rate=rate, turns=TurnFacts(**facts | own), **plain | changes)


def on(size: int = 1, **changes: Any) -> Turning:
    found = turning("cpu", model(**changes), size)
    assert found is not None
    return found


def judged(units: int, *services: ServiceFacts) -> Verdict:
    """All that a device of so many cores has as one partition."""
    device = cpu(units)
    return judge(View(0, device, EMPTY_PLAN, services, ()), unit_layout(device, units, units), 0.0)


RATES = st.floats(0.01, 30.0)
PLACES = st.integers(1, 64)
PACES = st.sampled_from([0, 25 * MS, 100 * MS])


@given(RATES, st.floats(1.0, 4.0), PLACES, PACES, st.floats(0.0, 0.5))
def test_more_requests_are_never_answered_sooner(
    rate: float, times: float, together: int, pace: int, others: float
) -> None:
    found = on(together=together, pace=pace)
    less, more = found.expect(rate, others), found.expect(rate * times, others)
    for one, other in zip(less, more, strict=True):
        assert one <= other * (1 + 1e-6)


@given(RATES, st.floats(1.0, 4.0), PLACES, PACES)
def test_shorter_turns_are_never_worse(rate: float, times: float, together: int, pace: int) -> None:
    slow = TurnCost(*(times * each for each in msgspec.structs.astuple(COST)))
    longer = on(together=together, pace=pace, costs={"cpu": {1: slow}})
    shorter = on(together=together, pace=pace)
    for one, other in zip(shorter.expect(rate, 0.0), longer.expect(rate, 0.0), strict=True):
        assert one <= other * (1 + 1e-6)


@given(RATES, PLACES, PACES, st.floats(0.0, 0.5))
def test_without_what_is_too_much_the_objective_holds(
    rate: float, together: int, pace: int, others: float
) -> None:
    found = on(together=together, pace=pace)
    lost = found.overload(rate, others)
    assert 0.0 <= lost <= 2.0
    if lost < 1.0:
        assert found.holds(rate * (1.0 - lost), others)


@given(RATES, PLACES)
def test_a_place_more_is_never_worse_while_answers_have_time(rate: float, together: int) -> None:
    fewer, more = (on(together=n, pace=10 * S) for n in (together, together + 1))
    assert more.demand <= fewer.demand * (1 + 1e-9)


@given(RATES, st.sampled_from([1, 2, 4]))
def test_twice_the_units_carry_at_least_as_much(rate: float, units: int) -> None:
    one, other = judged(units, model(rate)), judged(2 * units, model(rate))
    assert other.overload <= one.overload
    assert one.misses or not other.misses


@given(RATES, st.floats(1.0, 3.0), st.sampled_from([1, 2, 4]))
def test_load_grows_with_rate_and_shrinks_with_size(rate: float, times: float, units: int) -> None:
    here = load("cpu", model(rate), units, 0.0)
    assert here <= load("cpu", model(rate * times), units, 0.0)
    assert here >= load("cpu", model(rate), 2 * units, 0.0)


def test_an_answer_may_take_longer_than_its_first_token_is_to_take() -> None:
    long = model(0.1, answer=1000.0, exec_ns={"cpu": {"1x1": 30 * S, "1x16": 60 * S}})
    assert not judged(1, long).misses


@pytest.mark.parametrize("change", [{"objective": 20 * MS}, {"pace": 10 * MS}])
def test_each_part_of_an_objective_counts(change: dict[str, Any]) -> None:
    assert not judged(1, model(0.1)).misses
    assert judged(1, model(0.1, **change)).misses


def test_where_not_even_one_alone_is_in_time_more_units_are_better() -> None:
    worse, better = (judged(n, model(1.0, objective=2 * MS)).overload for n in (1, 2))
    assert better < worse


@given(RATES)
def test_few_answers_hold_a_partition_nearly_as_long_as_many(rate: float) -> None:
    verdict = judged(1, model(rate))
    assert verdict.busy[0] >= verdict.rho[0] or verdict.rho[0] > 1.0


@given(st.floats(0.1, 5.0))
def test_beside_a_model_others_wait_for_its_turns(rate: float) -> None:
    quick = {"cpu": {"1x1": 2 * MS, "1x8": 8 * MS}}
    other = service("s", rate=1.0, exec_ns=quick, objective=15 * MS)
    assert not judged(1, other).misses
    assert "s" in judged(1, other, model(rate)).misses


def test_what_is_not_known_of_turns_is_no_miss() -> None:
    for unknown in ({"costs": {}}, {"warm": {}}, {"answer": 0.0}, {"prompt": 0.0}):
        assert not judged(1, model(0.1, **unknown)).misses


def test_units_on_which_it_never_served_are_judged_by_warm_ups() -> None:
    assert on(2).turn(1) == pytest.approx(on(1).turn(1) / 2)
    assert on(2, warm={}).turn(1) == on(1).turn(1)


# --- the planner ----------------------------------------------------------------------------


def settled(rate: float) -> Planning:
    world = Planning(8)
    for _ in range(100):
        world.see(model(rate), job())
    return world


def test_more_load_takes_more_cores() -> None:
    sizes = [settled(rate).service_cores for rate in (0.5, 10.0, 25.0, 45.0)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert sizes[-1] > sizes[0]


def test_it_gets_no_core_more_than_its_load_asks_for() -> None:
    world = settled(10.0)
    view = View(world.now, world.devices[0], world.present, (model(10.0),), (job(),))
    layout = world.planner.state.devices["cpu"].layout
    assert layout is not None
    assert not judge(view, layout, 10.0).misses
    fewer = unit_layout(world.devices[0], layout.compute - 1, layout.compute - 1)
    assert judge(view, fewer, 10.0).misses


# --- beside others, and what was seen -----------------------------------------------------------


@given(RATES, st.floats(1.0, 200.0))
def test_turns_that_are_cut_for_others_carry_no_more(rate: float, within: float) -> None:
    whole, cut = on(), turning("cpu", model(), 1, within * MS)
    assert cut is not None
    assert cut.together <= whole.together
    assert whole.demand <= cut.demand * (1 + 1e-9)
    assert whole.overload(rate, 0.0) <= cut.overload(rate, 0.0) + 1e-9


def test_turns_that_all_had_as_many_tokens_do_not_tell_what_one_costs() -> None:
    alike, varied = IterationCosts(), IterationCosts()
    for count in range(40):
        alike.observe(Load(1, 100), 20 * MS)
        varied.observe(Load(1 + count % 4, 100), (20 + count % 4) * MS)
    assert varied.told and not alike.told
