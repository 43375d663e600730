"""A device on which everything is possible and done at once: the first device, for tests."""

from __future__ import annotations

from cotenant.domain.device import DeviceSpec, Partition, PreemptLevel
from cotenant.domain.errors import DeviceError


class NullDevice:
    """``units`` compute units that exist only in name."""

    blocking = False

    def __init__(self, units: int = 2, preempt: PreemptLevel = PreemptLevel.PRIORITY) -> None:
        self._spec = DeviceSpec(
            id="null",
            kind="null",
            units=tuple(range(units)),
            memory=0,
            shapes=tuple(range(1, units + 1)),
            preempt=preempt,
            resizes_live=True,
            revoke_ns=0,
            repartition_ns=0,
        )
        self._grants: dict[str, set[str]] = {}
        self._workers: set[str] = set()

    @property
    def spec(self) -> DeviceSpec:
        return self._spec

    def open(self) -> None:
        self._grants.clear()

    def close(self) -> None:
        self._grants.clear()

    def repartition(self, partitions: tuple[Partition, ...]) -> None:
        seen: set[int] = set()
        for partition in partitions:
            if not set(partition.units) <= set(self._spec.units) - seen:
                raise DeviceError(f"{partition.id}: its units are taken or do not exist")
            seen |= set(partition.units)

    def attach_job(self, job: str, pid: int) -> None:
        self._grants[job] = set()

    def detach_job(self, job: str) -> None:
        self._grants.pop(job, None)

    def grant(self, job: str, partition: Partition) -> None:
        self._held(job).add(partition.id)

    def revoke(self, job: str, partition: Partition) -> int:
        self._held(job).discard(partition.id)
        return 0

    def attach_worker(self, worker: str, pid: int, exec_timeout_ns: int) -> None:
        self._workers.add(worker)

    def detach_worker(self, worker: str) -> None:
        self._workers.discard(worker)

    def bind_worker(self, worker: str, partition: Partition) -> None:
        if worker not in self._workers:
            raise DeviceError(f"{worker} was never attached")

    def refresh(self) -> None:
        pass

    def _held(self, job: str) -> set[str]:
        if job not in self._grants:
            raise DeviceError(f"{job} was never attached")
        return self._grants[job]
