"""Tenancy: which jobs run, on which devices, and when one is stopped.

A job that wants to run is started once there is room: fewer jobs than the limit run, its memory
fits beside what else is on its devices, and, where a device binds processes to a partition, the
plan in force has given it one. Where several kinds of device would do it goes to the kind with
most compute to a job. A job is stopped to start elsewhere when a plan takes its partition away,
and for good when it does not yield; who does not obey is killed. One that was seen to compute where
its device cannot hold it back is kept apart on that device: it runs only where no service does.
"""

from __future__ import annotations

from typing import Final

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import DeviceSpec, PreemptLevel
from cotenant.domain.plan import Plan
from cotenant.domain.units import S, format_bytes
from cotenant.policy.desk import Desk
from cotenant.policy.holds import Holds
from cotenant.policy.memory.budgets import Budgets
from cotenant.policy.state import PHASE_TRANSITIONS, PartitionState, Phase, Tenant

KILL_AFTER: Final = 5 * S
"""Beyond its grace a job that is stopped has so long (ns), for its processes to be collected."""
ALONE: Final = "it could not be held back, and services are wherever it could compute"


class Tenancy:
    """See the module's text."""

    def __init__(self, desk: Desk, holds: Holds, budgets: Budgets) -> None:
        self._desk = desk
        self._budgets = budgets
        self._holds = holds
        self._state = desk.state

    @staticmethod
    def _step(tenant: Tenant, what: str) -> bool:
        after = PHASE_TRANSITIONS[tenant.phase].get(what)
        if after is None:
            return False
        tenant.phase = after
        return True

    # --- what happens -----------------------------------------------------------------------

    def queued(self, event: e.JobQueued) -> None:
        """A job wants to run."""
        tenants = self._state.tenants
        if event.job not in tenants:
            tenants[event.job] = Tenant(
                id=event.job,
                weight=event.weight,
                guaranteed=event.guaranteed,
                limit=event.limit,
                kinds=event.kinds,
                memory=event.memory,
                kept=event.memory if event.kept < 0 else event.kept,
                gives=event.gives,
                apart=event.apart,
                grace=event.grace,
                device=event.device,
                own=event.own,
            )
            self._choose_kind(tenants[event.job])
        self.settle()

    def ready(self, event: e.JobReady) -> bool:
        """A job runs; False if that is late news."""
        tenant = self._state.tenants.get(event.job)
        if tenant is None or not self._step(tenant, "JobReady"):
            return False
        for device, level in event.levels.items():
            if level is PreemptLevel.NONE:
                self._keep_apart(tenant, device)
        self._holds.open(tenant, event.levels)
        self.part()
        return True

    def level(self, event: e.JobLevel) -> None:
        """How a job that runs can be made to yield was seen to be another than thought."""
        tenant, share = self._state.tenants.get(event.job), self._state.jobs.get(event.job)
        if tenant is None or share is None or event.device not in tenant.devices:
            return
        share.levels[event.device] = event.level
        if event.level is PreemptLevel.NONE:
            self._keep_apart(tenant, event.device)
            self.part()

    def weakened(self, spec: DeviceSpec) -> list[str]:
        """A device's level fell: so did that of all jobs there. Those that have to go from it."""
        for tenant in self._state.tenants.values():
            share = self._state.jobs.get(tenant.id)
            if share is not None and spec.id in share.levels:
                share.levels[spec.id] = min(share.levels[spec.id], spec.preempt)
            if spec.preempt is PreemptLevel.NONE:
                self._keep_apart(tenant, spec.id)
        self.part()
        return [s.id for s in self._state.jobs.values() if s.stopping]

    def _keep_apart(self, tenant: Tenant, device: str) -> None:
        if device not in tenant.apart:
            tenant.apart = (*tenant.apart, device)
        share = self._state.jobs.get(tenant.id)
        if share is not None:
            share.apart = tenant.apart

    def part(self) -> None:
        """Stop those who are to be apart from services and are not; they start again elsewhere."""
        for tenant in self._state.tenants.values():
            running = tenant.phase not in (Phase.QUEUED, Phase.STOPPING)
            if running and self._clashes(tenant, tenant.devices, tenant.place):
                self.stop(
                    tenant.id,
                    "it cannot be held back, and services are where it computes",
                    again=True,
                )

    def _clashes(self, tenant: Tenant, devices: tuple[str, ...], place: str) -> bool:
        """Whether services are where a job would be and is to be apart from them: in its partition,
        or anywhere on devices that do not bind it to one."""
        apart = set(devices).intersection(tenant.apart)
        parts = self._state.partitions.values() if apart else ()
        return any(p.services and p.device in apart and place in ("", p.id) for p in parts)

    def exited(self, event: e.JobExited) -> list[PartitionState]:
        """A job is gone; the partitions that are free by that."""
        self._state.tenants.pop(event.job, None)
        self._budgets.exited(event.job)
        return self._holds.close(event.job)

    # --- starting ---------------------------------------------------------------------------

    def settle(self) -> None:
        """Start, in the order in which they came, the jobs that there is room for."""
        state = self._state
        for tenant in state.tenants.values():
            if tenant.phase != Phase.QUEUED:
                continue
            running = sum(t.phase != Phase.QUEUED and not t.device for t in state.tenants.values())
            if state.most_jobs and running >= state.most_jobs and not tenant.device:
                tenant.waits = f"{running} jobs run, as many as may"
                continue
            self._start(tenant)

    def _start(self, tenant: Tenant) -> None:
        kind = self._choose_kind(tenant)
        if not kind:
            self._budgets.exited(tenant.id)  # what it was given while it waited
            return
        devices = tuple(
            d
            for d in self._desk.devices
            if d.kind == kind and d.trains and tenant.device in ("", d.id)
        )
        place = ""
        if devices and devices[0].pins_jobs:
            partition = self._place_of(tenant, kind)
            if partition is None or partition.retiring:
                tenant.waits = ALONE if tenant.apart else "its partition is not there yet"
                return
            if not self._fits_beside(tenant, partition.id):
                tenant.waits = "another job has the memory of its partition"
                return
            place = partition.id
            devices = tuple(d for d in devices if d.id == partition.device)
        names = tuple(d.id for d in devices)
        if self._clashes(tenant, names, place):
            tenant.waits = ALONE
            return
        if not self._budgets.start(tenant, names):
            tenant.waits = "others are to give the memory that it is guaranteed"
            return
        self._step(tenant, "Start")
        tenant.place, tenant.waits = place, ""
        tenant.devices = names
        self._desk.out.append(a.Start(self._desk.cause, tenant.id, tenant.devices, place))

    def _place_of(self, tenant: Tenant, kind: str) -> PartitionState | None:
        """The partition of a kind of device that the plan in force gives a job."""
        parts = self._state.partitions
        mine = (parts[p] for p in self._state.plan.jobs.get(tenant.id, ()) if p in parts)
        return next((p for p in mine if p.kind == kind), None)

    def _fits_beside(self, tenant: Tenant, place: str) -> bool:
        """Whether a job can be where others are bound to: where the partition has memory of its own
        all of them have to say what they need of it."""
        there = [t.memory for t in self._state.tenants.values() if t.place == place]
        room = next(p.memory for p in self._state.plan.partitions if p.id == place)
        needs = [*there, tenant.memory]
        return not there or not room or (all(needs) and sum(needs) <= room)

    def _choose_kind(self, tenant: Tenant) -> str:
        """Choose the kind of device for a job that is to start; "" if there is no room for it now,
        and then why."""
        if tenant.device and not self._desk.specs[tenant.device].trains:
            tenant.kind = self._desk.specs[tenant.device].kind  # nothing runs there that is ours
            return tenant.kind
        able = [k for k in self._desk.compute if not tenant.kinds or k in tenant.kinds]
        if not able:
            names = " or ".join(tenant.kinds)
            tenant.waits = f"no device of kind {names} trains here"
            return ""
        need = {kind: self._budgets.guaranteed(tenant, kind) for kind in able}
        left = {kind: self._budgets.left(kind, tenant.id, tenant.device) for kind in able}
        roomy = [k for k in able if need[k] <= left[k]]
        compute = self._desk.compute
        tenant.kind = max(
            roomy or able, key=lambda k: compute[k] / (1 + self._others_on(k, tenant))
        )
        if not roomy:
            most, least = format_bytes(max(0, *left.values())), format_bytes(min(need.values()))
            tenant.waits = f"it needs {least} of memory, others leave {most}"
            return ""
        return tenant.kind

    def _others_on(self, kind: str, tenant: Tenant) -> int:
        return sum(t.kind == kind and t is not tenant for t in self._state.tenants.values())

    # --- stopping ---------------------------------------------------------------------------

    def move(self, device: str, plan: Plan) -> None:
        """Stop the jobs whose partition on a device a plan takes away."""
        state = self._state
        mine = {p.id for p in plan.partitions if p.device == device}
        for tenant in state.tenants.values():
            there = tenant.place and state.partitions[tenant.place].device == device
            if not there or tenant.phase == Phase.QUEUED:
                continue
            kept = tenant.place in mine and tenant.place in plan.jobs.get(tenant.id, ())
            if not kept:
                self.stop(tenant.id, "its partition goes to others", again=True)

    def bound(self, partition: PartitionState) -> bool:
        """Whether a job's processes are bound to a partition."""
        return any(
            t.place == partition.id and t.phase != Phase.QUEUED
            for t in self._state.tenants.values()
        )

    def stop(self, job: str, reason: str, again: bool = False) -> None:
        """Stop a job, unless it is being stopped already."""
        tenant = self._state.tenants.get(job)
        if tenant is None or not self._step(tenant, "Stop"):
            return
        tenant.stop_by = self._state.now + tenant.grace + KILL_AFTER
        self._desk.watch(tenant.stop_by, "job", job)
        self._holds.stop(job)
        self._desk.out.append(a.Stop(self._desk.cause, job, reason, again=again))

    def failed(self, event: e.ActionFailed) -> None:
        """A revocation could not be carried out, ordered here or by the shell (a grant that came
        too late): the job is where it must not be."""
        self.stop(event.job, f"it could not be made to yield: {event.reason}")

    def partition_overdue(self, partition: str) -> str:
        """Stop the job that has not left a partition in time; its id, or ""."""
        job = self._holds.overdue(partition)
        if job:
            self.stop(job, "it did not yield in time")
        return job

    def job_overdue(self, job: str) -> None:
        """Kill a job that was stopped and is still there."""
        tenant = self._state.tenants.get(job)
        if tenant is not None and 0 < tenant.stop_by <= self._state.now:
            tenant.stop_by = 0
            self._desk.out.append(
                a.Stop(self._desk.cause, job, "it did not end in time", kill=True)
            )
