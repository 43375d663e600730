"""Scenarios whose execution times were measured by ``cotenant profile``."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cotenant.domain.errors import ConfigError
from cotenant.domain.profile import FORMAT, ModelProfile, Profiles
from cotenant.sim.scenario import Scenario
from cotenant.sim.scenario_file import parse_scenario
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


def scenario(folder: Path, text: str = TEXT, *profiles: ModelProfile) -> Scenario:
    found = Profiles(FORMAT, profiles or (profiled(),))
    (folder / "a.json").write_bytes(msgspec.json.encode(found))
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


BOTH = "devices: [{kind: cpu, units: 4}, {kind: npu}]"
NPU = msgspec.structs.replace(profiled("npu", 1), load_ns=9_000_000_000, memory_peak=7)


def test_each_kind_of_device_has_its_own_figures(tmp_path: Path) -> None:
    text = TEXT.replace("device: {kind: cpu, units: 4}", BOTH)
    (service,) = scenario(tmp_path, text, profiled(), NPU).services
    assert service.costs["npu"].profile == NPU.table != service.costs["cpu"].profile
    assert service.spec.variants["npu"].memory == 7
    assert service.spec.variants["cpu"].memory == profiled().memory_peak
    assert service.load == NPU.load_ns, "the longest"


def test_what_a_device_that_only_serves_has_no_figures_of_has_no_build(tmp_path: Path) -> None:
    text = TEXT.replace("device: {kind: cpu, units: 4}", BOTH)
    (service,) = scenario(tmp_path, text).services
    assert service.costs.keys() == {"cpu"}


def test_what_is_stated_of_a_kind_stands_beside_its_figures(tmp_path: Path) -> None:
    text = TEXT.replace("device: {kind: cpu, units: 4}", BOTH)
    (service,) = scenario(
        tmp_path, text + "    npu: {accuracy: 0.9, operators: [conv]}\n", profiled(), NPU
    ).services
    variant = service.spec.variants["npu"]
    assert (variant.accuracy, variant.memory, variant.operators) == (0.9, 7, ("conv",))
    assert service.costs["npu"].profile == NPU.table
    stated = text + "    npu: {cost: {first: 3ms}}\n"
    (service,) = scenario(tmp_path, stated, profiled(), NPU).services
    assert service.costs["npu"].first == 3_000_000 and not service.costs["npu"].profile


def test_a_gpu_in_subsets_is_another_device_than_a_whole_one(tmp_path: Path) -> None:
    divided = msgspec.structs.replace(profiled("cuda"), subsets=True)
    text = TEXT.replace("{kind: cpu, units: 4}", "{kind: sm, units: 4, trains: false}")
    (service,) = scenario(tmp_path, text, divided).services
    assert service.costs["sm"].profile == divided.table
    whole = TEXT.replace("{kind: cpu, units: 4}", "{kind: cuda}")
    (service,) = scenario(tmp_path, whole, profiled("cuda", 1)).services
    assert service.costs["cuda"].profile == profiled("cuda", 1).table
    with pytest.raises(ConfigError):
        scenario(tmp_path, whole, divided)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("a.json", "b.json", r"services\[0\].profile: cannot read"),
        ("a.json", "a.json\n    cost: {first: 10ms}", r"services\[0\].profile: .*leave one"),
        ("{kind: cpu, units: 4}", "{kind: cuda}", r"services\[0\].profile: .*kinds cpu"),
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
    with pytest.raises(ConfigError, match=r"services\[0\].profile: .*no whole profiles"):
        parse_scenario(TEXT, tmp_path)
