"""Everything the dispatcher remembers, as plain data: one tree that can be encoded.

A checkpoint of this tree at the head of each journal segment lets a replay start anywhere.
Behaviour lives in the modules that decide: ``queues``, ``admission``, ``lending``,
``dispatcher``. The classes are dataclasses because mypyc makes those native: compiled, reading
a field is a load from memory.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from cotenant.domain.device import PreemptLevel
from cotenant.domain.plan import EMPTY_PLAN, Plan
from cotenant.domain.request import Batch, Request
from cotenant.domain.workload import ORIGINAL, PRIORITY_CLASSES, Share, Variant
from cotenant.policy.estimate import Costs, Median, Quantile
from cotenant.policy.iterations import IterationCosts
from cotenant.policy.memory.account import Account
from cotenant.policy.tail import WHOLE


class Hold(enum.IntEnum):
    """How a job stands to a partition; ``HOLD_TRANSITIONS`` holds every legal step."""

    NONE = 0
    GRANTING = 1
    HELD = 2
    CLOSING = 3
    STOPPING = 4


HOLD_TRANSITIONS: dict[Hold, dict[str, Hold]] = {
    Hold.NONE: {"Grant": Hold.GRANTING},
    Hold.GRANTING: {
        "Granted": Hold.HELD,
        "Revoke": Hold.CLOSING,
        "Stop": Hold.STOPPING,
        "JobExited": Hold.NONE,
        "ActionFailed(Grant)": Hold.NONE,
    },
    Hold.HELD: {"Revoke": Hold.CLOSING, "Stop": Hold.STOPPING, "JobExited": Hold.NONE},
    Hold.CLOSING: {
        "Revoked": Hold.NONE,
        "Stop": Hold.STOPPING,
        "JobExited": Hold.NONE,
        "ActionFailed(Grant)": Hold.NONE,
    },
    Hold.STOPPING: {"Revoked": Hold.NONE, "JobExited": Hold.NONE},
}
"""State → what happens → state; whatever is not listed is ignored as late news. A revocation that
fails, or is not answered in time, stops the job."""


class Phase(enum.IntEnum):
    """Life of a job as the dispatcher sees it; ``PHASE_TRANSITIONS`` holds every legal step."""

    QUEUED = 0
    STARTING = 1
    RUNNING = 2
    STOPPING = 3


PHASE_TRANSITIONS: dict[Phase, dict[str, Phase]] = {
    Phase.QUEUED: {"Start": Phase.STARTING},
    Phase.STARTING: {"JobReady": Phase.RUNNING, "Stop": Phase.STOPPING},
    Phase.RUNNING: {"Stop": Phase.STOPPING},
    Phase.STOPPING: {},
}
"""As ``HOLD_TRANSITIONS``. From any phase ``JobExited`` ends it."""


@dataclass
class Lane:
    """Requests of one service that may share a batch, as a heap of (key, arrival, id).

    All its requests are of one class of ``size`` (see ``estimate.size_class``). Entries of requests
    that were cancelled or expired stay until they surface."""

    version: str
    size: int = 0
    worker: str = ""
    """The worker that has these requests between two turns; any of the version if empty."""
    heap: list[tuple[int, int, int]] = field(default_factory=list)
    live: int = 0
    rows: list[int] = field(default_factory=lambda: [0] * PRIORITY_CLASSES)
    """What is queued, by priority class."""


@dataclass
class ServiceState:
    """One service: its bounds, queue, idle instances and what was learned of it."""

    name: str
    objective: int
    max_batch: int
    max_queue: int
    preferred: tuple[int, ...]
    max_queue_delay: int
    strict: bool
    missable: int
    """Ppm of its answers that may be late."""
    caution: int
    """By how many mean deviations (thousandths) its executions are taken longer."""
    tail: Quantile
    """The latency that lending watches (see ``cotenant.policy.tail``)."""
    back: Median
    """Time (ns) from the end of an execution until the dispatcher knows."""
    exec: dict[str, Costs] = field(default_factory=dict)
    """What executions cost, by kind of device: of the variant that serves there."""
    serving: dict[str, str] = field(default_factory=dict)
    """That variant, where it is not the original."""
    foretold: dict[str, None] = field(default_factory=dict)
    """Kinds of device where that was measured by others, and no instance was loaded since."""
    aside: dict[str, dict[str, Costs]] = field(default_factory=dict)
    """What executions of others cost, by kind of device and variant."""
    variants: dict[str, dict[str, tuple[Variant, ...]]] = field(default_factory=dict)
    """Of each version, by kind of device: those that may take the place of the original."""
    chosen: dict[str, str] = field(default_factory=dict)
    """Which is to serve, by kind of device, where that is not the original."""
    ready: dict[str, str] = field(default_factory=dict)
    """Which is to be loaded beside it, by kind of device, to take over at once."""
    spoilt: dict[int, dict[str, dict[str, str]]] = field(default_factory=dict)
    """Those that could not be loaded, by revision and kind of device, and why."""
    home: str = ""
    """The kind of device that the service is planned on first: it measures its queue."""
    instances: int = 1
    keep: int = 1
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes that an instance occupies, by kind of device, as declared."""
    occupies: dict[str, int] = field(default_factory=dict)
    """And as measured."""
    unloads: bool = False
    """Whether its instances may be unloaded while they idle."""
    asleep: dict[int, dict[str, None]] = field(default_factory=dict)
    """Sites where they are, by revision: others needed the memory."""
    load_ns: int = 0
    """How long an instance took to load, last."""
    silence: int = 0
    """Mean length (ns) of times without requests, and mean deviation; 0: there was none."""
    silence_dev: int = 0
    looked_at: int = 0
    """When (ns) it is looked at next whether somebody waits in vain; not, if that is over."""
    version: str = ""
    """The version that requests go to which name none."""
    versions: dict[str, int] = field(default_factory=dict)
    """Versions that serve, oldest first, and the revision of each."""
    offer: str = ""
    """The version that is being brought up, if any, and its revision."""
    offer_revision: int = 0
    wanted: list[str] = field(default_factory=list)
    """The devices that are to carry it."""
    places: dict[str, list[str]] = field(default_factory=dict)
    """And the partitions of those that bind instances to one."""
    unfit: dict[int, dict[str, str]] = field(default_factory=dict)
    """Sites that could not load a revision, and why."""
    failures: int = 0
    """How often in a row an instance failed."""
    retry_at: int = 0
    """When (ns) the next try may be."""
    lanes: dict[str, Lane] = field(default_factory=dict)
    queued: int = 0
    rows: list[int] = field(default_factory=lambda: [0] * PRIORITY_CLASSES)
    """What is queued, by priority class."""
    partitions: list[str] = field(default_factory=list)
    idle: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """Idle workers by site and version."""
    workers: int = 0
    at: dict[str, int] = field(default_factory=dict)
    """Those workers by site."""
    last_arrival: int = 0
    gap: int = 0
    """Mean time between arrivals (ns, exponentially weighted)."""
    last_start: int = 0
    """When a batch was last dispatched."""
    margin: int = 0
    """By how much longer (ppm) admission has learned to take a predicted wait."""
    turns: bool = False
    """Whether its requests live through several turns."""
    pace: int = 0
    """Of such an answer each further piece is due so much later (ns); 0: as the first."""
    kv: int = 0
    """Bytes guaranteed to each instance for keys and values."""
    turn_costs: dict[str, IterationCosts] = field(default_factory=dict)
    """What turns cost, by kind and compute of the partition."""
    spoken: int = WHOLE
    """How much (ppm) of what they may say answers are expected to say."""
    spoken_mean: int = WHOLE
    spoken_dev: int = 0


