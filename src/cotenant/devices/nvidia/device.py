"""An NVIDIA GPU as a device.

How it shares the GPU, and why so:

* Models and jobs are processes of their own, to which the GPU is shown by its UUID.
* A job is taken off by its launch gate (docs/gate.md), which its processes bring along as a
  preloaded library. What is in flight is bounded and drains; the node sees that without the job's
  help. A job that computes past its gate is of level ``NONE``, and kept apart from services.
* The level is what was seen here: ``open`` tries the gate on this GPU with a process of its own
  (``selftest``), and, if that is asked for, whether a kernel can be stopped in its middle: level
  ``PAUSE``. Where the gate fails, or the shim was not built, the device serves and trains, but
  nothing can be taken back: level ``NONE``.
* A GPU that is not divided is one unit. Kernels of different processes are mixed by the driver as
  it likes, so that there is no space to promise to one of them. With MIG on, its memory slices are
  the units and its instances the partitions (``migspace``), each process sees one of them, and the
  gate works within it. It is tried on the first instance that there is.
* With ``subsets`` its units are groups of multiprocessors (``subsetspace``). No job could be kept
  to them, so the device takes none and needs no gate.
* The host side of jobs runs at a lower weight, so that it does not delay models.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from cotenant.devices import proctree
from cotenant.devices.nvidia.gates import Gates
from cotenant.devices.nvidia.migspace import MigSpace
from cotenant.devices.nvidia.nvml import Nvml, NvmlGpu
from cotenant.devices.nvidia.selftest import NoGate, gates_for, run, run_channels
from cotenant.devices.nvidia.space import VISIBLE, Space, WholeGpu
from cotenant.devices.nvidia.subsetspace import SubsetSpace
from cotenant.domain.costs import Eviction, drain
from cotenant.domain.device import (
    DeviceSpec,
    Launch,
    LayoutStep,
    Partition,
    PreemptLevel,
    Tenant,
    TenantFacts,
    TenantKind,
)
from cotenant.domain.device_config import SERVES_ONLY, CudaConfig
from cotenant.domain.errors import DeviceError, EnvironmentProblem
from cotenant.domain.reservation import Adopted
from cotenant.domain.units import format_bytes

log = logging.getLogger("cotenant.devices")

JOB_NICE = 10


@dataclass
class _Tenant:
    pid: int
    is_job: bool
    pids: list[int] = field(default_factory=list)
    level: PreemptLevel = PreemptLevel.NONE
    granted: set[str] = field(default_factory=set)
    adopted: dict[int, int] = field(default_factory=dict)
    """Processes from elsewhere, and when they started (ticks)."""


class CudaDevice:
    """The GPU that ``config.gpu`` names, by number or UUID. ``state``: the node's directory, for
    what is to be known of the GPU by the next node."""

    blocking = True

    def __init__(self, config: CudaConfig, state: Path) -> None:
        self._config = config
        self._state = state
        self._nvml = Nvml()
        self._space: Space | None = None
        self._gates: Gates | None = None
        self._tried = False
        """Whether the gate was seen to work."""
        self._stopped_ns = 0
        """How long it took to take a kernel off in its middle; 0: that was not seen."""
        self._memory = 0
        self._uuid = self._model = ""
        self._limits: list[str] = []
        self._tenants: dict[str, _Tenant] = {}
        self._used: dict[int, int] = {}
        """Bytes of the GPU by process, as of the last look."""

    # --- life -------------------------------------------------------------------------------

    def open(self) -> None:
        """Raises EnvironmentProblem where the GPU is not there, or may not be used as it is."""
        self._nvml.open()
        try:
            self._find()
            self._open_gates()
        except BaseException:
            self._space = None
            self._nvml.close()
            raise

    def _find(self) -> None:
        gpu = _find(self._nvml, self._config)
        total, _, reserved = gpu.memory()
        usable = total - (reserved or 0)
        if self._config.memory > usable:
            raise EnvironmentProblem(
                f"device {self._config.id}: memory {format_bytes(self._config.memory)} is more "
                f"than the GPU has, {format_bytes(usable)}"
            )
        self._memory = self._config.memory or usable
        self._uuid, self._model = gpu.uuid(), gpu.name()
        self._space = self._space_of(gpu)
        self._space.open()

    def _space_of(self, gpu: NvmlGpu) -> Space:
        mig, id = gpu.mig(), self._config.id
        divided = mig is not None and mig.on
        if divided and self._config.subsets:
            raise EnvironmentProblem(
                f"device {id}: MIG is on, so the GPU is divided already; leave subsets out, or as "
                f"root switch MIG off: nvidia-smi -i {gpu.index} -mig 0"
            )
        if divided:
            return MigSpace(gpu, id, self._state / f"mig-{self._uuid}.json")
        if self._config.subsets:
            return SubsetSpace(gpu, id, self._nvml.driver())
        return WholeGpu(gpu, id)

    def _open_gates(self) -> None:
        """Gates, unless they were seen not to work here."""
        self._limits, self._gates = [], None
        self._tried, self._stopped_ns = False, 0
        if not self._room.takes_jobs:
            return
        if self._config.preempt is PreemptLevel.NONE:
            self._limits.append("jobs are not taken off: switched off (preempt: none)")
            return
        node = f"{self._state.absolute()}:{self._config.id}"
        try:
            self._gates = gates_for(node, self._config.bound)
        except NoGate as error:
            self._limits.append(f"jobs are not taken off: {error}")
            return
        self._try()

    def _try(self) -> None:
        """Try the gate, once there is something to try it on."""
        gates, shown = self._gates, self._room.trial()
        if gates is None or self._tried or not shown:
            return
        try:
            run(gates, shown)
            self._try_channels(gates, shown)
        except BaseException as error:
            gates.close()
            self._gates = None
            if not isinstance(error, DeviceError):
                raise
            self._limits.append(f"jobs are not taken off: {error}")
        else:
            self._tried = True

    def _try_channels(self, gates: Gates, shown: str) -> None:
        if self._config.preempt < PreemptLevel.PAUSE:
            return
        try:
            self._stopped_ns = run_channels(gates, shown)
        except NoGate as error:
            self._limits.append(f"kernels of jobs run to their end: {error}")

    def close(self) -> None:
        """Jobs that still run do so freely."""
        if self._gates is not None:
            self._gates.close()
            self._gates = None
        if self._space is not None:
            self._space.close()
            self._space = None
        self._tenants.clear()
        self._used.clear()
        self._nvml.close()

    @property
    def _room(self) -> Space:
        assert self._space is not None
        return self._space

    @property
    def spec(self) -> DeviceSpec:
        gated = self._gates is not None
        limits = list(self._limits)
        if gated and not self._tried:
            limits.append("jobs: how they yield is tried on the first MIG instance, not yet seen")
        return self._room.fit(
            DeviceSpec(
                id=self._config.id,
                kind=CudaConfig.kind,
                units=(),
                memory=self._memory,
                shapes=(),
                preempt=self._level,
                revoke_ns=self._stopped_ns or (drain(self._config.bound).most if gated else 0),
                repartition_ns=0,
                limits=tuple(limits),
                evicts=gated,
                eviction=self._gates.eviction if self._gates is not None else Eviction(),
                kv=self._config.kv,
                hardware=self._uuid,
                model=self._model,
            )
        )

    @property
    def _level(self) -> PreemptLevel:
        if self._gates is None:
            return PreemptLevel.NONE
        return PreemptLevel.PAUSE if self._stopped_ns else PreemptLevel.GATE

    def repartition(self, partitions: tuple[Partition, ...]) -> None:
        """And try the gate, on the first instance that there is."""
        self._room.repartition(partitions)
        self._try()

    def preview(self, partitions: tuple[Partition, ...]) -> tuple[LayoutStep, ...]:
        return self._room.preview(partitions)

    # --- tenants ----------------------------------------------------------------------------

    def launch(self, tenant: Tenant, partition: Partition | None) -> Launch:
        """The GPU, or its instance, by its UUID; for a job its page, with the gate closed."""
        gpu = self._room.shown(tenant.id, partition)
        shown = {VISIBLE: gpu}
        if tenant.kind is TenantKind.WORKER:
            return Launch(fixed={**shown, **self._room.worker(gpu)})
        self._check_takes_jobs(tenant.id)
        if self._gates is None:
            return Launch(fixed=shown, own_memory=True)
        found = self._gates.launch(tenant.id, tenant.memory)
        fixed = {**shown, **found.fixed}
        return Launch(fixed=fixed, prepend=found.prepend, own_memory=True, mounts=found.mounts)

    def _check_takes_jobs(self, job: str) -> None:
        if not self._room.takes_jobs:
            raise DeviceError(f"{job}: {self._config.id}: {SERVES_ONLY}")

    def attach(self, tenant: Tenant, pid: int) -> PreemptLevel:
        """A job without a page, since a node before this one had none, is of level ``NONE``."""
        is_job = tenant.kind is TenantKind.JOB
        if is_job:
            self._check_takes_jobs(tenant.id)
        found = _Tenant(pid, is_job, [] if is_job else [pid], self._level)
        if is_job:
            found.level = PreemptLevel.NONE
            if self._gates is not None and self._gates.take_over(tenant.id):
                stops = self._gates.stops(tenant.id)
                found.level = PreemptLevel.PAUSE if stops else PreemptLevel.GATE
        self._tenants[tenant.id] = found
        return found.level

    def adopt(self, job: str, process: Adopted) -> None:
        """Its page it has by its environment; the next look sees what it occupies."""
        self._job(job).adopted[process.pid] = process.start

    def detach(self, tenant: str) -> None:
        found = self._tenants.pop(tenant, None)
        self._room.forget(tenant)
        if found is not None and found.is_job and self._gates is not None:
            self._gates.forget(tenant)

    def grant(self, job: str, partition: Partition) -> None:
        found = self._job(job)
        self._room.check(job, partition)
        if self._gates is not None and found.level > PreemptLevel.NONE:
            self._gates.grant(job)
        found.granted.add(partition.id)

    def revoke(self, job: str, partition: Partition) -> int:
        found = self._job(job)
        if partition.id not in found.granted:
            return 0
        if self._gates is None or found.level is PreemptLevel.NONE:
            raise DeviceError(f"{job}: it has no gate, and nothing else takes it off this GPU")
        took = self._gates.revoke(job)
        found.granted.discard(partition.id)
        return took

    def bind(self, worker: str, partition: Partition) -> None:
        if worker not in self._tenants:
            raise DeviceError(f"{worker}: not attached to {self._config.id}")
        self._room.check(worker, partition)

    def _job(self, job: str) -> _Tenant:
        found = self._tenants.get(job)
        if found is None or not found.is_job:
            raise DeviceError(f"{job}: not attached to {self._config.id}")
        return found

    # --- looking ----------------------------------------------------------------------------

    def refresh(self) -> None:
        """Raises NvmlError where the driver does not answer; what was seen before stands. Raises
        DeviceError, after all that is to be done, where something is wrong with the GPU's space."""
        shown = self._room.processes()
        self._used = {process.pid: process.memory or 0 for process in shown}
        jobs = {name: t for name, t in list(self._tenants.items()) if t.is_job}
        table = proctree.scan() if jobs else {}
        for tenant in jobs.values():
            tenant.pids = proctree.family(tenant.pid, tenant.adopted, table)
            for tid in proctree.threads(tenant.pids):
                with contextlib.suppress(OSError):
                    if os.getpriority(os.PRIO_PROCESS, tid) < JOB_NICE:
                        os.setpriority(os.PRIO_PROCESS, tid, JOB_NICE)
        if self._gates is not None:
            self._gates.look({name: self._used.keys() & set(t.pids) for name, t in jobs.items()})
        if trouble := self._room.trouble():
            raise DeviceError(trouble)

    def facts(self) -> dict[str, TenantFacts]:
        """Memory as the driver says it; of a job behind its gate what it has allocated, which is
        what its quota counts."""
        found = {}
        for name, tenant in list(self._tenants.items()):
            memory = sum(self._used.get(pid, 0) for pid in tenant.pids)
            if tenant.is_job and self._gates is not None:
                memory = self._gates.memory(name) or memory
            past = self._gates is None or self._gates.beyond(name)
            level = PreemptLevel.NONE if past else tenant.level
            away = self._gates.away(name) if tenant.is_job and self._gates is not None else 0
            found[name] = TenantFacts(memory, level, self._evictable(name, tenant), away)
        return found

    def _evictable(self, name: str, tenant: _Tenant) -> int:
        if self._gates is None or not tenant.is_job or tenant.level is PreemptLevel.NONE:
            return 0
        return self._gates.evictable(name)

    def evict(self, job: str, size: int) -> None:
        if self._evictable(job, self._job(job)):
            assert self._gates is not None
            moved = self._gates.evict(job, size)
            log.info("memory taken from a job", extra={"job": job, "bytes": moved, "asked": size})


def _find(nvml: Nvml, config: CudaConfig) -> NvmlGpu:
    """Raises EnvironmentProblem, which says what there is."""
    gpus = [nvml.gpu(index) for index in range(nvml.count())]
    names = {gpu.index: gpu.uuid() for gpu in gpus}
    for gpu in gpus:
        if config.gpu in (str(gpu.index), names[gpu.index]):
            return gpu
    known = ", ".join(f"{index} ({uuid})" for index, uuid in names.items()) or "none"
    raise EnvironmentProblem(
        f"device {config.id}: there is no GPU {config.gpu}; the driver shows: {known}"
    )
