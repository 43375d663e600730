"""The library that stands in for NVIDIA's answers real ``pynvml`` as NVIDIA describes its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cotenant.domain import mig
from tests.nvml_standin import Box, Fault, Gpu, Instance, Process, a100, environment, h100, uuid_of

INSUFFICIENT_RESOURCES, IN_USE, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION = 23, 19, 2, 3, 4
PROGRAM = """
import json, sys
from ctypes import byref, c_uint
import pynvml as n

def refused(ask, *arguments):
    try:
        ask(*arguments)
    except n.NVMLError as error:
        return error.value
    return 0

def create(gpu, profile, start, size):
    place = n.c_nvmlGpuInstancePlacement_t(start, size)
    return n.nvmlDeviceCreateGpuInstanceWithPlacement(gpu, profile, byref(place))

def instances(gpu, profile):
    found, count = (n.c_nvmlGpuInstance_t * 7)(), c_uint()
    n.nvmlDeviceGetGpuInstances(gpu, profile, found, byref(count))
    return found[:count.value]

n.nvmlInit()
gpu = n.nvmlDeviceGetHandleByIndex(0)
out = []
exec(sys.argv[1])
n.nvmlShutdown()
print(json.dumps(out))
"""
Ask = Callable[..., list[Any]]


@pytest.fixture
def ask(nvml_library: Path, tmp_path: Path) -> Ask:
    """Have a child that sees a machine execute lines, which append to ``out``; returns that."""

    def run(machine: Box | Path, *lines: str) -> list[Any]:
        path = machine.write(tmp_path / "box") if isinstance(machine, Box) else machine
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, "\n".join(lines)],
            env=environment(nvml_library, path),
            stdout=subprocess.PIPE,
            check=True,
        )
        answer: list[Any] = json.loads(done.stdout)
        return answer

    return run


def mig_on(**changes: Any) -> Box:
    return Box((a100(mig=True, **changes),))


def test_it_says_what_the_machine_is(ask: Ask) -> None:
    machine = Box((h100(used=5 << 30), a100()), driver="550.1", cuda=12040)
    out = ask(
        machine,
        "out += [n.nvmlSystemGetDriverVersion(), n.nvmlSystemGetCudaDriverVersion_v2()]",
        "out += [n.nvmlDeviceGetCount(), n.nvmlDeviceGetUUID(gpu)]",
        f"other = n.nvmlDeviceGetHandleByUUID({uuid_of(1).encode()})",
        "out += [n.nvmlDeviceGetName(other), n.nvmlDeviceGetPciInfo(other).bus]",
        "both = n.nvmlDeviceGetMemoryInfo(gpu), n.nvmlDeviceGetMemoryInfo(gpu, n.nvmlMemory_v2)",
        "out += [both[1].used, both[0].used - both[1].used == both[1].reserved]",
        "out += [both[0].free == both[1].free, n.nvmlDeviceGetNumGpuCores(gpu)]",
    )
    assert out == ["550.1", 12040, 2, uuid_of(0), a100().name, 0x18, 5 << 30, True, True, 16896]


@pytest.mark.parametrize("gpu", [h100, a100])
def test_profiles_and_places_are_those_of_the_tables(ask: Ask, gpu: Callable[..., Gpu]) -> None:
    out = ask(
        Box((gpu(mig=True),)),
        "for i in range(n.NVML_GPU_INSTANCE_PROFILE_COUNT):",
        "    if refused(n.nvmlDeviceGetGpuInstanceProfileInfo, gpu, i): continue",
        "    p = n.nvmlDeviceGetGpuInstanceProfileInfo(gpu, i)",
        "    places, count = (n.c_nvmlGpuInstancePlacement_t * 16)(), c_uint()",
        "    n.nvmlDeviceGetGpuInstancePossiblePlacements(gpu, p.id, places, byref(count))",
        "    starts = [place.start for place in places[:count.value]]",
        "    out.append([p.name, p.id, p.instanceCount, places[0].size, starts])",
    )
    wanted = [
        [f"MIG {p.name}", p.id, p.max_instances, p.size, list(p.starts)]
        for p in mig.table(gpu().table).profiles
    ]
    assert sorted(out) == sorted(wanted)


def test_a_taken_place_has_no_room_and_an_unknown_one_is_invalid(ask: Ask) -> None:
    out = ask(
        mig_on(instances=(Instance(1, "3g.20gb", 0),)),
        "out += [refused(create, gpu, 19, 3, 1), refused(create, gpu, 19, 7, 1)]",
        "out += [refused(create, gpu, 5, 0, 4), refused(create, gpu, 9, 4, 4)]",
        "out += [n.nvmlDeviceGetGpuInstanceRemainingCapacity(gpu, 19)]",
    )
    assert out == [INSUFFICIENT_RESOURCES, INVALID_ARGUMENT, INSUFFICIENT_RESOURCES, 0, 0]


def test_a_gpu_instance_goes_after_its_compute_instances(ask: Ask, tmp_path: Path) -> None:
    out = ask(
        mig_on(),
        "made = create(gpu, 9, 4, 4)",
        "two = n.nvmlGpuInstanceCreateComputeInstance(made, 1)",
        "out += [refused(n.nvmlGpuInstanceCreateComputeInstance, made, 1)]",
        "one = n.nvmlGpuInstanceCreateComputeInstance(made, 0)",
        "out += [refused(n.nvmlGpuInstanceDestroy, made), n.nvmlComputeInstanceGetInfo(one).id]",
        "devices = [n.nvmlDeviceGetMigDeviceHandleByIndex(gpu, i) for i in range(2)]",
        "out += [[n.nvmlDeviceGetAttributes(d).multiprocessorCount for d in devices]]",
    )
    assert out == [INSUFFICIENT_RESOURCES, IN_USE, 1, [28, 14]]
    out = ask(
        tmp_path / "box",
        "(made,) = instances(gpu, 9)",
        "for i in range(2):",
        "    n.nvmlComputeInstanceDestroy(n.nvmlGpuInstanceGetComputeInstanceById(made, i))",
        "out += [refused(n.nvmlGpuInstanceDestroy, made), len(instances(gpu, 9))]",
    )
    assert out == [0, 0], "what one process made the next one found, and removed"


def test_what_computes_is_not_taken_away(ask: Ask) -> None:
    machine = mig_on(
        instances=(Instance(2, "1g.5gb", 0, (1,)),), processes=(Process(77, 1 << 30, 2, 0),)
    )
    out = ask(
        machine,
        "made = n.nvmlDeviceGetGpuInstanceById(gpu, 2)",
        "inner = n.nvmlGpuInstanceGetComputeInstanceById(made, 0)",
        "out += [refused(n.nvmlComputeInstanceDestroy, inner)]",
        "device = n.nvmlDeviceGetMigDeviceHandleByIndex(gpu, 0)",
        "out += [[p.pid for p in n.nvmlDeviceGetComputeRunningProcesses(device)]]",
        "out += [n.nvmlDeviceGetMemoryInfo(device).used]",
    )
    assert out == [IN_USE, [77], 1 << 30]


def test_without_mig_or_the_right_nothing_is_made(ask: Ask) -> None:
    lines = ("out += [refused(create, gpu, 19, 0, 1)]",)
    assert ask(Box((a100(),)), *lines) == [NOT_SUPPORTED]
    assert ask(Box((a100(mig=True),), privileged=False), *lines) == [NO_PERMISSION]


def test_failures_come_when_they_are_due_and_over_processes(ask: Ask, tmp_path: Path) -> None:
    fault = Fault("nvmlDeviceGetName", code=15, skip=1, times=2, gpu=0)
    lines = ("out += [refused(n.nvmlDeviceGetName, gpu) for _ in range(2)]",)
    assert ask(Box((h100(),), faults=(fault,)), *lines) == [0, 15]
    assert ask(tmp_path / "box", *lines) == [15, 0]
