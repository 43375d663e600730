"""Scenario files: what they give, and what is said of bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from cotenant.domain.errors import ConfigError
from cotenant.sim.scenario_file import parse_scenario, read_scenario

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
        (
            "kind: cpu",
            "kind: cpus",
            "'cpus' is none of cpu, cuda, mig, npu, sm; did you mean 'cpu'",
        ),
        ("units: 4", "units: 0", "device.units: expected a whole number from 1"),
        ("rate: 10}", "rate: -1}", r"services\[0\].arrivals.rate: must not be negative"),
        ("kind: poisson", "kind: poison", "did you mean 'poisson'"),
        ("rate: 5", "rate: 0", r"jobs\[0\].cost.rate: must be above 0"),
        ("rate: 5}", "rate: 5}, guaranteed: 1.5", "guaranteed: must be a share"),
        ("latency: 50ms", "latency: 2ms", "infeasible.*smallest change.*latency"),
        ("first: 10ms,", "first: 49ms, parallel: 0, cv: 0.2,", "infeasible: 99 %.* to 76.2 ms"),
        ("{rate: 5}", "{rate: 5, speed: 3}", "cost.speed: unknown key"),
        ("{rate: 5}", "{rate: 5, saturates: 2, gang: 0.5}", "cost.gang: must be between 1 and"),
        ("{rate: 5}", "{rate: 5, gang: 2}", "cost.gang: needs saturates"),
        ("first: 10ms,", "", r"services\[0\].cost.first: is required"),
        ("kind: poisson, rate: 10", "kind: trace, file: no.csv", "cannot read the trace"),
        ("kind: poisson, rate: 10", "kind: steps, rates: {5s: 1}", "start at 0s"),
        ("jobs:", "jobs:\n  - {name: k, guaranteed: 1.1, cost: {rate: 1}}", "must be a share"),
        ("jobs:", "jobs:\n  - {name: j, cost: {rate: 1}}", "'j' stands twice"),
        ("device: {kind: cpu, units: 4}", "", "device: is required; give device for one"),
        (
            "kind: poisson, rate: 10",
            "kind: bursts, rate: 1, burst_rate: 2, mean_quiet: 1ns, mean_burst: 1s",
            "mean_quiet: must be at least 1ms",
        ),
        ("name: s", "name: " + "[" * 5000, "nested too deeply"),
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


MIG = """
name: m
duration: 20s
device: {kind: mig, gpu: A100-SXM4-80GB, layout: [3g.40gb, 3g.40gb]}
services:
  - name: a
    objective: {latency: 50ms}
    memory: 4GiB
    cost: {first: 10ms, per_row: 2ms}
    arrivals: {kind: poisson, rate: 10}
"""
NPU = """
name: n
duration: 20s
devices:
  - {kind: cpu, units: 4}
  - {kind: npu, memory: 100MiB, operators: [conv]}
services:
  - name: a
    objective: {latency: 50ms}
    cost: {first: 10ms, per_row: 2ms}
    npu: {cost: {first: 5ms}, memory: 50MiB, accuracy: 0.9, operators: [conv]}
    arrivals: {kind: poisson, rate: 10}
"""


def test_devices_are_what_they_say() -> None:
    gpu = parse_scenario(MIG, Path()).device
    assert (gpu.spec.compute, gpu.spec.pins_jobs, gpu.layout) == (7, True, ("3g.40gb", "3g.40gb"))
    cores, npu = parse_scenario(NPU, Path()).devices
    assert (cores.spec.trains, npu.spec.trains, npu.spec.operators) == (True, False, ("conv",))
    assert npu.spec.memory == 100 * 2**20


@pytest.mark.parametrize(
    ("text", "old", "new", "said"),
    [
        (MIG, "A100-SXM4-80GB", "A100-80", "device.gpu: 'A100-80' is none of"),
        (MIG, "[3g.40gb, 3g.40gb]", "[4g.40gb, 4g.40gb]", "layout.*cannot form 4g.40gb, 4g.40gb"),
        (
            MIG,
            "[3g.40gb, 3g.40gb]",
            "[9g.40gb]",
            "device.layout: .* has no profile '9g.40gb'; it",
        ),
        (MIG, "memory: 4GiB", "memory: 400GiB", r"services\[0\]: infeasible.*needs 400"),
        (NPU, "units: 4}", "units: 4, layout: [5, 1]}", r"devices\[0\].layout: expected \[units"),
        (NPU, "units: 4}", "units: 4, layout: [3, 2]}", "of 4 units, got"),
        (NPU, "operators: [conv]}\nservices", "layout: [1, 1]}\nservices", "is one partition"),
        (NPU, "kind: npu", "kind: npu, units: 3", "units: unknown key"),
        (NPU, "kind: npu", "kind: npu, name: cpu", "devices: 'cpu' stands twice"),
        (NPU, "devices:", "device: {kind: cpu, units: 1}\ndevices:", "device: both are given"),
        (NPU, "duration: 20s", "duration: 20s\nboxes: 0", "boxes: expected a whole number"),
    ],
)
def test_devices_that_cannot_be_are_named(text: str, old: str, new: str, said: str) -> None:
    assert old in text
    with pytest.raises(ConfigError, match=said):
        parse_scenario(text.replace(old, new), Path())


def test_a_model_that_fits_nowhere_is_refused_with_each_reason() -> None:
    only = NPU.replace("  - {kind: cpu, units: 4}\n", "").replace(
        "[conv]}\n    arr", "[gemm]}\n    arr"
    )
    with pytest.raises(ConfigError, match=r"none of the devices: npu does not support gemm"):
        parse_scenario(only, Path())


def test_cores_that_only_serve_have_costs_of_their_own(tmp_path: Path) -> None:
    soc = GOOD.replace(
        "device: {kind: cpu, units: 4}",
        "devices: [{kind: sm, units: 4}, {kind: cpu, units: 2, trains: false}]",
    )
    found = parse_scenario(soc, tmp_path)
    assert [d.spec.trains for d in found.devices] == [True, False]
    assert set(found.services[0].costs) == {"sm"}
    own = soc.replace("    arrivals", "    cpu: {cost: {first: 30ms}}\n    arrivals", 1)
    costs = parse_scenario(own, tmp_path).services[0].costs
    assert (costs["sm"].first, costs["cpu"].first) == (10_000_000, 30_000_000)


def test_errors_of_a_file_name_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"mine\.yaml is empty"):
        read_scenario(path)
    path.write_text(GOOD.replace("units: 4", "units: 0"))
    with pytest.raises(ConfigError, match=r"^mine\.yaml: device\.units"):
        read_scenario(path)
