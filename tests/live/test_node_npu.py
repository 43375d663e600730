"""A node serves on an emulated NPU, and says why it does not serve what that refuses."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cotenant.devices import proctree

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
    for kind, name in (("scale", "scale"), ("finding", "refused"), ("finding", "finding")):
        box.model(kind, name)
    services = [
        {"name": "scale", "kinds": ["npu", "cpu"]},
        {"name": "refused", "kinds": "npu"},
        {"name": "finding", "kinds": "cpu"},
    ]
    return box.configure(services, devices=DEVICES).start(ready=False)


def environment(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


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
    assert all(os.sched_getaffinity(tid) == {CORES[1]} for tid in proctree.threads(there))


def test_status_says_that_it_is_emulated_and_that_it_only_serves(box: Box) -> None:
    assert any("EMULATED" in limit for limit in device(box, "npu")["limits"])
    assert device(box, "npu")["trains"] is False


def test_what_it_does_not_support_is_named_and_not_computed_some_other_way(box: Box) -> None:
    box.until(lambda: "NonZero" in box.index().get(("refused", "1"), {}).get("reason", ""))
    assert box.infer("refused", x=X).status != 200


def test_the_same_model_is_served_where_it_may_run_on_the_cpu(box: Box) -> None:
    box.until(lambda: box.infer("finding", x=X).status == 200)
    assert box.infer("finding", x=X).values == [1, 1, 1, 1]
    assert box.ask("GET", "/v2/models/finding").json["platform"] != "openvino_onnx"
