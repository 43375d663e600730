"""Holds: which job has which partition, from the grant until it is taken back.

How a job stands to a partition is ``PartitionState.hold``; ``HOLD_TRANSITIONS`` says what may
become of it, and every step here is made by that table. To whom, when and for how long space is
lent is decided in ``cotenant.policy.lending``.
"""

from __future__ import annotations

from typing import Final

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import PreemptLevel
from cotenant.domain.units import S
from cotenant.domain.workload import share_on
from cotenant.policy import lending
from cotenant.policy.desk import Desk
from cotenant.policy.state import HOLD_TRANSITIONS, Hold, JobShare, PartitionState, Tenant

BLOCKED_AFTER_FAILED_GRANT: Final = 1 * S


class Holds:
    """See the module's text."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._state = desk.state

    @staticmethod
    def step(partition: PartitionState, what: str) -> bool:
        """Pass on to what a hold becomes when this happens; False if it is late news."""
        after = HOLD_TRANSITIONS[partition.hold].get(what)
        if after is None:
            return False
        partition.hold = after
        return True

    # --- lending ----------------------------------------------------------------------------

    def lend(self, partition: PartitionState) -> None:
        """Lend an idle partition now, or set the time to think of it again."""
        state, desk = self._state, self._desk
        if partition.hold != Hold.NONE or partition.batch or partition.retiring:
            return
        if not state.jobs or state.draining or (partition.waiting and partition.wake):
            return
        if not desk.specs[partition.device].trains:
            return
        now = state.now
        job = self._choose_job(partition)
        if job is None:
            blocked = [j.blocked_until for j in state.jobs.values() if j.blocked_until > now]
            if blocked:
                desk.set_wake(partition, min(blocked))
            return
        lending.adjust_slice(state, partition, now)
        units = desk.compute[job.kind]
        if not lending.lendable_now(state, partition, job, units):
            if partition.lendable:
                desk.set_wake(partition, now + lending.ADJUST_EVERY)
            return
        self._grant(partition, job)

    def _choose_job(self, partition: PartitionState) -> JobShare | None:
        units = self._desk.compute.get(partition.kind, 0)
        return lending.choose_job(self._state, partition, self._state.now, units)

    def _grant(self, partition: PartitionState, job: JobShare) -> None:
        state = self._state
        if not job.held:
            # A job that held nothing must not cash in the time it was away.
            beside = (j.vtime for j in state.jobs.values() if j.held and j.kind == job.kind)
            floor = min(beside, default=job.vtime)
            job.vtime = max(job.vtime, floor)
        slice_ns = self._slice(partition)
        self.step(partition, "Grant")
        partition.job = job.id
        partition.held_since = state.now
        partition.slice_end = state.now + slice_ns
        job.held.append(partition.id)
        job.units += partition.compute
        self._desk.out.append(a.Grant(self._desk.cause, job.id, partition.id, slice_ns))

    def _slice(self, partition: PartitionState) -> int:
        plan = self._state.plan
        return max(plan.slice_min, partition.slice_ns) if partition.services else plan.slice_max

    def slice_over(self, partition: PartitionState) -> None:
        """A slice may have ended: rotate if another job should have the partition, else go on."""
        state, now = self._state, self._state.now
        if partition.hold != Hold.HELD or partition.held_since == now:
            return
        if partition.slice_end > now:
            if len(state.jobs) > 1:
                self._desk.set_wake(partition, partition.slice_end)
            return
        lending.adjust_slice(state, partition, now)
        holder = state.jobs[partition.job]
        rival = self._choose_job(partition)
        if rival is not None and rival is not holder:
            owed = lending.in_debt(state, rival, now, self._desk.compute[rival.kind])
            behind = lending.virtual_time(state, rival, now)
            guest = rival.id in partition.owners and holder.id not in partition.owners
            if owed or guest or behind < lending.virtual_time(state, holder, now):
                self.revoke(partition)
                return
        partition.slice_end = now + self._slice(partition)
        if len(state.jobs) > 1:
            self._desk.set_wake(partition, partition.slice_end)

    # --- taking back ------------------------------------------------------------------------

    def revoke(self, partition: PartitionState) -> None:
        """Take a partition back, if a job has it and is not being taken off already."""
        if self.step(partition, "Revoke"):
            self._desk.out.append(a.Revoke(self._desk.cause, partition.job, partition.id))
            partition.revoke_by = self._state.now + lending.REVOKE_WITHIN
            self._watch(partition)

    def _watch(self, partition: PartitionState) -> None:
        if not partition.watched:
            partition.watched = True
            self._desk.watch(partition.revoke_by, "partition", partition.id)

    def level(self, partition: PartitionState) -> PreemptLevel:
        """How the job that has a partition can be made to yield."""
        job = self._state.jobs.get(partition.job)
        level = job.levels.get(partition.device) if job is not None else None
        return self._desk.specs[partition.device].preempt if level is None else level

    def overdue(self, name: str) -> str:
        """The job that should have left a partition by now; "" if there is none."""
        partition = self._state.partitions.get(name)
        if partition is None:
            return ""
        partition.watched = False
        if partition.hold != Hold.CLOSING:
            return ""
        if partition.revoke_by <= self._state.now:
            return partition.job
        self._watch(partition)
        return ""

    def stop(self, job: str) -> None:
        """A job is about to be stopped: it is lent nothing more, and what it has is free once it
        has left it, or is gone."""
        share = self._state.jobs.get(job)
        if share is None:
            return
        share.stopping = True
        for name in share.held:
            partition = self._state.partitions[name]
            if partition.hold != Hold.CLOSING:
                partition.revoke_by = self._state.now + lending.REVOKE_WITHIN
            self.step(partition, "Stop")

    def granted(self, event: e.Granted) -> None:
        """The job runs there now."""
        partition = self._state.partitions.get(event.partition)
        if partition is None or partition.job != event.job:
            return
        if self.step(partition, "Granted") and len(self._state.jobs) > 1:
            # It may have ended, or another job may have come, while the grant was under way.
            self._desk.set_wake(partition, max(self._state.now, partition.slice_end))

    def revoked(self, event: e.Revoked) -> PartitionState | None:
        """The partition that a job left, if it did."""
        partition = self._state.partitions.get(event.partition)
        if partition is None or partition.job != event.job or not self.step(partition, "Revoked"):
            return None
        lending.note_revoked(partition, event.took_ns)
        self._vacate(partition)
        return partition

    def failed(self, event: e.ActionFailed) -> PartitionState | None:
        """A grant could not be carried out; the partition that is free by that."""
        state = self._state
        partition = state.partitions.get(event.target)
        if partition is None or partition.job != event.job:
            return None
        if not self.step(partition, "ActionFailed(Grant)"):
            return None
        state.jobs[event.job].blocked_until = state.now + BLOCKED_AFTER_FAILED_GRANT
        self._vacate(partition)
        return partition

    def _vacate(self, partition: PartitionState) -> None:
        """Book what the job used of a partition that it left."""
        job, now = self._state.jobs.get(partition.job), self._state.now
        if job is not None:
            lending.settle(job, now, partition.compute, partition.held_since)
            job.held.remove(partition.id)
            job.units -= partition.compute
            lending.roll_window(self._state, job, now, self._desk.compute[job.kind])
        partition.job = ""

    # --- jobs -------------------------------------------------------------------------------

    def open(self, tenant: Tenant, levels: dict[str, PreemptLevel]) -> None:
        """A job may be lent space from now on."""
        state, compute = self._state, self._desk.compute.get(tenant.kind, 0)
        # What others hold right now counts: a newcomer has no claim on the time before it came.
        beside = [j for j in state.jobs.values() if j.kind == tenant.kind]
        others = (lending.virtual_time(state, j, state.now) for j in beside)
        state.jobs[tenant.id] = JobShare(
            id=tenant.id,
            kind=tenant.kind,
            weight=max(1, round(tenant.weight * 1000)),
            guaranteed=round(share_on(tenant.guaranteed, tenant.kind) * 1_000_000),
            limit=max(1, int(share_on(tenant.limit, tenant.kind) * compute + 1e-9)),
            place=tenant.place,
            levels=dict(levels),
            apart=tenant.apart,
            device=tenant.device,
            own=tenant.own,
            vtime=min(others, default=0),
            since=state.now,
            target=lending.target(state.plan, tenant.id),
        )

    def rotate(self, partition: PartitionState) -> bool:
        """See to it that a partition's job makes way when its slice ends, now that there is
        another; False if nobody has it for a slice."""
        if partition.hold != Hold.HELD or partition.wake:
            return False
        self._desk.set_wake(partition, max(self._state.now, partition.slice_end))
        return True

    def close(self, job_id: str) -> list[PartitionState]:
        """A job is gone; the partitions that are free by that."""
        job = self._state.jobs.get(job_id)
        if job is None:
            return []
        vacated = [self._state.partitions[p] for p in job.held]
        for partition in vacated:
            self.step(partition, "JobExited")
            self._vacate(partition)
        del self._state.jobs[job_id]
        return vacated

    def below_limit(self) -> list[PartitionState]:
        """Free partitions that a job that is below its limit again may take now."""
        state, compute = self._state, self._desk.compute
        if all(job.limit >= compute.get(job.kind, 0) for job in state.jobs.values()):
            return []
        return [p for p in state.partitions.values() if p.hold == Hold.NONE]
