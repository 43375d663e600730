"""What happens to a node. Data only; ``domain.protocol`` says which action each answers."""

from __future__ import annotations

import msgspec

from cotenant.domain.device import DeviceSpec, PreemptLevel
from cotenant.domain.plan import Plan
from cotenant.domain.request import Request
from cotenant.domain.units import S
from cotenant.domain.workload import JobSpec, ServiceSpec, Share, Variant


class _Event(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pass


class ServiceAdded(_Event, frozen=True):
    """A service may receive requests from now on, or its bounds change. Times in ns; ``percentile``
    of its answers are to meet ``objective``. On each device that carries it ``instances`` of its
    ``keep`` newest versions are loaded; ``memory``: the bytes that one occupies, by kind of device
    ("": any other). ``pace``: see ``Slo``; ``kv``: bytes guaranteed to each instance for keys and
    values. ``notes`` are for its owner: nothing depends on them. ``unloads``: its instances may be
    unloaded while they idle, if others need the memory."""

    service: str
    objective: int
    max_batch: int
    max_queue: int
    preferred: tuple[int, ...] = ()
    max_queue_delay: int = 0
    strict: bool = False
    notes: tuple[str, ...] = ()
    percentile: float = 99.0
    instances: int = 1
    keep: int = 1
    memory: dict[str, int] = {}
    pace: int = 0
    kv: int = 0
    unloads: bool = False


class ServiceRemoved(_Event, frozen=True):
    """The service takes no more requests; those queued are answered with an error."""

    service: str


class Arrived(_Event, frozen=True):
    """A request was decoded and is ready to execute.

    ``more``: others arrived with it and follow at once; no batch starts before the last or
    before it has an idle instance's share of a full one.
    """

    request: Request
    more: bool = False


class Cancelled(_Event, frozen=True):
    """The client of a request went away."""

    request: int


class BatchDone(_Event, frozen=True):
    """A batch executed: for its requests, a turn. ``exec_ns`` is the worker's own execution time;
    ``start_ns`` the time between dispatch and the start of execution (hand-over, wake-up, queueing
    by the kernel, and the batch before it if the worker had one).

    Of its requests, ``failed`` are answered with an error of their own. ``unfinished`` are resident
    on the worker and get another turn there; ``emitted`` are those of these that have a piece of
    their answer to send. All others are finished. ``said``: request, and of how many tokens what
    it gave is.

    With ``more`` its lease goes on: the next turn of the unfinished is under way. ``work``: tokens
    that were computed, and pairs of those with the ones that they look at; 0 where unknown.
    ``moved``: ns of ``exec_ns`` in which inputs were read and joined, and in which outputs were
    divided and written; 0 where the engine does that within its execution.
    """

    batch: int
    exec_ns: int
    start_ns: int = 0
    failed: tuple[int, ...] = ()
    unfinished: tuple[int, ...] = ()
    emitted: tuple[int, ...] = ()
    said: tuple[tuple[int, int], ...] = ()
    more: bool = False
    work: tuple[int, int] = (0, 0)
    moved: tuple[int, int] = (0, 0)


class BatchFailed(_Event, frozen=True):
    """The model refused or failed on a batch; the worker lives on."""

    batch: int
    reason: str


class Foretold(msgspec.Struct, frozen=True, array_like=True):
    """What was measured of a version before it is loaded, on a ``kind`` of device: as in
    ``WorkerUp``. ``profile``: ``(size, units, rows, ns)``."""

    kind: str
    profile: tuple[tuple[int, int, int, int], ...]
    memory: int
    load_ns: int


class VersionOffered(_Event, frozen=True):
    """A version of a service's model is there to be loaded. ``revision`` tells files that bear the
    same version apart: a greater one takes the place of what was offered or serves under it.
    ``foretold``: what is known of it, by kind of device."""

    service: str
    version: str
    revision: int = 0
    foretold: tuple[Foretold, ...] = ()


class VersionGone(_Event, frozen=True):
    """A version is to serve no longer (its files are gone)."""

    service: str
    version: str


class VariantsKnown(_Event, frozen=True):
    """The variants of a version beside the original, by kind of device: all that may serve there.
    It comes before the version is offered, and whenever they change."""

    service: str
    version: str
    variants: dict[str, tuple[Variant, ...]] = {}


class LoadFailed(_Event, frozen=True):
    """An instance could not be made ready. ``final``: nor would another try."""

    worker: str
    reason: str
    final: bool = False


class WorkerUp(_Event, frozen=True):
    """A warmed model instance is ready on ``device``. ``profile`` holds measured execution times
    there as ``(units, rows, ns)``, for rows of ``size``; ``memory`` the bytes it occupies there, if
    measured. ``turns``: requests live through several turns there; ``room``: so many tokens of them
    it can hold (0: any number), in ``pool`` bytes, blocks of ``block``. ``load_ns``: what loading
    it takes; 0: as long as it took since it was ordered."""

    worker: str
    service: str
    version: str
    device: str
    profile: tuple[tuple[int, int, int], ...] = ()
    size: int = 1
    memory: int = 0
    turns: bool = False
    room: int = 0
    pool: int = 0
    block: int = 1
    load_ns: int = 0


class Held(_Event, frozen=True):
    """Of a worker: what its pool of keys and values has, in bytes, and would have to have for what
    it has to do; what of that it could give without putting work aside, what of that nobody reads,
    and what its first request needs alone. Of a job: what its processes have, and want, which is
    that and what was taken from them; what of that it can be made to give, and what it says that it
    does not use. Of a cache of results: what it has, all of which it can give."""

    holder: str
    held: int
    wanted: int
    evictable: int
    cold: int
    least: int = 0


class WorkerDown(_Event, frozen=True):
    """A model instance is gone, with whatever it was executing."""

    worker: str
    reason: str = ""


class JobQueued(_Event, frozen=True):
    """A job wants to run: on devices of one of ``kinds`` (none named: any that trains).
    ``guaranteed`` and ``limit`` are shares of the compute of that kind. Of ``memory`` bytes, which
    it may have, it is guaranteed ``kept`` (-1: all) if it can be made to give the rest, else all.
    When it is to stop it may take ``grace`` ns. On devices of ``apart`` it was seen not to yield,
    or no job does: it shares no space with services there. One that stands for a reservation names
    its ``device``, and has ``own`` units of that for itself."""

    job: str
    weight: float = 1.0
    guaranteed: Share = 0.0
    limit: Share = 1.0
    kinds: tuple[str, ...] = ()
    memory: int = 0
    grace: int = 5 * S
    kept: int = -1
    gives: bool = False
    apart: tuple[str, ...] = ()
    device: str = ""
    own: int = 0


class JobReady(_Event, frozen=True):
    """A job's processes run and may be granted partitions. ``levels``: how it can be made to yield
    on each of its devices, where that is not what the device says of itself."""

    job: str
    levels: dict[str, PreemptLevel] = {}


class JobLevel(_Event, frozen=True):
    """A running job can be made to yield on a device at another level than before, as was seen. At
    ``NONE`` it is kept apart from services there from now on."""

    job: str
    device: str
    level: PreemptLevel


class JobExited(_Event, frozen=True):
    """A job's processes are gone (or it is held, or wants to run no more); its grants are void."""

    job: str


class Granted(_Event, frozen=True):
    """The job may run on the partition now."""

    job: str
    partition: str


class Revoked(_Event, frozen=True):
    """No process of the job runs on the partition any more. ``took_ns``: from the order."""

    job: str
    partition: str
    took_ns: int


class Repartitioned(_Event, frozen=True):
    """A device's layout is now that of plan ``version``."""

    device: str
    version: int


class DeviceChanged(_Event, frozen=True):
    """What a device says of itself is another now: its level and limits, say, once its gate was
    tried. Where its level fell, jobs there are of no higher one; at ``NONE`` they are kept apart
    from services there. Memory stays booked as at the start."""

    spec: DeviceSpec


class ActionFailed(_Event, frozen=True):
    """A dispatch, grant, revocation or repartition could not be carried out. ``target``: the batch,
    the partition, or the device. A revocation may be the shell's own: of a grant that came to be
    after it had failed."""

    action: str
    target: str
    job: str
    reason: str


class Woke(_Event, frozen=True):
    """The time asked for by ``WakeAt`` has come."""


class Planned(_Event, frozen=True):
    """The planner set new bounds."""

    plan: Plan


class Draining(_Event, frozen=True):
    """The node is about to stop: no new request is admitted."""


Event = (
    ServiceAdded
    | ServiceRemoved
    | Arrived
    | Cancelled
    | BatchDone
    | BatchFailed
    | VersionOffered
    | VersionGone
    | VariantsKnown
    | LoadFailed
    | WorkerUp
    | Held
    | WorkerDown
    | JobQueued
    | JobReady
    | JobLevel
    | JobExited
    | Granted
    | Revoked
    | Repartitioned
    | DeviceChanged
    | ActionFailed
    | Woke
    | Planned
    | Draining
)


def service_added(
    spec: ServiceSpec, joined: bool = True, keep: int = 1, notes: tuple[str, ...] = ()
) -> ServiceAdded:
    """The event of a service as its owner declares it; ``joined``: whether requests may share
    batches."""
    batch = spec.batch
    return ServiceAdded(
        service=spec.name,
        objective=spec.slo.latency,
        max_batch=batch.max if joined else 1,
        max_queue=spec.max_queue,
        preferred=batch.preferred if joined else (),
        max_queue_delay=batch.max_queue_delay if joined else 0,
        strict=spec.strict,
        notes=notes,
        percentile=spec.slo.percentile,
        instances=spec.instances,
        keep=keep,
        memory={"": spec.memory} | {k: v.memory for k, v in spec.variants.items() if v.memory},
        pace=spec.slo.pace,
        kv=spec.kv.guaranteed,
        unloads=spec.unloads,
    )


def job_queued(spec: JobSpec, gives: bool = False, apart: tuple[str, ...] = ()) -> JobQueued:
    """The event of a job that wants to run; ``gives``: it runs already, and can be asked for
    memory; ``apart``: devices on which it does not yield."""
    reserved = spec.reservation
    return JobQueued(
        job=spec.id,
        weight=spec.weight,
        guaranteed=spec.guaranteed,
        limit=spec.limit,
        kinds=spec.kinds,
        memory=spec.memory,
        grace=spec.grace,
        kept=spec.memory if spec.memory_guaranteed is None else spec.memory_guaranteed,
        gives=gives,
        apart=apart,
        device=reserved.device if reserved is not None else "",
        own=reserved.units if reserved is not None else 0,
    )
