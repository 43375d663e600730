"""A request and a batch, as the policy sees them: numbers and handles, never bytes."""

from __future__ import annotations

import enum

import msgspec


class Request(msgspec.Struct, frozen=True, array_like=True):
    """One inference request.

    ``arrived`` and ``deadline`` are ns on the node's monotonic clock. ``expires`` (0 = never)
    is the client's own time-out: a request still queued then is answered with an error.
    ``rows`` counts rows along the batch axis, ``size`` the elements of a row's free axes; requests
    batch together when ``shape`` (which gives the size) and ``version`` are equal. ``prompt`` and
    ``most``: tokens that a language model is to read, and may say at most.
    """

    id: int
    service: str
    arrived: int
    deadline: int
    priority: int = 1
    rows: int = 1
    version: str = ""
    shape: str = ""
    expires: int = 0
    size: int = 1
    prompt: int = 0
    most: int = 0


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """Requests that execute together on one worker."""

    id: int
    service: str
    version: str
    requests: tuple[int, ...]
    rows: int


class Lease(msgspec.Struct, frozen=True, array_like=True):
    """How many turns a batch may have before it is to be dispatched again: up to ``turns``, as long
    as the last began within ``ns``, and until it is recalled. ``budget``: about how long (ns) one
    of them may take, where its engine can cut it to that; 0: as long as it takes."""

    turns: int = 1
    ns: int = 0
    budget: int = 0


class Refusal(enum.Enum):
    """Why a request is not answered with a result. The value goes on the wire."""

    OVERLOADED = "the deadline cannot be met at the present load"
    QUEUE_FULL = "the queue is full"
    DEADLINE = "the deadline is shorter than the model's own execution time"
    EXPIRED = "the client's time-out passed while the request was queued"
    UNAVAILABLE = "no instance of the model is running"
    WORKER_LOST = "the instance that executed the request died, twice"
    FAILED = "the model failed on this input"
    RESERVED = "capacity is owed to a job with a guaranteed share"
    SHUTTING_DOWN = "the node is shutting down"
    CANCELLED = "the client went away"
    MEMORY = "no tensor memory is free"
    UNREAD = "the client did not take up the pieces of its answer"
