"""What a GPU's space is: one unit, the memory slices of MIG (``migspace``), or groups of
multiprocessors (``subsetspace``). The device asks here for all that differs between them."""

from __future__ import annotations

from typing import Protocol

import msgspec

from cotenant.devices.nvidia.facts import Process
from cotenant.devices.nvidia.nvml import NvmlGpu
from cotenant.domain.device import CUDA, PROCESSOR, DeviceSpec, LayoutStep, Partition
from cotenant.domain.errors import DeviceError
from cotenant.domain.units import MS

VISIBLE = "CUDA_VISIBLE_DEVICES"


class Space(Protocol):
    """Calls that ask the driver raise NvmlError where it refuses. ``fit``, ``shown``, ``worker``
    and ``preview`` do not ask it."""

    takes_jobs: bool
    """Whether jobs can be kept to what they are granted."""

    def open(self) -> None:
        """Find out what there is; raises EnvironmentProblem where that cannot be used."""

    def close(self) -> None:
        """Leave the GPU as it was found, as far as it can be."""

    def fit(self, spec: DeviceSpec) -> DeviceSpec:
        """A device of this space; ``spec.memory`` is that of the whole GPU."""

    def repartition(self, partitions: tuple[Partition, ...]) -> None:
        """See ``Device.repartition``."""

    def preview(self, partitions: tuple[Partition, ...]) -> tuple[LayoutStep, ...]:
        """See ``Device.preview``."""

    def shown(self, tenant: str, partition: Partition | None) -> str:
        """The UUID of what a tenant's processes are to see, from now on. Raises DeviceError."""

    def worker(self, shown: str) -> dict[str, str]:
        """Variables of a model instance to which this is shown."""

    def check(self, tenant: str, partition: Partition) -> None:
        """Raises DeviceError where a tenant's processes do not see a partition."""

    def forget(self, tenant: str) -> None:
        """A tenant's processes are gone."""

    def trial(self) -> str:
        """The UUID of something to try the gate on; "" while there is nothing."""

    def processes(self) -> tuple[Process, ...]:
        """Those that compute on the GPU."""

    def trouble(self) -> str:
        """What is wrong with it, as of the last ``processes``; "" if nothing is."""


class WholeGpu:
    """A GPU that is not divided: one unit."""

    takes_jobs = True

    def __init__(self, gpu: NvmlGpu, device: str) -> None:
        self._gpu = gpu
        self._device = device
        self._uuid = ""

    def open(self) -> None:
        self._uuid = self._gpu.uuid()

    def close(self) -> None:
        pass

    def fit(self, spec: DeviceSpec) -> DeviceSpec:
        # A job sees this GPU alone: it is bound to it, also where there are more.
        return msgspec.structs.replace(
            spec, units=(0,), shapes=(1,), repartition_ns=1 * MS, pins_jobs=True
        )

    def repartition(self, partitions: tuple[Partition, ...]) -> None:
        if any(partition.units != (0,) for partition in partitions) or len(partitions) > 1:
            raise DeviceError(f"{self._device}: a GPU that is not divided is one partition")

    def preview(self, partitions: tuple[Partition, ...]) -> tuple[LayoutStep, ...]:
        return ()

    def shown(self, tenant: str, partition: Partition | None) -> str:
        return self._uuid

    def worker(self, shown: str) -> dict[str, str]:
        return {PROCESSOR: f"{CUDA}{shown}"}

    def check(self, tenant: str, partition: Partition) -> None:
        pass

    def forget(self, tenant: str) -> None:
        pass

    def trial(self) -> str:
        return self._uuid

    def processes(self) -> tuple[Process, ...]:
        return self._gpu.processes()

    def trouble(self) -> str:
        return ""
