"""What is found of GPUs, by processes of their own on machines that a stand-in library describes;
and ``cotenant devices``, which shows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cotenant.cli.devices import Exit, exit_code
from cotenant.devices.nvidia import host
from cotenant.devices.nvidia.facts import Cause, Found, Links
from tests.gpu_machine import GpuMachine
from tests.nvml_standin import (
    Box,
    Fault,
    Instance,
    Process,
    a100,
    environment,
    h100,
    uuid_of,
)

NO_PERMISSION, FUNCTION_NOT_FOUND, LOST, MISMATCH, UNKNOWN = 4, 13, 15, 18, 999
TWO = (Instance(1, "3g.20gb", 0, (2, 1)), Instance(2, "1g.5gb", 4))
SURVEY = """
import sys, msgspec
from cotenant.devices.nvidia.survey import survey
sys.stdout.buffer.write(msgspec.json.encode(survey()))
"""
Look = Callable[[Box], Found]
Devices = Callable[..., tuple[int, dict[str, Any]]]
OWN_GPU = "this machine has a GPU of its own"


@pytest.fixture
def look(nvml_library: Path, tmp_path: Path) -> Look:
    """What is found on a machine, which is to be the same after it."""

    def run(machine: Box) -> Found:
        path = machine.write(tmp_path / "box")
        before = path.read_text()
        found = child(environment(nvml_library, path), "-c", SURVEY)
        assert machine.faults or path.read_text() == before
        assert found.returncode == 0
        return msgspec.json.decode(found.stdout, type=Found)

    return run


@pytest.fixture
def devices(nvml_library: Path, tmp_path: Path) -> Devices:
    """``cotenant devices --json`` on a machine: its exit code, and what it prints."""

    def run(machine: Box, *options: str) -> tuple[int, dict[str, Any]]:
        return command(environment(nvml_library, machine.write(tmp_path / "box")), *options)

    return run


def command(env: Mapping[str, str], *options: str) -> tuple[int, dict[str, Any]]:
    done = child(env, "-m", "cotenant", "devices", "--json", *options)
    return done.returncode, json.loads(done.stdout)


def child(env: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, check=False)
    assert not done.stderr, done.stderr.decode()
    return done


# --- what is found ----------------------------------------------------------------------------


def test_a_gpu_is_found_with_all_that_the_driver_says(look: Look) -> None:
    found = look(Box((h100(used=3 << 30, links_up=17, processes=(Process(41, 3 << 30),)),)))
    (gpu,) = found.gpus
    assert found.driver is not None and found.trouble is None
    assert (found.driver.version, found.driver.cuda) == ("570.86.15", (12, 8))
    assert (gpu.name, gpu.uuid, gpu.sms) == (h100().name, uuid_of(0), 132)
    assert (gpu.memory, gpu.used, gpu.reserved) == (h100().memory, 3 << 30, h100().reserved)
    assert gpu.capability == (9, 0) and gpu.links == Links(18, 17) and not gpu.unread
    assert gpu.mig is not None and not gpu.mig.on
    assert gpu.processes is not None and [process.pid for process in gpu.processes] == [41]


def test_instances_are_found_with_what_they_are_divided_into(look: Look) -> None:
    (gpu,) = look(Box((a100(mig=True, instances=TWO),))).gpus
    assert gpu.mig is not None and gpu.mig.on and gpu.mig.instances is not None
    places = [(i.profile, i.start, i.size) for i in gpu.mig.instances]
    assert places == [("3g.20gb", 0, 4), ("1g.5gb", 4, 1)]
    assert [(d.gpu_instance, d.sms) for d in gpu.mig.devices] == [(1, 28), (1, 14)]
    assert gpu.sms == 108


def test_without_rights_the_devices_of_instances_are_found_still(look: Look) -> None:
    (gpu,) = look(Box((a100(mig=True, instances=TWO),), privileged=False)).gpus
    assert gpu.mig is not None and gpu.mig.instances is None and len(gpu.mig.devices) == 2
    assert not gpu.unread


def test_a_mode_that_is_to_come_is_told_from_the_one_that_is(look: Look) -> None:
    (gpu,) = look(Box((a100(pending=True),))).gpus
    assert gpu.mig is not None and (gpu.mig.on, gpu.mig.pending) == (False, True)


def test_a_gpu_without_mig_and_links_is_no_failure(look: Look) -> None:
    (gpu,) = look(Box((h100(table="", links=0, name="NVIDIA L4"),))).gpus
    assert gpu.mig is None and gpu.links is None and not gpu.unread


def test_of_a_driver_that_is_too_old_gpus_are_named_still(look: Look) -> None:
    found = look(Box((h100(),), driver="470.82.01", cuda=11040))
    assert found.trouble is not None and found.trouble.cause is Cause.DRIVER
    assert [gpu.name for gpu in found.gpus] == [h100().name]


def test_an_old_driver_that_lacks_a_call_is_asked_another(look: Look) -> None:
    found = look(Box((h100(),), faults=(Fault("nvmlDeviceGetMemoryInfo_v2", FUNCTION_NOT_FOUND),)))
    (gpu,) = found.gpus
    assert found.trouble is None and (gpu.memory, gpu.reserved) == (h100().memory, None)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        ("nvmlDeviceGetMigMode", "mig"),
        ("nvmlDeviceGetMaxMigDeviceCount", "mig"),
        ("nvmlDeviceGetAttributes_v2", "mig"),
        ("nvmlDeviceGetGpuInstances", "mig"),
        ("nvmlDeviceGetNvLinkState", "links"),
        ("nvmlDeviceGetNumGpuCores", "cores"),
        ("nvmlDeviceGetComputeRunningProcesses_v3", "processes"),
        ("nvmlDeviceGetPciInfo_v3", "pci"),
    ],
)
def test_what_cannot_be_read_is_named_and_the_rest_is_found(
    look: Look, call: str, what: str
) -> None:
    divided = a100(mig=True, instances=TWO)
    found = look(Box((divided, h100()), faults=(Fault(call, UNKNOWN, gpu=0),)))
    assert found.trouble is None and [list(gpu.unread) for gpu in found.gpus] == [[what], []]
    assert "GPU 0" in found.gpus[0].unread[what]


def test_one_lost_gpu_leaves_the_other(look: Look) -> None:
    found = look(Box((h100(), a100()), faults=(Fault("nvmlDeviceGetNvLinkState", LOST, gpu=0),)))
    assert found.trouble is None and [gpu.name for gpu in found.gpus] == [a100().name]
    (lost,) = found.lost
    assert "GPU 0" in lost and "nvmlDeviceGetNvLinkState" in lost


@pytest.mark.parametrize(
    ("call", "code", "cause"),
    [
        ("nvmlInitWithFlags", MISMATCH, Cause.DRIVER),
        ("nvmlInitWithFlags", NO_PERMISSION, Cause.ACCESS),
        ("nvmlSystemGetDriverVersion", UNKNOWN, Cause.DRIVER),
        ("nvmlDeviceGetCount_v2", UNKNOWN, Cause.DRIVER),
        ("nvmlDeviceGetHandleByIndex_v2", LOST, Cause.DRIVER),
        ("nvmlDeviceGetHandleByIndex_v2", NO_PERMISSION, Cause.ACCESS),
    ],
)
def test_without_any_gpu_that_can_be_read_the_cause_is_named(
    look: Look, call: str, code: int, cause: Cause
) -> None:
    found = look(Box((h100(),), faults=(Fault(call, code),)))
    assert not found.gpus and found.trouble is not None and found.trouble.cause is cause
    assert found.trouble.what and found.trouble.how
    assert exit_code(None, found) not in (Exit.USABLE, Exit.ABSENT)


# --- the command ------------------------------------------------------------------------------


def test_the_command_lists_processor_and_gpus(devices: Devices) -> None:
    machine = Box((h100(), a100(mig=True, instances=TWO)))
    code, said = devices(machine)
    assert code == Exit.USABLE and [d["kind"] for d in said["devices"]] == ["cpu", "cuda", "cuda"]
    assert said["devices"][2]["mig"]["on"] is True and said["trouble"] is None
    assert all(device["features"] for device in said["devices"])


def test_the_command_ends_as_scripts_want_it(devices: Devices) -> None:
    old = Box((h100(),), driver="470.82.01", cuda=11040)
    assert devices(old, "--kind", "cuda")[0] == Exit.DRIVER
    assert devices(old, "--kind", "cpu")[0] == devices(old)[0] == Exit.USABLE


def test_no_gpu_is_a_failure_only_if_one_was_asked_for(devices: Devices) -> None:
    if host.look() != host.Host():
        pytest.skip(OWN_GPU)
    assert devices(Box(), "--kind", "cuda")[0] == Exit.ABSENT
    assert devices(Box())[0] == Exit.USABLE


def test_without_library_or_package_only_the_processor_is_found(tmp_path: Path) -> None:
    if host.look() != host.Host():
        pytest.skip(OWN_GPU)
    (tmp_path / "pynvml.py").write_text("raise ImportError\n")
    for path in ("", str(tmp_path)):
        code, said = command({**os.environ, "PYTHONPATH": path})
        assert code == Exit.USABLE and [d["kind"] for d in said["devices"]] == ["cpu"]
        assert said["trouble"]["cause"] == Cause.ABSENT.value


@pytest.mark.parametrize(
    ("options", "rm", "stopped"),
    [
        ((), "", ("not tested", None)),
        (("--channels",), "", ("tested", "PAUSE")),
        (("--channels",), "refuse", ("no", None)),
    ],
)
def test_the_gate_is_tried_and_if_asked_for_channels(
    gpu: GpuMachine, options: tuple[str, ...], rm: str, stopped: tuple[str, str | None]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cotenant", "devices", "--kind", "cuda", "--json", *options],
        env={**os.environ, **gpu.env(), "LD_PRELOAD": str(gpu.rm), "STANDIN_RM": rm},
        capture_output=True,
        check=True,
    )
    (device,) = json.loads(done.stdout)["devices"]
    found = {f["name"]: (f["standing"], f["level"]) for f in device["features"]}
    assert found["gate"] == ("tested", "GATE")
    assert found["kernels stopped"] == stopped
