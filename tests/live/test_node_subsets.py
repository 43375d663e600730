"""A node whose GPU is in subsets: services beside each other on multiprocessors of their own.

The driver is a stand-in. Workers are real, with the real bindings and the engine for GPUs, whose
ONNX Runtime executes on the CPU (``tests.cuda_standin.OnCpu``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cotenant.domain.errors import InvalidRequest
from tests.gpu_machine import GpuMachine
from tests.nvml_standin import Box as Machine
from tests.nvml_standin import h100

if TYPE_CHECKING:
    from tests.live.conftest import Box, Boxes

pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)

UNITS = 4
ON_GPU = """
import json, os, time
import cotenant.engines.onnx_cuda as module
from tests.cuda_standin import OnCpu

class Recorded(module.OnnxCudaEngine):
    '''Takes 60 ms on two units, 15 on four, and writes down where.'''

    def __init__(self, path, units, target, **given):
        super().__init__(path, units, target, runtime=OnCpu(), **given)
        self._name = path.parent.parent.name

    def _run(self, units, inputs, room):
        began = time.monotonic_ns()
        outputs = super()._run(units, inputs, room)
        time.sleep(0.24 / units**2)
        if self._settled:
            lane = next(reversed(self._sessions.values())).lane
            seen = [self._name, lane.units, lane.sms, began, time.monotonic_ns()]
            with open(os.environ["COTENANT_TEST_RUNS"], "a") as file:
                file.write(json.dumps(seen) + chr(10))
        return outputs

module.OnnxCudaEngine = Recorded
"""
SERVICES = [{"name": name, "objective": {"latency": "1s"}, "batch": {"max": 1}} for name in "ab"]
SUBSETS = {"kind": "cuda", "subsets": True}


def boxed(boxes: Boxes, gpu: GpuMachine, folder: Path, mps: bool = True) -> Box:
    """A box with two models, and MPS if it is to be there."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(ON_GPU)
    (folder / "mps").mkdir()
    if mps:
        (folder / "mps" / "control").touch()
    root = Path(__file__).parents[2]
    found = boxes({
        **gpu.env(),
        "CUDA_MPS_PIPE_DIRECTORY": str(folder / "mps"),
        "COTENANT_TEST_RUNS": str(folder / "runs"),
        "PYTHONPATH": f"{folder / 'site'}:{root}",
        "STANDIN_SMS": "36",
    })  # fmt: skip
    (folder / "runs").touch()
    for name in "ab":
        found.model("scale", name)
    return found.configure(SERVICES, devices=[SUBSETS], policy={"grow_after": "500ms"})


@pytest.fixture
def box(boxes: Boxes, gpu: GpuMachine, tmp_path: Path) -> Box:
    return boxed(boxes, gpu, tmp_path)


def runs(folder: Path) -> list[tuple[str, tuple[int, ...], int, int, int]]:
    """Model, units, multiprocessors as read back, begin and end (ns) of each batch."""
    lines = (folder / "runs").read_text().splitlines()
    return [(name, tuple(units), *rest) for name, units, *rest in map(json.loads, lines)]


def places(box: Box) -> dict[str, tuple[int, ...]]:
    """Units of the partitions on which each service may run."""
    found: dict[str, tuple[int, ...]] = {}
    for partition in box.status()["partitions"]:
        for name in partition["services"]:
            found[name] = (*found.get(name, ()), *partition["units"])
    return found


def apart(box: Box) -> bool:
    """Whether each service has a half."""
    found = places(box)
    return sorted(map(len, found.values())) == [2, 2] and not set(found["a"]) & set(found["b"])


def asked(box: Box, name: str) -> int:
    return box.infer(name, x=np.ones((1, 4), np.float32)).status


def device(box: Box) -> dict[str, Any]:
    (found,) = box.status()["devices"]
    return dict(found)


def test_services_run_at_once_each_on_its_own_multiprocessors(box: Box, tmp_path: Path) -> None:
    box.start()
    box.until(lambda: apart(box))
    assert len(device(box)["units"]) == UNITS and not device(box)["trains"]
    planned = box.control.plan(dry_run=True)
    shown = [unit for part in planned["plan"]["partitions"] for unit in part["units"]]
    assert sorted(shown) == list(range(UNITS)) and not planned["devices"][0]["problem"]
    x = np.ones((1, 4), np.float32)
    with box.under_load("a", 5, x=x), box.under_load("b", 5, x=x):
        box.until(lambda: len(runs(tmp_path)) >= 40)
    while_apart = [run for run in runs(tmp_path) if len(run[1]) == 2]
    assert {sms for _, _, sms, _, _ in while_apart} == {16}, "as many as the driver says"
    a, b = ([run for run in while_apart if run[0] == name] for name in "ab")
    assert a and b and not {u for r in a for u in r[1]} & {u for r in b for u in r[1]}
    beside = [(r, s) for r in a for s in b if r[3] < s[4] and s[3] < r[4]]
    assert beside, "they never ran at the same time"


def test_the_gpu_is_divided_anew_under_load(box: Box, tmp_path: Path) -> None:
    """One service asks for more than a half can do; all of the GPU is more than twice as fast."""
    box.start()
    box.until(lambda: apart(box))
    assert asked(box, "b") == 200
    with box.under_load("a", 25, x=np.ones((1, 4), np.float32)):
        box.until(lambda: [run for run in runs(tmp_path) if run[0] == "a" and len(run[1]) == UNITS])
        assert asked(box, "b") == 200
    assert {sms for _, units, sms, _, _ in runs(tmp_path) if len(units) == UNITS} == {36}


def test_jobs_are_refused_with_what_would_do(box: Box) -> None:
    box.start()
    for kinds in (("cuda",), ()):
        with pytest.raises(InvalidRequest, match="MIG"):
            box.submit("true", kinds=kinds)
    assert not box.status()["jobs"]


def test_a_node_does_not_start_where_there_are_no_subsets(
    boxes: Boxes, gpu: GpuMachine, tmp_path: Path
) -> None:
    box = boxed(boxes, gpu, tmp_path, mps=False)
    assert box.spawn().wait(30) and "MPS" in box.log()
    (tmp_path / "mps" / "control").touch()
    gpu.write(Machine(gpus=(h100(),), driver="535.183.01", cuda=12020))
    assert box.spawn().wait(30) and "535.183.01" in box.log()
    gpu.write(Machine(gpus=(h100(table="H100-SXM5-80GB", mig=True),)))
    assert box.spawn().wait(30) and "mig 0" in box.log()
