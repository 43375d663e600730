"""Reservations: space that a scheduler outside of the node (Kubernetes) has promised to somebody.

A reservation is a job without a command. It is guaranteed its share from the time it is made, and
its processes, which somebody else starts, are adopted by their pid on this host.
"""

from __future__ import annotations

from typing import Final

import msgspec

MOST_ID: Final = 253
"""Characters that an outside id may have."""


class Reservation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is reserved, under an ``id`` of the outside scheduler's.

    Of ``device`` either a ``share`` of its time (0..1; the rest of the device may be borrowed up
    to ``limit``), or so many ``units`` of its own (cores, groups of multiprocessors, compute slices
    of a MIG instance; all of a device that only serves), on which no service is planned. ``memory``
    in bytes is guaranteed with it (0: none is). ``within``: the longest (ns) that its processes may
    be kept from what is theirs; 0: as long as guarantees are paid within. ``name`` is for people.
    """

    id: str
    device: str
    share: float = 0.0
    units: int = 0
    limit: float = 1.0
    memory: int = 0
    within: int = 0
    name: str = ""


class Answer(msgspec.Struct, frozen=True):
    """Whether there is room for a reservation: why not, or what the planner would do for it, a line
    a step. ``made``: it is there now (never after a dry run)."""

    holds: bool
    reason: str = ""
    would: tuple[str, ...] = ()
    made: bool = False


class Adopted(msgspec.Struct, frozen=True):
    """A process on this host, and when it started (clock ticks after boot): pids come again."""

    pid: int
    start: int


class ReservationStatus(msgspec.Struct, frozen=True):
    """A reservation as it stands: ``waiting`` for its space (``reason`` says for what), or
    ``ready`` for processes. ``partitions`` are those that are its own.

    Once it is ready, a process needs ``env`` in its environment, what ``prepend`` says at the front
    of its lists of paths (joined by ":"), and the host's ``mounts`` at the same paths, to be
    adopted at its device.
    """

    reservation: Reservation
    job: str
    state: str
    reason: str = ""
    partitions: tuple[str, ...] = ()
    env: dict[str, str] = {}
    prepend: dict[str, str] = {}
    mounts: tuple[str, ...] = ()
    reports: str = ""
    """A directory of the host's. Whoever has it mounted at the same path can report
    (``cotenant.report``) on the socket ``sock`` in it, which ``COTENANT_REPORT_SOCKET`` is to name.
    Empty: there is none."""
    adopted: tuple[Adopted, ...] = ()
