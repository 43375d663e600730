"""Connections that share what one HTTP server has, and which of them gives way.

* At most so many are open. Where one more comes, that one is closed that has waited for its client
  for longest: idle, in a head or a body that does not end, or with an answer that is not read. It
  does not matter where clients come from: all on this box, or behind one proxy, have one address.
  Where all are at work, the newcomer is refused.
* One that is idle between two requests is closed after ``KEEP_ALIVE_S``, or up to ``SWEEP_S``
  later: a timer for each would cost more than looking at all that have waited so long.
* Answers that their clients do not take up share ``UNREAD_BYTES``: beyond, those are ended that
  have waited for longest. One of which less than ``UNREAD_PACE_BYTES`` is taken up in ``UNREAD_S``
  is ended in any case.
* What was read ahead of requests under way shares ``AHEAD_TOTAL_BYTES``.
"""

from __future__ import annotations

import asyncio
from functools import partial
from itertools import takewhile
from typing import Protocol

from cotenant.serving.listening import UNREAD_S
from cotenant.serving.overdue import Overdue

KEEP_ALIVE_S = 75.0
SWEEP_S = 5.0
UNREAD_BYTES = 256 * 2**20
UNREAD_PACE_BYTES = 64 * 1024
AHEAD_TOTAL_BYTES = 64 * 2**20


class Member(Protocol):
    """A connection."""

    def __hash__(self) -> int:
        """One connection is no other."""

    def unread_bytes(self) -> int:
        """How much of its answers was not taken up yet."""

    def is_idle(self) -> bool:
        """Whether nothing of another request has come."""

    def give_way(self) -> None:
        """Close at once."""


class Crowd:
    """The connections of one server; ``most`` may be open."""

    def __init__(self, most: int, keep_alive_s: float = KEEP_ALIVE_S) -> None:
        self.most = most
        self.ahead_bytes = 0
        self._keep_alive_s = keep_alive_s
        self._members: set[Member] = set()
        self._waiting: dict[Member, float] = {}
        """Those that wait for their clients, the longest first, and since when."""
        self._unread: dict[Member, int] = {}
        """Those whose answers are not taken up, the longest first, and how much of them."""
        self._slow = Overdue(UNREAD_S)
        self._sweeping = False

    def enter(self, member: Member) -> bool:
        """A new connection; False if there are too many and all are at work."""
        if len(self._members) >= self.most:
            longest = next(iter(self._waiting), None)
            if longest is not None:
                self.leave(longest)
                longest.give_way()
        self._members.add(member)
        self.rest(member)
        if not self._sweeping:
            self._sweep()
        return len(self._members) <= self.most

    def leave(self, member: Member) -> None:
        """A connection is gone, or as good as gone."""
        self._members.discard(member)
        self.work(member)
        self.read(member)

    def rest(self, member: Member) -> None:
        """It is new, or was answered; what it does next is its client's."""
        if member in self._members:
            self._waiting.pop(member, None)
            self._waiting[member] = asyncio.get_running_loop().time()

    def work(self, member: Member) -> None:
        """A request is here entirely; the client waits for us."""
        self._waiting.pop(member, None)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        before = loop.time() - self._keep_alive_s
        for member in list(takewhile(lambda m: self._waiting[m] < before, self._waiting)):
            if member.is_idle():
                self.leave(member)
                member.give_way()
        self._sweeping = bool(self._members)
        if self._sweeping:
            loop.call_later(min(SWEEP_S, self._keep_alive_s), self._sweep)

    def unread(self, member: Member) -> None:
        """Its client is slow to take up what was answered."""
        if member not in self._members:
            return
        self._unread[member] = member.unread_bytes()
        if member not in self._slow:
            self._slow.enter(member, partial(self._look_again, member))
        if sum(self._unread.values()) > UNREAD_BYTES:
            self._make_room()

    def read(self, member: Member) -> None:
        """Its client has taken up most of it."""
        self._unread.pop(member, None)
        self._slow.leave(member)

    def _make_room(self) -> None:
        for member in self._unread:
            self._unread[member] = member.unread_bytes()
        total = sum(self._unread.values())
        while total > UNREAD_BYTES:
            member, nbytes = next(iter(self._unread.items()))
            total -= nbytes
            self.leave(member)
            member.give_way()

    def _look_again(self, member: Member) -> None:
        before = self._unread.get(member)
        if before is None:
            return
        now = member.unread_bytes()
        if before - now < UNREAD_PACE_BYTES:
            self.leave(member)
            member.give_way()
            return
        self._unread[member] = now
        asyncio.get_running_loop().call_soon(self._watch, member)

    def _watch(self, member: Member) -> None:
        if member in self._unread and member not in self._slow:
            self._slow.enter(member, partial(self._look_again, member))