@dataclass
class WorkerState:
    """One model instance; ``partition`` is where it last ran, ``place`` the only one where it can
    ("": anywhere on its device)."""

    id: str
    service: str
    version: str
    device: str
    revision: int = 0
    variant: str = ORIGINAL
    memory: int = 0
    """Bytes that it occupies there."""
    room: int = 0
    """So many tokens of sequences it can hold now; 0: any number."""
    most_room: int = 0
    """At most."""
    reach: int = 0
    """And so many if others lent what they do not want."""
    pool: int = 0
    """The bytes that they take at most, and (``pool_now``) may take now."""
    pool_now: int = 0
    block: int = 1
    """What its pool is made of, in bytes."""
    held: int = 0
    """What it said last of them (``events.Held``)."""
    wanted: int = 0
    evictable: int = 0
    cold: int = 0
    least: int = 0
    up: bool = False
    pending: bool = False
    """Whether it waits for memory and is not loaded yet, and (``coming``) others are to give it,
    which takes them ``waits_ns``."""
    coming: bool = False
    waits_ns: int = 0
    since: int = 0
    """When it was ordered or, if that is later, when it came up (ns)."""
    batch: int = 0
    partition: str = ""
    place: str = ""
    retiring: bool = False
    standby: bool = False
    """Whether it is given nothing as yet: it is of a variant that may be chosen."""
    stalled: bool = False
    """Whether its pool is too small for anything that it has; until it tells of a change."""
    told: bool = False
    """Whether it has told of one since its last turn."""

    @property
    def rests(self) -> bool:
        """Whether it is given nothing new."""
        return self.retiring or self.standby

    @property
    def site(self) -> str:
        """Where it can run: one partition, or any of a device."""
        return self.place or self.device


