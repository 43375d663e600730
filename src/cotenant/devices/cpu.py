"""The CPU as an accelerator: a partition is a set of cores.

How it takes space back from a job, and what was found to matter:

* A job's threads are moved by ``sched_setaffinity``, all of them, about 5 µs each. A thread
  inherits the mask of the one that makes it, so what is born between two looks at ``/proc`` is
  confined as its maker was.
* A job that loses its last core is stopped as a whole (SIGSTOP to every process, so that a
  gang does not spin at a barrier for a member that is gone) and continued when it gets one.
  Who watches a process may act on the news of its stop only after that, and stop itself
  (script, su), or go on without it (a shell with job control). So parents are stopped first
  and continued last, and for some looks after it what is found stopped is continued again;
  what a job stops later is its own affair.
* A job may set its own affinity (taskset, numactl, OMP_PROC_BIND). Within its cores that holds
  until they change; a thread found outside is brought back at the next look.
* A thread moved off a core does not come back by itself for some milliseconds: the kernel
  balances lazily. On a grant the busiest threads are therefore put on the new cores one by one
  (pinned there, then given the whole mask).
* What a request waits for on a busy core is the wake-up of its worker, not the taking back.
  Where the right to do so exists, workers and the node run at ``SCHED_FIFO`` and start at once;
  that is level ``PRIORITY``. Otherwise jobs run at a lower weight (nice) and the level is
  ``PAUSE``.
* Real-time priority is a loaded gun: the kernel's own budget (``RLIMIT_RTTIME``) ends a worker
  that computes without a pause for longer than its time-out, even when nobody else can run. With
  the next batch always at hand a worker never blocks, and would be ended for that: it is told
  (``REST_EVERY``) to sleep now and then, long enough to count.
* GNU OpenMP threads spin at a barrier for milliseconds by default. When a job's gang is squeezed
  onto fewer cores than it has threads, the spinners burn the very core that the thread they wait
  for needs. So jobs are launched with fewer turns of it: a few microseconds, then they sleep.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import NamedTuple

import msgspec

from cotenant.devices import proctree, reclaim
from cotenant.devices.footprint import Footprint
from cotenant.devices.reclaim import Reclaim
from cotenant.domain.costs import PAGING
from cotenant.domain.device import (
    REST_EVERY,
    DeviceSpec,
    Launch,
    LayoutStep,
    Partition,
    PreemptLevel,
    Tenant,
    TenantFacts,
    TenantKind,
)
from cotenant.domain.errors import DeviceError, EnvironmentProblem
from cotenant.domain.reservation import Adopted
from cotenant.domain.units import MS, US, S, format_bytes

NODE_PRIORITY = 10
WORKER_PRIORITY = 20
"""The node stays below its workers. Whoever reaps a process, or looks it up in ``/proc`` while it
ends, may spin in the kernel until that process's own threads have let go of its entries there; if
they wait for the core the node spins on, neither ever moves. The kernel moves a node that a
worker displaces to another core at once."""
NATIVE_NICE = -10
"""Niceness of the node's native threads beside its real-time ones."""
JOB_NICE = 10
"""Niceness of jobs where inference cannot have real-time priority."""
CONTINUE_LOOKS = 8
"""Looks after a job was continued at which what is found stopped is continued again."""
SPIN_COUNT = "1000"
"""Turns that an OpenMP thread of a job spins (``GOMP_SPINCOUNT``)."""
REST_EVERY_NS = 100 * MS
_FIFO = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
"""Threads made later start at ordinary priority; ``refresh`` raises those of workers."""


class _Thread(NamedTuple):
    tid: int
    ticks: int


class _Job(msgspec.Struct):
    root: int
    footprint: Footprint = msgspec.field(default_factory=Footprint)
    granted: dict[str, tuple[int, ...]] = {}
    adopted: dict[int, int] = {}
    """Processes that do not descend from the root, and when they started (ticks)."""
    pids: list[int] = []
    """Parents first."""
    watching: set[int] = set()
    """Those that may act on the news that a child of theirs was stopped."""
    threads: list[int] = []
    """Thread ids, those that used most CPU since the last look first."""
    ticks: dict[int, int] = {}
    stopped: bool = False
    late: set[int] = set()
    """Those that are still to be stopped: they were not reached in time."""
    relapsing: set[int] = set()
    """Those that were found to have stopped themselves after they were continued."""
    looks: int = 0
    """How many more looks continue what they find stopped."""

    @property
    def cores(self) -> set[int]:
        """Union of what is granted."""
        return {core for cores in self.granted.values() for core in cores}


