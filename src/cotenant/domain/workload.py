"""Services (latency-bound) and jobs (everything left over): what their owners declare."""

from __future__ import annotations

import enum
from typing import Final

import msgspec

from cotenant.domain.reservation import Reservation
from cotenant.domain.units import MS, S

PRIORITY_CLASSES: Final = 3
"""Request priority classes: 0 high, 1 normal, 2 low."""


Share = float | dict[str, float]
"""A share (0..1) of the compute of one kind of device: of whichever its owner runs on, or by
kind."""


def share_on(share: Share, kind: str) -> float:
    """The part of a kind of device that a share is; none of a kind that it does not name."""
    return share.get(kind, 0.0) if isinstance(share, dict) else share


class Slo(msgspec.Struct, frozen=True):
    """``percentile`` % of answers within ``latency`` nanoseconds of arrival. Of an answer that
    comes in pieces (tokens) that is for the first, and each further one is due ``pace`` ns later
    (0: ``latency`` later): the i-th of them at arrival + latency + i * pace."""

    latency: int
    percentile: float = 99.0
    pace: int = 0


class Joining(enum.Enum):
    """Whether rows of several requests may run together: where trials at load show that each gets
    the same answer as alone, on the owner's word, or never (the model has no batch axis)."""

    CHECKED = "checked"
    TRUSTED = "trusted"
    NONE = "none"


class BatchSpec(msgspec.Struct, frozen=True):
    """Bounds on dynamic batching.

    ``max`` rows per batch, and per request (1 disables batching); ``preferred`` sizes worth waiting
    for; ``max_queue_delay`` nanoseconds a batch below a preferred size may be held back on an idle
    partition, as far as the oldest request's slack allows. 0 never waits.
    """

    max: int = 8
    preferred: tuple[int, ...] = ()
    max_queue_delay: int = 0
    joining: Joining = Joining.CHECKED


class KvSpec(msgspec.Struct, frozen=True):
    """Bytes that an instance of a language model may have for keys and values: what it always gets
    in the end, and the most."""

    guaranteed: int = 0
    limit: int = 2**30


ORIGINAL: Final = "original"
"""What a version's own model file is called among its variants."""


class Variant(msgspec.Struct, frozen=True):
    """What a model is on one kind of device: bytes that an instance holds there, accuracy (0..1)
    as it runs there (quantized, perhaps), and what it is made of. An execution takes ``relative``
    times as long as one of the original there."""

    memory: int = 0
    accuracy: float = 1.0
    operators: tuple[str, ...] = ()
    name: str = ORIGINAL
    relative: float = 1.0


class ServiceSpec(msgspec.Struct, frozen=True):
    """A model served under an objective."""

    name: str
    model: str
    slo: Slo
    batch: BatchSpec = BatchSpec()
    guaranteed: Share = 0.0
    """Share that is never planned away from this service."""
    limit: Share = 1.0
    """Largest share that may be planned for this service."""
    kinds: tuple[str, ...] = ()
    """Kinds of device that may carry it; empty: any that it has a build for."""
    memory: int = 0
    """Bytes that an instance occupies on its device, 0 = not known before it is loaded."""
    accuracy_floor: float = 0.0
    """A version whose check data show less accuracy (0..1) is refused."""
    max_queue: int = 1024
    """Requests waiting; one more is refused."""
    strict: bool = False
    """If set, jobs' guaranteed shares never tighten this service's admission."""
    refuse_nan: bool = False
    """If set, floating-point inputs that hold NaN or infinity are refused."""
    instances: int = 1
    """Model instances (worker processes) kept warm; each runs one batch at a time."""
    threads: int = 0
    """Compute units that one execution may use at most; 0 = all of its partition."""
    exec_timeout: int = 30 * S
    """A batch that executes longer than this is ended together with its worker."""
    kv: KvSpec = KvSpec()
    cache: int = 0
    """Bytes that results may take which the node keeps, to answer the same request at once; 0: none
    are. For models that give the same answer to the same input, in one piece."""
    unloads: bool = False
    """If set, instances that idle are unloaded when others need the memory, and loaded again before
    they are expected to be wanted, or when they are."""
    variants: dict[str, Variant] = {}
    """What the model is on kinds of device; empty: the same anywhere."""
    chooses: bool = True
    """Whether other variants of its model may serve in place of the original."""


class RestartPolicy(enum.Enum):
    """When a job that ended is started again."""

    NEVER = "never"
    ON_FAILURE = "on-failure"
    ALWAYS = "always"


class JobSpec(msgspec.Struct, frozen=True):
    """A training (or other batch) program: any command.

    ``env`` is all of its environment but for what the node adds, and is shown to nobody.
    ``weight`` divides what is left among jobs; ``guaranteed`` is a share (0..1) that is owed to it;
    ``limit`` caps what it may borrow; ``memory`` (bytes, 0 = none)
    ends the job alone when its process tree occupies more. Of that ``memory_guaranteed`` (None:
    all) is its own; the rest it may be told to give back.
    """

    id: str
    name: str
    command: tuple[str, ...]
    cwd: str = "."
    env: dict[str, str] = {}
    weight: float = 1.0
    guaranteed: Share = 0.0
    limit: Share = 1.0
    kinds: tuple[str, ...] = ()
    """Kinds of device that it can run on; empty: any that trains."""
    memory: int = 0
    memory_guaranteed: int | None = None
    restart: RestartPolicy = RestartPolicy.ON_FAILURE
    max_restarts: int = 5
    grace: int = 5 * S
    """Nanoseconds between SIGTERM and SIGKILL when the job is stopped."""
    log_limit: int = 64 * 2**20
    """Bytes of log kept per job (the newest)."""
    time_limit: int = 0
    """Nanoseconds that it may run, all its runs together, by the clock on the wall; 0: no end."""
    after: tuple[str, ...] = ()
    """Jobs (ids) that have to have succeeded before it starts; if one does not, it is cancelled."""
    reservation: Reservation | None = None
    """What it was made for: it has no command then, and its processes are adopted."""


class JobState(enum.Enum):
    """Life of a job; ``JOB_TRANSITIONS`` holds every legal step."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    HELD = "held"
    BACKOFF = "backoff"
    STOPPING = "stopping"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


JOB_TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.STARTING, JobState.CANCELLED}),
    JobState.STARTING: frozenset(
        {JobState.RUNNING, JobState.QUEUED, JobState.BACKOFF, JobState.FAILED, JobState.STOPPING}
    ),
    JobState.RUNNING: frozenset(
        {
            JobState.HELD,
            JobState.BACKOFF,
            JobState.STOPPING,
            JobState.SUCCEEDED,
            JobState.FAILED,
            JobState.QUEUED,
        }
    ),
    JobState.HELD: frozenset(
        {
            JobState.RUNNING,
            JobState.BACKOFF,
            JobState.STOPPING,
            JobState.SUCCEEDED,
            JobState.FAILED,
            JobState.QUEUED,
        }
    ),
    JobState.BACKOFF: frozenset({JobState.STARTING, JobState.CANCELLED, JobState.QUEUED}),
    JobState.STOPPING: frozenset({JobState.CANCELLED, JobState.FAILED, JobState.QUEUED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}

JOB_ENDED = frozenset(s for s, to in JOB_TRANSITIONS.items() if not to)

ENDED_STATES: Final = frozenset(state.value for state in JOB_ENDED)
"""The same, as ``JobStatus.state`` has them."""

DEFAULT_SLO = Slo(latency=100 * MS)
"""Objective of a model that is loaded by name without a service entry."""
