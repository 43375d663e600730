"""NVML, the driver's own account of its GPUs: a session, handles that are kept, typed answers.

Its methods read and never change anything. Every refusal becomes an ``NvmlError``, a
``DeviceError`` that names the call and the GPU. ``pynvml`` is imported in ``open``: without GPUs
nobody needs it.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from cotenant.devices.nvidia.facts import Driver, GpuInstance, Links, Mig, MigDevice, Process
from cotenant.domain.errors import DeviceError, EnvironmentProblem

MIB: Final = 2**20
NO_ID: Final = 0xFFFFFFFF
"""What NVML says where there is no instance."""
MIG_NAME: Final = "MIG "
"""What drivers put before the name of a profile."""


class Code(enum.IntEnum):
    """Why NVML refuses, as far as we tell refusals apart; the numbers are NVML's."""

    INVALID_ARGUMENT = 2
    NOT_SUPPORTED = 3
    NO_PERMISSION = 4
    NOT_FOUND = 6
    DRIVER_NOT_LOADED = 9
    LIBRARY_NOT_FOUND = 12
    FUNCTION_NOT_FOUND = 13
    GPU_IS_LOST = 15
    RESET_REQUIRED = 16
    LIB_RM_VERSION_MISMATCH = 18
    IN_USE = 19
    INSUFFICIENT_RESOURCES = 23
    UNKNOWN = 999


_WORDS: Final = {
    Code.NOT_SUPPORTED: "this GPU or driver does not support it",
    Code.NO_PERMISSION: "this user may not do that; run it as root",
    Code.NOT_FOUND: "there is no such thing",
    Code.DRIVER_NOT_LOADED: "the driver is not running, or its device files are not here",
    Code.LIBRARY_NOT_FOUND: "the driver's library libnvidia-ml.so.1 was not found",
    Code.FUNCTION_NOT_FOUND: "this driver is too old for it",
    Code.GPU_IS_LOST: "the GPU fell off the bus; a restart of the machine may bring it back",
    Code.RESET_REQUIRED: "the GPU must be reset first: nvidia-smi --gpu-reset",
    Code.LIB_RM_VERSION_MISMATCH: (
        "the driver's library and its kernel module are of different versions; restart the machine"
    ),
    Code.IN_USE: "something still uses it",
    Code.INSUFFICIENT_RESOURCES: "there is no room for it",
}


class NvmlError(DeviceError):
    """NVML refused ``call``; ``code`` is ``Code.UNKNOWN`` where we do not tell reasons apart."""

    def __init__(self, call: str, number: int, words: str, where: str = "") -> None:
        known = number in Code._value2member_map_
        self.call, self.code = call, Code(number) if known else Code.UNKNOWN
        place = f"{where}: " if where else ""
        super().__init__(f"{place}{call}: {_WORDS.get(self.code, words)}")


