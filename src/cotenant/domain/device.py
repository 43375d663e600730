"""What a device is to the policy: a set of compute units, memory, and levels of capability."""

from __future__ import annotations

import enum
from collections.abc import Mapping

import msgspec

from cotenant.domain.costs import Eviction


class PreemptLevel(enum.IntEnum):
    """How work of a job on a device can be made to yield, weakest first."""

    NONE = 0
    """Runs to completion."""
    GATE = 1
    """Submission stops; what is in flight drains (bounded)."""
    PAUSE = 2
    """Stopped in the middle, state kept."""
    PRIORITY = 3
    """The hardware or kernel puts urgent work first by itself: an urgent batch may start
    before the job's revocation is acknowledged."""


class TenantKind(enum.Enum):
    """What occupies space on a device."""

    WORKER = "worker"
    """A model instance: one process, which executes what the dispatcher sends it."""
    JOB = "job"
    """A tree of processes that computes as it likes, on what it is granted."""


class Tenant(msgspec.Struct, frozen=True):
    """Whatever occupies space on a device, before there is a process of it and while there is.

    ``memory`` in bytes (0: not known), ``threads`` compute units it may use at once (0: all of its
    partition), ``exec_timeout`` ns that one execution may take (0: any time).
    """

    id: str
    kind: TenantKind
    memory: int = 0
    threads: int = 0
    exec_timeout: int = 0


REST_EVERY = "COTENANT_REST_EVERY_NS"
"""Environment variable of a model instance, for ``Launch``: without a break longer than so many ns
it sleeps for a moment between two batches."""

PROCESSOR = "COTENANT_PROCESSOR"
"""Environment variable of a model instance, for ``Launch``: what it executes on. ``cpu`` (also if
it is not set), or ``cuda:`` and a GPU: its UUID, or its ordinal among those that the process sees.
With ``cuda-subsets:`` before the GPU the units of partitions are its groups of multiprocessors, as
``cotenant.engines.cuda.subsets`` numbers them; otherwise an execution has all of it. NPUs are as
``cotenant.domain.npu`` writes them."""
CPU = "cpu"
CUDA = "cuda:"
CUDA_SUBSETS = "cuda-subsets:"


class Launch(msgspec.Struct, frozen=True):
    """What a device wants of a tenant's process before it is executed.

    ``env``: variables, where a job's owner did not set them. ``fixed``: variables that are as the
    device says, whoever set them. ``prepend``: what comes first in variables that are lists of
    paths (joined by ":"), before what the owner has there. ``limits`` (``RLIMIT_x``: soft, hard);
    a hard limit that is lower already stays. ``cgroup``: the directory of the control group that a
    job is to be in; "" if it is the same to the device. ``own_memory``: what a job may have is
    memory of the device, which is not counted as its processes'; on the host it has no limit.
    ``mounts``: paths of this host that the variables speak of, for a process that sees another
    file system."""

    env: dict[str, str] = {}
    limits: dict[int, tuple[int, int]] = {}
    cgroup: str = ""
    fixed: dict[str, str] = {}
    prepend: dict[str, str] = {}
    own_memory: bool = False
    mounts: tuple[str, ...] = ()

    def applied(self, owned: Mapping[str, str]) -> dict[str, str]:
        """The whole environment of a process whose owner wants these variables."""
        found = {**self.env, **owned, **self.fixed}
        for name, first in self.prepend.items():
            then = found.get(name, "")
            found[name] = f"{first}:{then}" if then else first
        return found


class TenantFacts(msgspec.Struct, frozen=True):
    """What was seen of a tenant: resident ``memory`` on the device in bytes; the ``level`` at which
    it can be made to yield, None if that is what it was when it was attached; how much of a job's
    memory the device could take back now, None if that is all of it wherever it takes any; and how
    much it has taken, which the job has to have back to go on (``away``)."""

    memory: int = 0
    level: PreemptLevel | None = None
    evictable: int | None = None
    away: int = 0


class Partition(msgspec.Struct, frozen=True):
    """A piece of a device's space; the only thing that work runs on.

    ``units`` are the device's own unit numbers (cores, SM groups, MIG memory slices), so two
    partitions of one device overlap exactly when their units intersect. ``slices`` is set where
    compute is counted otherwise: a MIG instance of four memory slices may have three compute
    slices. ``memory`` in bytes, 0 where it is not divided.
    """

    id: str
    device: str
    units: tuple[int, ...]
    memory: int = 0
    slices: int = 0

    @property
    def compute(self) -> int:
        """Number of compute units."""
        return self.slices or len(self.units)


class DeviceSpec(msgspec.Struct, frozen=True):
    """A device as the planner sees it.

    ``shapes`` lists partition sizes (in compute units) that the device can form;
    ``revoke_ns`` is a first guess at the cost of taking a partition back from a job, replaced
    by measurements; ``repartition_ns`` likewise for a change of layout. Devices of one ``kind``
    execute a model equally fast. Memory in bytes, 0 where it is no constraint.
    """

    id: str
    kind: str
    units: tuple[int, ...]
    memory: int
    shapes: tuple[int, ...]
    preempt: PreemptLevel
    revoke_ns: int
    repartition_ns: int
    limits: tuple[str, ...] = ()
    """What this device does without on this machine, in words (shown by ``cotenant status``)."""
    mig: str = ""
    """Which MIG table (``cotenant.domain.mig.table``) says what partitions it can form: ``units``
    are its memory slices, and ``shapes`` only how much compute a partition may have. Empty: any
    units together."""
    slices: int = 0
    """Compute units, where they are counted otherwise than ``units``."""
    trains: bool = True
    """Whether jobs can run on it."""
    pins_jobs: bool = False
    """Whether a running job is bound to its partition: it can be paused there, but to move it
    is to start it again."""
    pins_workers: bool = False
    """Whether a model instance is bound to the partition that it was loaded in."""
    move_ns: int = 0
    """What that costs a job."""
    operators: tuple[str, ...] = ()
    """What a model may be made of to run here; empty: anything."""
    evicts: bool = False
    """Whether it can take memory back from a running job, and (``eviction``) what that costs: a
    first guess, or as it was seen to."""
    eviction: Eviction = Eviction()
    kv: int = 0
    """Bytes that the pools of keys and values of language models may have here together, lent among
    them; 0: each may have its limit."""
    hardware: str = ""
    """What it is in the machine, where that can be named (a GPU's UUID): no two devices are one."""
    model: str = ""
    """What sort of device it is: its maker's name, and how it is divided. What is emulated says so.
    Times that were measured on one device hold for others of its kind and model."""

    @property
    def compute(self) -> int:
        """Number of compute units."""
        return self.slices or len(self.units)


def even_sizes(units: int) -> tuple[int, ...]:
    """Sizes of parts when so many units are divided as equally as can be: in one part, in two, and
    so on. ``shapes`` of a device that is divided so."""
    parts = range(1, units + 1)
    return tuple(sorted({size for n in parts for size in (units // n, -(-units // n))}))


class LayoutStep(msgspec.Struct, frozen=True):
    """A step of a change of layout, in words, and the ns that it is expected to take: as such steps
    took on this machine (``measured``), or as it is assumed."""

    what: str
    ns: int
    measured: bool
