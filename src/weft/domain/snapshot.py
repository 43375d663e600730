"""The facts that the planner decides on; no opinions."""

from __future__ import annotations

import msgspec

from weft.domain.device import DeviceSpec
from weft.domain.plan import Plan


class ServiceFacts(msgspec.Struct, frozen=True):
    """One service over the last observation window. Times in ns, rates per second.

    ``exec_ns`` maps ``(units, rows)`` to the measured execution time. ``rate_trend`` is the
    change of the arrival rate per second.
    """

    name: str
    objective: int
    percentile: float
    guaranteed: float
    limit: float
    max_batch: int
    rate: float
    rate_trend: float
    queued: int
    p50: int
    p95: int
    p99: int
    misses: int
    refused: int
    answered: int
    exec_ns: dict[str, int]
    instances: int = 1
    live_instances: int = 1

    def exec_time(self, units: int, rows: int) -> int | None:
        """Measured ns of a batch of ``rows`` on ``units`` compute units, if known."""
        return self.exec_ns.get(f"{units}x{rows}")


class JobFacts(msgspec.Struct, frozen=True):
    """One job. ``rate`` is its progress per second, ``held_ns`` unit-nanoseconds granted."""

    id: str
    weight: float
    guaranteed: float
    limit: float
    rate: float
    held_ns: int


class PartitionFacts(msgspec.Struct, frozen=True):
    """Busy time of one partition by workload over the window, in ns, and switches."""

    id: str
    busy_ns: dict[str, int]
    idle_ns: int
    switches: int


class Snapshot(msgspec.Struct, frozen=True):
    """Everything the planner may know at ``now`` (ns, monotonic)."""

    now: int
    window: int
    device: DeviceSpec
    plan: Plan
    services: tuple[ServiceFacts, ...]
    jobs: tuple[JobFacts, ...]
    partitions: tuple[PartitionFacts, ...] = ()
