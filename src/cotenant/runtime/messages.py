"""What a node and a worker say to each other: length-prefixed msgpack over a socket pair.

Tensors are not in the messages: they lie in the service's arena, at the offsets named.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

import msgspec

from cotenant.domain.config import ModelSettings
from cotenant.domain.request import Lease
from cotenant.domain.workload import Joining
from cotenant.engines.accuracy import Accuracy
from cotenant.engines.base import Candidate, EngineMeta
from cotenant.engines.placement import Executed

LENGTH = struct.Struct("<I")


class _Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pass


class Open(_Message, frozen=True):
    """Load, check and profile a model. ``units`` are the counts of threads to be ready for;
    ``check`` is the path of a ``check.npz``, or ""; ``joining`` is what is known of whether rows
    may be joined; ``kv``: at most so many bytes for keys and values; ``partitions``: the units of
    those on which services may run now; ``measures``: a ``Measure`` may follow."""

    path: str
    units: tuple[int, ...]
    max_batch: int
    check: str = ""
    settings: ModelSettings = ModelSettings()
    joining: Joining = Joining.CHECKED
    kv: int = 2**30
    partitions: tuple[tuple[int, ...], ...] = ()
    measures: bool = False


class Place(msgspec.Struct, frozen=True, array_like=True):
    """A tensor in the arena."""

    shape: tuple[int, ...]
    offset: int
    nbytes: int


LEFT_OUT: Final = Place((), -1, 0)
"""In place of an optional input that a request does not have."""


class Item(msgspec.Struct, frozen=True, array_like=True):
    """One request of a batch: inputs in the model's order, and where its outputs may go. ``id``
    is what a ``TurnEngine`` knows it by, ``due`` and ``pace`` (ns) when its first piece and each
    further one is wanted; other engines need none (0)."""

    rows: int
    inputs: tuple[Place, ...]
    out_offset: int
    out_bytes: int
    id: int = 0
    due: int = 0
    pace: int = 0


class Run(_Message, frozen=True):
    """Execute a batch on these ``units`` (the partition's) with so many ``threads``: turns of it
    where the engine takes turns. ``sent`` is the monotonic ns of dispatch."""

    batch: int
    units: tuple[int, ...]
    threads: int
    sent: int
    items: tuple[Item, ...]
    lease: Lease = Lease()


class Measure(_Message, frozen=True):
    """Execute so many rows of what the model was tried with, once, on so many units."""

    units: int
    rows: int


class Recall(_Message, frozen=True):
    """The lease of a batch ends with the turn that is under way."""

    batch: int


class Resize(_Message, frozen=True):
    """The pool of keys and values may have so many bytes from now on."""

    size: int


class Forget(_Message, frozen=True):
    """Nobody waits for these requests (``Item.id``) any more."""

    keys: tuple[int, ...]


class Opened(_Message, frozen=True):
    """The model is warm. ``profile``: (units, rows, ns) for rows of ``size`` (see ``size_of``);
    ``accuracy`` on the check data; ``memory`` in bytes, as much as the process ever had resident;
    ``unjoined`` says why rows are not joined, "" if they are; ``notes``: what its owner should know
    of how it executes. ``engine`` is the name of the one that opened it, ``executed`` what that
    says of operators; ``candidates``: which engines open such files, it among them."""

    meta: EngineMeta
    profile: tuple[tuple[int, int, int], ...]
    size: int = 1
    accuracy: Accuracy | None = None
    unjoined: str = ""
    memory: int = 0
    notes: tuple[str, ...] = ()
    engine: str = ""
    executed: tuple[Executed, ...] = ()
    candidates: tuple[Candidate, ...] = ()


class OpenFailed(_Message, frozen=True):
    """The model cannot be served, and why."""

    reason: str


class Outputs(msgspec.Struct, frozen=True, array_like=True):
    """One request's outputs, or what it emitted in a turn (without places: nothing). ``spilled``
    holds the bytes of those whose place was too small (offset -1), in order. ``error`` says why
    this request of a batch has none. One that is not ``finished`` is to get another turn. Of a
    turn: ``id`` is that of the request, ``said`` how many tokens they are."""

    places: tuple[Place, ...]
    spilled: tuple[bytes, ...] = ()
    error: str = ""
    finished: bool = True
    id: int = 0
    said: int = 0


class Done(_Message, frozen=True):
    """A batch executed: times in ns, outputs by request in the order of ``Run.items`` or, of a
    turn, with their ``id``. ``unjoined`` says why this worker joins no rows from now on, should it
    have found out. ``more``, ``work`` and ``moved``: see ``events.BatchDone``."""

    batch: int
    start_ns: int
    exec_ns: int
    items: tuple[Outputs, ...]
    unjoined: str = ""
    more: bool = False
    work: tuple[int, int] = (0, 0)
    moved: tuple[int, int] = (0, 0)


class Measured(_Message, frozen=True):
    """Ns of one execution, without what it waited for a core."""

    ns: int


class Held(_Message, frozen=True):
    """See ``events.Held``."""

    held: int
    wanted: int
    evictable: int
    cold: int
    least: int = 0


class Failed(_Message, frozen=True):
    """The model refused a batch (0: what was to be measured); the worker lives on."""

    batch: int
    reason: str


ToWorker = Open | Run | Measure | Recall | Resize | Forget
FromWorker = Opened | OpenFailed | Done | Failed | Measured | Held

_encoder = msgspec.msgpack.Encoder()


def frame(message: ToWorker | FromWorker) -> bytes:
    """The bytes of one message."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


def unframe(buffer: bytearray) -> Iterator[bytes]:
    """Take whole messages off the front of ``buffer``."""
    while len(buffer) >= LENGTH.size:
        (length,) = LENGTH.unpack_from(buffer)
        end = LENGTH.size + length
        if len(buffer) < end:
            return
        body = bytes(memoryview(buffer)[LENGTH.size : end])
        del buffer[:end]
        yield body
