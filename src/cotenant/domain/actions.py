"""What the dispatcher orders. Every action names the event that caused it in ``cause``
(the event's type and subject); ``cotenant.domain.protocol`` lists the events that answer it."""

from __future__ import annotations

import msgspec

from cotenant.domain.device import Partition
from cotenant.domain.request import Batch, Refusal


class _Action(msgspec.Struct, frozen=True, tag=True, array_like=True):
    cause: str


class Dispatch(_Action, frozen=True):
    """Execute ``batch`` on ``worker`` within ``partition``.

    ``preempting``: a job held the partition until now, and its revocation may not be
    acknowledged yet (devices of level ``PRIORITY`` only). ``after``: the batch that the worker
    executes now, there; it goes on with this one by itself (0: the partition is free).
    """

    batch: Batch
    worker: str
    partition: str
    preempting: bool = False
    after: int = 0


class Grant(_Action, frozen=True):
    """Let ``job`` run on ``partition``; expect to take it back after ``slice_ns``."""

    job: str
    partition: str
    slice_ns: int


class Revoke(_Action, frozen=True):
    """Take ``partition`` back from ``job`` at once."""

    job: str
    partition: str


class StopJob(_Action, frozen=True):
    """End ``job``: it could not be made to yield."""

    job: str
    reason: str


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


Action = Dispatch | Grant | Revoke | StopJob | Emit | Complete | Reject | Repartition | WakeAt
