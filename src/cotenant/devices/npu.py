"""An NPU, emulated on cores of the CPU that no other device has.

It serves only, and one batch at a time: one unit, and one partition of it. What a model may be
made of and how large it may be its engine checks when it is loaded (``cotenant.engines.openvino``),
as the compiler of an NPU would.
"""

from __future__ import annotations

from cotenant.devices.cpu import CpuDevice
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
from cotenant.domain.errors import DeviceError
from cotenant.domain.npu import Emulated
from cotenant.domain.units import MS


class NpuDevice:
    """The cores are held as a CPU holds them; every model instance has all of them."""

    blocking = False

    def __init__(self, config: NpuConfig) -> None:
        self._id = config.id
        self._cores = CpuDevice(config.id, config.emulate, realtime="never")
        self._whole = Partition(f"{config.id}:emulated", config.id, config.emulate)
        self._emulated = Emulated(len(config.emulate), config.memory, config.operators)

    @property
    def spec(self) -> DeviceSpec:
        listed = ", ".join(map(str, self._whole.units))
        said = f"EMULATED: no NPU, but the CPU's cores {listed}; its times say nothing of one"
        return DeviceSpec(
            id=self._id,
            kind=NpuConfig.kind,
            units=(0,),
            memory=self._emulated.memory or self._cores.spec.memory,
            shapes=(1,),
            preempt=PreemptLevel.NONE,
            revoke_ns=0,
            repartition_ns=1 * MS,
            limits=(said,),
            trains=False,
            operators=self._emulated.operators,
        )

    def open(self) -> None:
        """Raises EnvironmentProblem if its cores are not there."""
        self._cores.open()

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
        return Launch(fixed={PROCESSOR: self._emulated.processor})

    def attach(self, tenant: Tenant, pid: int) -> PreemptLevel:
        self._cores.attach(tenant, pid)
        if tenant.kind is TenantKind.WORKER:
            self._cores.bind(tenant.id, self._whole)
        return PreemptLevel.NONE

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
        """Resident bytes of whole processes: what the emulation takes of the host."""
        return self._cores.facts()

    def evict(self, job: str, size: int) -> None:
        raise DeviceError(f"{self._id}: no job has memory here")
