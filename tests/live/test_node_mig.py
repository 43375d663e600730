"""A node on a GPU in MIG mode: the stand-in for NVML, and a model that computes nowhere."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cotenant.domain.events import DeviceChanged
from cotenant.sim.replay import replay
from cotenant.telemetry.records import Record, read
from tests.gpu_machine import GpuMachine
from tests.live.conftest import Boxes
from tests.nvml_standin import Box as Machine
from tests.nvml_standin import Fault, a100, add, environment, instances

WAITS = ("sh", "-c", "echo $CUDA_VISIBLE_DEVICES; while :; do sleep 0.05; done")
CUDA = {"kind": "cuda", "preempt": "none"}
NO_ROOM = 23


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
    log = Path(box.control.log_path("job"))
    box.until(lambda: log.exists() and log.read_text().startswith("MIG-"))
    assert len(instances(machine)) == 1
    (device,) = box.status()["devices"]
    assert len(device["units"]) > 1
    box.stop()
    assert instances(machine) == []


def test_models_are_loaded_in_their_instances_and_answer_there(
    boxes: Boxes, nvml_library: Path, machine: Path
) -> None:
    box = boxes(dict(environment(nvml_library, machine)))
    path = box.models / "pieces" / "1" / "model.pieces.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(msgspec.json.encode({"pieces": 3, "turn_ms": 5}))
    box.configure([{"name": "pieces"}], devices=[CUDA]).start()
    for _ in range(10):
        answer = box.post("/v2/models/pieces/generate_stream", b'{"text": "abcdef"}')
        assert (answer.status, answer.body.count(b"data: ")) == (200, 3)
    plan = box.control.plan()["plan"]
    serving = [p for p in plan["partitions"] if "pieces" in p["services"]]
    (service,) = box.status()["services"]
    assert service["workers"] == len(serving) >= 1
    assert len(instances(machine)) == len(plan["partitions"])


def test_a_gate_that_fails_in_the_first_instance_is_told_the_dispatcher(
    boxes: Boxes, gpu: GpuMachine, tmp_path: Path
) -> None:
    gpu.write(Machine((a100(mig=True),)))
    faults = tmp_path / "faults"
    faults.write_text("alloc 0 2\ncreate 0 2\n")
    box = boxes({**gpu.env(), "STANDIN_FAULT": str(faults)})
    box.configure([], devices=[{"kind": "cuda"}]).start()
    box.submit(*WAITS)
    (device,) = box.until(lambda: [d for d in box.status()["devices"] if d["level"] == "NONE"])
    box.until(lambda: box.job("job").partitions)
    box.stop()
    entries = list(read(box.state / "journal"))
    told = [x.event for x in entries if isinstance(x, Record)]
    specs = [event.spec for event in told if isinstance(event, DeviceChanged)]
    assert [spec.preempt.name for spec in specs][-1] == "NONE"
    assert specs[-1].limits == tuple(device["limits"])
    assert replay(entries).identical


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