class _Worker(msgspec.Struct):
    pid: int
    footprint: Footprint = msgspec.field(default_factory=Footprint)
    cores: set[int] = set()
    threads: list[int] = []


class CpuDevice:
    """Core sets of this machine.

    ``cores``: the cores to use (None: all this process may run on). ``realtime``: "auto" uses
    SCHED_FIFO where allowed, "never" does not, "require" raises EnvironmentProblem without.
    ``pin``: whether workers are bound to their partition's cores. ``memory``: bytes for tenants (0:
    all that the machine has), and those of them for pools of keys and values. ``reclaims``: whether
    to look for a way to take memory from jobs, which may make control groups.
    """

    blocking = False

    def __init__(
        self,
        device_id: str = "cpu",
        cores: tuple[int, ...] | None = None,
        realtime: str = "auto",
        pin: bool = True,
        memory: tuple[int, int] = (0, 0),
        reclaims: bool = True,
    ) -> None:
        self._id = device_id
        self._wanted = cores
        self._realtime_mode = realtime
        self._pin = pin
        self._memory, self._kv = memory
        self._reclaims = reclaims
        self._reclaim: Reclaim | None = None
        self._realtime = False
        self._cores: tuple[int, ...] = ()
        self._model = ""
        self._limits: list[str] = []
        self._jobs: dict[str, _Job] = {}
        self._workers: dict[str, _Worker] = {}
        self._raised: set[int] = set()
        """Our own threads that were made urgent."""
        self._lock = threading.Lock()
        """``refresh`` runs beside the loop; a mask is computed and set under this lock."""

    # --- life -------------------------------------------------------------------------------

    def open(self) -> None:
        """Raises EnvironmentProblem if the cores asked for are not there."""
        allowed = os.sched_getaffinity(0)
        wanted = set(self._wanted) if self._wanted is not None else allowed
        missing = wanted - allowed
        if missing or not wanted:
            raise EnvironmentProblem(
                f"device {self._id}: cores {sorted(missing)} are not in this process's affinity "
                f"mask {sorted(allowed)}; name only those, or start Cotenant with a wider mask"
            )
        if self._memory > physical_memory():
            raise EnvironmentProblem(
                f"device {self._id}: memory {format_bytes(self._memory)} is more than this machine "
                f"has, {format_bytes(physical_memory())}"
            )
        self._cores = tuple(sorted(wanted))
        self._model = model_name()
        self._limits = []
        self._realtime = self._realtime_mode != "never" and try_realtime()
        if self._realtime_mode == "require" and not self._realtime:
            raise EnvironmentProblem(
                f"device {self._id}: real-time priority is required but not allowed; grant "
                "CAP_SYS_NICE (or an rtprio limit of at least 20), or set realtime: auto"
            )
        self._reclaim, why = reclaim.find() if self._reclaims else (None, "")
        if why:
            self._limits.append(f"jobs give memory back only if they can be asked: {why}")
        if not self._pin:
            self._limits.append("workers are not pinned: partitions bind jobs only")
        if not self._realtime:
            why = "switched off" if self._realtime_mode == "never" else "not allowed here"
            self._limits.append(f"no real-time priority ({why}): waking on a busy core costs")
        if len(self._cores) == 1:
            self._limits.append("one core: jobs are stopped while a request runs")

    def close(self) -> None:
        """Let jobs that are still attached run freely; this process is as urgent as it was."""
        for name in list(self._jobs):
            self.detach(name)
        self._workers.clear()
        for tid in self._raised:
            with contextlib.suppress(OSError):
                os.sched_setscheduler(tid, os.SCHED_OTHER, os.sched_param(0))
        self._raised.clear()

    @property
    def _level(self) -> PreemptLevel:
        return PreemptLevel.PRIORITY if self._realtime else PreemptLevel.PAUSE

    @property
    def spec(self) -> DeviceSpec:
        return DeviceSpec(
            id=self._id,
            kind="cpu",
            units=self._cores,
            memory=self._memory or physical_memory(),
            shapes=tuple(range(1, len(self._cores) + 1)),
            preempt=self._level,
            revoke_ns=20 * US,
            repartition_ns=1 * MS,
            limits=tuple(self._limits),
            evicts=self._reclaim is not None,
            eviction=PAGING,
            kv=self._kv,
            model=self._model,
        )

    def repartition(self, partitions: tuple[Partition, ...]) -> None:
        taken: set[int] = set()
        for partition in partitions:
            units = set(partition.units)
            if not units or not units <= set(self._cores) - taken:
                raise DeviceError(f"{partition.id}: cores {sorted(units)} are taken or not ours")
            taken |= units

    # --- tenants ----------------------------------------------------------------------------

    def preview(self, partitions: tuple[Partition, ...]) -> tuple[LayoutStep, ...]:
        return ()

    def launch(self, tenant: Tenant, partition: Partition | None) -> Launch:
        if tenant.kind is TenantKind.JOB:
            place = self._reclaim.place(tenant.id) if self._reclaim is not None else ""
            return Launch(env={"GOMP_SPINCOUNT": SPIN_COUNT}, cgroup=place)
        timeout = tenant.exec_timeout
        if not self._realtime or not timeout:
            return Launch()
        return Launch(
            env={REST_EVERY: str(min(REST_EVERY_NS, timeout // 4))},
            limits={resource.RLIMIT_RTTIME: (timeout // US, (timeout + 2 * S) // US)},
        )

    def attach(self, tenant: Tenant, pid: int) -> PreemptLevel:
        if tenant.kind is TenantKind.JOB:
            self._attach_job(tenant.id, pid)
        else:
            found = self._workers[tenant.id] = _Worker(pid=pid)
            self._look_at_worker(found)
        return self._level

    def adopt(self, job: str, process: Adopted) -> None:
        found = self._find(job)
        found.adopted[process.pid] = process.start
        self._look_at_job(found, proctree.scan())

    def detach(self, tenant: str) -> None:
        self._workers.pop(tenant, None)
        found = self._jobs.pop(tenant, None)
        if found is not None:
            if self._reclaim is not None:
                self._reclaim.forget(tenant)
            with self._lock:
                found.granted = {"": self._cores}
                self._apply(found)

    def facts(self) -> dict[str, TenantFacts]:
        """Of workers the resident set, of jobs what their processes occupy together."""
        found = {n: w.footprint.look([w.pid]) for n, w in list(self._workers.items())}
        found |= {n: j.footprint.look(j.pids) for n, j in list(self._jobs.items())}
        return {name: TenantFacts(memory) for name, memory in found.items()}

    def evict(self, job: str, size: int) -> None:
        found = self._jobs.get(job)
        if found is not None and self._reclaim is not None:
            self._reclaim.take(job, found.pids, size)

    # --- jobs -------------------------------------------------------------------------------

    def _attach_job(self, job: str, pid: int) -> None:
        found = self._jobs[job] = _Job(root=pid, stopped=True)
        # So far it ran on any core; what it forks just after a single look would go on doing so.
        proctree.freeze(pid, found.adopted)
        self._look_at_job(found, proctree.scan())

    def grant(self, job: str, partition: Partition) -> None:
        found = self._find(job)
        with self._lock:
            found.granted[partition.id] = partition.units
            self._spread(found, partition.units)
            self._apply(found)

    def revoke(self, job: str, partition: Partition) -> int:
        started = time.monotonic_ns()
        found = self._find(job)
        with self._lock:
            found.granted.pop(partition.id, None)
            self._apply(found)
        return time.monotonic_ns() - started

    def _find(self, job: str) -> _Job:
        if job not in self._jobs:
            raise DeviceError(f"{job}: not attached to {self._id}")
        return self._jobs[job]

    def _apply(self, job: _Job) -> None:
        cores = job.cores
        if not cores:
            reached = proctree.stop(job.pids, job.watching)
            job.stopped, job.late = True, set(job.pids).difference(reached)
            if not self._realtime:
                proctree.await_stopped(reached)
            return
        for tid in job.threads:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(tid, cores)
        if job.stopped:
            proctree.send(reversed(job.pids), signal.SIGCONT)
            proctree.continue_again(job.relapsing)
            job.stopped, job.looks = False, CONTINUE_LOOKS

    def _spread(self, job: _Job, new: tuple[int, ...]) -> None:
        """Put one busy thread on each core that is new to the job; ``_apply`` widens after."""
        older = len(job.cores) - len(new)
        for index, core in enumerate(new):
            if older + index < len(job.threads):
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(job.threads[older + index], {core})

    def _look_at_job(self, job: _Job, table: dict[int, proctree.Stat]) -> None:
        """See what became of a job: newcomers and strays are brought into line."""
        pids = proctree.family(job.root, job.adopted, table)
        watching = proctree.watchers(pids, table)
        seen = [_Thread(tid, _thread_ticks(tid)) for tid in proctree.threads(pids)]
        confined = job.cores
        strays = [t.tid for t in seen if confined and not _affinity(t.tid) <= confined]
        halted = [pid for pid in pids if table[pid].state == b"T"]
        used = {t.tid: t.ticks - job.ticks.get(t.tid, 0) for t in seen}
        fresh = {t.tid for t in seen} - set(job.threads)
        job.threads = sorted(used, key=lambda tid: (-used[tid], tid))
        job.ticks = {t.tid: t.ticks for t in seen}
        with self._lock:
            known = set(job.pids) - job.late
            due = [pid for pid in pids if pid not in known]
            job.pids, job.watching = pids, watching
            if job.stopped:
                job.late = set(due).difference(proctree.stop(due, watching))
            elif job.looks:
                job.looks -= 1
                again = list(filter(proctree.is_stopped, reversed(halted)))
                proctree.send(again, signal.SIGCONT)
                job.relapsing = job.relapsing.intersection(pids).union(again)
            for tid in fresh.union(strays):
                self._tame(tid, job.cores)

    def _tame(self, tid: int, cores: set[int]) -> None:
        """Bring a thread into line that is new to us, or has left its cores."""
        with contextlib.suppress(OSError):
            if cores:
                os.sched_setaffinity(tid, cores)
            if not self._realtime and os.getpriority(os.PRIO_PROCESS, tid) < JOB_NICE:
                os.setpriority(os.PRIO_PROCESS, tid, JOB_NICE)

    # --- workers ----------------------------------------------------------------------------

    def bind(self, worker: str, partition: Partition) -> None:
        found = self._workers.get(worker)
        if found is None:
            raise DeviceError(f"{worker}: not attached to {self._id}")
        if self._pin:
            with self._lock:
                found.cores, found.threads = set(partition.units), []
            self._look_at_worker(found)

    def _look_at_worker(self, worker: _Worker) -> None:
        """Newcomers and strays are brought into line: what looks at the processor moves its thread
        from core to core, and in the end back to where that was before."""
        with self._lock:
            known = set(worker.threads)
            worker.threads = proctree.threads([worker.pid])
            for tid in worker.threads:
                fresh = tid not in known
                with contextlib.suppress(OSError):
                    if worker.cores and (fresh or not _affinity(tid) <= worker.cores):
                        os.sched_setaffinity(tid, worker.cores)
                    if self._realtime and fresh:
                        _make_realtime(tid, WORKER_PRIORITY)

    # --- the node itself --------------------------------------------------------------------

    def protect_self(self) -> None:
        """Raise this process's threads above all but the workers (not inherited by children).

        Python's threads all of them, since any may hold the interpreter's lock. Threads of
        native libraries only get a lower niceness: they are pools whose work can wait, and at
        real-time priority a whole pool may wake up for each piece of it.
        """
        if not self._realtime:
            return
        python = {thread.native_id for thread in threading.enumerate()}
        for tid in proctree.threads([os.getpid()]):
            with contextlib.suppress(OSError):
                if tid in python:
                    _make_realtime(tid, NODE_PRIORITY)
                    self._raised.add(tid)
                else:
                    os.setpriority(os.PRIO_PROCESS, tid, NATIVE_NICE)

    def refresh(self) -> None:
        table = proctree.scan() if self._jobs else {}
        for job in list(self._jobs.values()):
            self._look_at_job(job, table)
        for worker in list(self._workers.values()):
            self._look_at_worker(worker)
        self.protect_self()


def try_realtime() -> bool:
    """Whether real-time priority is allowed: this thread has it for a moment."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        _make_realtime(0, WORKER_PRIORITY)
    except OSError:
        return False
    os.sched_setscheduler(0, *before)
    return True


def model_name(proc: Path = Path("/proc")) -> str:
    """The processor's; "" where the kernel does not say (it does on x86)."""
    for line in (proc / "cpuinfo").read_text(errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return ""


def physical_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _make_realtime(tid: int, priority: int) -> None:
    os.sched_setscheduler(tid, _FIFO, os.sched_param(priority))


def _affinity(tid: int) -> set[int]:
    try:
        return os.sched_getaffinity(tid)
    except OSError:
        return set()


def _thread_ticks(tid: int) -> int:
    found = proctree.thread_stat(tid)
    return found.cpu_ticks if found is not None else 0
