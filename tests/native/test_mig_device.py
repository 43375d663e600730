"""A GPU in MIG mode as a device: on the stand-ins for NVML and for the driver."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from cotenant.devices.nvidia import gates, shim
from cotenant.devices.nvidia.device import VISIBLE, CudaDevice
from cotenant.devices.nvidia.migspace import MigSpace
from cotenant.domain import mig
from cotenant.domain.device import Partition, PreemptLevel, Tenant, TenantKind
from cotenant.domain.device_config import CudaConfig
from cotenant.domain.errors import DeviceError, EnvironmentProblem
from cotenant.policy.layouts import mig_layouts, without_services
from cotenant.policy.views import Layout
from tests.native.conftest import Built
from tests.nvml_standin import (
    Box,
    Fault,
    Gpu,
    Instance,
    Process,
    a100,
    add,
    h100,
    instances,
)

JOB, WORKER = Tenant("j", TenantKind.JOB), Tenant("w", TenantKind.WORKER)
UNGATED = CudaConfig(preempt=PreemptLevel.NONE)
IN_USE, UNKNOWN = 19, 999


class Machine:
    """One GPU, and devices that nodes open on it."""

    def __init__(self, folder: Path) -> None:
        self.box = folder / "box"
        self.opened: list[CudaDevice] = []

    def has(self, gpu: Gpu, **box: object) -> None:
        """Let this be its GPU."""
        msgspec.structs.replace(Box((gpu,)), **box).write(self.box)

    def device(self, config: CudaConfig = UNGATED, state: str = "state") -> CudaDevice:
        folder = self.box.parent / state
        folder.mkdir(exist_ok=True)
        made = CudaDevice(config, folder)
        made.open()
        self.opened.append(made)
        return made

    def standing(self) -> list[tuple[int, int]]:
        """Memory slices at which instances start, and the compute slices of each."""
        return sorted((start, sum(compute)) for _, _, start, compute in instances(self.box))


@pytest.fixture
def machine(
    nvml_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machine]:
    import pynvml

    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(nvml_library / "libnvidia-ml.so.1")))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setenv("COTENANT_NVML_STANDIN", str(tmp_path / "box"))
    made = Machine(tmp_path)
    made.has(a100(mig=True))
    yield made
    for device in made.opened:
        device.close()


@pytest.fixture
def gated(machine: Machine, built: Built, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The machine with the shim and a driver."""
    library = built.shim / "libcuda.so.1"
    monkeypatch.setattr(shim, "SHIM", library)
    monkeypatch.setattr(gates, "SHIM", library)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(built.driver))
    return machine


@pytest.fixture
def sleeper() -> Iterator[Callable[[], int]]:
    started: list[subprocess.Popen[bytes]] = []

    def start() -> int:
        started.append(subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=-1))
        return started[-1].pid

    yield start
    for process in started:
        process.kill()
        process.communicate()


def layout(device: CudaDevice, *profiles: str) -> tuple[Partition, ...]:
    """Services' instances of these profiles, and the jobs' that the planner puts beside them."""
    found = next(
        each
        for each in mig_layouts(device.spec, None)
        if sorted(p.id.rpartition(":")[2].partition("@")[0] for p in each.mine) == sorted(profiles)
    )
    return (*found.mine, *found.free)


def everything(found: Layout) -> tuple[Partition, ...]:
    return (*found.mine, *found.free)


# --- what it is -----------------------------------------------------------------------------


def test_a_gpu_in_mig_mode_is_its_memory_slices(machine: Machine) -> None:
    spec = machine.device().spec
    table = mig.table("A100-SXM4-40GB")
    assert mig.table(spec.mig) == table
    assert spec.units == tuple(range(table.memory_slices))
    assert (spec.compute, spec.pins_jobs) == (table.compute_slices, True)
    assert spec.move_ns > 0 and spec.repartition_ns > 0 and spec.memory > 0
    assert not spec.limits or all(limit.strip() for limit in spec.limits)


def test_without_mig_it_is_one_unit(machine: Machine) -> None:
    machine.has(a100())
    spec = machine.device().spec
    assert (spec.units, spec.mig, spec.pins_jobs) == ((0,), "", True)


@pytest.mark.parametrize("gpu", [a100(mig=True), h100(mig=True)], ids=["a100", "h100"])
def test_every_layout_that_the_planner_can_think_of_can_be_made(machine: Machine, gpu: Gpu) -> None:
    machine.has(gpu)
    device = machine.device()
    for found in [*mig_layouts(device.spec, None)[::9], without_services(device.spec)]:
        partitions = everything(found)
        device.repartition(partitions)
        assert machine.standing() == sorted((p.units[0], p.compute) for p in partitions)
        assert device.preview(partitions) == ()


