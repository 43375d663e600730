"""The job supervisor: queued jobs become processes, and what becomes of them is recorded.

Its laws:

1. A step is in the store before its effect is in the world: no run starts unless its id has
   been written. So a daemon that comes after a crash knows of every run there can be.
2. A job has at most one run at a time. A run is over when its shim is dead (its lock is free)
   and nothing of its tree is left; only then is the next one started.
3. For each job come in turn ``on_job_queued`` (it wants to run), perhaps ``on_job_ready``, and
   ``on_job_exited``. It is ``start``ed in between, or not: when is not decided here.
4. ``close`` leaves no process: running jobs are stopped and go back to the queue, where the
   next daemon takes them up. A daemon that is killed leaves them running, and the next one
   adopts them; so does every daemon with reservations, whose processes are not its own to end.

Longer than most files here: recovery, holding, stopping and ending meet in the same few states,
and are easier to check next to each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import msgspec

from cotenant.devices import proctree
from cotenant.domain.device import Launch
from cotenant.domain.errors import (
    Conflict,
    DeviceError,
    EnvironmentProblem,
    InvalidRequest,
)
from cotenant.domain.port import JobStatus
from cotenant.domain.reservation import Adopted
from cotenant.domain.units import S
from cotenant.domain.workload import JOB_ENDED, JOB_TRANSITIONS, JobSpec, JobState
from cotenant.runtime.jobadopting import JobAdopting, living
from cotenant.runtime.jobledger import JobLedger
from cotenant.runtime.joblive import LiveJob, status_of
from cotenant.runtime.jobrun import RUN_MARKER, JobRun, Outcome, lock_directory
from cotenant.runtime.jobspec import CHECKPOINT, checked, environment
from cotenant.runtime.jobstore import JobRecord, JobStore
from cotenant.runtime.jobtalk import JobTalk
from cotenant.runtime.jobverdict import RestartRules, verdict

log = logging.getLogger("cotenant.jobs")
log.addHandler(logging.NullHandler())

FORCE_AFTER_S = 10.0
"""Added to a job's grace before a shim that does not answer is killed itself."""
SAVE_PROGRESS_EVERY_S = 10.0


class JobOptions(msgspec.Struct, frozen=True):
    """What rarely needs changing. Seconds and counts."""

    rules: RestartRules = RestartRules()
    sample_every_s: float = 1.0
    """How often CPU time is looked at, holds are renewed and unsaved steps are retried."""
    store_retry_s: float = 5.0
    """Wait after the store could not be written before a start is tried again."""
    keep_ended: int = 200
    """Ended jobs kept with their logs; older ones are forgotten."""


class JobShell(Protocol):
    """What the jobs need of the node. ``on_job_ready`` and ``on_job_exited`` do not block."""

    def on_job_queued(self, spec: JobSpec) -> None:
        """The job wants to run; ``start`` it once there is room for it."""

    async def launch_job(self, spec: JobSpec) -> Launch:
        """What its devices want before its command is executed; raises DeviceError."""

    def on_job_ready(self, spec: JobSpec, pid: int) -> None:
        """The job's processes exist (or exist again for us: adopted, or released from a hold),
        below process ``pid``, and run unconfined."""

    def on_job_listens(self, job: str) -> None:
        """One of its programs can be asked for memory."""

    def on_job_adopts(self, job: str, process: Adopted) -> None:
        """A process from elsewhere belongs to it from now on."""

    def on_job_exited(self, job: str) -> None:
        """They are gone, or the job is held and must lose its partitions, or wants to run no
        more."""


