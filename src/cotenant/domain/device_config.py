"""``devices:`` of the configuration: a list whose entries say their ``kind``, each with keys of its
own. To add a kind, add its class and reader here, and make it in ``cli/wiring.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Final, TypeGuard

import msgspec

from cotenant.domain import reading
from cotenant.domain.costs import GATE_BOUND
from cotenant.domain.device import PreemptLevel
from cotenant.domain.errors import ConfigError
from cotenant.domain.npu import OPERATORS
from cotenant.domain.units import format_bytes


class CpuConfig(msgspec.Struct, frozen=True):
    """``cores`` None = all that this process may use; ``realtime`` auto, never or require; ``pin``
    false leaves it to the kernel where workers run (to compare with); ``memory``: bytes for
    instances, jobs and pools (0: all that the machine has); ``kv``: see ``DeviceSpec``.
    """

    kind: ClassVar[str] = "cpu"
    id: str = "cpu"
    cores: tuple[int, ...] | None = None
    realtime: str = "auto"
    pin: bool = True
    memory: int = 0
    kv: int = 0


class NullConfig(msgspec.Struct, frozen=True):
    """A stand-in with so many ``units`` and bytes of ``memory`` (0: no constraint), which claims a
    level and to be ``blocking``."""

    kind: ClassVar[str] = "null"
    id: str = "null"
    units: int = 2
    memory: int = 0
    preempt: PreemptLevel = PreemptLevel.PRIORITY
    blocking: bool = False
    kv: int = 0


SERVES_ONLY: Final = (
    "jobs do not run on a GPU in subsets, since nothing would keep them to one; for jobs beside "
    "services leave subsets out (the launch gate), or switch MIG on"
)


class CudaConfig(msgspec.Struct, frozen=True):
    """An NVIDIA GPU: ``gpu`` is its number or UUID, as ``cotenant devices`` shows them. ``memory``
    and ``kv`` as of a CPU (0: all that the driver leaves). ``subsets``: its multiprocessors are
    divided among services, and no job runs there. ``preempt``: how jobs are taken off: ``PAUSE``
    (their kernels are stopped in their middle, if that works), ``GATE``, or ``NONE`` (not at all).
    ``bound``: ns of a job's work that may be on the GPU at one time, for which a request may have
    to wait.
    """

    kind: ClassVar[str] = "cuda"
    id: str = "cuda"
    gpu: str = "0"
    memory: int = 0
    kv: int = 0
    subsets: bool = False
    preempt: PreemptLevel = PreemptLevel.GATE
    bound: int = GATE_BOUND


class NpuConfig(msgspec.Struct, frozen=True):
    """An NPU: ``device``, as OpenVINO lists it, or else emulated on the cores ``emulate``.
    ``memory``: bytes for its model instances (0: all that there are). ``operators``: what an
    emulated one takes, as OpenVINO names them."""

    kind: ClassVar[str] = "npu"
    kv: ClassVar[int] = 0
    """No engine serves language models on one."""
    emulate: tuple[int, ...] = ()
    id: str = "npu"
    memory: int = 0
    operators: tuple[str, ...] = OPERATORS
    device: str = ""


DeviceConfig = CpuConfig | NullConfig | CudaConfig | NpuConfig


def closed_to_jobs(devices: Sequence[DeviceConfig]) -> dict[str, str]:
    """Kinds of device on which no job may run, and why."""
    subsets = any(isinstance(device, CudaConfig) and device.subsets for device in devices)
    closed = {CudaConfig.kind: SERVES_ONLY} if subsets else {}
    if any(isinstance(device, NpuConfig) for device in devices):
        closed[NpuConfig.kind] = "an NPU serves only; let jobs run on another kind of device"
    return closed


def read_devices(sections: Sequence[reading.Section]) -> tuple[DeviceConfig, ...]:
    """The devices of a box: without any, the CPU. Raises ConfigError."""
    devices = tuple(_device(section) for section in sections) or (CpuConfig(),)
    ids = [device.id for device in devices]
    for id in ids:
        if ids.count(id) > 1:
            raise ConfigError(f"the id {id!r} stands twice; give each device its own", "devices")
    _tell_apart([device for device in devices if isinstance(device, CudaConfig)])
    _separate([device for device in devices if _has_cores(device)])
    return devices


def _device(section: reading.Section) -> DeviceConfig:
    device = _READERS[section.take("kind", _kind)](section)
    section.done()
    return device


def _kind(value: object) -> str:
    if value is None:  # what YAML makes of a bare null, and of nothing at all
        raise ValueError('is empty; for the stand-in write "null", in quotes')
    return reading.one_of(_READERS)(value)


def _cpu(section: reading.Section) -> CpuConfig:
    cpu = CpuConfig(
        id=section.take("id", reading.name, "cpu"),
        cores=section.take("cores", reading.cores, None),
        realtime=section.take("realtime", reading.one_of(("auto", "never", "require")), "auto"),
        pin=section.take("pin", reading.boolean, True),
    )
    memory, kv = _memory(section)
    return msgspec.structs.replace(cpu, memory=memory, kv=kv)


def _null(section: reading.Section) -> NullConfig:
    levels = {level.name.lower(): level for level in PreemptLevel}
    null = NullConfig(
        id=section.take("id", reading.name, "null"),
        units=section.take("units", reading.integer(1, 1024), 2),
        preempt=levels[section.take("preempt", reading.one_of(levels), "priority")],
        blocking=section.take("blocking", reading.boolean, False),
    )
    memory, kv = _memory(section)
    return msgspec.structs.replace(null, memory=memory, kv=kv)


def _cuda(section: reading.Section) -> CudaConfig:
    levels = {
        "auto": PreemptLevel.GATE,
        "gate": PreemptLevel.GATE,
        "channel": PreemptLevel.PAUSE,
        "none": PreemptLevel.NONE,
    }
    subsets = section.take("subsets", reading.boolean, False)
    if subsets:
        for key in ("preempt", "bound"):
            if key in section.names():
                why = f"is about jobs; leave it out: {SERVES_ONLY}"
                raise ConfigError(why, section.at(key))
    cuda = CudaConfig(
        id=section.take("id", reading.name, "cuda"),
        gpu=section.take("gpu", _gpu, "0"),
        subsets=subsets,
        preempt=levels[section.take("preempt", reading.one_of(levels), "auto")],
        bound=section.take("bound", reading.duration, GATE_BOUND),
    )
    memory, kv = _memory(section)
    return msgspec.structs.replace(cuda, memory=memory, kv=kv)


def _npu(section: reading.Section) -> NpuConfig:
    if device := section.take("device", _listed, ""):
        for key in ("emulate", "operators"):
            if key in section.names():
                raise ConfigError(
                    "is about an emulated NPU, and device names one that is there; leave one out",
                    section.at(key),
                )
        return NpuConfig(
            id=section.take("id", reading.name, "npu"),
            memory=section.take("memory", reading.size, 0),
            device=device,
        )
    return NpuConfig(
        emulate=section.take("emulate", _emulating),
        id=section.take("id", reading.name, "npu"),
        memory=section.take("memory", reading.size, 0),
        operators=section.take("operators", reading.names, OPERATORS),
    )


def _listed(value: object) -> str:
    if isinstance(value, str) and value.partition(".")[0] == "NPU":
        return value
    raise ValueError("is an NPU as OpenVINO lists it, such as NPU; see cotenant devices")


def _emulating(value: object) -> tuple[int, ...]:
    found = reading.cores(value)
    if not found:
        raise ValueError("names the cores that the NPU is emulated on, such as [3]")
    return found


def _gpu(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return str(value)
    if isinstance(value, str) and (value.isdigit() or value.startswith("GPU-")):
        return value
    raise ValueError("is a GPU's number or UUID (GPU-…), as cotenant devices shows them")


def _memory(section: reading.Section) -> tuple[int, int]:
    """Bytes for everything on a device, and for pools of keys and values out of these: all, if it
    is not said how many."""
    memory = section.take("memory", reading.size, 0)
    kv = section.take("kv", reading.size, memory)
    if memory and kv > memory:
        raise ConfigError(
            f"{format_bytes(kv)} are more than the device's memory, {format_bytes(memory)}",
            section.at("kv"),
        )
    return memory, kv


_READERS: dict[str, Callable[[reading.Section], DeviceConfig]] = {
    CpuConfig.kind: _cpu,
    NullConfig.kind: _null,
    CudaConfig.kind: _cuda,
    NpuConfig.kind: _npu,
}


def _tell_apart(gpus: Sequence[CudaConfig]) -> None:
    named: dict[str, str] = {}
    for device in gpus:
        if named.setdefault(device.gpu, device.id) != device.id:
            both = f"{named[device.gpu]} and {device.id}"
            raise ConfigError(f"{both} are both GPU {device.gpu}; a GPU belongs to one", "devices")
    if len({device.subsets for device in gpus}) > 1:
        raise ConfigError(
            "one GPU has subsets and another has not, but a kind says how fast a model executes; "
            "let all of a node's GPUs have them or none, or run a node for each",
            "devices",
        )


def _has_cores(device: DeviceConfig) -> TypeGuard[CpuConfig | NpuConfig]:
    return isinstance(device, CpuConfig) or (isinstance(device, NpuConfig) and not device.device)


def _separate(devices: Sequence[CpuConfig | NpuConfig]) -> None:
    taken: dict[int, str] = {}
    for device in devices:
        cores = device.cores if isinstance(device, CpuConfig) else device.emulate
        if cores is None and len(devices) > 1:
            others = ", ".join(other.id for other in devices if other.id != device.id)
            raise ConfigError(
                f"{device.id} has all cores, and {others} would have some of them; name the cores "
                "of each",
                "devices",
            )
        for core in cores or ():
            if core in taken:
                raise ConfigError(
                    f"{taken[core]} and {device.id} share core {core}; a core belongs to one "
                    "device",
                    "devices",
                )
            taken[core] = device.id
