"""The contract between a node and a device kind. To add one, see docs/howto-device.md.

A tenant (a model instance or a job) passes through ``launch``, before it has a process, ``attach``,
perhaps ``adopt``, ``bind`` or ``grant`` and ``revoke`` any number of times, and ``detach``. Calls
return when the thing is done, raise ``DeviceError`` when it cannot be, and may be made only between
``open`` and ``close``. ``tests/contract/test_devices.py`` runs against every device.

Who calls, and when (``cotenant.runtime.fleet``):

* A device of ``blocking = False`` is called on the node's loop and must return within
  microseconds. Any other is called on a thread of its own, one call after the other; only
  ``revoke`` runs beside those, and beside other ``revoke`` calls.
* Calls that name the same tenant come one after the other, except for ``revoke`` of different
  partitions.
* ``refresh`` and ``facts`` run beside everything else, on a third thread, for every device;
  ``evict``, which may take long, on a fourth, one after the other.
* ``spec`` and ``preview`` are asked on the node's loop, whatever else runs: from memory.
"""

from __future__ import annotations

from typing import Protocol

from cotenant.domain.device import (
    DeviceSpec,
    Launch,
    LayoutStep,
    Partition,
    PreemptLevel,
    Tenant,
    TenantFacts,
)
from cotenant.domain.reservation import Adopted


class Device(Protocol):
    """One accelerator (or the CPU) whose space is cut into partitions."""

    blocking: bool
    """Whether its calls may block: then they are never made on the node's loop."""

    @property
    def spec(self) -> DeviceSpec:
        """What it can do on this machine; valid after ``open``, and perhaps another after a change
        of layout."""

    def open(self) -> None:
        """Find out what is there and what is allowed; raises EnvironmentProblem."""

    def close(self) -> None:
        """Give everything back as it was found."""

    def repartition(self, partitions: tuple[Partition, ...]) -> None:
        """Make these the partitions of the device; every one that changes is idle."""

    def preview(self, partitions: tuple[Partition, ...]) -> tuple[LayoutStep, ...]:
        """What ``repartition`` would do, from what was last seen, step by step; nothing where a
        layout is only what the node believes. Raises DeviceError for one that it would refuse."""

    def launch(self, tenant: Tenant, partition: Partition | None) -> Launch:
        """What a process of the tenant needs before it is executed. A partition is given only
        where the device binds processes to one (``spec.pins_jobs``, ``spec.pins_workers``)."""

    def attach(self, tenant: Tenant, pid: int) -> PreemptLevel:
        """Take control of a tenant's processes and say how well: the level may differ by tenant.

        ``pid`` is the process of a model instance, which is prepared for urgent work. For a job
        it is the process above it: what descends from that is the job, and runs nowhere until it
        is granted space."""

    def adopt(self, job: str, process: Adopted) -> None:
        """Take a process that does not descend from that of ``attach``, with all that descends from
        it, for a part of the job. Raises DeviceError for a job that was never attached."""

    def detach(self, tenant: str) -> None:
        """Forget a tenant: its processes are gone, or are to run freely. No effect on one that
        was never attached."""

    def grant(self, job: str, partition: Partition) -> None:
        """Let the job run on the partition, besides where it runs already."""

    def revoke(self, job: str, partition: Partition) -> int:
        """Take the job's whole process tree off the partition; returns the ns it took. With
        no partition left the job stands still, its state kept. No effect on a partition that it
        does not hold."""

    def bind(self, worker: str, partition: Partition) -> None:
        """Have the model instance's next turn execute on the partition."""

    def refresh(self) -> None:
        """Look again at what changed by itself (new threads and children); called from time
        to time, must tolerate anything vanishing."""

    def facts(self) -> dict[str, TenantFacts]:
        """What is seen of each tenant that is attached: measured, after ``refresh``."""

    def evict(self, job: str, size: int) -> None:
        """Take up to ``size`` bytes of memory back from a job; what it needs of them again it gets.
        Called only if ``spec.evicts``."""