class Nvml:
    """A session with the driver, from ``open`` to ``close``; safe to use from several threads."""

    def __init__(self) -> None:
        self._lib: Any = None
        self._gpus: dict[int, NvmlGpu] = {}
        self._lock = threading.Lock()

    def open(self) -> None:
        """Raises EnvironmentProblem without the package, NvmlError without a working driver."""
        try:
            import pynvml
        except ImportError:
            raise EnvironmentProblem(
                "the package nvidia-ml-py is not installed; pip install 'cotenant[nvidia]'"
            ) from None
        self._lib = pynvml
        try:
            self.call("nvmlInit")
        except NvmlError:
            self._lib = None
            raise

    def close(self) -> None:
        """End the session; no effect on one that is not open."""
        self._gpus.clear()
        if self._lib is not None:
            with contextlib.suppress(NvmlError):
                self.call("nvmlShutdown")
        self._lib = None

    def call(self, name: str, *arguments: Any, where: str = "") -> Any:
        """A function of pynvml; ``where`` says in an error which GPU it was about."""
        try:
            return getattr(self._lib, name)(*arguments)
        except self._lib.NVMLError as error:
            raise NvmlError(name, error.value, str(error), where) from None

    @property
    def lib(self) -> Any:
        """The module pynvml, for its constants and types."""
        return self._lib

    def driver(self) -> Driver:
        """Which driver it is."""
        cuda = self.call("nvmlSystemGetCudaDriverVersion_v2")
        return Driver(self.call("nvmlSystemGetDriverVersion"), (cuda // 1000, cuda % 1000 // 10))

    def count(self) -> int:
        """How many GPUs the driver shows to this process."""
        return int(self.call("nvmlDeviceGetCount"))

    def gpu(self, index: int) -> NvmlGpu:
        """The GPU at an index, its handle taken once; raises NvmlError."""
        with self._lock:
            if index not in self._gpus:
                handle = self.call("nvmlDeviceGetHandleByIndex", index, where=f"GPU {index}")
                self._gpus[index] = NvmlGpu(self, handle, f"GPU {index}", index)
            return self._gpus[index]


class NvmlGpu:
    """One GPU of a session; every method asks the driver and raises NvmlError. Memory in bytes."""

    def __init__(self, nvml: Nvml, handle: Any, where: str, index: int) -> None:
        self.index = index
        self.nvml, self.where, self._handle = nvml, where, handle

    def ask(self, name: str, *arguments: Any) -> Any:
        """A function of pynvml that takes the GPU's handle first."""
        return self.nvml.call(name, self._handle, *arguments, where=self.where)

    def _unless(self, code: Code, ask: Callable[[], Any]) -> Any:
        """The answer, or None if it is refused for this reason."""
        try:
            return ask()
        except NvmlError as error:
            if error.code is not code:
                raise
            return None

    def name(self) -> str:
        return str(self.ask("nvmlDeviceGetName"))

    def uuid(self) -> str:
        return str(self.ask("nvmlDeviceGetUUID"))

    def pci(self) -> str:
        """Such as ``00000000:17:00.0``."""
        return str(self.ask("nvmlDeviceGetPciInfo").busId)

    def memory(self) -> tuple[int, int, int | None]:
        """All, used, and reserved by the driver: None if that is counted as used (before 510)."""
        version = self.nvml.lib.nvmlMemory_v2
        found = self._unless(
            Code.FUNCTION_NOT_FOUND, lambda: self.ask("nvmlDeviceGetMemoryInfo", version)
        )
        if found is None:
            found = self.ask("nvmlDeviceGetMemoryInfo")
            return int(found.total), int(found.used), None
        return int(found.total), int(found.used), int(found.reserved)

    def capability(self) -> tuple[int, int]:
        major, minor = self.ask("nvmlDeviceGetCudaComputeCapability")
        return int(major), int(minor)

    def cores(self) -> int:
        """CUDA cores: NVML does not say the multiprocessors of a whole GPU."""
        return int(self.ask("nvmlDeviceGetNumGpuCores"))

    def links(self) -> Links | None:
        """Its NVLinks; None without any."""
        up = 0
        for link in range(self.nvml.lib.NVML_NVLINK_MAX_LINKS):
            try:
                up += bool(self.ask("nvmlDeviceGetNvLinkState", link))
            except NvmlError as error:
                if error.code not in (Code.INVALID_ARGUMENT, Code.NOT_SUPPORTED):
                    raise
                return Links(link, up) if link else None
        return Links(self.nvml.lib.NVML_NVLINK_MAX_LINKS, up)

    def processes(self) -> tuple[Process, ...]:
        """Those that compute on it."""
        return tuple(
            Process(
                int(found.pid),
                found.usedGpuMemory,
                _id(found.gpuInstanceId),
                _id(found.computeInstanceId),
            )
            for found in self.ask("nvmlDeviceGetComputeRunningProcesses")
        )

    # --- MIG --------------------------------------------------------------------------------

    def mig(self) -> Mig | None:
        """How it is divided; None for a GPU without MIG."""
        modes = self._unless(Code.NOT_SUPPORTED, lambda: self.ask("nvmlDeviceGetMigMode"))
        if modes is None:
            return None
        on, pending = bool(modes[0]), bool(modes[1])
        if not on:
            return Mig(on, pending)
        instances = self._unless(Code.NO_PERMISSION, self.instances)
        return Mig(on, pending, self.mig_devices(), instances)

    def mig_devices(self) -> tuple[MigDevice, ...]:
        """Its compute instances, by number."""
        found = [self._mig_device(instance) for instance in self.mig_handles()]
        return tuple(sorted(found, key=lambda d: (d.gpu_instance, d.compute_instance)))

    def mig_handles(self) -> tuple[NvmlGpu, ...]:
        """Each of them as a GPU of its own: its UUID, memory and processes."""
        found = []
        for index in range(self.ask("nvmlDeviceGetMaxMigDeviceCount")):
            ask = partial(self.ask, "nvmlDeviceGetMigDeviceHandleByIndex", index)
            handle = self._unless(Code.NOT_FOUND, ask)
            if handle is not None:
                found.append(NvmlGpu(self.nvml, handle, self.where, index))
        return tuple(found)

    def _mig_device(self, device: NvmlGpu) -> MigDevice:
        attributes = device.ask("nvmlDeviceGetAttributes")
        return MigDevice(
            device.uuid(),
            int(device.ask("nvmlDeviceGetGpuInstanceId")),
            int(device.ask("nvmlDeviceGetComputeInstanceId")),
            int(attributes.multiprocessorCount),
            int(attributes.memorySizeMB) * MIB,
        )

    def profiles(self) -> tuple[Any, ...]:
        """NVML's description of each kind of GPU instance that this GPU can have."""
        found = []
        for index in range(self.nvml.lib.NVML_GPU_INSTANCE_PROFILE_COUNT):
            try:
                found.append(self.ask("nvmlDeviceGetGpuInstanceProfileInfo", index))
            except NvmlError as error:
                if error.code not in (Code.NOT_SUPPORTED, Code.INVALID_ARGUMENT):
                    raise
        return tuple(found)

    def instances(self) -> tuple[GpuInstance, ...]:
        """Its GPU instances by their place; takes the right to administer the GPU."""
        found = [
            self._instance(handle, profile)
            for profile in self.profiles()
            for handle in self.handles(profile)
        ]
        return tuple(sorted(found, key=lambda i: i.start))

    def handles(self, profile: Any) -> list[Any]:
        """Handles of its GPU instances of a profile; takes the same right."""
        handles = (self.nvml.lib.c_nvmlGpuInstance_t * profile.instanceCount)()
        count = ctypes.c_uint(0)
        self.ask("nvmlDeviceGetGpuInstances", profile.id, handles, ctypes.byref(count))
        return list(handles[: count.value])

    def _instance(self, handle: Any, profile: Any) -> GpuInstance:
        info = self.nvml.call("nvmlGpuInstanceGetInfo", handle, where=self.where)
        return GpuInstance(
            int(info.id),
            str(profile.name).removeprefix(MIG_NAME),
            int(info.placement.start),
            int(info.placement.size),
            int(profile.memorySizeMB) * MIB,
            int(profile.multiprocessorCount),
        )


def _id(number: int) -> int | None:
    return None if number == NO_ID else int(number)
