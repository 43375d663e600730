"""Devices for tests that misbehave as real ones may."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

from cotenant.devices.null import NullDevice
from cotenant.domain.device import Launch, Partition, PreemptLevel, Tenant, TenantFacts
from cotenant.domain.errors import DeviceError

FAILURES: tuple[Callable[[], BaseException], ...] = (
    lambda: DeviceError("the driver refused"),
    lambda: OSError(5, "Input/output error"),
    lambda: KeyError("handle"),
    MemoryError,
    lambda: SystemExit(3),
)
"""What a device may raise: its own error, or anything that a driver's binding brings about."""


class SlowDevice(NullDevice):
    """A null device whose calls block for a random time of at most ``slowest_s`` and fail with a
    probability of ``failing``, by ``seed``.

    ``hang(kind)`` makes the next call of a kind wait for ``let_go``; ``fail(kind)`` makes it raise.
    ``log`` holds what was done in order: (kind, tenant, partition). ``held`` maps jobs to what they
    were granted.
    """

    def __init__(
        self,
        units: int = 2,
        seed: int = 0,
        slowest_s: float = 0.0,
        failing: float = 0.0,
        device_id: str = "slow",
    ) -> None:
        super().__init__(device_id, units, preempt=PreemptLevel.GATE, blocking=True)
        self.log: list[tuple[str, str, str]] = []
        self.threads: set[str] = set()
        self.layout: tuple[Partition, ...] = ()
        self.looks = 0
        self.level: PreemptLevel | None = None
        """What is seen of every tenant."""
        self._random = random.Random(seed)
        self._slowest_s = slowest_s
        self._failing = failing
        self._hanging: dict[str, threading.Event] = {}
        self._due: dict[str, BaseException] = {}
        self._lock = threading.Lock()

    @property
    def held(self) -> dict[str, set[str]]:
        return {job: set(partitions) for job, partitions in self._grants.items()}

    def hang(self, kind: str) -> Callable[[], None]:
        """The next call of this kind hangs until what is returned is called."""
        event = self._hanging[kind] = threading.Event()
        return event.set

    def fail(self, kind: str, error: BaseException) -> None:
        """The next call of this kind raises."""
        self._due[kind] = error

    def _turn(self, kind: str, tenant: str = "", partition: str = "") -> None:
        with self._lock:
            self.threads.add(threading.current_thread().name)
            hanging, due = self._hanging.pop(kind, None), self._due.pop(kind, None)
            wait_s = self._random.uniform(0.0, self._slowest_s)
            if due is None and self._random.random() < self._failing:
                due = self._random.choice(FAILURES)()
        if hanging is not None:
            hanging.wait()
        time.sleep(wait_s)
        if due is not None:
            raise due
        with self._lock:
            self.log.append((kind, tenant, partition))

    def repartition(self, partitions: tuple[Partition, ...]) -> None:
        self._turn("repartition", "", " ".join(p.id for p in partitions))
        super().repartition(partitions)
        self.layout = partitions

    def launch(self, tenant: Tenant, partition: Partition | None) -> Launch:
        self._turn("launch", tenant.id)
        return Launch({"ON": self.spec.id, self.spec.id: "1"})

    def attach(self, tenant: Tenant, pid: int) -> PreemptLevel:
        self._turn("attach", tenant.id)
        return super().attach(tenant, pid)

    def detach(self, tenant: str) -> None:
        self._turn("detach", tenant)
        super().detach(tenant)

    def grant(self, job: str, partition: Partition) -> None:
        self._turn("grant", job, partition.id)
        super().grant(job, partition)

    def revoke(self, job: str, partition: Partition) -> int:
        self._turn("revoke", job, partition.id)
        return super().revoke(job, partition)

    def bind(self, worker: str, partition: Partition) -> None:
        self._turn("bind", worker, partition.id)
        super().bind(worker, partition)

    def evict(self, job: str, size: int) -> None:
        self._turn("evict", job)

    def facts(self) -> dict[str, TenantFacts]:
        self._turn("facts")
        self.looks += 1
        return dict.fromkeys(super().facts(), TenantFacts(level=self.level))


class Broken(NullDevice):
    """A quick device that raises whatever it is told to from every call but ``open``."""

    def __init__(self, error: Exception) -> None:
        super().__init__("broken")
        self._error = error

    def __getattribute__(self, name: str) -> Any:
        if name in ("launch", "attach", "grant", "revoke", "bind", "repartition", "refresh"):
            raise object.__getattribute__(self, "_error")
        return object.__getattribute__(self, name)