def test_what_cannot_be_made_is_refused_and_changes_nothing(machine: Machine) -> None:
    device = machine.device()
    there = layout(device, "3g.20gb", "3g.20gb")
    device.repartition(there)
    before = machine.standing()
    one = there[0]
    for wrong in (
        (one, msgspec.structs.replace(one, id="again")),
        (Partition("far", "cuda", (90, 91), slices=2),),
        (Partition("nothing", "cuda", ()),),
    ):
        with pytest.raises(DeviceError):
            device.repartition(wrong)
    assert machine.standing() == before


def test_only_who_administers_the_gpu_can_drive_it_and_that_is_said(machine: Machine) -> None:
    machine.has(a100(mig=True), privileged=False)
    with pytest.raises(EnvironmentProblem, match="root"):
        machine.device()


# --- steps ----------------------------------------------------------------------------------


def test_a_preview_says_what_a_change_takes_and_changes_nothing(machine: Machine) -> None:
    device = machine.device()
    ahead = device.preview(layout(device, "3g.20gb"))
    assert ahead and machine.standing() == []
    assert all(step.what and step.ns > 0 and not step.measured for step in ahead)


def test_what_steps_took_is_what_they_are_expected_to_take_and_the_next_node_knows_it(
    machine: Machine,
) -> None:
    assumed = machine.device().spec.repartition_ns
    machine.opened.pop().close()
    device = machine.device()
    for profile in ("3g.20gb", "2g.10gb"):
        device.repartition(layout(device, profile))
    shown = device.preview(layout(device, "1g.5gb"))
    assert shown and all(step.measured for step in shown)
    learned = device.spec.repartition_ns
    assert learned != assumed
    device.close()
    device.open()
    assert device.spec.repartition_ns > 0
    assert all(step.measured for step in device.preview(layout(device, "3g.20gb")))


def test_a_change_that_fails_half_way_is_undone(machine: Machine) -> None:
    add(machine.box, Fault("nvmlGpuInstanceCreateComputeInstance", UNKNOWN, skip=2, times=1))
    device = machine.device()
    there = layout(device, "3g.20gb", "3g.20gb")
    device.repartition(there)
    with pytest.raises(DeviceError):
        device.repartition(layout(device, "2g.10gb"))
    assert machine.standing() == sorted((p.units[0], p.compute) for p in there)
    assert all(device.launch(JOB, p).fixed[VISIBLE].startswith("MIG-") for p in there)


# --- what is not ours -----------------------------------------------------------------------


def test_layouts_are_made_beside_what_others_made(machine: Machine) -> None:
    machine.has(a100(mig=True, instances=(Instance(1, "2g.10gb", 0, (2,)),)))
    device = machine.device()
    spec = device.spec
    assert spec.limits and set(spec.units) == set(range(2, 8)) and spec.compute == 5
    for found in [*mig_layouts(spec, None)[::5], without_services(spec)]:
        device.repartition(everything(found))
        assert (0, 2) in machine.standing()
    device.close()
    assert machine.standing() == [(0, 2)]


def test_what_others_make_meanwhile_is_worked_around_from_the_next_change_on(
    machine: Machine,
) -> None:
    ours, other = machine.device(), machine.device(state="another node")
    wanted = layout(ours, "3g.20gb", "3g.20gb")
    (theirs,) = mig_layouts(other.spec, None)[:1]
    other.repartition(theirs.mine)
    before = machine.standing()
    with pytest.raises(DeviceError):
        ours.repartition(wanted)
    assert machine.standing() == before and ours.spec.limits
    ours.repartition(everything(mig_layouts(ours.spec, None)[0]))
    assert set(before) < set(machine.standing())


def test_a_gpu_that_others_have_all_of_is_refused_with_what_to_do(machine: Machine) -> None:
    machine.has(a100(mig=True, instances=(Instance(1, "7g.40gb", 0, (7,)),)))
    with pytest.raises(EnvironmentProblem, match=r"7g\.40gb"):
        machine.device()


def test_what_an_earlier_node_left_is_taken_over_and_goes_at_the_end(machine: Machine) -> None:
    add(machine.box, Fault("nvmlComputeInstanceDestroy", IN_USE))
    device = machine.device()
    device.repartition(layout(device, "3g.20gb", "3g.20gb"))
    device.close()
    machine.opened.clear()
    left = machine.standing()
    assert left
    add(machine.box)
    again = machine.device()
    assert again.spec.compute == 7, "they are ours"
    assert machine.standing() == left
    again.close()
    assert machine.standing() == []


