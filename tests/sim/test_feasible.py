"""The smallest change by which an objective would be met."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cotenant.domain.units import MS
from cotenant.sim.arrivals import Recorded, Thinned
from cotenant.sim.feasible import Missed, with_changes
from cotenant.sim.scenario import Scenario
from cotenant.sim.scenario_file import parse_scenario

TWO = """
name: two
duration: 10s
device: {kind: cpu, units: 4}
services:
  - name: a
    objective: {latency: 50ms}
    cost: {first: 10ms, per_row: 2ms}
    arrivals: {kind: poisson, rate: 10}
  - name: b
    objective: {latency: 50ms}
    cost: {first: 10ms, per_row: 2ms}
    arrivals: {kind: poisson, rate: 10}
"""
MISSED = Missed("a", 50 * MS, 99.0, 0.7)


class Needs:
    """A world in which a service is fine from so much latency on, and up to so many requests."""

    def __init__(self, latency_ms: float, share: float) -> None:
        self.latency, self.share = latency_ms * MS, share
        self.tried: list[Scenario] = []

    def __call__(self, scenario: Scenario) -> float:
        self.tried.append(scenario)
        a, b = scenario.services
        assert b == parse_scenario(TWO, Path()).services[1], "only the one is changed"
        kept = a.arrivals.kept if isinstance(a.arrivals, Thinned) else 1.0
        return 1.0 if a.spec.slo.latency >= self.latency or kept <= self.share else 0.7


@pytest.mark.parametrize("latency_ms", [51.0, 63.7, 100.0, 440.0, 3000.0])
@pytest.mark.parametrize("share", [0.99, 0.5, 0.31, 0.02])
def test_the_smallest_change_is_found_to_five_percent(latency_ms: float, share: float) -> None:
    needs = Needs(latency_ms, share)
    found = with_changes(parse_scenario(TWO, Path()), MISSED, needs)
    assert found.searched
    assert found.latency is not None and found.requests is not None
    assert latency_ms <= found.latency / MS <= 1.06 * latency_ms
    assert share / 1.06 <= found.requests <= share
    assert len(needs.tried) <= 22
    said = found.said("cotenant")
    assert f"latency: {found.latency / MS:g}ms or {100 * found.requests:.3g} % of" in said
    tried = {s.services[0].spec.slo.latency for s in needs.tried}
    assert found.latency in tried, "what is said was run"


def test_where_nothing_in_reach_does_that_is_said() -> None:
    found = with_changes(parse_scenario(TWO, Path()), MISSED, Needs(1e6, 0.001))
    assert (found.latency, found.requests) == (None, None)
    assert "neither 64 times the latency nor 1/64 of its requests would do" in found.said(
        "cotenant"
    )


def test_where_only_fewer_requests_do_that_is_said() -> None:
    said = with_changes(parse_scenario(TWO, Path()), MISSED, Needs(1e6, 0.5)).said("cotenant")
    assert said.endswith("; no latency up to 64 times as long would do, but 50 % of its requests")


def test_it_is_infeasible_only_if_no_policy_meets_it() -> None:
    assert (
        "a misses its objective, infeasible for every policy here: 70 % of its requests"
        in MISSED.said("cotenant")
    )
    met = msgspec.structs.replace(MISSED, met_by=("static", "shared"))
    assert "a misses its objective, which static, shared met: 70 %" in met.said("cotenant")
    assert "would do" not in met.said("cotenant"), "nothing was looked for"


def test_recorded_requests_that_had_the_objective_have_the_changed_one() -> None:
    recorded = Recorded((0, 10, 20), (1, 2, 1), (1, 1, 0), (50 * MS, 30 * MS, 50 * MS))
    whole = parse_scenario(TWO, Path())
    a = msgspec.structs.replace(whole.services[0], arrivals=recorded)
    tried = []

    def attempt(scenario: Scenario) -> float:
        tried.append(scenario.services[0])
        return 1.0

    with_changes(msgspec.structs.replace(whole, services=(a,)), MISSED, attempt)
    slower = next(s for s in tried if s.spec.slo.latency == 100 * MS)
    assert isinstance(slower.arrivals, Recorded)
    assert slower.arrivals.budgets == (100 * MS, 30 * MS, 100 * MS)
