"""``cotenant plan``: what is shown of a plan, and that asking changes nothing."""

from __future__ import annotations

from typing import Any

import msgspec

from cotenant.cli.plan import plan_view
from cotenant.domain import events as e
from cotenant.domain.device import Partition
from cotenant.domain.plan import Plan
from cotenant.domain.units import S
from cotenant.policy.dispatcher import Dispatcher
from cotenant.runtime.preview import loads
from tests.unit.test_planner import Planning, service
from tests.unit.test_views import show


def partition(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": name, "device": "cuda", "units": [0], "compute": 3, "memory": 20 << 30,
        "services": ["digits"], "jobs": ["train"], "lent": True, **changes,
    }  # fmt: skip


def plan_document(dry_run: bool, **changes: Any) -> dict[str, Any]:
    """What a node answers."""
    plan = {
        "version": 3, "reasons": ["job train came"], "unplaced": {"huge": "too large"},
        "partitions": [partition("cuda:3g.20gb@0")],
    }  # fmt: skip
    found: dict[str, Any] = {"plan": {**plan, "age_s": 2.5}, "changing": []}
    if dry_run:
        step = {"what": "remove 3g.20gb at 0", "seconds": 0.14, "measured": True}
        device = {
            "id": "cuda", "goes": ["cuda:3g.20gb@0"], "comes": ["cuda:2g.10gb@4"],
            "steps": [step, {**step, "what": "make 2g.10gb at 4", "measured": False}],
            "seconds": 0.28, "problem": "",
        }  # fmt: skip
        then = {**plan, "version": 4, "partitions": [partition("cuda:2g.10gb@4", memory=0)]}
        found |= {"next": then, "devices": [device]}
    return found | changes


def test_the_plan_in_force_says_who_has_what_and_why() -> None:
    shown = show(plan_view(plan_document(dry_run=False)))
    for said in ("cuda:3g.20gb@0", "digits", "train", "job train came", "huge"):
        assert said in shown
    assert "2g.10gb" not in shown


def test_a_dry_run_shows_each_step_and_whether_its_time_is_known() -> None:
    shown = show(plan_view(plan_document(dry_run=True)))
    first, second = (
        next(line for line in shown.splitlines() if what in line)
        for what in ("remove 3g.20gb at 0", "make 2g.10gb at 4")
    )
    assert first.partition("(")[2] != second.partition("(")[2]


def test_a_dry_run_that_changes_nothing_says_so() -> None:
    same = show(plan_view(plan_document(dry_run=True, next=None, devices=[])))
    assert len(same.splitlines()) > len(show(plan_view(plan_document(False))).splitlines())


def test_what_a_device_would_refuse_is_shown() -> None:
    device = {
        "id": "cuda",
        "goes": [],
        "comes": [],
        "steps": [],
        "seconds": 0,
        "problem": "no room",
    }
    assert "no room" in show(plan_view(plan_document(dry_run=True, devices=[device])))


def test_a_preview_is_the_next_plan_and_is_forgotten() -> None:
    planning = Planning()
    planning.see(service())
    before = msgspec.json.encode(planning.planner.state)
    more = planning.snapshot(service(), service("other"))
    then = planning.planner.preview(more)
    assert then is not None and planning.planner.preview(more) == then
    assert msgspec.json.encode(planning.planner.state) == before
    assert planning.planner.plan(more) == then


def test_what_is_loaded_in_other_instances_is_a_step_as_long_as_the_slowest() -> None:
    dispatcher = Dispatcher(())
    state = dispatcher.state
    for name, ns in (("a", 3 * S), ("b", 8 * S), ("c", 20 * S)):
        dispatcher.handle(0, e.ServiceAdded(name, S, 1, 1))
        state.services[name].load_ns = ns
    here, there = Partition("gpu:1g@0", "gpu", (0,)), Partition("gpu:2g@2", "gpu", (2, 3))
    state.plan = Plan(1, (here,), dict.fromkeys("abc", (here.id,)), {}, ())
    services = {"a": (there.id,), "b": (here.id, there.id), "c": (here.id,)}
    then = Plan(2, (here, there), services, {}, ())
    (step,) = loads(state, "gpu", then)
    assert (step.ns, step.measured) == (8 * S, True)
    assert loads(state, "other", then) == loads(state, "gpu", state.plan) == ()
