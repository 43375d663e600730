"""Scenarios whose execution times were measured by ``cotenant profile``."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cotenant.domain.errors import ConfigError
from cotenant.domain.profile import ModelProfile
from cotenant.sim.scenario import Scenario, parse_scenario
from tests.builders import profiled

TEXT = """
name: s
duration: 10s
device: {kind: cpu, units: 4}
services:
  - name: a
    objective: {latency: 50ms}
    profile: a.json
    arrivals: {kind: poisson, rate: 10}
"""


def scenario(folder: Path, text: str = TEXT, profile: ModelProfile | None = None) -> Scenario:
    (folder / "a.json").write_bytes(msgspec.json.encode(profile or profiled()))
    return parse_scenario(text, folder)


def test_times_memory_and_loading_are_those_measured(tmp_path: Path) -> None:
    measured = profiled()
    (service,) = scenario(tmp_path).services
    cost = service.costs["cpu"]
    for units, rows, ns in measured.table:
        assert cost.mean(units, rows) == ns
    assert service.load == measured.load_ns
    assert service.spec.variants["cpu"].memory == measured.memory_peak


def test_what_the_scenario_states_itself_counts(tmp_path: Path) -> None:
    text = TEXT.replace("profile: a.json", "profile: a.json\n    load: 7s\n    memory: 1MiB")
    (service,) = scenario(tmp_path, text).services
    assert service.load == 7_000_000_000
    assert service.spec.variants["cpu"].memory == 2**20


def test_an_objective_is_judged_by_what_was_measured(tmp_path: Path) -> None:
    slow = msgspec.structs.replace(profiled().figures[0], median_ns=900_000_000)
    with pytest.raises(ConfigError, match="infeasible"):
        scenario(tmp_path, TEXT, msgspec.structs.replace(profiled(), figures=(slow,)))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("a.json", "b.json", r"services\[0\].profile: cannot read"),
        ("a.json", "a.json\n    cost: {first: 10ms}", r"services\[0\].profile: .*leave one"),
        ("{kind: cpu, units: 4}", "{kind: cuda}", r"services\[0\].profile: .*of the kind cpu"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        scenario(tmp_path, TEXT.replace(old, new))


def test_a_torn_profile_is_refused(tmp_path: Path) -> None:
    scenario(tmp_path)
    whole = (tmp_path / "a.json").read_bytes()
    (tmp_path / "a.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"services\[0\].profile: .*no whole profile"):
        parse_scenario(TEXT, tmp_path)
