"""Machines with NVIDIA GPUs that are not there: a library in place of ``libnvidia-ml.so.1``.

``build`` compiles it (``tests/native/nvml``), ``Box`` describes a machine, and ``environment`` has
a child process find both: real ``pynvml`` then calls it as it would call NVIDIA's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from cotenant.domain import mig

SOURCE = Path(__file__).parent / "native" / "nvml" / "standin.c"
PROFILE_INDEX = {1: 0, 2: 1, 3: 2, 4: 3, 7: 4}
"""``NVML_GPU_INSTANCE_PROFILE_n_SLICE`` by compute slices."""
REV1, REV2 = {1: 7, 2: 8}, {1: 9}
"""The same of profiles with media extensions, and of those with twice the memory a slice."""
COMPUTE_PROFILE = PROFILE_INDEX
ANY = 0xFFFFFFFF


class Instance(msgspec.Struct):
    """A GPU instance; ``compute``: the slices of each of its compute instances."""

    id: int
    profile: str
    start: int
    compute: tuple[int, ...] = ()


class Process(msgspec.Struct):
    """A process that computes; with the ids of its instances where it runs on some."""

    pid: int
    memory: int
    gi: int = ANY
    ci: int = ANY


class Gpu(msgspec.Struct):
    """A GPU. ``table``: its MIG profiles (``cotenant.domain.mig``), with ``mig`` off or on."""

    name: str
    memory: int
    major: int
    minor: int
    cores: int
    table: str = ""
    mig: bool = False
    pending: bool | None = None
    links: int = 0
    links_up: int | None = None
    used: int = 0
    reserved: int = 500 << 20
    instances: tuple[Instance, ...] = ()
    processes: tuple[Process, ...] = ()


class Fault(msgspec.Struct):
    """What a call does instead (``code``), or how long it takes: from the ``skip``-th time on, so
    many ``times``, and on one GPU or on all. ``late``: it fails when it is done (calls that change
    something)."""

    call: str
    code: int = 0
    ms: int = 0
    skip: int = 0
    times: int = ANY
    gpu: int = ANY
    late: int = 0


class Box(msgspec.Struct):
    """A machine."""

    gpus: tuple[Gpu, ...] = ()
    driver: str = "570.86.15"
    cuda: int = 12080
    privileged: bool = True
    faults: tuple[Fault, ...] = ()

    def write(self, path: Path) -> Path:
        """The file that the stand-in reads."""
        lines = [
            _line("box", driver=self.driver, cuda=self.cuda, privileged=int(self.privileged)),
            *(_line("fail", **msgspec.structs.asdict(fault)) for fault in self.faults),
        ]
        for index, gpu in enumerate(self.gpus):
            lines += _gpu(index, gpu)
        path.write_text("\n".join(lines) + "\n")
        return path


def h100(**changes: object) -> Gpu:
    """An H100 of 80 GB, MIG off."""
    made = Gpu("NVIDIA H100 80GB HBM3", 81559 << 20, 9, 0, 132 * 128, "H100-SXM5-80GB", links=18)
    return msgspec.structs.replace(made, **changes)


def a100(**changes: object) -> Gpu:
    """An A100 of 40 GB, MIG off."""
    made = Gpu("NVIDIA A100-SXM4-40GB", 40960 << 20, 8, 0, 108 * 64, "A100-SXM4-40GB", links=12)
    return msgspec.structs.replace(made, **changes)


def compiler() -> str | None:
    """A C compiler of this machine."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


def build(folder: Path) -> Path:
    """Compile the library into a folder of its own; returns the folder."""
    found = compiler()
    assert found is not None
    target = folder / "libnvidia-ml.so.1"
    options = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread")
    subprocess.run([found, *options, "-o", str(target), str(SOURCE)], check=True)
    return folder


def environment(library: Path, machine: Path) -> Mapping[str, str]:
    """This process's environment, for a child that is to see the machine of a file."""
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(library),
        "COTENANT_NVML_STANDIN": str(machine),
    }


