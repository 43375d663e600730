"""The load of a service: its rate over what it can bear where it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.domain.device import DeviceSpec
from cotenant.domain.plan import EMPTY_PLAN, Plan
from cotenant.domain.snapshot import ServiceFacts, Snapshot
from cotenant.domain.units import MS, S
from cotenant.policy.judging import judge
from cotenant.policy.layouts import unit_layout
from cotenant.policy.planner import Planner
from cotenant.policy.planstate import Tuning
from cotenant.policy.saturation import loads
from cotenant.policy.views import Layout, View
from tests.builders import cpu
from tests.unit.test_continuous import model
from tests.unit.test_planner import Planning, service

RATES = st.floats(0.5, 2000.0)
MORE = st.floats(1.0, 3.0)


def on(
    *services: ServiceFacts,
    cores: int = 4,
    size: int = 1,
    devices: tuple[DeviceSpec, ...] = (),
    **boosts: float,
) -> Mapping[str, float]:
    """Loads where each of the devices is whole and shared by all these services."""
    devices = devices or (cpu(cores),)
    layouts = {d.id: unit_layout(d, d.compute, size) for d in devices}
    everywhere = tuple(p.id for layout in layouts.values() for p in layout.mine)
    plan = Plan(
        1,
        tuple(p for layout in layouts.values() for p in layout.mine),
        {s.name: everywhere for s in services},
        {},
        (),
        {},
    )
    compute = sum(d.compute for d in devices)
    parts = {s.name: {d.id: d.compute / compute for d in devices} for s in services}
    return loads(Snapshot(S, devices, plan, services, ()), parts, boosts)


def test_a_service_that_nobody_asks_has_no_load() -> None:
    assert on(service()) == {"s": 0.0}


@given(RATES, MORE)
def test_a_higher_rate_is_never_less_load(rate: float, more: float) -> None:
    assert on(service(rate=rate))["s"] <= on(service(rate=rate * more))["s"]


@given(RATES, MORE)
def test_a_higher_rate_of_a_neighbour_is_never_less_load(rate: float, more: float) -> None:
    before = on(service(rate=20.0), service("t", rate=rate))
    after = on(service(rate=20.0), service("t", rate=rate * more))
    assert before["s"] <= after["s"]


@given(RATES, MORE, st.integers(1, 8))
def test_a_larger_objective_and_more_cores_are_never_more_load(
    rate: float, more: float, cores: int
) -> None:
    tight = on(service(rate=rate), cores=cores)["s"]
    assert on(service(rate=rate, objective=round(more * 100 * MS)), cores=cores)["s"] <= tight
    assert on(service(rate=rate), cores=cores + 1)["s"] <= tight


@given(RATES)
def test_a_load_over_one_is_where_the_planner_predicts_a_miss(rate: float) -> None:
    asked = service(rate=rate)
    device = cpu(1)
    layout: Layout = unit_layout(device, 1, 1)
    missed = judge(View(S, device, EMPTY_PLAN, (asked,), ()), layout, 0.0).misses
    assert (on(asked, cores=1)["s"] > 1.0) == bool(missed)


@given(RATES)
def test_of_answers_in_turns_too(rate: float) -> None:
    asked = model(rate=rate)
    device = cpu(1)
    view = View(S, device, EMPTY_PLAN, (asked,), ())
    missed = judge(view, unit_layout(device, 1, 1), 0.0).misses
    assert (on(asked, cores=1)["m"] > 1.0) == bool(missed)


def test_what_several_devices_bear_adds_up() -> None:
    one = on(service(rate=60.0), cores=2)["s"]
    two = on(service(rate=60.0), devices=(cpu(2, id="a"), cpu(2, id="b")))["s"]
    assert 0.0 < two < one


def test_measured_misses_are_load() -> None:
    assert on(service(rate=60.0), s=2.0)["s"] > on(service(rate=60.0))["s"]


@pytest.mark.parametrize(
    "changes",
    [{"exec_ns": {}}, {"objective": MS}],
    ids=["costs are not known", "no rate would hold it"],
)
def test_where_no_rate_can_be_named_there_is_no_load(changes: dict[str, Any]) -> None:
    assert on(service(rate=60.0, **changes)) == {}


def test_without_a_place_there_is_no_load() -> None:
    planner = Planner(Tuning())
    planner.plan(Snapshot(S, (cpu(1),), EMPTY_PLAN, (service(rate=1.0),), ()))
    assert planner.loads == {}


def test_the_planner_tells_loads_of_the_layout_in_force() -> None:
    """With every look at a snapshot, also where the plan stays as it is."""
    world = Planning(2, split=(1, 1))
    world.see(service(rate=10.0))
    assert world.see(service(rate=10.0)) is None
    one = world.planner.loads["s"]
    assert world.see(service(rate=30.0)) is None
    assert world.planner.loads["s"] > one
    wide = Planning(2, split=(2, 1))
    wide.see(service(rate=10.0))
    wide.see(service(rate=10.0))
    assert wide.planner.loads["s"] < one