class JobSupervisor:
    """See the module's text. All methods are called on the loop that ``open`` ran on.

    Thread use: one pool for /proc, starting and files, so that the loop does not wait for them.
    """

    def __init__(
        self,
        store: JobStore,
        directory: Path,
        shell: JobShell,
        options: JobOptions | None = None,
    ) -> None:
        self._store = store
        self._directory = Path(directory).absolute()
        self._shell = shell
        self._options = options or JobOptions()
        self._ledger = JobLedger(store)
        self._live: dict[str, LiveJob] = {}
        self._asked: set[str] = set()
        """Jobs of which the shell knows that they want to run, or do."""
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.talk = JobTalk(self._directory, self._ledger, self._live, shell.on_job_listens)
        """What programs of jobs say, and are asked."""
        self.adopting = JobAdopting(self._ledger, self._live, shell.on_job_adopts)
        """Reservations, and processes that belong to them."""
        self._stack = contextlib.AsyncExitStack()
        self._open = False
        self._saved_at = 0.0

    # -- life cycle

    async def open(self) -> None:
        """Take up what an earlier daemon left, then start queued jobs.

        Opens the store. Runs that live are adopted, ended ones recorded, lost ones cleaned up
        and restarted by policy. Callbacks may come before this returns. Raises
        ``EnvironmentProblem`` if the directory is in use, not writable or its path too long.
        """
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(os.close, await lock_directory(self._directory))
            self._store.open()
            stack.callback(self._store.close)
            self.talk.open()
            stack.callback(self.talk.close)
            self._pool = ThreadPoolExecutor(4, "cotenant-jobs")
            stack.callback(self._pool.shutdown, wait=False)
            # One thread of its own: the last order to freeze or continue is the one that counts.
            self._freezer = ThreadPoolExecutor(1, "cotenant-holds")
            stack.callback(self._freezer.shutdown, wait=False)
            self._ledger.load()
            self._open = True
            stack.push_async_callback(self._stop_all)
            await asyncio.gather(*map(self._recover, list(self._ledger.records.values())))
            sampler = asyncio.create_task(self._sample_forever())
            stack.push_async_callback(_cancelled, sampler)
            self._schedule()
            self._prune()
            self._stack = stack.pop_all()

    async def close(self) -> None:
        """Stop all jobs, each within its grace, and put them back into the queue.

        Jobs that are being cancelled become CANCELLED; held ones stay held. Closes the store.
        """
        await self._stack.aclose()

    @property
    def stops_within_s(self) -> float:
        """Seconds that ``close`` may take: the longest grace of the jobs that run, and what is
        added for those that do not end in theirs."""
        graces = [self._ledger.records[id].spec.grace / S for id in self._live]
        return max(graces, default=0.0) + 2 * FORCE_AFTER_S

    async def _stop_all(self) -> None:
        self._open = False
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        within = self.stops_within_s
        # What is being frozen at this moment could not hear the SIGTERM: let that end first.
        await asyncio.get_running_loop().run_in_executor(self._freezer, lambda: None)
        for id, live in list(self._live.items()):
            if self._ledger.records[id].spec.reservation is None:
                live.run.stop()
            elif live.task is not None:
                live.task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within - FORCE_AFTER_S)
        for live in self._live.values():
            live.run.force()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=FORCE_AFTER_S)
        self._ledger.flush()

    # -- what front ends ask for

    def submit(self, spec: JobSpec) -> str:
        """Queue a job and return its id; it is on the disk by then.

        An empty id is filled in, an empty name becomes the program's; a relative ``cwd`` is
        taken from the daemon's own; ``after`` may have what ``resolve`` takes. The same again, id
        and all, changes nothing. Raises ``InvalidRequest`` for a spec that cannot be run,
        ``Conflict`` for another under an id that is taken, ``NotFound`` for a job that it is to
        come after, ``TooLarge`` if command and environment are too big, ``EnvironmentProblem``.
        """
        self._require_open()
        spec = checked(spec, self._ledger.records)
        if (there := self._ledger.records.get(spec.id)) is not None:
            after = tuple(self._ledger.resolve(ref, before=spec.id) for ref in spec.after)
            if msgspec.structs.replace(spec, after=after) != there.spec:
                raise Conflict(f"another job has the id {spec.id}; choose another, or leave it out")
            return spec.id
        spec = msgspec.structs.replace(spec, after=tuple(map(self._followed, spec.after)))
        self._ledger.add(spec, time.time())
        log.info("job submitted", extra={"job": spec.id, "job_name": spec.name})
        self._schedule()
        return spec.id

    def cancel(self, ref: str, reason: str = "cancelled") -> str:
        """End a job for good, within its grace; returns its id. No effect on an ended one."""
        self._require_open()
        id = self.resolve(ref)
        record = self._ledger.records[id]
        if record.state in (JobState.QUEUED, JobState.BACKOFF):
            self._drop_timer(id)
            self._ledger.step(id, JobState.CANCELLED, reason=reason, finished=time.time())
            self._tell_exited(id)
            self._schedule()  # those that were to come after it
        elif id in self._live and record.state is not JobState.STOPPING:
            self._end(id, reason)
        return id

    def _end(self, id: str, reason: str, overdue: bool = False) -> None:
        """Stop a run for good."""
        held = self._ledger.records[id].state is JobState.HELD
        self._ledger.step(id, JobState.STOPPING, reason=reason, overdue=overdue)
        if held:  # not while it is being frozen
            self._background(self._apply_hold(id, self._live[id]))
        else:
            self._stop(id)

    def hold(self, ref: str) -> str:
        """Keep a job from running until it is released; returns its id.

        A running job becomes HELD: its tree is stopped and ``on_job_exited`` is called. One that
        waits goes on waiting. A hold survives the daemon. Raises ``InvalidRequest`` if the job
        has ended or is being stopped.
        """
        self._require_open()
        id = self.resolve(ref)
        record = self._ledger.records[id]
        if record.ended or record.state is JobState.STOPPING:
            raise InvalidRequest(f"job {id} is {record.state.value}; only a live job can be held")
        if record.spec.reservation is not None:
            raise InvalidRequest(f"job {id} is a reservation: its space is promised to others")
        if record.state is JobState.RUNNING:
            self._ledger.step(id, JobState.HELD, held=True)
            self._background(self._apply_hold(id, self._live[id]))
            self._tell_exited(id)
        elif not record.held:
            self._ledger.step(id, record.state, held=True)
            if record.state is JobState.QUEUED:
                self._tell_exited(id)
        return id

    def resume(self, ref: str) -> str:
        """Undo ``hold``; returns the id. A running job goes on once it is started again."""
        self._require_open()
        id = self.resolve(ref)
        record = self._ledger.records[id]
        if record.state is JobState.HELD:
            self._ledger.step(id, JobState.RUNNING, held=False)
            self._ask(id)
        elif record.held:
            self._ledger.step(id, record.state, held=False)
            self._schedule()
        return id

    async def checkpoint(self, ref: str, within_s: float) -> str:
        """Ask a running job's programs for a checkpoint; the path of the next that is reported.
        Raises ``NotFound``, ``InvalidRequest`` if it cannot be asked, ``NotReady`` if none came."""
        self._require_open()
        return await self.talk.checkpoint(self.resolve(ref), within_s)

    def statuses(self) -> list[JobStatus]:
        """All jobs, oldest first. ``partitions``, ``pauses`` and ``held_s`` are the node's to
        fill in. Progress is what the job reports, else the CPU seconds of its tree."""
        return [status_of(r, self._live.get(id)) for id, r in self._ledger.records.items()]

    def resolve(self, ref: str) -> str:
        """The id that an id, a name (its newest job) or a unique prefix of an id means; raises
        ``NotFound`` with near matches."""
        return self._ledger.resolve(ref)

    def log_path(self, ref: str) -> str:
        """Path of the job's log (older output is in the same name with ``.1``); raises
        ``NotFound``. The file does not exist before the first output."""
        return str(self._job_directory(self.resolve(ref)) / "log")

    # -- what the shell orders

    def start(self, id: str) -> None:
        """Start a job that wants to run, or let one go on that runs already. One that wants to no
        more is left alone."""
        record, live = self._ledger.records.get(id), self._live.get(id)
        if record is None or not self._open or id not in self._asked:
            return
        if record.state is JobState.QUEUED and id not in self._timers:
            self._launch(id)
        elif record.state is JobState.RUNNING and live is not None:
            self._background(self._apply_hold(id, live))

    def stop(self, id: str, reason: str, kill: bool = False, again: bool = False) -> None:
        """Stop a running job, at once if ``kill``; it has failed, or goes back to the queue to run
        ``again``."""
        live = self._live.get(id)
        if live is None or not self._open:
            return
        if kill:
            live.run.force()
        elif again:
            live.again = True
            self._stop(id)
        else:
            self.cancel(id, reason)

    # -- one run

    def _schedule(self) -> None:
        """Let the shell know of jobs that want to run, oldest first."""
        for id, found in list(self._ledger.records.items()):
            record = self._follow(id) if found.waits_for else found
            if record.state is not JobState.QUEUED or record.held or record.waits_for:
                continue
            if id not in self._timers:
                self._ask(id)

    def _followed(self, ref: str) -> str:
        """The id of a job that another is to come after."""
        id = self.resolve(ref)
        record = self._ledger.records[id]
        if record.ended and record.state is not JobState.SUCCEEDED:
            raise InvalidRequest(
                f"job {id} has {record.state.value}: what comes after it would never start"
            )
        return id

    def _follow(self, id: str) -> JobRecord:
        """See whether what a job waits for has succeeded, or never will. Who comes after a job is
        younger than it: one look at all jobs, oldest first, is enough."""
        record = self._ledger.records[id]
        if record.state is not JobState.QUEUED:
            return record
        states = {i: r.state for i in record.waits_for if (r := self._ledger.records.get(i))}
        met = [i for i, state in states.items() if state is JobState.SUCCEEDED]
        if met:
            record = self._ledger.step(id, record.state, met=(*record.met, *met))
        for other in record.waits_for:
            state = states.get(other, JobState.CANCELLED)  # not there: forgotten, long ago
            if state in JOB_ENDED:
                reason = f"job {other}, which it was to come after, did not succeed"
                return self._ledger.step(
                    id, JobState.CANCELLED, reason=reason, finished=time.time()
                )
        return record

    def _ask(self, id: str) -> None:
        if self._open and id not in self._asked:
            self._asked.add(id)
            self._shell.on_job_queued(self._ledger.records[id].spec)

    def _launch(self, id: str) -> None:
        run = secrets.token_hex(8)
        self._ledger.step(
            id,
            JobState.STARTING,
            run=run,
            started=time.time(),
            finished=0.0,
            exit_code=None,
            reason="",
        )
        if not self._ledger.saved:  # law 1: what is not written must not be started
            self._ledger.step(id, JobState.QUEUED, reason="waits: the job store cannot be written")
            self._retry_after(id, self._options.store_retry_s)
            self._tell_exited(id)
            return
        live = self._live[id] = LiveJob(JobRun(self._job_directory(id), run, self._pool))
        live.task = self._background(self._see_through(id, live, adopted=False))

    async def _recover(self, record: JobRecord) -> None:
        """Take up one job where the last daemon left it."""
        id = record.spec.id
        if record.state is JobState.BACKOFF:
            delay = self._options.rules.delay_s(record.streak)
            self._retry_after(id, min(delay, max(0.0, record.finished + delay - time.time())))
        elif not record.ended and record.state is not JobState.QUEUED:
            run = JobRun(self._job_directory(id), record.run, self._pool)
            live = self._live[id] = LiveJob(run)
            if run.shim_lives():
                live.task = self._background(self._see_through(id, live, adopted=True))
                await live.settled.wait()
            else:
                await self._finish(id, live, await run.outcome(), recovering=True)

    async def _see_through(self, id: str, live: LiveJob, adopted: bool) -> None:
        """One run from its start (or adoption) to its recorded end."""
        spec = self._ledger.records[id].spec
        try:
            if adopted:
                pid = await live.run.adopt()
                if self._ledger.records[id].state is JobState.STOPPING:
                    self._stop(id)
            else:
                launch = await self._shell.launch_job(spec)
                if spec.reservation is not None:
                    self._ledger.step(id, self._ledger.records[id].state, launch=launch)
                env = environment(spec, launch)
                env["COTENANT_JOB_ID"], env[RUN_MARKER] = id, live.run.run
                env["COTENANT_REPORT_SOCKET"] = str(self.talk.path)
                if checkpoint := self._ledger.records[id].checkpoint:
                    env[CHECKPOINT] = checkpoint
                pid = await live.run.start(spec, env, launch)
            if pid:
                self._on_running(id, live, pid)
            live.settled.set()
            await live.run.gone()
            outcome = await live.run.outcome()
        except OSError as error:
            log.warning("job not started: %s", error, extra={"job": id})
            outcome = await live.run.outcome()
            if not outcome.begun:
                outcome = Outcome(failed="spawn", errno=error.errno or 0, begun=False)
        except DeviceError as error:
            log.warning("job not started: %s", error, extra={"job": id})
            outcome = Outcome(failed="spawn", detail=str(error), begun=False)
        except asyncio.CancelledError:  # the next daemon is to look after it
            self._live.pop(id, None)
            self._tell_exited(id)
            live.run.release()
            raise
        finally:
            live.settled.set()
        await self._finish(id, live, outcome, recovering=adopted)

    def _on_running(self, id: str, live: LiveJob, pid: int) -> None:
        record = self._ledger.records[id]
        live.run.take_in(living(record.adopted))
        if record.spec.reservation is not None:
            self.talk.open_for(id)
        pids = {"pid": pid, "shim_pid": live.run.shim_pid}
        if record.state is JobState.STARTING:
            record = self._ledger.step(id, JobState.RUNNING, **pids)
            if record.held:
                record = self._ledger.step(id, JobState.HELD)
                self._tell_exited(id)
        elif (record.pid, record.shim_pid) != (pid, live.run.shim_pid):
            record = self._ledger.step(id, record.state, **pids)
        if record.state is JobState.HELD:
            self._background(self._apply_hold(id, live))
        elif record.state is JobState.RUNNING and id in self._asked:
            self._tell_ready(id, live)
        elif record.state is JobState.RUNNING:  # adopted: it stands still until it is started
            self._background(self._hold_back(id, live))

    async def _finish(self, id: str, live: LiveJob, outcome: Outcome, recovering: bool) -> None:
        """Record the end of a run and what follows from it."""
        self.talk.drain(id)  # it may have said that it saved its work, and gone
        if live.force is not None:
            live.force.cancel()
        for waiting in live.awaited:
            waiting.cancel()
        self._live.pop(id, None)
        self._tell_exited(id)
        record = self._ledger.records[id]
        to, reason, streak = verdict(
            record,
            outcome,
            closing=not self._open or live.again,
            recovering=recovering,
            rules=self._options.rules,
        )
        if live.again and to is JobState.QUEUED:
            reason = ""
        if to not in JOB_TRANSITIONS[record.state]:
            self._ledger.step(id, JobState.RUNNING)  # it ended before we saw it run
        self._ledger.step(
            id,
            to,
            pid=0,
            shim_pid=0,
            exit_code=outcome.code,
            reason=reason,
            restarts=record.restarts + (to is JobState.BACKOFF),
            streak=streak,
            finished=outcome.ended or time.time(),
            cpu_s=record.cpu_s + (outcome.cpu_s or live.cpu_s),
            ran_s=record.ran_s + outcome.ran_s,
            **live.progress_fields(),
            **live.checkpoint_fields(),
        )
        if outcome.left or outcome.log_dropped:
            extra = {"job": id, "left": outcome.left, "log_dropped": outcome.log_dropped}
            log.warning("job left processes behind or lost log output", extra=extra)
        if not self._ledger.saved:
            live.run.release()  # its directory is all that the next daemon would know
        else:
            await live.run.discard()
        if to is JobState.BACKOFF:
            self._retry_after(id, self._options.rules.delay_s(streak))
        if to in JOB_ENDED:
            self.talk.remove(id)
        self._schedule()  # before: what comes after it is to see how it ended
        self._prune()

    def _retry_after(self, id: str, delay_s: float) -> None:
        if not self._open:
            return

        def retry() -> None:
            self._timers.pop(id, None)
            if self._ledger.records[id].state is JobState.BACKOFF:
                self._ledger.step(id, JobState.QUEUED)
            self._schedule()

        self._timers[id] = asyncio.get_running_loop().call_later(delay_s, retry)

    def _drop_timer(self, id: str) -> None:
        if timer := self._timers.pop(id, None):
            timer.cancel()

    def _stop(self, id: str) -> None:
        self._live[id].stop(self._ledger.records[id].spec.grace / S + FORCE_AFTER_S)

    async def _apply_hold(self, id: str, live: LiveJob) -> None:
        """Freeze, continue or stop a job, whichever its state asks for when its turn comes."""

        def apply() -> None:
            state = self._ledger.records[id].state
            if state is JobState.HELD and self._open:
                live.run.freeze()
            elif state is JobState.RUNNING:
                live.run.thaw()

        await asyncio.get_running_loop().run_in_executor(self._freezer, apply)
        if self._live.get(id) is not live:
            return
        state = self._ledger.records[id].state
        if state is JobState.STOPPING:
            self._stop(id)
        elif state is JobState.RUNNING and not live.told:
            self._tell_ready(id, live)

    async def _hold_back(self, id: str, live: LiveJob) -> None:
        await asyncio.get_running_loop().run_in_executor(self._freezer, live.run.freeze)
        if self._live.get(id) is live and self._ledger.records[id].state is JobState.RUNNING:
            self._ask(id)

    def _tell_ready(self, id: str, live: LiveJob) -> None:
        if not self._open:
            return
        live.told = True
        try:
            self._shell.on_job_ready(self._ledger.records[id].spec, live.run.shim_pid)
        except Exception:
            log.exception("on_job_ready failed", extra={"job": id})

    def _tell_exited(self, id: str) -> None:
        if id in self._live:
            self._live[id].told = False
        if id in self._asked:
            self._asked.discard(id)
            try:
                self._shell.on_job_exited(id)
            except Exception:
                log.exception("on_job_exited failed", extra={"job": id})

    # -- looking after what runs

    def apart(self, id: str) -> tuple[str, ...]:
        """Devices on which a job was seen not to yield, perhaps by an earlier daemon."""
        return self._ledger.records[id].apart

    def note_apart(self, id: str, device: str) -> None:
        """Remember that of a job."""
        record = self._ledger.records[id]
        if device not in record.apart:
            self._ledger.step(id, record.state, apart=(*record.apart, device))

    async def _sample_forever(self) -> None:
        while True:
            await asyncio.sleep(self._options.sample_every_s)
            try:
                await self._sample()
            except Exception:
                log.exception("sampling jobs failed")

    async def _sample(self) -> None:
        self._ledger.flush()
        looked = [(id, live) for id, live in self._live.items() if live.run.shim_pid]
        if not looked:
            return

        def look() -> list[float]:
            table = proctree.scan()
            return [
                proctree.cpu_seconds(live.run.shim_pid, live.run.adopted, table)
                for _, live in looked
            ]

        used = await asyncio.get_running_loop().run_in_executor(self._pool, look)
        now = time.monotonic()
        save = now - self._saved_at >= SAVE_PROGRESS_EVERY_S
        for (id, live), seconds in zip(looked, used, strict=True):
            if self._live.get(id) is not live:
                continue
            live.note_cpu(seconds)
            self.talk.save_checkpoint(id, live)
            state = self._ledger.records[id].state
            if state is JobState.HELD:  # again: somebody may have continued it
                self._background(self._apply_hold(id, live))
            if save:
                self._ledger.step(id, state, **live.progress_fields())
            self._end_overdue(id)
        if save:
            self._saved_at = now

    def _end_overdue(self, id: str) -> None:
        record = self._ledger.records[id]
        limit_s = record.spec.time_limit / S
        if not limit_s or record.state not in (JobState.RUNNING, JobState.HELD):
            return
        if record.ran_s + time.time() - record.started >= limit_s:
            self._end(id, f"it ran for as long as it may (time_limit {limit_s:g}s)", overdue=True)

    def _prune(self) -> None:
        for id in self._ledger.prune(self._options.keep_ended):
            self._pool.submit(shutil.rmtree, self._job_directory(id), ignore_errors=True)

    def _job_directory(self, id: str) -> Path:
        return self._directory / "jobs" / id

    def _require_open(self) -> None:
        if not self._open:
            raise EnvironmentProblem(
                "Cotenant takes no orders for jobs: it is starting or stopping"
            )

    def _background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("job task failed", exc_info=error)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