# --- tenants --------------------------------------------------------------------------------


def test_each_tenant_sees_its_own_instance_alone(
    machine: Machine, sleeper: Callable[[], int]
) -> None:
    device = machine.device()
    first, second, *_ = there = layout(device, "3g.20gb", "3g.20gb")
    device.repartition(there)
    seen = {
        device.launch(tenant, p).fixed[VISIBLE] for tenant, p in ((JOB, first), (WORKER, second))
    }
    assert len(seen) == 2 and all(uuid.startswith("MIG-") for uuid in seen)
    device.attach(JOB, sleeper())
    device.attach(WORKER, sleeper())
    device.grant("j", first)
    device.bind("w", second)
    with pytest.raises(DeviceError):
        device.grant("j", second)
    with pytest.raises(DeviceError):
        device.bind("w", first)
    device.detach("j")
    device.launch(JOB, second)


def test_without_an_instance_there_is_nothing_to_see(machine: Machine) -> None:
    device = machine.device()
    (first, *_) = there = layout(device, "3g.20gb", "3g.20gb")
    with pytest.raises(DeviceError):
        device.launch(JOB, None)
    with pytest.raises(DeviceError):
        device.launch(JOB, first)
    device.repartition(there)
    device.launch(JOB, first)
    device.repartition(())
    with pytest.raises(DeviceError):
        device.launch(JOB, first)


def test_an_instance_that_somebody_removes_is_missed_and_made_again(machine: Machine) -> None:
    device = machine.device()
    parts = layout(device, "3g.20gb", "2g.10gb")
    device.repartition(parts)
    device.refresh()
    gone, *rest = parts
    space = device._space
    assert isinstance(space, MigSpace)
    space._control.reconcile(tuple(map(space._placement, rest)))  # as somebody else would
    with pytest.raises(DeviceError, match="not there any more"):
        device.refresh()
    with pytest.raises(DeviceError, match="no instance"):
        device.launch(WORKER, gone)
    assert all(device.launch(WORKER, part).fixed[VISIBLE] for part in rest)
    device.repartition(parts)
    device.refresh()
    assert device.launch(WORKER, gone).fixed[VISIBLE]


def test_memory_is_that_of_the_instances_processes(
    machine: Machine, sleeper: Callable[[], int]
) -> None:
    worker, stranger = sleeper(), sleeper()
    shown = (Process(worker, 3 << 30, 1, 0), Process(stranger, 1 << 30, 1, 0))
    machine.has(a100(mig=True, processes=shown))
    device = machine.device()
    (first, *_) = there = layout(device, "3g.20gb", "3g.20gb")
    device.repartition(there)
    device.launch(WORKER, first)
    device.attach(WORKER, worker)
    device.refresh()
    assert device.facts()["w"].memory == 3 << 30


# --- the gate -------------------------------------------------------------------------------


def test_the_gate_is_promised_until_there_is_an_instance_and_then_tried(gated: Machine) -> None:
    device = gated.device(CudaConfig())
    promised = device.spec
    assert promised.preempt is PreemptLevel.GATE
    device.repartition(layout(device, "3g.20gb", "3g.20gb"))
    tried = device.spec
    assert tried.preempt is PreemptLevel.GATE
    assert len(tried.limits) < len(promised.limits), "it was not tried before, and that was said"


def test_where_the_gate_fails_in_an_instance_the_level_is_none(
    gated: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = gated.device(CudaConfig())
    broken = tmp_path / "libcuda.so.1"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(gates, "SHIM", broken)
    device.repartition(layout(device, "3g.20gb", "3g.20gb"))
    assert device.spec.preempt is PreemptLevel.NONE and device.spec.limits


def test_a_job_is_behind_a_gate_within_its_instance(
    gated: Machine, sleeper: Callable[[], int]
) -> None:
    device = gated.device(CudaConfig())
    first, second, *_ = there = layout(device, "3g.20gb", "3g.20gb")
    device.repartition(there)
    launch = device.launch(JOB, second)
    assert launch.fixed[VISIBLE].startswith("MIG-") and launch.prepend
    device.attach(JOB, sleeper())
    device.grant("j", second)
    assert device.revoke("j", second) >= 0
    assert device.revoke("j", first) == 0, "what it does not hold is no error"
    device.detach("j")


def test_it_can_be_opened_again(gated: Machine) -> None:
    device = gated.device(CudaConfig())
    before = device.spec
    device.close()
    device.open()
    assert device.spec == before
