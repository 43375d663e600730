"""A GPU in subsets of its multiprocessors as a device: the real bindings for NVML and the driver,
on stand-ins for both."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cotenant.devices.nvidia.device import VISIBLE, CudaDevice
from cotenant.domain.device import (
    CUDA_SUBSETS,
    PROCESSOR,
    Partition,
    PreemptLevel,
    Tenant,
    TenantKind,
)
from cotenant.domain.device_config import CudaConfig
from cotenant.domain.errors import DeviceError, EnvironmentProblem
from cotenant.policy.layouts import even_layouts
from tests import nvml_standin
from tests.native.conftest import Built

pytestmark = pytest.mark.usefixtures("gpu_python")
Open = Callable[..., CudaDevice]
WORKER = Tenant("w", TenantKind.WORKER)
JOB = Tenant("j", TenantKind.JOB)


@pytest.fixture
def pipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a running MPS daemon leaves."""
    found = tmp_path / "mps"
    found.mkdir()
    (found / "control").touch()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(found))
    return found


@pytest.fixture
def has(
    nvml_library: Path, built: Built, pipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[nvml_standin.Box], Any]:
    """Lets the machine be this one; at first it has an H100."""
    import pynvml

    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(nvml_library / "libnvidia-ml.so.1")))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setenv("COTENANT_NVML_STANDIN", str(tmp_path / "box"))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(built.driver))
    nvml_standin.Box(gpus=(nvml_standin.h100(),)).write(tmp_path / "box")
    return lambda box: box.write(tmp_path / "box")


@pytest.fixture
def opened(has: Any, tmp_path: Path) -> Iterator[Open]:
    made: list[CudaDevice] = []

    def start(**config: Any) -> CudaDevice:
        device = CudaDevice(CudaConfig(subsets=True, **config), tmp_path)
        device.open()
        made.append(device)
        return device

    yield start
    for device in made:
        device.close()


def part(*units: int) -> Partition:
    return Partition(f"cuda:{'+'.join(map(str, units))}", "cuda", units)


# --- what it is -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sms", "group", "units"), [(132, "8 8", 16), (108, "4 2", 27), (58, "2 2", 29)]
)
def test_its_units_are_those_that_a_worker_finds(
    opened: Open, monkeypatch: pytest.MonkeyPatch, sms: int, group: str, units: int
) -> None:
    monkeypatch.setenv("STANDIN_SMS", str(sms))
    monkeypatch.setenv("STANDIN_SM_GROUP", group)
    spec = opened().spec
    assert spec.units == tuple(range(units)) and spec.compute == units
    assert spec.shapes[0] == 1 and spec.shapes[-1] == units
    assert spec.memory > 0 and spec.repartition_ns > 0


def test_it_serves_and_takes_no_jobs(opened: Open) -> None:
    device = opened()
    spec = device.spec
    assert not spec.trains and not spec.evicts and spec.preempt is PreemptLevel.NONE
    assert any(limit.strip() for limit in spec.limits), "and says so"
    for refused in (lambda: device.launch(JOB, None), lambda: device.attach(JOB, 1)):
        with pytest.raises(DeviceError):
            refused()


def test_a_worker_is_told_that_its_units_are_groups_of_multiprocessors(opened: Open) -> None:
    found = opened().launch(WORKER, None).fixed
    assert found[PROCESSOR] == f"{CUDA_SUBSETS}{nvml_standin.uuid_of(0)}"
    assert found[VISIBLE] == nvml_standin.uuid_of(0)


def test_the_gpu_is_found_among_several(has: Any, opened: Open) -> None:
    has(nvml_standin.Box(gpus=(nvml_standin.h100(), nvml_standin.h100())))
    found = opened(gpu="1").launch(WORKER, None).fixed
    assert found[PROCESSOR] == f"{CUDA_SUBSETS}{nvml_standin.uuid_of(1)}"


# --- layouts --------------------------------------------------------------------------------


def test_every_layout_of_the_planner_can_be_had_at_once(opened: Open) -> None:
    device = opened()
    layouts = even_layouts(device.spec)
    assert len(layouts) == len(device.spec.units)
    device.attach(WORKER, 1)
    for layout in layouts:
        assert device.preview(layout.mine) == ()
        device.repartition(layout.mine)
        for partition in layout.mine:
            device.bind("w", partition)


@pytest.mark.parametrize(
    "partitions",
    [(part(0, 1), part(1, 2)), (part(16),), (part(0, -1),), (part(),), (part(3, 3),)],
    ids=["shared", "not there", "below", "nothing", "twice"],
)
def test_a_layout_that_is_none_is_refused(opened: Open, partitions: tuple[Partition, ...]) -> None:
    with pytest.raises(DeviceError):
        opened().repartition(partitions)


# --- where it cannot be had -----------------------------------------------------------------


def test_a_gpu_in_mig_mode_is_divided_already(has: Any, opened: Open) -> None:
    has(nvml_standin.Box(gpus=(nvml_standin.h100(table="H100-SXM5-80GB", mig=True),)))
    with pytest.raises(EnvironmentProblem, match="MIG"):
        opened()


def test_a_driver_without_green_contexts_is_refused(has: Any, opened: Open) -> None:
    gpus = (nvml_standin.h100(),)
    has(nvml_standin.Box(gpus=gpus, driver="535.183.01", cuda=12020))
    with pytest.raises(EnvironmentProblem, match=r"535\.183\.01"):
        opened()


@pytest.mark.parametrize("call", ["cuDevSmResourceSplitByCount", "cuGreenCtxCreate"])
def test_a_driver_that_refuses_is_named_with_its_call(
    opened: Open, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setenv("STANDIN_GREEN_FAULT", f"{call} 801")
    with pytest.raises(EnvironmentProblem, match=call):
        opened()


def test_a_gpu_too_small_to_divide_is_refused(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_SMS", "6")
    with pytest.raises(EnvironmentProblem):
        opened()


def test_without_the_bindings_it_is_said_how_to_get_them(
    opened: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "without" / "cuda"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    with pytest.raises(EnvironmentProblem, match=r"cotenant\[cuda\]"):
        opened()


def test_without_mps_services_would_take_turns_so_it_is_refused(opened: Open, pipes: Path) -> None:
    (pipes / "control").unlink()
    with pytest.raises(EnvironmentProblem, match="MPS"):
        opened()


def test_beside_static_partitions_it_is_refused(opened: Open, pipes: Path) -> None:
    script = "print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-S", "-c", script], stdin=-1, stdout=-1) as daemon:
        assert daemon.stdout is not None and daemon.stdout.readline()
        (pipes / "nvidia-cuda-mps-control.pid").write_text(str(daemon.pid))
        with pytest.raises(EnvironmentProblem, match="static"):
            opened()
        daemon.kill()


def test_what_does_not_answer_is_not_waited_for(
    opened: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("cotenant.devices.nvidia.subsetspace.WITHIN_S", 0.5)
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(100)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EnvironmentProblem):
        opened()
