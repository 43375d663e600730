"""What the dispatcher orders. Every action names the event that caused it in ``cause``
(the event's type and subject); ``cotenant.domain.protocol`` lists the events that answer it."""

from __future__ import annotations

import msgspec

from cotenant.domain.device import Partition
from cotenant.domain.request import Batch, Lease, Refusal
from cotenant.domain.workload import ORIGINAL


class _Action(msgspec.Struct, frozen=True, tag=True, array_like=True):
    cause: str


class Dispatch(_Action, frozen=True):
    """Execute ``batch`` on ``worker`` within ``partition``.

    ``preempting``: a job held the partition until now, and its revocation may not be
    acknowledged yet (devices of level ``PRIORITY`` only). ``after``: the batch that the worker
    executes now, there; it goes on with this one by itself (0: the partition is free).
    ``lease``: how many turns that is.
    """

    batch: Batch
    worker: str
    partition: str
    preempting: bool = False
    after: int = 0
    lease: Lease = Lease()


class Recall(_Action, frozen=True):
    """The lease of a batch ends with the turn that is under way."""

    batch: int
    worker: str


class Grant(_Action, frozen=True):
    """Let ``job`` run on ``partition``; expect to take it back after ``slice_ns``."""

    job: str
    partition: str
    slice_ns: int


class Revoke(_Action, frozen=True):
    """Take ``partition`` back from ``job`` at once."""

    job: str
    partition: str


class Load(_Action, frozen=True):
    """Make an instance of a version ready on ``device``, to be known as ``worker``: of its
    ``variant``; in ``partition`` if the device binds processes to one."""

    worker: str
    service: str
    version: str
    revision: int
    device: str
    partition: str = ""
    variant: str = ORIGINAL


class Unload(_Action, frozen=True):
    """End an instance; it has nothing to do."""

    worker: str


class Resize(_Action, frozen=True):
    """A worker's pool of keys and values, a job or a cache of results may have ``size`` bytes from
    now on; -1, not of a pool: as many as its limit allows."""

    holder: str
    size: int


class Serve(_Action, frozen=True):
    """Requests that name no version go to this one from now on: its instances are up."""

    service: str
    version: str
    revision: int


class Decline(_Action, frozen=True):
    """A version that was offered is not served."""

    service: str
    version: str
    revision: int
    reason: str


class Start(_Action, frozen=True):
    """Start ``job`` on ``devices`` (all of one kind), or let it go on if it is held; in
    ``partition`` if the device binds processes to one."""

    job: str
    devices: tuple[str, ...]
    partition: str = ""


class Stop(_Action, frozen=True):
    """Stop ``job``: within its grace, or at once (``kill``). ``again``: it goes back to the queue,
    to start elsewhere; otherwise it is ended for good."""

    job: str
    reason: str
    kill: bool = False
    again: bool = False


class Emit(_Action, frozen=True):
    """Send what these requests of a batch emitted in its turn; they are not finished."""

    batch: int
    requests: tuple[int, ...]


class Complete(_Action, frozen=True):
    """Answer the requests of a batch with their results: the last pieces, where there were some."""

    batch: int
    requests: tuple[int, ...]


class Reject(_Action, frozen=True):
    """Answer a request with an error. ``retry_after`` ns (0 = retrying will not help)."""

    request: int
    refusal: Refusal
    retry_after: int = 0
    detail: str = ""


class Repartition(_Action, frozen=True):
    """Make ``partitions`` the layout of a device, as plan ``version`` has it; every partition that
    changes is idle."""

    device: str
    version: int
    partitions: tuple[Partition, ...]


class WakeAt(_Action, frozen=True):
    """Send ``Woke`` at this time (ns); replaces an earlier order."""

    at: int


Action = (
    Dispatch
    | Recall
    | Grant
    | Revoke
    | Load
    | Unload
    | Resize
    | Serve
    | Decline
    | Start
    | Stop
    | Emit
    | Complete
    | Reject
    | Repartition
    | WakeAt
)