def enter_pool(service: ServiceState, worker: WorkerState) -> None:
    """A worker may be given a batch from now on."""
    versions = service.idle.setdefault(worker.site, {})
    versions.setdefault(worker.version, []).append(worker.id)


def leave_pool(service: ServiceState, worker: WorkerState) -> None:
    """A worker is to be given no more batches."""
    service.workers -= 1
    service.at[worker.site] -= 1
    versions = service.idle.get(worker.site, {})
    idle = versions.get(worker.version, [])
    if worker.id in idle:
        idle.remove(worker.id)
    if not idle:
        versions.pop(worker.version, None)


@dataclass
class Running:
    """A batch that a worker has: under way, or at hand (``after`` is the batch before it).
    ``started``: when it was dispatched or, if that is later, when the batch before it was done."""

    batch: Batch
    requests: list[Request]
    worker: str
    partition: str
    started: int
    expected_end: int
    preempting: bool
    after: int = 0
    size: int = 0
    """Class of size of its requests."""
    turns: int = 1
    """How many its lease has."""
    recalled: bool = False


@dataclass
class Resident:
    """A request between its first turn and its last: the worker that has it, whether its client
    has had a piece of the answer, of how many tokens (``said``), and when the first was due."""

    worker: str
    due: int = 0
    emitted: bool = False
    said: int = 0
    withdrawn: bool = False
    """Whether the client went away during its turn."""


@dataclass
class PartitionState:
    """One partition: who may use it, who holds it, and what lending it was seen to cost."""

    id: str
    device: str
    kind: str
    units: tuple[int, ...]
    compute: int
    slice_ns: int
    services: list[str] = field(default_factory=list)
    owners: list[str] = field(default_factory=list)
    lendable: bool = False
    batch: int = 0
    at_hand: int = 0
    """The batch that the worker of ``batch`` has already and goes on with."""
    job: str = ""
    hold: Hold = Hold.NONE
    held_since: int = 0
    slice_end: int = 0
    wake: int = 0
    retiring: bool = False
    waiting: dict[str, None] = field(default_factory=dict)
    """Services with requests queued that may run here, in order of becoming so."""
    hot: int = 0
    """Worst headroom seen in the present adjustment window: permille of the objective."""
    adjust_at: int = 0
    revoke_by: int = 0
    """When (ns) the job must have left a partition that is being taken back."""
    watched: bool = False
    """Whether that time is looked at."""
    revoke_cost: int = 0
    binds: bool = False
    """Whether model instances are bound to it, or to any other of its device."""

    @property
    def site(self) -> str:
        """Where an instance must be that is to run here."""
        return self.id if self.binds else self.device


@dataclass
class Tenant:
    """A job from when it wants to run until it is gone."""

    id: str
    weight: float
    guaranteed: Share
    limit: Share
    kinds: tuple[str, ...]
    memory: int
    """Bytes that it may have at most; 0: not said."""
    kept: int
    """And is guaranteed, if it can be made to give the rest."""
    grace: int
    phase: Phase = Phase.QUEUED
    kind: str = ""
    """The kind of device that it runs on, or would if it was started now."""
    devices: tuple[str, ...] = ()
    place: str = ""
    """The partition that it was started in, where its device binds it to one."""
    waits: str = ""
    """Why it is not started."""
    gives: bool = False
    """Whether it can be asked for memory, or was seen to be made to give it."""
    apart: tuple[str, ...] = ()
    """Devices on which it does not yield: it shares no space with services there."""
    most: int = -1
    """Bytes that it was told to have at most; -1: as many as it may."""
    stop_by: int = 0
    """When (ns) it must be gone, else it is killed; 0: it is not being stopped, or was killed."""
    device: str = ""
    """The one device that it may be on, where it stands for a reservation."""
    own: int = 0
    """Units of that which are its own."""


