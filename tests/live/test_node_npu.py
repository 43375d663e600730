"""A node serves on an NPU, emulated or behind a stand-in for OpenVINO, and says why it does not
serve what that refuses."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cotenant.devices import proctree
from cotenant.devices.cpu import CpuDevice
from cotenant.devices.npu import NpuDevice
from cotenant.devices.npu_look import Npu, Npus
from cotenant.domain.device_config import NpuConfig

if TYPE_CHECKING:
    from tests.live.conftest import Box, Boxes

if importlib.util.find_spec("openvino") is None:
    pytest.skip("the extra openvino is not installed", allow_module_level=True)
CORES = sorted(os.sched_getaffinity(0))
if len(CORES) < 2:
    pytest.skip("an emulated NPU beside a CPU needs two cores", allow_module_level=True)
X = np.ones((1, 4), np.float32)
DEVICES = [{"kind": "cpu", "cores": CORES[:1]}, {"kind": "npu", "emulate": CORES[1:2]}]


@pytest.fixture(scope="module")
def box(module_boxes: Boxes) -> Box:
    box = module_boxes()
    for kind, name in (("scale", "scale"), ("finding", "refused"), ("finding", "finding"),
                       ("finding", "either")):  # fmt: skip
        box.model(kind, name)
    services = [
        {"name": "scale", "kinds": ["npu", "cpu"]},
        {"name": "refused", "kinds": "npu"},
        {"name": "finding", "kinds": "cpu"},
        {"name": "either", "kinds": ["npu", "cpu"]},
    ]
    return box.configure(services, devices=DEVICES).start(ready=False)


def environment(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def cores_of(pids: list[int]) -> set[int]:
    """Those that any thread of them may run on."""
    found: set[int] = set()
    for thread in proctree.threads(pids):
        with contextlib.suppress(ProcessLookupError):
            found |= os.sched_getaffinity(thread)
    return found


def device(box: Box, name: str) -> dict[str, Any]:
    return next(dict(d) for d in box.status()["devices"] if d["id"] == name)


def test_what_the_npu_takes_is_served_there_first_on_its_cores(box: Box) -> None:
    box.until(lambda: box.infer("scale", x=X).status == 200)
    assert box.infer("scale", x=X).values == [2, 2, 2, 2]
    assert any(tenant.startswith("scale#") for tenant in device(box, "npu")["tenants"])
    assert not any(tenant.startswith("scale#") for tenant in device(box, "cpu")["tenants"])
    assert box.ask("GET", "/v2/models/scale").json["platform"] == "openvino_onnx"
    there = [pid for pid in box.workers() if b"npu-emulated" in environment(pid)]
    assert there
    box.until(lambda: {CORES[1]} == cores_of(there))


def test_status_says_that_it_is_emulated_and_that_it_only_serves(box: Box) -> None:
    assert any("EMULATED" in limit for limit in device(box, "npu")["limits"])
    assert device(box, "npu")["trains"] is False


def test_what_it_does_not_support_is_named_and_not_computed_some_other_way(box: Box) -> None:
    box.until(lambda: "NonZero" in box.index().get(("refused", "1"), {}).get("reason", ""))
    assert box.infer("refused", x=X).status != 200


def test_a_model_that_the_npu_refuses_is_served_by_the_cpu_if_it_may_be(box: Box) -> None:
    box.until(lambda: box.infer("either", x=X).status == 200)
    assert box.infer("either", x=X).values == [1, 1, 1, 1]
    assert any(tenant.startswith("either#") for tenant in device(box, "cpu")["tenants"])


def test_the_same_model_is_served_where_it_may_run_on_the_cpu(box: Box) -> None:
    box.until(lambda: box.infer("finding", x=X).status == 200)
    assert box.infer("finding", x=X).values == [1, 1, 1, 1]
    assert box.ask("GET", "/v2/models/finding").json["platform"] != "openvino_onnx"


def test_a_service_that_one_device_cannot_carry_is_on_both(boxes: Boxes) -> None:
    box = boxes()
    box.model("work", "heavy", layers=90)
    service = {"name": "heavy", "kinds": ["npu", "cpu"], "batch": {"max": 1}}
    box.configure([service | {"objective": {"latency": "100ms"}}], devices=DEVICES).start()
    x = np.ones((1, 256), np.float32)
    for _ in range(20):
        assert box.infer("heavy", x=x).status == 200
    (stats,) = box.ask("GET", "/v2/models/heavy/stats").json["model_stats"]
    spent = stats["inference_stats"]["compute_infer"]
    twice = 2e9 * spent["count"] / spent["ns"]  # requests a second that would take two of it
    with box.under_load("heavy", twice, x=x) as load:
        box.until(lambda: device(box, "npu")["tenants"] and device(box, "cpu")["tenants"])
    assert load.count(200)


STANDIN = f"""
import sys

if "cotenant.runtime.worker" in sys.orig_argv:
    sys.path.append({str(Path(__file__).parents[2])!r})
    from cotenant.engines import openvino_npu
    from tests.npu_standin import StandIn

    openvino_npu.shared_core = StandIn
"""


def test_a_node_serves_on_an_npu_that_openvino_lists(
    boxes: Boxes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(STANDIN)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    box = boxes()
    box.model("scale", "scale")
    box.model("finding", "finding")
    services = [{"name": "scale", "kinds": "npu"}, {"name": "finding", "kinds": "npu"}]
    box.configure(services, devices=DEVICES)
    there = Npus((Npu("NPU", "Stand-in NPU", memory=1 << 30),), ("/dev/accel/accel0",))
    devices = [
        CpuDevice("cpu", CORES[:1], realtime="never"),
        NpuDevice(NpuConfig(device="NPU"), lambda: there),
    ]

    async def live() -> None:
        async with box.here(devices=devices):
            ask = asyncio.to_thread
            await ask(box.until, lambda: box.infer("scale", x=X).status == 200)
            assert (await ask(box.infer, "scale", x=X)).values == [2, 2, 2, 2]
            wide = np.ones((2, 4), np.float32)
            assert (await ask(box.infer, "scale", x=wide)).status == 400, "its shapes are fixed"
            index = await ask(box.index)
            assert "NonZero" in index["finding", "1"].get("reason", "")

    asyncio.run(live())
