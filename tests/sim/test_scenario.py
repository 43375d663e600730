"""Scenario files: what they give, and what is said of bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.domain.errors import ConfigError
from weft.sim.scenario import parse_scenario, read_scenario

GOOD = """
name: s
duration: 10s
device: {kind: cpu, units: 4}
services:
  - name: a
    objective: {latency: 50ms}
    cost: {first: 10ms, per_row: 2ms}
    arrivals: {kind: poisson, rate: 10}
jobs:
  - {name: j, cost: {rate: 5}}
"""
EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "scenarios").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_example_is_in_order(path: Path) -> None:
    scenario = read_scenario(path)
    assert scenario.name == path.stem
    assert scenario.story


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("duration: 10s", "durration: 10s", "duration: is required.*'durration' a slip"),
        ("duration: 10s", "duration: 10", "duration: needs a unit"),
        ("kind: cpu", "kind: cpus", "'cpus' is none of cpu, sm; did you mean 'cpu'"),
        ("units: 4", "units: 0", "device.units: expected a whole number from 1"),
        ("rate: 10}", "rate: -1}", r"services\[0\].arrivals.rate: must not be negative"),
        ("kind: poisson", "kind: poison", "did you mean 'poisson'"),
        ("rate: 5", "rate: 0", r"jobs\[0\].cost.rate: must be above 0"),
        ("rate: 5}", "rate: 5}, guaranteed: 1.5", "guaranteed: must be a share"),
        ("latency: 50ms", "latency: 2ms", "infeasible.*smallest change.*latency"),
        ("{rate: 5}", "{rate: 5, speed: 3}", "cost.speed: unknown key"),
        ("first: 10ms,", "", r"services\[0\].cost.first: is required"),
        ("kind: poisson, rate: 10", "kind: trace, file: no.csv", "cannot read the trace"),
        ("kind: poisson, rate: 10", "kind: steps, rates: {5s: 1}", "start at 0s"),
        ("jobs:", "jobs:\n  - {name: k, guaranteed: 1.1, cost: {rate: 1}}", "must be a share"),
        ("jobs:", "jobs:\n  - {name: j, cost: {rate: 1}}", "'j' stands twice"),
    ],
)
def test_a_bad_scenario_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError, match=said):
        parse_scenario(GOOD.replace(old, new, 1), tmp_path)


def test_guarantees_above_the_whole_are_refused(tmp_path: Path) -> None:
    text = GOOD.replace("name: a\n", "name: a\n    guaranteed: 0.7\n")
    text = text.replace("name: j,", "name: j, guaranteed: 0.5,")
    with pytest.raises(ConfigError, match=r"sum to 1\.2"):
        parse_scenario(text, tmp_path)


def test_nothing_to_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to run"):
        parse_scenario("name: s\nduration: 1s\ndevice: {kind: cpu, units: 1}\n", tmp_path)


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the scenario"):
        read_scenario(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_scenario(tmp_path / "binary.yaml")
