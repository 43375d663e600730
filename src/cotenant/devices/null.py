"""A device on which everything is possible and done at once: a stand-in, and the first for tests.

It exists only in name. What runs "on" it runs on this machine's processor, unconfined.
"""

from __future__ import annotations

from cotenant.domain.device import (
    DeviceSpec,
    Launch,
    LayoutStep,
    Partition,
    PreemptLevel,
    Tenant,
    TenantFacts,
    TenantKind,
)
from cotenant.domain.errors import DeviceError
from cotenant.domain.reservation import Adopted

STAND_IN = (
    "a stand-in: models and jobs on it run on this machine's processor, and nothing confines them"
)


class NullDevice:
    """``units`` compute units that exist only in name, and ``memory`` bytes that do.

    ``blocking``: whether the node is to call it as it calls a device that may block.
    """

    def __init__(
        self,
        device_id: str = "null",
        units: int = 2,
        memory: int = 0,
        preempt: PreemptLevel = PreemptLevel.PRIORITY,
        blocking: bool = False,
        kv: int = 0,
    ) -> None:
        self.blocking = blocking
        self._spec = DeviceSpec(
            id=device_id,
            kind="null",
            units=tuple(range(units)),
            memory=memory,
            shapes=tuple(range(1, units + 1)),
            preempt=preempt,
            revoke_ns=0,
            repartition_ns=0,
            limits=(STAND_IN,),
            kv=kv,
        )
        self._grants: dict[str, set[str]] = {}
        self._workers: set[str] = set()

    @property
    def spec(self) -> DeviceSpec:
        return self._spec

    def open(self) -> None:
        pass

    def close(self) -> None:
        self._grants.clear()
        self._workers.clear()

    def repartition(self, partitions: tuple[Partition, ...]) -> None:
        seen: set[int] = set()
        for partition in partitions:
            if not set(partition.units) <= set(self._spec.units) - seen:
                raise DeviceError(f"{partition.id}: its units are taken or do not exist")
            seen |= set(partition.units)

    def preview(self, partitions: tuple[Partition, ...]) -> tuple[LayoutStep, ...]:
        return ()

    def launch(self, tenant: Tenant, partition: Partition | None) -> Launch:
        return Launch()

    def attach(self, tenant: Tenant, pid: int) -> PreemptLevel:
        if tenant.kind is TenantKind.JOB:
            self._grants[tenant.id] = set()
        else:
            self._workers.add(tenant.id)
        return self._spec.preempt

    def adopt(self, job: str, process: Adopted) -> None:
        self._held(job)

    def detach(self, tenant: str) -> None:
        self._grants.pop(tenant, None)
        self._workers.discard(tenant)

    def grant(self, job: str, partition: Partition) -> None:
        self._held(job).add(partition.id)

    def revoke(self, job: str, partition: Partition) -> int:
        self._held(job).discard(partition.id)
        return 0

    def bind(self, worker: str, partition: Partition) -> None:
        if worker not in self._workers:
            raise DeviceError(f"{worker} was never attached to {self._spec.id}")

    def refresh(self) -> None:
        pass

    def facts(self) -> dict[str, TenantFacts]:
        return dict.fromkeys([*self._grants, *self._workers], TenantFacts())

    def evict(self, job: str, size: int) -> None:
        pass

    def _held(self, job: str) -> set[str]:
        if job not in self._grants:
            raise DeviceError(f"{job} was never attached to {self._spec.id}")
        return self._grants[job]
