"""An NPU: one that OpenVINO lists, or emulated on cores of the CPU that no other device has.

It serves only, and one batch at a time: one unit, and one partition of it. What a model may be made
of and how large it may be its engine finds out when it is loaded (``cotenant.engines.openvino``).
The host's side of its model instances has the cores ``emulate``, or those that the kernel gives it.
"""

from __future__ import annotations

from collections.abc import Callable

from cotenant.devices.cpu import CpuDevice
from cotenant.devices.npu_look import Npu, Npus, look
from cotenant.domain.device import (
    PROCESSOR,
    DeviceSpec,
    Launch,
    LayoutStep,
    Partition,
    PreemptLevel,
    Tenant,
    TenantFacts,
    TenantKind,
)
from cotenant.domain.device_config import NpuConfig
from cotenant.domain.errors import DeviceError, EnvironmentProblem
from cotenant.domain.npu import Emulated, Present
from cotenant.domain.reservation import Adopted
from cotenant.domain.units import MS, format_bytes


class NpuDevice:
    """Cores are held as a CPU holds them; every model instance has all of them. ``find``: what
    looks for NPUs that are there."""

    def __init__(self, config: NpuConfig, find: Callable[[], Npus] = look) -> None:
        self._config = config
        self._id = config.id
        self._find = find
        self._there: Npu | None = None
        pinned = bool(config.emulate)
        self._cores = CpuDevice(
            config.id, config.emulate or None, realtime="never", pin=pinned, reclaims=False
        )
        self._whole = Partition(f"{config.id}:emulated", config.id, config.emulate)
        self._emulated = Emulated(len(config.emulate), config.memory, config.operators)
        self.blocking = not pinned
        """To find an NPU takes a process."""

    @property
    def spec(self) -> DeviceSpec:
        return DeviceSpec(
            id=self._id,
            kind=NpuConfig.kind,
            units=(0,),
            memory=self._memory or self._cores.spec.memory,
            shapes=(1,),
            preempt=PreemptLevel.NONE,
            revoke_ns=0,
            repartition_ns=1 * MS,
            limits=(self._said(),),
            trains=False,
            operators=() if self._config.device else self._emulated.operators,
            model=self._model,
        )

    @property
    def _memory(self) -> int:
        return self._config.memory or (self._there.memory if self._there is not None else 0)

    @property
    def _model(self) -> str:
        if self._config.device:
            return (self._there.name if self._there is not None else "") or self._config.device
        cores = self._emulated.cores
        return f"EMULATED NPU: {cores} core{'s' * (cores > 1)} of {self._cores.spec.model}"

    def _said(self) -> str:
        if self._config.device:
            return f"{self._model}: driven through OpenVINO, untested on hardware"
        listed = ", ".join(map(str, self._config.emulate))
        return f"EMULATED: no NPU, but the CPU's cores {listed}; its times say nothing of one"

    def open(self) -> None:
        """Raises EnvironmentProblem if its cores, or the NPU, are not there."""
        if self._config.device:
            self._there = self._found()
        self._cores.open()

    def _found(self) -> Npu:
        found, wanted = self._find(), self._config.device
        if found.trouble is not None:
            how = f"; {found.trouble.how}" if found.trouble.how else ""
            raise EnvironmentProblem(f"device {self._id}: {found.trouble.what}{how}")
        there = next((npu for npu in found.npus if npu.id == wanted), None)
        if there is None:
            known = ", ".join(npu.id for npu in found.npus)
            raise EnvironmentProblem(f"device {self._id}: there is no {wanted}; there is {known}")
        if there.memory and self._config.memory > there.memory:
            raise EnvironmentProblem(
                f"device {self._id}: memory {format_bytes(self._config.memory)} is more than it "
                f"has, {format_bytes(there.memory)}"
            )
        return there

    def close(self) -> None:
        self._cores.close()

    def repartition(self, partitions: tuple[Partition, ...]) -> None:
        if any(partition.units != (0,) for partition in partitions) or len(partitions) > 1:
            raise DeviceError(f"{self._id} is not divided: unit 0 is all of it, in one partition")

    def preview(self, partitions: tuple[Partition, ...]) -> tuple[LayoutStep, ...]:
        return ()

    def launch(self, tenant: Tenant, partition: Partition | None) -> Launch:
        if tenant.kind is TenantKind.JOB:
            return self._cores.launch(tenant, partition)
        if self._config.device:
            return Launch(
                fixed={PROCESSOR: Present(self._config.device, self._config.memory).processor}
            )
        return Launch(fixed={PROCESSOR: self._emulated.processor})

    def attach(self, tenant: Tenant, pid: int) -> PreemptLevel:
        self._cores.attach(tenant, pid)
        if tenant.kind is TenantKind.WORKER:
            self._cores.bind(tenant.id, self._whole)
        return PreemptLevel.NONE

    def adopt(self, job: str, process: Adopted) -> None:
        self._cores.adopt(job, process)

    def detach(self, tenant: str) -> None:
        self._cores.detach(tenant)

    def grant(self, job: str, partition: Partition) -> None:
        self._cores.grant(job, self._whole)

    def revoke(self, job: str, partition: Partition) -> int:
        return self._cores.revoke(job, self._whole)

    def bind(self, worker: str, partition: Partition) -> None:
        self._cores.bind(worker, self._whole)

    def refresh(self) -> None:
        self._cores.refresh()

    def facts(self) -> dict[str, TenantFacts]:
        """Resident bytes of whole processes: what they take of the host. How much of an NPU's
        memory a process has its driver does not say."""
        return self._cores.facts()

    def evict(self, job: str, size: int) -> None:
        raise DeviceError(f"{self._id}: no job has memory here")
