"""NVIDIA GPUs: what is made of what the driver and the kernel say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cotenant.cli import devices
from cotenant.cli.devices import Exit, devices_view, document, exit_code
from cotenant.devices import processor, reclaim
from cotenant.devices.features import (
    CHANNELS,
    GATE,
    MIG,
    MPS,
    RECLAIM,
    SUBSETS,
    Feature,
    Missing,
    Standing,
)
from cotenant.devices.nvidia import host, mps
from cotenant.devices.nvidia.facts import (
    Cause,
    Driver,
    Found,
    Gpu,
    GpuInstance,
    Links,
    Mig,
    MigDevice,
    Process,
    Trouble,
)
from cotenant.devices.nvidia.features import NOT_TRIED, Surroundings, Tried, features
from cotenant.devices.nvidia.host import Host
from cotenant.devices.nvidia.mps import Mps
from cotenant.devices.nvidia.nvml import Code, NvmlError
from cotenant.devices.processor import ProcessorFacts
from cotenant.domain.device import PreemptLevel
from cotenant.domain.errors import DeviceError
from tests.unit.test_views import show

DRIVER = Driver("570.86.15", (12, 8))
OPEN = Surroundings(root=True, mps=Mps("/usr/bin/nvidia-cuda-mps-control", True, True, 77))
HERE = Host(pci=("0000:17:00.0",), module="570.86.15", nodes=("/dev/nvidia0", "/dev/nvidiactl"))


def gpu(**changes: Any) -> Gpu:
    made = Gpu(
        index=0,
        uuid="GPU-1",
        name="NVIDIA H100 80GB HBM3",
        pci="00000000:17:00.0",
        memory=80 << 30,
        used=1 << 30,
        reserved=1 << 29,
        capability=(9, 0),
        sms=132,
        links=Links(18, 18),
        mig=Mig(on=False, pending=False),
        processes=(),
    )
    return msgspec.structs.replace(made, **changes)


NO_GATE = Missing("it was not built", "build it")
NOTHING = Tried(NO_GATE, NO_GATE)


def judged(
    found: Gpu,
    driver: Driver = DRIVER,
    around: Surroundings = OPEN,
    tried: Tried = NOTHING,
) -> dict[str, Feature]:
    return {feature.name: feature for feature in features(found, driver, around, tried)}


def wants(feature: Feature) -> int:
    """How many things somebody could do for the feature on this machine."""
    return sum(bool(missing.how) for missing in feature.missing)


def test_what_was_not_tried_is_never_called_tested() -> None:
    for found in (gpu(), gpu(mig=None), gpu(capability=(6, 0)), gpu(mig=Mig(True, True))):
        for around in (OPEN, Surroundings()):
            of = judged(found, around=around)
            assert set(of) == {GATE, CHANNELS, RECLAIM, MIG, SUBSETS, MPS}
            assert all(f.standing is not Standing.TESTED and f.level is None for f in of.values())


def test_the_gate_is_of_the_level_at_which_it_was_tried() -> None:
    gate = judged(gpu(), tried=Tried())[GATE]
    assert (gate.standing, gate.level) == (Standing.TESTED, PreemptLevel.GATE)
    gate = judged(gpu())[GATE]
    assert (gate.standing, gate.level, gate.missing) == (Standing.ABSENT, None, (NO_GATE,))
    gate = judged(gpu(mig=Mig(True, True)), tried=Tried())[GATE]
    assert gate.standing is Standing.UNTESTED and gate.level is None


def test_channels_are_of_the_level_at_which_they_were_tried() -> None:
    stopped = judged(gpu(), tried=Tried())[CHANNELS]
    assert (stopped.standing, stopped.missing) == (Standing.UNTESTED, (NOT_TRIED,))
    stopped = judged(gpu(), tried=Tried(channels=None))[CHANNELS]
    assert (stopped.standing, stopped.level) == (Standing.TESTED, PreemptLevel.PAUSE)
    stopped = judged(gpu(), tried=Tried(channels=NO_GATE))[CHANNELS]
    assert (stopped.standing, stopped.level) == (Standing.ABSENT, None)
    stopped = judged(gpu(mig=Mig(True, True)), tried=Tried())[CHANNELS]
    assert stopped.standing is Standing.UNTESTED


def test_mig_is_absent_only_where_the_gpu_has_none() -> None:
    assert judged(gpu(mig=None))[MIG].standing is Standing.ABSENT
    unread = gpu(mig=None, unread={"mig": "no answer"})
    assert judged(unread)[MIG].standing is Standing.UNTESTED
    assert judged(gpu(mig=Mig(on=True, pending=True)))[MIG].standing is Standing.UNTESTED


def test_what_is_missing_for_mig_is_named_with_what_to_do() -> None:
    on, off = Mig(on=True, pending=True), Mig(on=False, pending=False)
    pending = Mig(on=False, pending=True)
    assert wants(judged(gpu(mig=on))[MIG]) == 0
    assert wants(judged(gpu(mig=off))[MIG]) == 1
    assert wants(judged(gpu(mig=off), around=Surroundings())[MIG]) == 2, "and the right to it"
    assert judged(gpu(mig=off))[MIG].missing != judged(gpu(mig=pending))[MIG].missing


def test_subsets_take_a_driver_with_green_contexts() -> None:
    assert judged(gpu(), Driver("535.1", (12, 2)))[SUBSETS].standing is Standing.ABSENT
    assert judged(gpu(), Driver("550.1", (12, 4)))[SUBSETS].standing is Standing.UNTESTED


def test_processes_are_kept_to_subsets_by_mps_where_all_of_it_is_there() -> None:
    new = Driver("590.1", (13, 1))
    assert wants(judged(gpu(), new)[SUBSETS]) == 0
    stopped, shared = (
        Surroundings(mps=msgspec.structs.replace(OPEN.mps, **change))
        for change in ({"runs": False, "static": False}, {"static": False})
    )
    ways = {judged(gpu(), new)[SUBSETS].way}
    for found, driver, around, wanted in (
        (gpu(), DRIVER, OPEN, 1),
        (gpu(), new, Surroundings(), 1),
        (gpu(), new, stopped, 1),
        (gpu(), new, shared, 1),
        (gpu(capability=(7, 5)), new, OPEN, 0),
    ):
        feature = judged(found, driver, around)[SUBSETS]
        assert feature.standing is Standing.UNTESTED and wants(feature) == wanted
        assert len(feature.missing) > len(judged(gpu(), new)[SUBSETS].missing)
        ways.add(feature.way)
    assert len(ways) == 2 and all(ways), "within a process it works in any case"


def test_mps_is_seen_by_what_it_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipes, proc = tmp_path / "pipes", tmp_path / "proc"
    pipes.mkdir()
    monkeypatch.setenv(mps.PIPES, str(pipes))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert mps.look(proc) == Mps()
    program = tmp_path / mps.CONTROL
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    (pipes / "control").touch()
    assert mps.look(proc) == Mps(str(program), runs=True), "nothing more is known"
    (pipes / f"{mps.CONTROL}.pid").write_text("41\n")
    assert not mps.look(proc).runs, "it was killed"
    for pid, words in ((41, [str(program), "-d", "-S"]), (42, ["/usr/bin/" + mps.SERVER]),
                       (43, ["sh"]), (44, [])):  # fmt: skip
        (proc / str(pid)).mkdir(parents=True)
        (proc / str(pid) / "cmdline").write_text("".join(word + "\0" for word in words))
    assert mps.look(proc) == Mps(str(program), runs=True, static=True, server=42)


def test_mps_takes_its_control_program_and_a_gpu_that_isolates_clients() -> None:
    assert judged(gpu(capability=(6, 1)))[MPS].standing is Standing.ABSENT
    assert judged(gpu(), around=Surroundings())[MPS].standing is Standing.ABSENT
    idle = Surroundings(mps=msgspec.structs.replace(OPEN.mps, runs=False))
    assert wants(judged(gpu(), around=idle)[MPS]) == 1 > wants(judged(gpu())[MPS])


# --- without a driver that works --------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "machine", "cause"),
    [
        (Code.LIBRARY_NOT_FOUND, Host(), Cause.ABSENT),
        (Code.LIBRARY_NOT_FOUND, Host(pci=HERE.pci), Cause.DRIVER),
        (Code.LIBRARY_NOT_FOUND, HERE, Cause.ACCESS),
        (Code.DRIVER_NOT_LOADED, Host(), Cause.ABSENT),
        (Code.DRIVER_NOT_LOADED, Host(pci=HERE.pci), Cause.DRIVER),
        (Code.DRIVER_NOT_LOADED, msgspec.structs.replace(HERE, nodes=()), Cause.ACCESS),
        (Code.NO_PERMISSION, msgspec.structs.replace(HERE, closed=HERE.nodes), Cause.ACCESS),
        (Code.LIB_RM_VERSION_MISMATCH, HERE, Cause.DRIVER),
        (Code.UNKNOWN, HERE, Cause.DRIVER),
    ],
)
def test_the_cause_follows_from_what_the_kernel_shows(
    code: Code, machine: Host, cause: Cause
) -> None:
    trouble = host.no_driver(NvmlError("nvmlInit", code, ""), machine)
    assert trouble.cause is cause
    assert bool(trouble.how) == (cause is not Cause.ABSENT)


def test_a_driver_without_gpus_hides_them_or_there_are_none() -> None:
    assert host.no_gpus(HERE).cause is Cause.ACCESS
    assert host.no_gpus(Host()).cause is Cause.ABSENT


def test_the_package_is_missed_only_where_there_is_a_gpu() -> None:
    assert host.no_package(HERE).cause is Cause.PACKAGE
    assert host.no_package(Host()).cause is Cause.ABSENT


def test_gpus_that_all_refuse_are_a_matter_of_rights_or_of_the_driver() -> None:
    closed, lost = (NvmlError("nvmlX", code, "", "GPU 0") for code in (4, 15))
    assert host.all_failed([closed, closed]).cause is Cause.ACCESS
    assert host.all_failed([closed, lost]).cause is Cause.DRIVER


def test_the_kernel_shows_gpus_module_and_device_files(tmp_path: Path) -> None:
    for name, vendor, kind in (("a", "0x10de", "0x030200"), ("b", "0x10de", "0x040300"),
                               ("c", "0x1002", "0x030000")):  # fmt: skip
        (tmp_path / "sys/bus/pci/devices" / name).mkdir(parents=True)
        (tmp_path / "sys/bus/pci/devices" / name / "vendor").write_text(vendor + "\n")
        (tmp_path / "sys/bus/pci/devices" / name / "class").write_text(kind + "\n")
    version = tmp_path / "proc/driver/nvidia/version"
    version.parent.mkdir(parents=True)
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build"
    version.write_text(f"{line}\nGCC version:  gcc version 12.3.0\n")
    (tmp_path / "dev").mkdir()
    for node in ("nvidia0", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / node).touch()
    found = host.look(tmp_path / "sys", tmp_path / "proc", tmp_path / "dev")
    assert found.pci == ("a",) and found.module == "570.86.15" and found.closed == ()
    assert [Path(node).name for node in found.nodes] == ["nvidia0", "nvidiactl"]
    assert host.look(*[tmp_path / "none"] * 3) == Host()


def test_an_error_names_the_call_and_the_gpu_and_keeps_unknown_reasons() -> None:
    error = NvmlError("nvmlDeviceGetName", 4711, "Strange Error", "GPU 3")
    assert isinstance(error, DeviceError) and error.code is Code.UNKNOWN
    assert all(part in str(error) for part in ("nvmlDeviceGetName", "GPU 3", "Strange Error"))


def test_codes_are_those_of_nvml() -> None:
    pynvml = pytest.importorskip("pynvml")
    assert {c.name: c.value for c in Code} == {
        c.name: getattr(pynvml, f"NVML_ERROR_{c.name}") for c in Code
    }


# --- the processor ----------------------------------------------------------------------------


def test_a_processor_pauses_jobs_at_least() -> None:
    assert processor.gate(True).level is PreemptLevel.PRIORITY
    assert processor.gate(False).level is PreemptLevel.PAUSE and processor.gate(False).missing


def test_the_processor_of_this_machine_is_found() -> None:
    before = os.sched_getscheduler(0)
    found = processor.look()
    assert set(found.cores) == os.sched_getaffinity(0) and found.memory > 0
    assert {feature.name for feature in found.features} == {GATE, RECLAIM}
    assert os.sched_getscheduler(0) == before


def test_a_way_to_take_memory_is_found_and_nothing_is_changed(tmp_path: Path) -> None:
    proc, own = tmp_path / "proc", tmp_path / "cgroup/mine"
    (proc / "self").mkdir(parents=True)
    own.mkdir(parents=True)
    (proc / "swaps").write_text("Filename Type\n")
    (proc / "self/status").write_text("CapEff:\t0000000000000000\n")
    (proc / "self/cgroup").write_text("0::/mine\n")
    assert reclaim.way(proc, tmp_path / "cgroup") == ("", reclaim.NO_SWAP)
    (proc / "swaps").write_text("Filename Type\n/dev/sda2 partition\n")
    assert reclaim.way(proc, tmp_path / "cgroup") == ("", reclaim.NO_RIGHT)
    (proc / "self/status").write_text("CapEff:\t000001ffffffffff\n")
    assert reclaim.way(proc, tmp_path / "cgroup") == (reclaim.Pageout.name, "")
    (own / "cgroup.controllers").write_text("cpu memory\n")
    (own / "cgroup.subtree_control").write_text("")
    files = sorted(own.iterdir())
    assert reclaim.way(proc, tmp_path / "cgroup") == (reclaim.Cgroups.name, "")
    assert sorted(own.iterdir()) == files and not (own / "cgroup.subtree_control").read_text()


# --- what is shown ----------------------------------------------------------------------------

DIVIDED = Mig(
    on=True,
    pending=False,
    devices=(MigDevice("MIG-1", 1, 0, 42, 20 << 30),),
    instances=(GpuInstance(1, "3g.20gb", 0, 4, 20 << 30, 42),),
)
CPU = ProcessorFacts("", (0, 1), 4, 8 << 30, (processor.gate(True), processor.memory("", "no")))
TROUBLE = Trouble(Cause.DRIVER, "it broke", "mend it")


def test_every_fact_is_shown() -> None:
    found = gpu(mig=DIVIDED, processes=(Process(77, None),), unread={"links": "no answer"})
    found = msgspec.structs.replace(found, features=features(found, DRIVER, OPEN, NOTHING))
    text = show(devices_view(CPU, Found(DRIVER, (found,), None, ("GPU 1: gone",))))
    for part in ("2 of 4 cores", "8GiB", "H100", "80GiB", "132 SMs", "9.0", "18 of 18", "GPU-1",
                 "3g.20gb", "MIG-1", "77", "no answer", "GPU 1: gone", "570.86.15", "12.8",
                 *(feature.name for feature in found.features)):  # fmt: skip
        assert part in text, part
    text = show(devices_view(None, Found(trouble=TROUBLE)))
    assert TROUBLE.what in text and TROUBLE.how in text


def test_a_gpu_of_which_little_is_known_is_shown_too() -> None:
    bare = gpu(pci="", reserved=None, sms=None, links=None, mig=None, processes=None)
    assert "GPU-1" in show(devices_view(None, Found(DRIVER, (bare,))), width=40)


def test_instances_are_told_from_those_that_cannot_be_listed() -> None:
    hidden = msgspec.structs.replace(DIVIDED, instances=None)
    texts = [show(devices_view(None, Found(DRIVER, (gpu(mig=m),)))) for m in (DIVIDED, hidden)]
    assert "3g.20gb" in texts[0] and "3g.20gb" not in texts[1]
    assert all("MIG-1" in text for text in texts)


def test_the_document_has_levels_by_name_and_all_of_the_facts() -> None:
    found = document(CPU, Found(DRIVER, (gpu(),), TROUBLE))
    cpu, cuda = found["devices"]
    assert (cpu["kind"], cuda["kind"]) == (devices.CPU, devices.CUDA)
    assert cpu["features"][0]["level"] == "PRIORITY" and cpu["features"][0]["standing"] == "tested"
    assert cuda["memory"] == 80 << 30 and cuda["mig"]["on"] is False
    assert found["driver"]["cuda"] == (12, 8) and found["trouble"]["cause"] == "driver"
    assert document(CPU, None) == {"devices": [cpu]}


def test_the_exit_code_says_whether_anything_asked_for_can_be_used() -> None:
    assert exit_code(CPU, Found(trouble=TROUBLE)) == Exit.USABLE
    assert exit_code(None, Found(DRIVER, (gpu(),))) == Exit.USABLE
    codes = [exit_code(None, Found(trouble=Trouble(cause, "", ""))) for cause in Cause]
    assert len({*codes, 0, 1, 2}) == 3 + len(Cause), "each cause has a code of its own"
