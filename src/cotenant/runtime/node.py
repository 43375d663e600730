"""The node: everything joined and run. Implements ``NodePort`` for the front ends."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from cotenant.devices.base import Device
from cotenant.domain import events as e
from cotenant.domain import shares
from cotenant.domain.config import NodeConfig
from cotenant.domain.device import DeviceSpec
from cotenant.domain.errors import CotenantError, EnvironmentProblem, InvalidRequest
from cotenant.domain.port import (
    Held,
    IndexEntry,
    InferCall,
    JobStatus,
    Language,
    ModelMeta,
    OnOutcome,
    Refused,
    Withdraw,
)
from cotenant.domain.reservation import Answer, Reservation, ReservationStatus
from cotenant.domain.snapshot import Snapshot
from cotenant.domain.units import MS, S, format_bytes
from cotenant.domain.workload import JobSpec
from cotenant.policy.dispatcher import Dispatcher
from cotenant.policy.planner import Planner
from cotenant.policy.planstate import Tuning
from cotenant.policy.state import DispatcherState
from cotenant.runtime.core import Clock, Core, steady
from cotenant.runtime.effects import Effects
from cotenant.runtime.fleet import Fleet
from cotenant.runtime.jobgiving import JobGiving
from cotenant.runtime.jobs import JobSupervisor
from cotenant.runtime.jobspec import minimal
from cotenant.runtime.jobstore import JobStore
from cotenant.runtime.jobtenants import JobTenants
from cotenant.runtime.models import Models
from cotenant.runtime.pins import Pins
from cotenant.runtime.preview import plan_view
from cotenant.runtime.repository import Repository
from cotenant.runtime.requests import Requests
from cotenant.runtime.reservations import Reservations
from cotenant.runtime.status import node_status
from cotenant.telemetry import metrics
from cotenant.telemetry.journal import Journal, checkpoint
from cotenant.telemetry.monitor import Monitor
from cotenant.telemetry.records import Header

log = logging.getLogger("cotenant.node")

REFRESH_S = 0.25
"""How often devices look for new threads and children of jobs, and at what tenants occupy."""
DRAIN_S = 10.0


class Node:
    """One box. ``async with`` it, ``await start()``; front ends call the ``NodePort`` methods
    from the time it is entered."""

    def __init__(
        self,
        config: NodeConfig,
        devices: Sequence[Device],
        clock: Clock = time.monotonic_ns,
    ) -> None:
        self.config = config
        self.fleet = Fleet(devices)
        self.addresses: dict[str, str | None] = {"http": None, "grpc": None, "jobs": None}
        self._state_dir = Path(config.state_dir).absolute()
        self._clock = steady(clock)
        self.started = time.monotonic()
        self.planned_at = self.started
        self._tasks: list[asyncio.Task[None]] = []
        self._replan: asyncio.Handle | None = None
        self._stack = contextlib.AsyncExitStack()

    # --- life -------------------------------------------------------------------------------

    async def __aenter__(self) -> Node:
        """Take the state directory and open the devices. Raises EnvironmentProblem."""
        async with contextlib.AsyncExitStack() as stack:
            self._lock_state_dir(stack)
            await self.fleet.open()
            stack.push_async_callback(self.fleet.close)
            self._make_parts(stack)
            stack.push_async_callback(self.fleet.close)  # what it still answers is journaled
            stack.push_async_callback(self._stop_tasks)
            stack.push_async_callback(self.models.close)
            stack.callback(self.core.close)
            await self.jobs_supervisor.open()
            stack.push_async_callback(self.jobs_supervisor.close)
            stack.push_async_callback(self._drain)
            self._stack = stack.pop_all()
        return self

    @property
    def specs(self) -> tuple[DeviceSpec, ...]:
        """What its devices say of themselves now."""
        return self.fleet.specs

    @property
    def stops_within_s(self) -> float:
        """Seconds that its end may take: answers that are due, then the graces of its jobs."""
        return DRAIN_S + self.jobs_supervisor.stops_within_s

    async def start(self) -> None:
        """Load the declared models, then submit the declared jobs and watch over both.

        A model that cannot be loaded does not stop the node: it is logged, shown by the index,
        and tried again when its files change.
        """
        await asyncio.gather(*(self._load_declared(s.name) for s in self.config.services))
        self._plan()
        self._submit_declared()
        self._every(self.config.plan_every / S, self._tick)
        self._every(self.config.poll_models_every / S, self.models.poll)
        self._every(REFRESH_S, self._refresh)

    async def __aexit__(self, *_: object) -> None:
        """Drain, stop jobs (they go back to the queue), end workers."""
        await self._stack.aclose()

    def _lock_state_dir(self, stack: contextlib.AsyncExitStack) -> None:
        try:
            self._state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self._state_dir / "workers").mkdir(exist_ok=True)
            fd = os.open(self._state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise EnvironmentProblem(
                f"cannot use the state directory {self._state_dir}: {error.strerror}; set "
                "node.state_dir to a directory that can be written"
            ) from error
        stack.callback(os.close, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(fd, 32, 0).decode(errors="replace").strip()
            raise EnvironmentProblem(
                f"the state directory {self._state_dir} is in use by another node (pid {owner}); "
                f"stop it (cotenant stop --state-dir {self._state_dir}), or set another "
                "node.state_dir"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)

    def _make_parts(self, stack: contextlib.AsyncExitStack) -> None:
        config, policy = self.config, self.config.policy
        for spec in self.specs:
            if policy.split is not None and policy.split[0] > len(spec.units):
                raise EnvironmentProblem(
                    f"policy.split.cores is {policy.split[0]}, {spec.id} has {len(spec.units)}"
                )
        _check_alike(self.specs)
        self.monitor = Monitor()
        self.planner = Planner(Tuning(**msgspec.structs.asdict(policy)))
        dispatcher = Dispatcher(self.specs, DispatcherState(most_jobs=config.limits.jobs))
        self.journal = self._make_journal(stack, dispatcher)
        effects = self.effects = Effects(self.fleet, self._clock, self._plan_soon)
        self.core = effects.core = Core(
            dispatcher, self.fleet, self.monitor, self.journal, effects, self._clock
        )
        self.models = effects.models = Models(
            Repository(Path(config.models).absolute()),
            config.services,
            config.limits.arena,
            self._state_dir / "workers",
            effects,
        )
        self.models.pins = Pins(self._state_dir / "pins.json")
        self.requests = effects.requests = Requests(
            self.models,
            self.monitor,
            dispatcher,
            self.core.feed,
            self._clock,
            config.limits.unread,
        )
        tenants = effects.jobs = JobTenants(self.fleet, self.core.feed, self._plan_soon)
        self.jobs_supervisor = tenants.supervisor = JobSupervisor(
            JobStore(self._state_dir / "jobs.sqlite"), self._state_dir, tenants
        )
        self.reserved = Reservations(self)
        tenants.giving = JobGiving(self.fleet, self.core.feed, self.jobs_supervisor.talk.ask_memory)

    def _make_journal(
        self, stack: contextlib.AsyncExitStack, dispatcher: Dispatcher
    ) -> Journal | None:
        if not self.config.journal.enabled:
            return None

        def header() -> Header:
            return checkpoint(dispatcher, self.planner, self._clock(), time.time())

        settings = self.config.journal
        journal = Journal(self._state_dir / "journal", header, settings.segment, settings.keep)
        journal.open()
        stack.callback(journal.close)
        return journal

    async def _load_declared(self, name: str) -> None:
        try:
            await self.models.load(name)
        except CotenantError as error:
            log.error("model not loaded", extra={"service": name, "why": str(error)})

    def _submit_declared(self) -> None:
        ended = ("succeeded", "failed", "cancelled")  # a reservation's name is somebody else's
        alive = {s.name for s in self.jobs() if s.command and s.state not in ended}
        for job in self.config.jobs:
            if job.name not in alive:
                env = {**minimal(os.environ), **job.env}
                self.submit_job(msgspec.structs.replace(job, env=env))

    async def _drain(self) -> None:
        """Admit nothing more and answer what was accepted."""
        self.requests.draining = True
        self.core.feed(e.Draining())
        end = time.monotonic() + DRAIN_S
        while len(self.requests) and time.monotonic() < end:
            await asyncio.sleep(0.01)

    async def _stop_tasks(self) -> None:
        if self._replan is not None:
            self._replan.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- what happens by itself -------------------------------------------------------------

    def _every(self, seconds: float, work: Any) -> None:
        async def repeat() -> None:
            while True:
                await asyncio.sleep(seconds)
                try:
                    await work()
                except Exception:
                    log.exception("background work failed", extra={"work": work.__name__})

        self._tasks.append(asyncio.create_task(repeat()))

    async def _tick(self) -> None:
        now = self._clock()
        self.monitor.tick(now)
        for instances in self.models.services.values():
            instances.end_overdue(now)
        self._plan()

    async def _refresh(self) -> None:
        self.fleet.look()
        self.effects.jobs.look()

    def _plan_soon(self) -> None:
        if self._replan is None:
            self._replan = asyncio.get_running_loop().call_soon(self._plan)

    def _plan(self) -> None:
        self._replan = None
        if self.requests.draining:
            return
        snapshot = self.snapshot()
        plan = self.planner.plan(snapshot)
        if self.journal is not None:
            self.journal.append_plan(snapshot.now, snapshot, plan)
        if plan is not None:
            self.planned_at = time.monotonic()
            log.info("plan", extra={"version": plan.version, "reasons": list(plan.reasons)})
            self.core.feed(e.Planned(plan))

    def snapshot(self) -> Snapshot:
        """What the planner may know now."""
        statuses = {s.id: s for s in self._job_statuses()}
        self.monitor.forget_jobs(statuses)
        return self.monitor.snapshot(
            self._clock(),
            self.specs,
            self.core.dispatcher.state,
            {name: instances.spec for name, instances in self.models.services.items()},
            {job: status.rate for job, status in statuses.items()},
            {t: n for spec in self.specs for t, n in self.fleet.memory(spec.id).items()},
        )

    # --- inference --------------------------------------------------------------------------

    def most_elements(self, name: str, version: str = "") -> int | None:
        """See NodePort."""
        return self.requests.most_elements(name, version)

    def submit(self, call: InferCall, done: OnOutcome) -> Withdraw | Refused:
        """See NodePort."""
        return self.requests.accept(call, done)

    # --- models -----------------------------------------------------------------------------

    def is_ready(self) -> bool:
        """See NodePort."""
        return not self.requests.draining and all(self.model_ready(n) for n in self.models.declared)

    def model_ready(self, name: str, version: str = "") -> bool:
        """See NodePort."""
        found = self.models.services.get(name)
        if found is None or name in self.models.leaving or self.requests.draining:
            return False
        if version:
            return version in found.loaded
        return found.live > 0 or (found.spec.unloads and bool(found.loaded))

    def metadata(self, name: str, version: str = "") -> ModelMeta:
        """See NodePort."""
        return self.models.metadata(name, version)

    async def language(self, name: str, version: str = "") -> Language:
        """See NodePort."""
        return await self.models.language(name, version)

    def index(self) -> list[IndexEntry]:
        """See NodePort."""
        return self.models.index()

    async def load(self, name: str) -> None:
        """See NodePort."""
        await self.models.load_newest(name)

    async def rollback(self, name: str) -> str:
        """See NodePort."""
        return await self.models.rollback(name)

    async def unload(self, name: str) -> None:
        """See NodePort."""
        await self.effects.unload(name)

    def statistics(self, name: str, version: str = "") -> dict[str, Any]:
        """See NodePort."""
        loaded = self.models.version(name, version)
        meter = self.monitor.service(name)
        return {
            "version": loaded.files.version,
            "last_inference_ms": self._wall_ms(meter.last_answer) if meter.last_answer else 0,
            "inference_count": meter.batched_rows,
            "execution_count": meter.batches,
            "success_count": meter.answered,
            "success_ns": meter.latency_ns,
            "fail_count": sum(meter.refused.values()),
            "fail_ns": 0,
            "queue_count": meter.answered,
            "queue_ns": meter.queue_ns,
            "compute_input_ns": 0,
            "compute_infer_ns": meter.exec_ns,
            "compute_output_ns": 0,
        }

    def _wall_ms(self, monotonic_ns: int) -> int:
        return round((time.time_ns() - (self._clock() - monotonic_ns)) / MS)

    # --- jobs -------------------------------------------------------------------------------

    def submit_job(self, spec: JobSpec) -> str:
        """See NodePort."""
        kinds = tuple(dict.fromkeys(d.kind for d in self.specs if d.trains))
        closed = {d.kind: "; ".join(d.limits) for d in self.specs if d.kind not in kinds}
        why = shares.problem(spec, kinds, closed)
        if why:
            raise InvalidRequest(f"job {spec.name or spec.command[0]}: {why}")
        return self.jobs_supervisor.submit(spec)

    def jobs(self) -> list[JobStatus]:
        """See NodePort."""
        return self._job_statuses()

    def _job_statuses(self) -> list[JobStatus]:
        return [self._placed(status) for status in self.jobs_supervisor.statuses()]

    def _placed(self, status: JobStatus) -> JobStatus:
        """A job with what the dispatcher knows of it."""
        state = self.core.dispatcher.state
        share, tenant = state.jobs.get(status.id), state.tenants.get(status.id)
        waits = f"waits: {tenant.waits}" if tenant is not None and tenant.waits else ""
        if tenant is not None and tenant.most >= 0:
            waits = f"others need memory: it is to have {format_bytes(tenant.most)}"
        return msgspec.structs.replace(
            status,
            held_s=self.monitor.held_ns(status.id, self._clock()) / S,
            pauses=self.monitor.job(status.id).pauses,
            partitions=tuple(share.held) if share is not None else (),
            devices=tenant.devices if tenant is not None else (),
            reason=status.reason or waits,
        )

    def cancel_job(self, ref: str) -> str:
        """See NodePort."""
        return self.jobs_supervisor.cancel(ref)

    def hold_job(self, ref: str) -> str:
        """See NodePort."""
        return self.jobs_supervisor.hold(ref)

    def resume_job(self, ref: str) -> str:
        """See NodePort."""
        return self.jobs_supervisor.resume(ref)

    def job_log_path(self, ref: str) -> str:
        """See NodePort."""
        return self.jobs_supervisor.log_path(ref)

    async def checkpoint_job(self, ref: str, within_s: float) -> str:
        """See NodePort."""
        return await self.jobs_supervisor.checkpoint(ref, within_s)

    # --- reservations -----------------------------------------------------------------------

    def reserve(self, reservation: Reservation, dry_run: bool) -> Answer:
        """See NodePort."""
        return self.reserved.reserve(reservation, dry_run)

    def release(self, id: str) -> None:
        """See NodePort."""
        self.reserved.release(id)

    def adopt(self, id: str, pid: int) -> None:
        """See NodePort."""
        self.reserved.adopt(id, pid)

    def reservations(self) -> list[ReservationStatus]:
        """See NodePort."""
        return self.reserved.all()

    # --- views ------------------------------------------------------------------------------

    def metrics(self) -> bytes:
        """See NodePort."""
        dispatcher = self.core.dispatcher
        memory = metrics.Memory(
            {spec.id: self.fleet.memory(spec.id) for spec in self.specs},
            {spec.id: dispatcher.budgets.lines(spec.id) for spec in self.specs},
            self.requests.results.counts(),
        )
        jobs, loads = self._job_statuses(), self.planner.loads
        return metrics.exposition(self.monitor, dispatcher.state, jobs, memory, loads)

    def status(self) -> dict[str, Any]:
        """See NodePort."""
        return node_status(self)

    def timeline(self) -> list[Held]:
        """See NodePort."""
        ahead = time.time() - self._clock() / S
        return [Held(ahead + s.end / S, s.window / S, s.held) for s in self.monitor.past]

    def plan(self, dry_run: bool) -> dict[str, Any]:
        """See NodePort."""
        return plan_view(self, dry_run)


def _check_alike(specs: Sequence[DeviceSpec]) -> None:
    """Raise EnvironmentProblem for devices of one kind that are not of one sort: the kind says how
    fast a model executes on so many units."""
    for spec in specs:
        other = next(s for s in specs if s.kind == spec.kind)
        if bool(other.mig) != bool(spec.mig):
            divided, whole = (spec, other) if spec.mig else (other, spec)
            raise EnvironmentProblem(
                f"{divided.id} is divided (MIG is on) and {whole.id} is not; give a node devices "
                f"of one sort: switch MIG off on the one (nvidia-smi -mig 0) or on on the other "
                "(-mig 1), or run a node for each"
            )
