"""The ledger's nouns: what is known of one device's memory and of those who hold it.

Plain data, so that it can be encoded into a checkpoint. Memory is in bytes, time in ns. The tables
say who gives in what order; ``cotenant.policy.memory.ledger`` decides by them.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from cotenant.domain.units import S

REST: Final = 1 * S
"""So long (ns) after one gave to another it borrows nothing back from it."""
STEP: Final = 64
"""For less than 1/STEP of the memory nobody is asked to give, so that shares are even."""
TELL: Final = 64
"""A pool tells of a change of what it could give that is 1/TELL of it."""
UNLOAD_BEYOND: Final = 4
"""An idle instance is unloaded if it is wanted again no sooner than so many times its load time."""


class Kind(enum.IntEnum):
    """What a holder is."""

    RESULTS = 0
    """A cache of results."""
    KV = 1
    """A pool of keys and values of a language model: it grows and shrinks."""
    INSTANCE = 2
    """An instance of a service."""
    JOB = 3


class Rank(enum.IntEnum):
    """What memory means to its holder: the lowest is given first."""

    RESULTS = 0
    PREFIX = 1
    """KV that no sequence reads or comes back to."""
    IDLE_INSTANCE = 2
    COLD_KV = 3
    """KV of sequences that were put aside."""
    IDLE_JOB = 4
    """Allocations of a job that it does not touch."""
    BUSY_JOB = 5
    IN_USE = 6
    """What else there is: only a need within a guarantee takes it, and a pool its fair share."""


GIVES: Final[dict[Kind, tuple[Rank, Rank]]] = {
    Kind.RESULTS: (Rank.RESULTS, Rank.RESULTS),
    Kind.KV: (Rank.PREFIX, Rank.COLD_KV),
    Kind.INSTANCE: (Rank.IDLE_INSTANCE, Rank.IDLE_INSTANCE),
    Kind.JOB: (Rank.IDLE_JOB, Rank.BUSY_JOB),
}
"""What a holder's cold part means, and the rest of what it could give."""

USES: Final[dict[Kind, Rank]] = {
    Kind.RESULTS: Rank.RESULTS,
    Kind.KV: Rank.IN_USE,
    Kind.INSTANCE: Rank.IN_USE,
    Kind.JOB: Rank.BUSY_JOB,
}
"""What memory in use means to a holder. Who borrows asks only for what means less."""


@dataclass
class Terms:
    """On what terms a holder is admitted."""

    name: str
    kind: Kind
    guaranteed: int
    """Of what it wants it always gets so much, in the end."""
    limit: int
    """And never more than this."""
    weight: float = 1.0
    """Of its part in what pools share."""
    give_cost: float = 0.0
    """What giving takes, in ns a byte."""
    back_cost: float = 0.0
    """And getting it back."""
    rest_ns: int = 0
    """What giving anything costs it besides (ns), however little."""
    cooperative: bool = True
    """Whether it gives any part when asked. Else it gives all by ending: an instance is unloaded,
    a job is stopped."""
    load_ns: int = 0
    """How long an instance takes to load."""
    unit: int = 1
    """Bytes of a block: what it has is whole ones."""


@dataclass
class Report:
    """What a holder says of itself."""

    held: int
    wanted: int
    """What it would like to have in all: what it uses and what its backlog needs."""
    evictable: int = 0
    """What it could give without work in progress being put aside. Of a holder that is not
    cooperative: all, if it may be ended, or nothing."""
    cold: int = 0
    """The part of that which nobody reads."""
    returns_at: int = 0
    """When (ns) an idle instance is expected to be wanted again; 0: not to be foreseen."""


class PoolUse(NamedTuple):
    """See ``events.Held``; bytes."""

    held: int
    wanted: int
    evictable: int
    cold: int
    least: int

    def tells(self, told: PoolUse | None, pool: int) -> bool:
        """Whether it is worth telling after what was ``told`` last: there is or is wanted more or
        less, or of a pool of so many bytes 1/TELL more or less could be given."""
        if told is None or (self[:2], self.least) != (told[:2], told.least):
            return True
        return abs(self.cold - told.cold) * TELL > pool


@dataclass
class Holder:
    """One holder: its terms, what it reported last, and what the ledger and it owe each other."""

    terms: Terms
    held: int = 0
    wanted: int = 0
    evictable: int = 0
    cold: int = 0
    returns_at: int = 0
    promised: int = 0
    """Granted, and not taken yet."""
    waiting: int = 0
    """Follows as others give."""
    turn: int = 0
    """Its place among those that wait."""
    asked: int = 0
    """What it is to give and has not given yet."""
    over: int = 0
    """What it reported beyond what it was granted."""
    gave_to: dict[str, int] = field(default_factory=dict)
    """When (ns) it was last asked to give for others."""

    @property
    def has(self) -> int:
        """What is booked to it."""
        return self.held + self.promised

    @property
    def keeps(self) -> int:
        """What is left to it once it has given."""
        return self.held + self.promised - self.asked

    @property
    def lacks(self) -> bool:
        """Whether it is a job that does not have, nor may take, all of its memory."""
        return self.terms.kind == Kind.JOB and not self.over and self.wanted > self.has

    @property
    def owed(self) -> int:
        """The part of what it waits for that is within its guarantee."""
        return min(self.waiting, max(0, self.sure - self.keeps))

    @property
    def sure(self) -> int:
        """The part of its guarantee that it wants: what it is never asked for. Who gives all or
        nothing wants all or nothing."""
        if not self.terms.cooperative:
            return self.terms.guaranteed if self.wanted else 0
        return min(self.terms.guaranteed, self.wanted)

    def price(self, size: int) -> float:
        """What each of so many bytes costs it in all (ns). Who is to give already rests anyway."""
        rest = 0 if self.asked else self.terms.rest_ns
        return self.terms.give_cost + self.terms.back_cost + rest / size


@dataclass
class Account:
    """One device's memory."""

    capacity: int
    reserved: int = 0
    """For the node itself."""
    holders: dict[str, Holder] = field(default_factory=dict)
    turns: int = 0


@dataclass
class Grant:
    """A holder may take so many bytes more."""

    holder: str
    bytes: int


@dataclass
class Order:
    """A holder is to give so many bytes, and to have ``target`` after all that it was asked for."""

    holder: str
    bytes: int
    target: int
    rank: Rank
    to: str
    """For whom."""


@dataclass
class Answer:
    """Of what was asked for, ``granted`` bytes may be taken now. Once ``orders`` (and earlier ones)
    are carried out ``waiting`` bytes follow. ``why``: what is to be done about the rest."""

    granted: int
    waiting: int
    orders: list[Order]
    why: str = ""


@dataclass
class Line:
    """One holder in a status."""

    name: str
    kind: str
    held: int
    promised: int
    guaranteed: int
    limit: int
    wanted: int
    target: int
    """What it may have now, less what it is to give."""
    lent: int
    """The part of its guarantee that others use."""
    borrowed: int
    """What it has above its guarantee."""
    asked: int
    waiting: int
    over: int
