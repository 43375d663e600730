"""``cotenant profile`` of an NPU, emulated or behind a stand-in for OpenVINO, and who reads it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from cotenant.cli.main import main
from cotenant.devices.npu import NpuDevice
from cotenant.devices.npu_look import Npu, Npus
from cotenant.domain.config import ModelSettings
from cotenant.domain.device_config import NpuConfig
from cotenant.domain.errors import ModelError
from cotenant.domain.events import Foretold, VersionOffered
from cotenant.domain.profile import PROFILE_FILE, ModelProfile, read_profiles
from cotenant.runtime.profiling import Ask, profile
from cotenant.runtime.repository import Repository
from cotenant.sim.scenario_file import parse_scenario
from cotenant.telemetry.records import Record, read
from tests.live.conftest import PATIENCE_S, finding_model, scale_model
from tests.live.test_node_npu import DEVICES, STANDIN, X

if TYPE_CHECKING:
    from tests.live.conftest import Box, Boxes

ASK = Ask((1,), 2, 0.05)


def profiled(box: Box, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cotenant", "profile", "scale", "--models", str(box.models)]
    command += ["--seconds", "0.1", "--config", str(box.directory / "cotenant.yaml"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def of(box: Box) -> dict[str, ModelProfile]:
    """By kind of device, what was measured."""
    data = (box.models / "scale" / "1" / PROFILE_FILE).read_bytes()
    return {found.kind: found for found in read_profiles(data)}


@pytest.fixture
def box(boxes: Boxes) -> Box:
    found = boxes()
    found.model("scale", "scale")
    services = [{"name": "scale", "kinds": ["npu", "cpu"]}]
    return found.configure(services, devices=DEVICES)


def test_each_kind_is_measured_as_the_node_has_it_and_says_if_it_is_emulated(box: Box) -> None:
    done = profiled(box, "--device", "all")
    assert done.returncode == 0, done.stderr
    assert "EMULATED" in done.stdout
    found = of(box)
    assert found.keys() == {"cpu", "npu"}
    npu, cpu = found["npu"], found["cpu"]
    assert npu.emulated and "EMULATED" in npu.device and npu.engine == "openvino"
    assert not cpu.emulated and cpu.engine == "onnxruntime"
    assert {f.units for f in npu.figures} == {1} and npu.units == 1
    assert 0 < npu.memory_loaded <= npu.memory_peak


def test_more_units_than_it_has_are_refused(box: Box) -> None:
    done = profiled(box, "--device", "npu", "--units", "2")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert not list(box.models.glob(f"**/{PROFILE_FILE}*"))


def test_a_model_that_it_does_not_take_is_refused_and_the_cpu_measured(box: Box) -> None:
    finding_model(box.models / "scale" / "1" / "model.onnx")
    assert profiled(box, "--device", "npu").returncode == 1
    done = profiled(box, "--device", "all")
    assert done.returncode == 0 and "npu" in done.stderr
    assert of(box).keys() == {"cpu"}


def test_the_planner_knows_both_before_an_instance_is_loaded(
    box: Box, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profiled(box, "--device", "all").returncode == 0
    box.start()
    assert box.infer("scale", x=X).status == 200
    known = {f.kind: f for f in foretold(box)}
    for kind, found in of(box).items():
        assert known[kind].memory == found.memory_peak
        times = {(f.size, f.units, f.rows, f.median_ns) for f in found.figures}
        assert set(known[kind].profile) == times
    (one,) = box.status()["services"][0]["engines"]
    assert one["device"] == "npu" and one["profile"]["emulated"]
    assert {other["engine"] for other in one["others"]} >= {"onnxruntime", "tensorrt"}
    assert main(["explain", "--state-dir", str(box.state)]) == 0
    assert "openvino" in capsys.readouterr().out


def foretold(box: Box) -> Iterator[Foretold]:
    for entry in read(box.state / "journal"):
        if isinstance(entry, Record) and isinstance(entry.event, VersionOffered):
            yield from entry.event.foretold


def test_of_an_npu_that_is_another_nothing_is_foretold(box: Box) -> None:
    """Emulated on another number of cores, it takes another time."""
    assert profiled(box, "--device", "npu").returncode == 0
    path = box.models / "scale" / "1" / PROFILE_FILE
    path.write_text(path.read_text().replace("EMULATED NPU: 1 core", "EMULATED NPU: 7 cores"))
    box.start()
    assert not list(foretold(box))


def test_of_an_engine_that_is_not_chosen_nothing_is_foretold(box: Box) -> None:
    assert profiled(box, "--engine", "openvino").returncode == 0
    assert of(box)["cpu"].engine == "openvino"
    box.start()
    assert not list(foretold(box))


def test_the_simulator_has_the_npu_take_its_own_times(box: Box) -> None:
    assert profiled(box, "--device", "all").returncode == 0
    scenario = {
        "name": "s",
        "duration": "1s",
        "devices": [{"kind": "cpu", "units": 1}, {"kind": "npu"}],
        "services": [
            {
                "name": "scale",
                "objective": {"latency": "30s"},
                "profile": f"scale/1/{PROFILE_FILE}",
                "arrivals": {"kind": "poisson", "rate": 1},
            }
        ],
    }
    (service,) = parse_scenario(yaml.safe_dump(scenario), box.models).services
    assert {kind: cost.profile for kind, cost in service.costs.items()} == {
        kind: found.table for kind, found in of(box).items()
    }


@pytest.fixture
def npu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NpuDevice]:
    """One that OpenVINO lists, on a stand-in."""
    (tmp_path / "sitecustomize.py").write_text(STANDIN)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    there = Npus((Npu("NPU", "Stand-in NPU", memory=1 << 30),), ("/dev/accel/accel0",))
    device = NpuDevice(NpuConfig(device="NPU"), lambda: there)
    device.open()
    yield device
    device.close()


def test_an_npu_that_openvino_lists_is_measured_as_itself(npu: NpuDevice, tmp_path: Path) -> None:
    scale_model(tmp_path / "models" / "scale" / "1" / "model.onnx")
    files = Repository(tmp_path / "models").newest("scale")
    found = asyncio.run(profile(files, ModelSettings(), ASK, npu, lambda done: None))
    assert (found.kind, found.device, found.emulated) == ("npu", "Stand-in NPU", False)
    assert found.engine == "openvino" and found.unjoined, "its shapes are fixed"
    assert [(f.units, f.rows) for f in found.figures] == [(1, 1)]


def test_what_an_npu_does_not_take_is_said(npu: NpuDevice, tmp_path: Path) -> None:
    finding_model(tmp_path / "models" / "finding" / "1" / "model.onnx")
    files = Repository(tmp_path / "models").newest("finding")
    with pytest.raises(ModelError, match="NonZero"):
        asyncio.run(profile(files, ModelSettings(), ASK, npu, lambda done: None))
