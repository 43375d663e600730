"""Jobs as tenants of the box: between the supervisor, which keeps their processes, the fleet, whose
devices they are on, and the dispatcher, which says when they start and stop."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import Launch, PreemptLevel, Tenant, TenantKind
from cotenant.domain.reservation import Adopted
from cotenant.domain.workload import JobSpec
from cotenant.runtime.fleet import Fleet
from cotenant.runtime.jobgiving import JobGiving
from cotenant.runtime.jobs import JobSupervisor

log = logging.getLogger("cotenant.node")


class _Run(msgspec.Struct, eq=False):
    """A job that wants to run, or does, on ``devices``; ``place``: in this partition, where these
    bind processes to one; ``launched``: they were asked what its processes need; ``attached``: they
    have these."""

    spec: JobSpec
    devices: tuple[str, ...] = ()
    place: str = ""
    launched: bool = False
    attached: bool = False


class JobTenants:
    """See the module's text. ``supervisor`` and ``giving`` are set once they are made; ``feed``
    hands an event to the dispatcher, ``plan_soon`` wakes the planner."""

    supervisor: JobSupervisor
    giving: JobGiving

    def __init__(
        self, fleet: Fleet, feed: Callable[[e.Event], None], plan_soon: Callable[[], None]
    ) -> None:
        self._fleet = fleet
        self._feed = feed
        self._plan_soon = plan_soon
        self._runs: dict[str, _Run] = {}
        fleet.changed = self._level_changed

    # --- what the dispatcher orders ---------------------------------------------------------

    def start(self, action: a.Start) -> None:
        """See Hands."""
        run = self._runs.get(action.job)
        if run is not None:  # else its JobExited is on its way
            run.devices, run.place = action.devices, action.partition
            self.supervisor.start(action.job)

    def stop(self, action: a.Stop) -> None:
        """See Hands."""
        self.supervisor.stop(action.job, action.reason, action.kill, action.again)

    def resize(self, action: a.Resize) -> None:
        """See Hands."""
        if action.holder in self._runs:
            self.giving.order(action.holder, action.size)

    def look(self) -> None:
        """See what jobs have, once the devices have looked at them."""
        for job, run in self._runs.items():
            if run.attached:
                self.giving.look(job, run.devices, self.supervisor.talk.can_be_asked(job))

    # --- what the supervisor tells ----------------------------------------------------------

    def on_job_queued(self, spec: JobSpec) -> None:
        """See JobShell."""
        self._runs[spec.id] = _Run(spec)
        none = (d.id for d in self._fleet.specs if d.preempt is PreemptLevel.NONE)
        apart = tuple(dict.fromkeys((*self.supervisor.apart(spec.id), *none)))
        self._feed(e.job_queued(spec, self.supervisor.talk.gave(spec.id), apart))
        self._plan_soon()

    async def launch_job(self, spec: JobSpec) -> Launch:
        """See JobShell."""
        run = self._runs[spec.id]
        partition = self._fleet.partition(run.place) if run.place else None
        run.launched = True
        return await self._fleet.launch(run.devices, _tenant(spec), partition)

    def attached(self, job: str) -> bool:
        """Whether its devices have a job's processes."""
        run = self._runs.get(job)
        return run is not None and run.attached

    def on_job_ready(self, spec: JobSpec, pid: int) -> None:
        """See JobShell."""
        run = self._runs[spec.id]
        run.attached = True
        self._fleet.attach(
            run.devices, _tenant(spec), pid, run, self._job_attached, self._job_refused
        )

    def _job_attached(self, run: _Run, _: object) -> None:
        job = run.spec.id
        if self._runs.get(job) is not run:
            return  # it ended meanwhile
        for process in self.supervisor.adopting.adopted(job):
            self._adopt(run, process)
        levels = {device: self._fleet.levels(device)[job] for device in run.devices}
        self._feed(e.JobReady(job, levels))
        self._plan_soon()

    def _level_changed(self, job: str, device: str, level: PreemptLevel) -> None:
        if job not in self._runs:
            return
        log.warning(
            "job yields otherwise than before",
            extra={"job": job, "device": device, "level": level.name},
        )
        holds = any(d.id == device and d.preempt > level for d in self._fleet.specs)
        if level is PreemptLevel.NONE and holds:  # others yield there: it is the job
            self.supervisor.note_apart(job, device)
        self._feed(e.JobLevel(job, device, level))
        self._plan_soon()

    def _job_refused(self, run: _Run, why: str) -> None:
        job = run.spec.id
        if self._runs.get(job) is run:
            log.error("job not attached, stopping it", extra={"job": job, "why": why})
            self.supervisor.stop(job, f"its device would not take it: {why}")

    def on_job_adopts(self, job: str, process: Adopted) -> None:
        """See JobShell."""
        run = self._runs.get(job)
        if run is not None and run.attached:
            self._adopt(run, process)

    def _adopt(self, run: _Run, process: Adopted) -> None:
        self._fleet.adopt(run.devices, run.spec.id, process, run, self._job_refused)

    def on_job_listens(self, job: str) -> None:
        """See JobShell."""
        self.giving.listens(job)

    def on_job_exited(self, job: str) -> None:
        """See JobShell."""
        run = self._runs.pop(job)
        self.giving.gone(job)
        self._feed(e.JobExited(job))
        if run.launched or run.attached:
            self._fleet.detach(run.devices, job)
        self._plan_soon()


def _tenant(spec: JobSpec) -> Tenant:
    return Tenant(spec.id, TenantKind.JOB, memory=spec.memory)
