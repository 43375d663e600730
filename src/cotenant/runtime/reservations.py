"""Reservations of a node: a job without a command for each, made once the planner has found room.

Its id is the outside scheduler's; the job behind it has one of its own. It is written to the store
of jobs before its maker is told, and goes on with the next node.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec

from cotenant.domain.device import DeviceSpec
from cotenant.domain.errors import InvalidRequest, NotFound
from cotenant.domain.reservation import MOST_ID, Answer, Reservation, ReservationStatus
from cotenant.domain.snapshot import Snapshot
from cotenant.domain.units import format_bytes
from cotenant.domain.workload import JobSpec, JobState, RestartPolicy
from cotenant.policy.reserving import facts_of, find_room, share_of
from cotenant.runtime.jobstore import JobRecord

if TYPE_CHECKING:
    from cotenant.runtime.node import Node

log = logging.getLogger("cotenant.node")
GIVEN_UP = "its reservation was released"


class Reservations:
    """See the module's text."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def reserve(self, wanted: Reservation, dry_run: bool) -> Answer:
        """See NodePort."""
        device = self._checked(wanted)
        there = self._node.jobs_supervisor.adopting.reservations().get(wanted.id)
        if there is not None:
            if there.spec.reservation != wanted:
                raise InvalidRequest(
                    f"{wanted.id} is reserved otherwise; release it first, or use another id"
                )
            return Answer(holds=True, made=not dry_run)
        if why := self._memory(wanted, device):
            return Answer(holds=False, reason=why)
        room = find_room(self._node.planner, self._snapshot(), wanted)
        if room.refusal or dry_run:
            return Answer(not room.refusal, room.refusal, room.would)
        job = self._node.jobs_supervisor.submit(self._spec(wanted, device))
        log.info("reserved", extra={"reservation": wanted.id, "job": job, "device": device.id})
        return Answer(holds=True, would=room.would, made=True)

    def release(self, id: str) -> None:
        """See NodePort."""
        there = self._node.jobs_supervisor.adopting.reservations().get(id)
        if there is not None:
            self._node.jobs_supervisor.cancel(there.spec.id, GIVEN_UP)

    def adopt(self, id: str, pid: int) -> None:
        """See NodePort."""
        there = self._node.jobs_supervisor.adopting.reservations().get(id)
        if there is None:
            raise NotFound(f"nothing is reserved under {id}")
        self._node.jobs_supervisor.adopting.adopt(there.spec.id, pid)

    def all(self) -> list[ReservationStatus]:
        """See NodePort."""
        records = self._node.jobs_supervisor.adopting.reservations().values()
        return [self._status(record) for record in records]

    def _status(self, record: JobRecord) -> ReservationStatus:
        job, launch = record.spec.id, record.launch
        assert record.spec.reservation is not None
        tenant = self._node.core.dispatcher.state.tenants.get(job)
        ready = record.state is JobState.RUNNING and self._node.effects.jobs.attached(job)
        plan = self._node.core.dispatcher.state.plan
        wanted = record.spec.reservation
        trains = any(d.id == wanted.device and d.trains for d in self._node.specs)
        if wanted.units and trains:
            ready = ready and bool(plan.jobs.get(job))
        status = ReservationStatus(
            reservation=wanted,
            job=job,
            state="ready" if ready else "waiting",
            reason="" if ready else record.reason or (tenant.waits if tenant is not None else ""),
            partitions=plan.jobs.get(job, ()),
            reports=self._node.jobs_supervisor.talk.directory(job),
            adopted=self._node.jobs_supervisor.adopting.adopted(job),
        )
        if not ready or launch is None:
            return status
        return msgspec.structs.replace(
            status, env={**launch.env, **launch.fixed}, prepend=launch.prepend, mounts=launch.mounts
        )

    def _snapshot(self) -> Snapshot:
        """What the planner knows, and reservations whose keeper is being started again."""
        found = self._node.snapshot()
        known = {job.id for job in found.jobs}
        devices = {d.id: d for d in found.devices}
        jobs = [*found.jobs]
        for record in self._node.jobs_supervisor.adopting.reservations().values():
            wanted = record.spec.reservation
            if wanted is not None and record.spec.id not in known and wanted.device in devices:
                jobs.append(facts_of(record.spec.id, wanted, devices[wanted.device]))
        return msgspec.structs.replace(found, jobs=tuple(jobs))

    # --- what is asked for ------------------------------------------------------------------

    def _checked(self, wanted: Reservation) -> DeviceSpec:
        """The device; raises InvalidRequest for what can never be reserved."""
        device = next((d for d in self._node.specs if d.id == wanted.device), None)
        for text, name in ((wanted.id, "id"), (wanted.name, "name")):
            if len(text) > MOST_ID or (text and not text.isprintable()):
                raise InvalidRequest(f"{name}: at most {MOST_ID} printable characters")
        if not wanted.id:
            raise InvalidRequest("id is missing; give one that tells this reservation from others")
        if device is None:
            known = ", ".join(d.id for d in self._node.specs)
            raise InvalidRequest(f"there is no device {wanted.device!r} here; there are: {known}")
        if bool(wanted.share) == bool(wanted.units):
            raise InvalidRequest("give either share (of time, above 0) or units (of its own)")
        if wanted.units and not 0 < wanted.units <= device.compute:
            raise InvalidRequest(
                f"units: {device.id} has 1 to {device.compute}, not {wanted.units}"
            )
        if wanted.share and not 0.0 < wanted.share <= 1.0:
            raise InvalidRequest(f"share: above 0 and at most 1, not {wanted.share:g}")
        if not share_of(wanted, device) - 1e-9 <= wanted.limit <= 1.0:
            raise InvalidRequest(
                f"limit: from what is guaranteed ({share_of(wanted, device):g}) to 1, not "
                f"{wanted.limit:g}"
            )
        if min(wanted.memory, wanted.within) < 0:
            raise InvalidRequest("memory (bytes) and within (ns) must not be below 0")
        return device

    def _memory(self, wanted: Reservation, device: DeviceSpec) -> str:
        """Why there is no memory for it; "" if there is."""
        if not wanted.memory or not device.trains:
            return ""
        budgets = self._node.core.dispatcher.budgets
        left = budgets.left(device.kind, "", device.id)
        if wanted.memory <= left:
            return ""
        return (
            f"{format_bytes(wanted.memory)} of memory are asked for on {device.id}, others leave "
            f"{format_bytes(left)}"
        )

    def _spec(self, wanted: Reservation, device: DeviceSpec) -> JobSpec:
        """The job that stands for it: its shares are of all devices of the kind."""
        compute = sum(d.compute for d in self._node.specs if d.kind == device.kind)
        part = device.compute / compute
        return JobSpec(
            id="",
            name=wanted.name or wanted.id[:128],
            command=(),
            cwd="/",
            guaranteed=share_of(wanted, device) * part,
            limit=wanted.limit * part,
            kinds=(device.kind,),
            memory=wanted.memory,
            restart=RestartPolicy.ALWAYS,
            max_restarts=2**31,
            reservation=wanted,
        )
