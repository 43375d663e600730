"""The contract between a node and a device kind. To add one, see docs/howto-device.md.

Calls return when the thing is done, raise ``DeviceError`` when it cannot be, and may be made
only between ``open`` and ``close``. A device of ``blocking = True`` is called on an executor
thread of its own; any other is called on the node's loop and must return within microseconds.
``tests/contract/test_devices.py`` runs against every device.
"""

from __future__ import annotations

from typing import Protocol

from cotenant.domain.device import DeviceSpec, Partition


class Device(Protocol):
    """One accelerator (or the CPU) whose space is cut into partitions."""

    blocking: bool

    @property
    def spec(self) -> DeviceSpec:
        """What it can do on this machine; valid after ``open``."""

    def open(self) -> None:
        """Find out what is there and what is allowed."""

    def close(self) -> None:
        """Give everything back as it was found."""

    def repartition(self, partitions: tuple[Partition, ...]) -> None:
        """Make these the partitions of the device; every one that changes is idle."""

    def attach_job(self, job: str, pid: int) -> None:
        """Take control of a job's process tree; it runs nowhere until it is granted space."""

    def detach_job(self, job: str) -> None:
        """Forget a job (its processes are gone, or are to run freely)."""

    def grant(self, job: str, partition: Partition) -> None:
        """Let the job run on the partition, besides where it runs already."""

    def revoke(self, job: str, partition: Partition) -> int:
        """Take the job's whole process tree off the partition; returns the ns it took. With
        no partition left the job stands still, its state kept."""

    def attach_worker(self, worker: str, pid: int, exec_timeout_ns: int) -> None:
        """Take control of a model instance's process and prepare it for urgent work."""

    def detach_worker(self, worker: str) -> None:
        """Forget a model instance."""

    def bind_worker(self, worker: str, partition: Partition) -> None:
        """Have the instance's next batch execute on the partition."""

    def refresh(self) -> None:
        """Look again at what changed by itself (new threads and children); called from time
        to time on an executor thread, must tolerate anything vanishing."""