@dataclass
class JobShare:
    """One running job's account of the compute of its kind of device, in unit-nanoseconds."""

    id: str
    kind: str
    weight: int
    """Weight in thousandths."""
    guaranteed: int
    """Guaranteed share in millionths."""
    limit: int
    """Units that it may hold."""
    place: str = ""
    """The one partition that it can run in; any if empty."""
    levels: dict[str, PreemptLevel] = field(default_factory=dict)
    """How it can be made to yield, by device, where that is not what the device says."""
    apart: tuple[str, ...] = ()
    """See ``Tenant``."""
    device: str = ""
    """The one device that it may be on; any of its kind if empty."""
    own: int = 0
    """Units of that which are its own."""
    stopping: bool = False
    vtime: int = 0
    held: list[str] = field(default_factory=list)
    units: int = 0
    since: int = 0
    received: int = 0
    carried: int = 0
    """Debt carried over from earlier windows."""
    blocked_until: int = 0
    target: int = 0
    """What the plan says that it is to hold in all, in thousandths of a unit; 0: nothing said."""

    @property
    def pace(self) -> int:
        """By which its virtual time runs."""
        return self.target or self.weight


@dataclass
class Reserve:
    """Tokens (unit-ns) that admission may spend while a guaranteed share is owed."""

    tokens: int = 0
    refilled: int = 0


@dataclass
class Change:
    """A device on its way to the layout of a plan, which waits for partitions to fall idle."""

    plan: Plan
    begun: bool = False
    """Whether the partitions that change are being vacated."""
    moving: bool = False
    """Whether ``Repartition`` was ordered."""
    successor: Plan | None = None
    """A plan that came since."""


@dataclass
class DispatcherState:
    """The whole."""

    now: int = 0
    services: dict[str, ServiceState] = field(default_factory=dict)
    workers: dict[str, WorkerState] = field(default_factory=dict)
    partitions: dict[str, PartitionState] = field(default_factory=dict)
    tenants: dict[str, Tenant] = field(default_factory=dict)
    """Jobs that want to run, in the order in which they came."""
    jobs: dict[str, JobShare] = field(default_factory=dict)
    """Those that run."""
    queued: dict[int, Request] = field(default_factory=dict)
    unplaced: dict[str, None] = field(default_factory=dict)
    """Services that were sent requests of which more follow at once."""
    retried: dict[int, None] = field(default_factory=dict)
    """Accepted requests that lost a worker once."""
    running: dict[int, Running] = field(default_factory=dict)
    residents: dict[int, Resident] = field(default_factory=dict)
    """Requests that have had a turn and are not finished."""
    expiries: list[tuple[int, int]] = field(default_factory=list)
    timers: list[tuple[int, str]] = field(default_factory=list)
    armed: int = 0
    next_batch: int = 1
    next_worker: int = 1
    plan: Plan = EMPTY_PLAN
    """What is in force."""
    changes: dict[str, Change] = field(default_factory=dict)
    """Devices whose layout is about to change."""
    watches: list[tuple[int, str, str]] = field(default_factory=list)
    """When (ns) to look at what: whether a partition was left, a job is gone, an instance can be
    loaded again."""
    leaving: dict[str, None] = field(default_factory=dict)
    """Workers that are to go once they have nothing to do."""
    most_jobs: int = 0
    """How many jobs may run at once; 0: any number."""
    draining: bool = False
    accounts: dict[str, Account] = field(default_factory=dict)
    """Of the memory of devices, and of that for pools (``memory.books``)."""
    settled: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    """When (ns) its needs were weighed last, and for what."""
    first: dict[str, int] = field(default_factory=dict)
    """Pools that have what their first answer needs, and since when (ns)."""
    settling: dict[str, int] = field(default_factory=dict)
    """When (ns) they are to be weighed again."""
    moved: dict[str, tuple[int, int]] = field(default_factory=dict)
    """What was free and coming of a memory that pools share with others, when they were told."""
    caches: dict[str, int] = field(default_factory=dict)
    """Bytes that caches of results were told to have at most."""
    again: dict[str, int] = field(default_factory=dict)
    """When (ns) who waits for a device's memory asks again."""
    reserves: dict[str, Reserve] = field(default_factory=dict)
    """By kind of device."""


def unfit(service: ServiceState) -> dict[str, str]:
    """Sites that could not load what is offered or, if nothing is, what serves."""
    serves = service.versions.get(service.version, 0)
    revision = service.offer_revision if service.offer else serves
    return service.unfit.get(revision, {})


def coming(state: DispatcherState, service: ServiceState) -> set[str]:
    """Versions that requests may wait for: instances that were asleep are loaded again."""
    workers = (w for w in state.workers.values() if w.service == service.name and service.unloads)
    return {w.version for w in workers if not (w.up or w.rests)}


def served(state: DispatcherState, service: ServiceState) -> set[str]:
    """Versions that some instance takes requests for."""
    workers = (w for w in state.workers.values() if w.service == service.name)
    serving = (w for w in workers if w.up and not w.rests)
    return {w.version for w in serving if w.version in service.versions}
