"""What was found of NVIDIA GPUs: pure data, as the driver said it."""

from __future__ import annotations

import enum

import msgspec

from cotenant.devices.features import Feature


class Driver(msgspec.Struct, frozen=True):
    """The driver's version, and the newest CUDA that it runs."""

    version: str
    cuda: tuple[int, int]


class Process(msgspec.Struct, frozen=True):
    """A process that computes on a GPU. ``memory`` in bytes, None where the driver does not say;
    the instances it runs on, None outside MIG."""

    pid: int
    memory: int | None
    gpu_instance: int | None = None
    compute_instance: int | None = None


class MigDevice(msgspec.Struct, frozen=True):
    """A compute instance, which is what a program sees as a GPU: its multiprocessors, and the
    memory of its GPU instance in bytes."""

    uuid: str
    gpu_instance: int
    compute_instance: int
    sms: int
    memory: int


class GpuInstance(msgspec.Struct, frozen=True):
    """A part of a GPU with memory of its own: ``size`` memory slices from ``start`` on."""

    id: int
    profile: str
    start: int
    size: int
    memory: int
    sms: int


class Mig(msgspec.Struct, frozen=True):
    """Whether a GPU is divided, and how. ``pending`` is the mode after the next reset.

    ``instances`` None: they cannot be listed without more rights; ``devices`` can always."""

    on: bool
    pending: bool
    devices: tuple[MigDevice, ...] = ()
    instances: tuple[GpuInstance, ...] | None = ()


class Links(msgspec.Struct, frozen=True):
    """NVLinks of a GPU: how many it has, and how many are up."""

    count: int
    up: int


class Gpu(msgspec.Struct, frozen=True):
    """A GPU. Memory in bytes: ``reserved`` by the driver (None: an old driver counts it as used).

    None stands for what it does not have, and for what could not be read: that is named in
    ``unread``, with the reason."""

    index: int
    uuid: str
    name: str
    pci: str
    memory: int
    used: int
    reserved: int | None
    capability: tuple[int, int]
    sms: int | None
    links: Links | None
    mig: Mig | None
    processes: tuple[Process, ...] | None
    unread: dict[str, str] = {}
    features: tuple[Feature, ...] = ()


class Cause(enum.Enum):
    """What keeps GPUs from being used; whom to ask differs by it."""

    ABSENT = "absent"
    """There is no GPU."""
    DRIVER = "driver"
    """The driver is not there, not running, too old, or fails."""
    ACCESS = "access"
    """There is a driver, and this process may not, or cannot, reach it."""
    PACKAGE = "package"
    """A Python package of Cotenant's is not installed."""


class Trouble(msgspec.Struct, frozen=True):
    """Why no GPU can be used, and what to do."""

    cause: Cause
    what: str
    how: str


class Found(msgspec.Struct, frozen=True):
    """All that was found: without ``trouble`` every one of the ``gpus`` can be used, with it none.
    ``lost`` says what went wrong with GPUs that are not among them."""

    driver: Driver | None = None
    gpus: tuple[Gpu, ...] = ()
    trouble: Trouble | None = None
    lost: tuple[str, ...] = ()
