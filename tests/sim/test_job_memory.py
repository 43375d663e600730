"""Memory of a job in virtual time: lent to a language model, it is gone for as long as it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.costs import ASKED
from cotenant.domain.errors import ConfigError
from cotenant.domain.plan import Plan
from cotenant.domain.snapshot import Snapshot
from cotenant.policy.planner import Planner
from cotenant.sim.outcome import Outcome
from cotenant.sim.scenario import Scenario
from cotenant.sim.scenario_file import parse_scenario
from cotenant.sim.world import World

GIB = 2**30
LEND = """
name: lend
duration: 60s
device: {kind: cuda, memory: 24GiB, kv: 24GiB, bandwidth: BANDWIDTH}
services:
  - name: chat
    objective: {ttft: 3s, tpot: 80ms, percentile: 95}
    batch: {max: 64}
    kv: {limit: 24GiB}
    generates:
      prompt: {kind: lognormal, mean: 600, cv: 0.6, most: 2000}
      answer: {kind: lognormal, mean: 250, cv: 0.6, most: 600}
      most: 600
      turn: {fixed: 6ms, token: 25us, pair: 8ns, cv: 0.03}
      block: 8MiB
      tokens: 16
    arrivals: {kind: steps, rates: {0s: 0.1, 20s: RATE, 30s: 0.1}}
jobs:
  - {name: tune, memory: 18GiB, memory_guaranteed: KEPT, cost: {rate: 20, resume: 2ms}}
"""


def lend(bandwidth: str = "12GiB", rate: float = 12, kept: str = "4GiB") -> Scenario:
    text = LEND.replace("BANDWIDTH", bandwidth).replace("RATE", str(rate)).replace("KEPT", kept)
    return parse_scenario(text, Path())


class Watch:
    """Checks the laws after each event, and keeps what the job was told and what it said."""

    def __init__(self) -> None:
        self.world: World | None = None
        self.told: list[tuple[int, int]] = []
        self.said: list[tuple[int, int]] = []

    def decided(self, now: int, event: e.Event, actions: list[a.Action]) -> None:
        assert self.world is not None
        self.world._memory.check()
        if isinstance(event, e.Held) and event.holder == "tune":
            assert event.wanted == 18 * GIB, "what is not here is on the host"
            self.said.append((now, event.held))
        for action in actions:
            if isinstance(action, a.Resize) and action.holder == "tune" and action.size >= 0:
                self.told.append((now, action.size))

    def planned(self, now: int, snapshot: Snapshot, plan: Plan | None) -> None:
        pass


def run(found: Scenario, seed: int = 0) -> tuple[Outcome, Watch]:
    watch = Watch()
    watch.world = World(found, Planner(), (seed, 0), observer=watch)
    return watch.world.run(), watch


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(1, 24),
    st.sampled_from((4, 12)),
    st.sampled_from(("0GiB", "4GiB", "10GiB")),
)
def test_what_is_taken_is_lost_to_the_job_for_at_least_bytes_by_bandwidth(
    seed: int, bandwidth: int, rate: int, kept: str
) -> None:
    kept = kept.replace("0GiB", "0") if kept == "0GiB" else kept
    outcome, watch = run(lend(f"{bandwidth}GiB", rate, kept), seed)
    tally = outcome.jobs["tune"]
    went = [before - now for (_, before), (_, now) in zip(watch.said, watch.said[1:], strict=False)]
    assert tally.evicted == sum(size for size in went if size > 0), "no byte is lost or made"
    assert tally.rested_ns >= tally.evicted / (bandwidth * GIB) * 1e9
    assert min(held for _, held in watch.said) >= int(kept.removesuffix("GiB")) * GIB


def test_who_waits_for_memory_has_it_once_it_was_moved() -> None:
    _, watch = run(lend("2GiB"))
    (ordered, most), (gone, left) = watch.told[0], watch.said[1]
    assert left < 18 * GIB
    assert gone - ordered >= ASKED + (18 * GIB - left) / (2 * GIB) * 1e9
    assert most >= left


def test_the_slower_memory_moves_the_more_a_job_loses() -> None:
    slow, fast = (run(lend(bandwidth))[0].jobs["tune"] for bandwidth in ("1GiB", "24GiB"))
    assert slow.rested_ns / slow.evicted > fast.rested_ns / fast.evicted


def test_a_job_to_which_all_is_guaranteed_loses_nothing() -> None:
    tally = run(lend(kept="18GiB"))[0].jobs["tune"]
    assert (tally.evicted, tally.rested_ns) == (0, 0)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("memory: 18GiB", "memory: 30GiB"),
        ("memory_guaranteed: 4GiB", "memory_guaranteed: 20GiB"),
        ("device: {kind: cuda, memory: 24GiB", "device: {kind: cuda"),
        ("kind: cuda, memory: 24GiB, kv: 24GiB, bandwidth: 12GiB", "kind: sm, units: 1, kv: 24GiB"),
    ],
)
def test_memory_that_cannot_be_is_refused(before: str, after: str) -> None:
    text = LEND.replace("BANDWIDTH", "12GiB").replace("RATE", "4").replace("KEPT", "4GiB")
    assert before in text
    with pytest.raises(ConfigError, match=r"jobs\[0\].memory"):
        parse_scenario(text.replace(before, after), Path())
