"""``cotenant plan`` on a node that runs: on the CPU, on a stand-in, on a GPU in MIG mode (of the
stand-in for NVML)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.live.conftest import Boxes
from tests.nvml_standin import Box as Machine
from tests.nvml_standin import Fault, a100, add, environment, instances

WAITS = ("sh", "-c", "echo $CUDA_VISIBLE_DEVICES; while :; do sleep 0.05; done")
STAND_IN = {"kind": "null", "id": "other", "units": 3}
CUDA = {"kind": "cuda", "preempt": "none"}
NO_ROOM = 23


def test_a_dry_run_shows_what_would_come_and_changes_nothing(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "scale")
    devices = [STAND_IN, {"kind": "cpu"}]
    box.configure([{"name": "scale", "kinds": "cpu"}], devices=devices).start()
    box.submit(*WAITS, kinds=("cpu",))
    box.until(lambda: box.job("job").partitions)
    plain = box.control.plan()
    assert "next" not in plain
    where = {name for p in plain["plan"]["partitions"] for name in p["services"]}
    assert where == {"scale"}
    for _ in range(20):
        found = box.control.plan(dry_run=True)
        there = found["plan"]["partitions"]
        assert {p["id"] for p in there} == {p["id"] for p in box.status()["partitions"]}
        assert [d["id"] for d in found["devices"]] == ["other", "cpu"]
        assert all(d["steps"] == [] and not d["problem"] for d in found["devices"])


@pytest.fixture
def machine(nvml_library: Path, tmp_path: Path) -> Path:
    """The file of a machine with a GPU in MIG mode."""
    return Machine((a100(mig=True),)).write(tmp_path / "box")


def test_a_job_on_a_gpu_in_mig_mode_sees_its_instance(
    boxes: Boxes, nvml_library: Path, machine: Path
) -> None:
    box = boxes(dict(environment(nvml_library, machine)))
    box.configure([], devices=[CUDA]).start()
    box.submit(*WAITS)
    box.until(lambda: box.job("job").partitions)
    box.until(lambda: Path(box.control.log_path("job")).read_text().startswith("MIG-"))
    assert len(instances(machine)) == 1
    (device,) = box.status()["devices"]
    assert len(device["units"]) > 1
    box.stop()
    assert instances(machine) == []


def test_a_dry_run_shows_the_steps_of_a_change_of_instances(
    boxes: Boxes, nvml_library: Path, machine: Path
) -> None:
    add(machine, Fault("nvmlDeviceCreateGpuInstanceWithPlacement", NO_ROOM))
    box = boxes(dict(environment(nvml_library, machine)))
    box.configure([], devices=[CUDA]).start()
    box.submit(*WAITS)
    (device,) = box.until(lambda: [d for d in box.control.plan(True)["devices"] if d["steps"]])
    assert device["comes"] and device["seconds"] > 0
    assert not any(step["measured"] for step in device["steps"])
    assert instances(machine) == []
