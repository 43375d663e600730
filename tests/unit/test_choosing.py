"""Laws of choosing among variants: the most accurate that holds, one step at a time."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from cotenant.domain.snapshot import ServiceFacts
from cotenant.domain.units import MS, S
from cotenant.domain.workload import ORIGINAL, Variant
from cotenant.policy.choosing import as_variant, ladder
from cotenant.sim.policies import POLICIES, simulate
from cotenant.sim.scenario_file import parse_scenario
from tests.builders import cpu
from tests.unit.test_planner import Planning, job, service

HALF = Variant(name="half", accuracy=0.97, relative=0.5)
TENTH = Variant(name="tenth", accuracy=0.9, relative=0.1)
WORSE = Variant(name="worse", accuracy=0.5, relative=0.05)
OTHERS = {"cpu": (TENTH, WORSE, HALF)}
CALM, BUSY, MORE = 5.0, 200.0, 1000.0


def varied(rate: float, serving: str = ORIGINAL, **changes: Any) -> ServiceFacts:
    """A service on 2 cores, as its present variant would be measured."""
    plain = service(rate=rate, others=OTHERS, accuracy_floor=0.8, instances=2, **changes)
    known = msgspec.structs.replace(plain, variants={"cpu": Variant()})
    original = as_variant(known, "cpu", serving)
    return msgspec.structs.replace(plain, exec_ns=original.exec_ns, serving={"cpu": serving})


class Choosing(Planning):
    """Plans for a service whose variants are loaded as soon as they are chosen."""

    serving = ORIGINAL

    def asked(self, rate: float, seconds: int, **changes: Any) -> str:
        """What serves after this load."""
        for _ in range(seconds):
            plan = self.see(varied(rate, self.serving, **changes), job())
            if plan is not None:
                self.serving = plan.variants.get("s", {}).get("cpu", ORIGINAL)
        return self.serving


def test_the_original_serves_while_it_holds() -> None:
    assert Choosing(2).asked(CALM, 60) == ORIGINAL


def test_under_more_than_any_layout_can_do_a_step_is_taken_down_and_up_again_later() -> None:
    box = Choosing(2)
    box.asked(CALM, 10)
    assert box.asked(BUSY, 20) == "half"
    assert box.asked(CALM, 60) == ORIGINAL


def test_a_step_is_only_as_far_as_needed_and_never_below_the_floor() -> None:
    box = Choosing(2)
    assert box.asked(MORE, 30) == "tenth"
    assert box.asked(10 * MORE, 60) == "tenth"


def test_a_step_waits_until_the_wish_has_held() -> None:
    box = Choosing(2, grow_after=5 * S)
    box.asked(CALM, 10)
    assert box.asked(BUSY, 3) == ORIGINAL
    assert box.asked(CALM, 10) == ORIGINAL
    assert box.asked(BUSY, 12) != ORIGINAL


def test_steps_are_not_taken_to_and_fro_under_a_constant_load() -> None:
    box = Choosing(2)
    seen = [box.asked(BUSY, 1) for _ in range(300)]
    changes = sum(one != other for one, other in pairwise(seen))
    assert changes <= 2


def test_nothing_further_happens_until_what_was_chosen_serves() -> None:
    box = Choosing(2)
    for _ in range(30):
        plan = box.see(varied(MORE), job())  # it never comes
        if plan is not None:
            assert plan.variants.get("s", {}).get("cpu", ORIGINAL) in (ORIGINAL, "half")


def test_an_objective_that_the_original_never_holds_is_for_another() -> None:
    assert Choosing(2).asked(0.0, 20, objective=15 * MS) == "half"


def test_a_variant_that_went_gives_way_at_once() -> None:
    box = Choosing(2)
    assert box.asked(BUSY, 20) == "half"
    left = msgspec.structs.replace(varied(BUSY, "half"), others={"cpu": (WORSE,)})
    plan = box.see(left, job())
    assert plan is not None and "s" not in plan.variants


def test_where_nothing_may_vary_the_original_serves() -> None:
    assert Choosing(2, vary=False).asked(MORE, 30) == ORIGINAL


def test_the_ladder_goes_down_in_accuracy_and_time_and_stops_at_the_floor() -> None:
    slow = Variant(name="slow", accuracy=0.95, relative=1.5)
    facts = service(others={"cpu": (WORSE, slow, TENTH, HALF)}, accuracy_floor=0.8)
    names = [v.name for v in ladder(facts, "cpu", (cpu(2),))]
    assert names == [ORIGINAL, "half", "tenth"]


def test_what_a_device_cannot_execute_is_no_step() -> None:
    odd = Variant(name="odd", accuracy=0.99, relative=0.3, operators=("rare",))
    large = Variant(name="large", accuracy=0.98, relative=0.2, memory=2000)
    facts = service(others={"cpu": (odd, large, HALF)})
    device = msgspec.structs.replace(cpu(2), operators=("conv",), memory=1000)
    assert [v.name for v in ladder(facts, "cpu", (device,))] == [ORIGINAL, "half"]


CROWD = """
name: crowd
story: more than the original can do, for a while
duration: 120s
device: {kind: cpu, units: 2}
services:
  - name: s
    objective: {latency: 60ms}
    accuracy: 0.95
    accuracy_floor: 0.9
    cost: {first: 12ms, per_row: 11ms}
    variants:
      int8: {relative: 0.2, accuracy: 0.93}
      bad: {relative: 0.1, accuracy: 0.8}
    arrivals: {kind: steps, rates: {0s: 20, 30s: 260, 70s: 20}}
jobs: [{name: j, cost: {rate: 5}}]
"""


def test_a_crowd_is_answered_by_a_variant_instead_of_refused() -> None:
    scenario = parse_scenario(CROWD, Path())
    runs = {
        name: simulate(scenario, setting, 0)
        for name in ("cotenant", "no_variants")
        for setting in POLICIES[name].settings(scenario).values()
    }
    mine, plain = runs["cotenant"].services["s"], runs["no_variants"].services["s"]
    assert mine.attainment > plain.attainment
    assert set(mine.variants) == {ORIGINAL, "int8"} and set(plain.variants) == {ORIGINAL}
    last = [why for _, reasons in runs["cotenant"].reasons for why in reasons if "->" in why]
    assert any("int8 -> original" in why for why in last)