def instances(machine: Path) -> list[tuple[int, int, int, tuple[int, ...]]]:
    """The GPU instances that a machine's file has: id, profile, start, and the compute slices of
    their compute instances."""
    found: list[tuple[int, int, int, tuple[int, ...]]] = []
    for line in machine.read_text().splitlines():
        word, *fields = line.split("\t")
        values = dict(field.split("=", 1) for field in fields)
        if word == "gi":
            found.append((int(values["id"]), int(values["profile"]), int(values["start"]), ()))
        elif word == "ci":
            *head, inner = found[-1]
            found[-1] = (*head, (*inner, int(values["size"])))
    return found


def add(machine: Path, *faults: Fault) -> None:
    """Let these be the faults of a machine."""
    kept = [x for x in machine.read_text().splitlines() if not x.startswith("fail\t")]
    lines = [_line("fail", **msgspec.structs.asdict(fault)) for fault in faults]
    machine.write_text("\n".join([*kept, *lines]) + "\n")


def meanwhile(
    machine: Path, processes: Iterable[Process] = (), faults: Iterable[Fault] = ()
) -> None:
    """Let these be the processes and faults of a machine's first GPU, also for who has it open."""
    lines = [_line("process", **msgspec.structs.asdict(process)) for process in processes]
    lines += [_line("fail", **msgspec.structs.asdict(fault)) for fault in faults]
    fresh = machine.with_name(f"{machine.name}.new")
    fresh.write_text("".join(f"{line}\n" for line in lines))
    fresh.replace(machine.with_name(f"{machine.name}.now"))


def uuid_of(index: int) -> str:
    """The UUID of the GPU at an index."""
    return f"GPU-{index:08x}-1111-2222-3333-444444444444"


def _gpu(index: int, gpu: Gpu) -> list[str]:
    table = mig.table(gpu.table) if gpu.table else None
    current = int(gpu.mig) if table else ANY
    made = [
        _line(
            "gpu",
            name=gpu.name,
            uuid=uuid_of(index),
            pci=f"00000000:{index + 0x17:02X}:00.0",
            memory=gpu.memory,
            reserved=gpu.reserved,
            used=gpu.used,
            major=gpu.major,
            minor=gpu.minor,
            cores=gpu.cores,
            mig=current,
            pending=current if gpu.pending is None else int(gpu.pending),
            links=gpu.links,
            links_up=gpu.links if gpu.links_up is None else gpu.links_up,
            compute_slices=table.compute_slices if table else 0,
        )
    ]
    made += [_profile(table, profile) for profile in table.profiles] if table else []
    for instance in gpu.instances:
        assert table is not None
        profile = table.profile(instance.profile)
        where = {"start": instance.start, "size": profile.size}
        made.append(_line("gi", id=instance.id, profile=profile.id, **where))
        start = 0
        for number, slices in enumerate(instance.compute):
            kind = COMPUTE_PROFILE[slices]
            made.append(_line("ci", id=number, profile=kind, start=start, size=slices))
            start += slices
    return made + [_line("process", **msgspec.structs.asdict(p)) for p in gpu.processes]


def _profile(table: mig.Table, profile: mig.Profile) -> str:
    plain = next(p for p in table.profiles if p.compute == profile.compute)
    index = PROFILE_INDEX[profile.compute]
    if profile.media_extensions:
        index = REV1[profile.compute]
    elif profile.name != plain.name:
        index = REV2[profile.compute]
    return _line(
        "profile",
        index=index,
        id=profile.id,
        name=profile.name,
        slices=profile.compute,
        instances=profile.max_instances,
        sms=profile.sms or 0,
        memory=profile.memory_mib or 0,
        size=profile.size,
        starts=",".join(map(str, profile.starts)),
    )


def _line(word: str, **fields: object) -> str:
    return "\t".join([word, *(f"{key}={value}" for key, value in fields.items())])
