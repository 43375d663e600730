"""The dispatcher's room for memory that is lent: how large which pool of keys and values is.

A pool belongs to an instance of a language model. What it has and wants the instance reports; what
waits in the queue for a first turn is wanted too. Where a device has a budget for pools, a ledger
divides it, and each pool is told its size whenever that changes. Without one each has its limit.

A guarantee holds for what is wanted: who wants nothing lends all, and has it back at once when it
does. And memory in which not one answer fits is of no use: the pools whose first answers fit beside
each other are guaranteed that much, the most urgent first, and keep it for a while (``TERM``) or
until they want nothing; so those that do not fit beside each other take turns.
"""

from __future__ import annotations

from typing import Final

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.request import Request
from cotenant.domain.units import MS, S
from cotenant.policy.desk import Desk
from cotenant.policy.generation import on_worker, queued
from cotenant.policy.memory.account import Holder, Kind, Report, Terms
from cotenant.policy.memory.books import KV, Books
from cotenant.policy.memory.ledger import Ledger
from cotenant.policy.state import ServiceState, WorkerState

SETTLE: Final = 100 * MS
"""So often at most the needs of all pools are weighed against each other."""
TERM: Final = 5 * S
"""So long a pool has what its first answer needs before a more urgent one may take it: work that is
put aside is computed again."""
COPY_NS: Final = 0.5
"""What giving a byte takes (ns), with its pages written again later: 53 us and 379 us for a block
of 720 KiB (docs/memory.md)."""


class Pools:
    """See the module's text."""

    def __init__(self, desk: Desk, books: Books) -> None:
        self._desk = desk
        self._state = desk.state
        self._books = books
        self._ledgers = books.pools

    def worker_up(self, worker: WorkerState) -> list[ServiceState]:
        """An instance with a pool is there; services that others may have room for now."""
        ledger = self._ledgers.get(worker.device)
        if ledger is None or not worker.pool:
            return []
        terms = Terms(worker.id + KV, Kind.KV, 0, worker.pool, unit=worker.block)
        terms.give_cost = terms.back_cost = COPY_NS
        refused = ledger.admit(terms)
        assert not refused, refused
        worker.pool_now = worker.pool
        return self._settle(worker.device, ledger)

    def worker_down(self, worker: WorkerState) -> list[ServiceState]:
        """An instance is gone, and what its pool had is the others'."""
        ledger = self._ledgers.get(worker.device)
        if ledger is None or worker.id + KV not in ledger.account.holders:
            return []
        ledger.left(worker.id + KV)
        self._state.first.pop(worker.id, None)
        return self._tell(worker.device, ledger)

    def reported(self, event: e.Held) -> list[ServiceState]:
        """An instance says what its pool has and wants."""
        worker = self._state.workers.get(event.holder)
        if worker is None:
            return []
        worker.held, worker.wanted = event.held, event.wanted
        worker.evictable, worker.cold, worker.least = event.evictable, event.cold, event.least
        worker.told, worker.stalled = True, False
        ledger = self._ledgers.get(worker.device)
        if ledger is None or worker.id + KV not in ledger.account.holders:
            return []
        self._enter(ledger, worker)
        return [*self._tell(worker.device, ledger), self._state.services[worker.service]]

    def changed(self, device: str) -> list[ServiceState]:
        """Others have given or taken memory that pools have a part in."""
        ledger = self._ledgers.get(device)
        return self._tell(device, ledger) if ledger is not None else []

    def look(self) -> list[ServiceState]:
        """Weigh the needs again where they have changed, unless that was just done."""
        found: list[ServiceState] = []
        for device, ledger in self._ledgers.items():
            at, needs = self._state.settled.get(device, (0, ()))
            if self._needs(ledger) == needs:
                continue
            if self._state.now < at + SETTLE:
                self._again(device, at + SETTLE)
                continue
            found += self._settle(device, ledger)
        return found

    def due(self, device: str) -> None:
        """The time has come that ``look`` waited for."""
        if self._state.settling.get(device, self._state.now + 1) <= self._state.now:
            del self._state.settling[device]
            self._state.settled.pop(device, None)

    # --- inside -----------------------------------------------------------------------------

    def _again(self, device: str, at: int) -> None:
        """Weigh the needs again at this time (ns), if not before."""
        if self._state.settling.get(device, at + 1) > at:
            self._state.settling[device] = at
            self._desk.watch(at, "memory", device)

    def _needs(self, ledger: Ledger) -> tuple[int, ...]:
        """Of each pool what it wants, and how many wait for it."""
        found: list[int] = []
        for worker, _ in self._pools(ledger):
            found += (worker.wanted, self._state.services[worker.service].queued)
        return tuple(found)

    def _settle(self, device: str, ledger: Ledger) -> list[ServiceState]:
        pools = self._pools(ledger)
        for worker, _ in pools:
            self._enter(ledger, worker)
        wanted = self._guarantees(device, ledger)
        for worker, holder in pools:
            if wanted[worker.id] < holder.terms.guaranteed:
                ledger.guarantee(holder.terms.name, wanted[worker.id])
        for worker, holder in pools:
            if wanted[worker.id] > holder.terms.guaranteed:
                ledger.guarantee(holder.terms.name, wanted[worker.id])
        ledger.settle(self._state.now)
        self._state.settled[device] = (self._state.now, self._needs(ledger))
        return self._tell(device, ledger)

    def _guarantees(self, device: str, ledger: Ledger) -> dict[str, int]:
        """What each pool is guaranteed now: its own of what it wants, and what its first answer
        needs where that fits beside the others'."""
        state, left = self._state, ledger.usable
        found: dict[str, int] = {}
        ranked: list[tuple[bool, int, str]] = []
        for other in ledger.account.holders.values():
            left -= other.terms.guaranteed if other.terms.kind != Kind.KV else 0
        for worker, holder in self._pools(ledger):
            name = worker.id
            kv = state.services[worker.service].kv
            # Of two versions beside each other, while one replaces the other, the second borrows.
            found[name] = min(kv, holder.wanted, holder.terms.limit, left)
            left -= found[name]
            if holder.wanted:
                may_go = state.now - state.first.get(name, -TERM) >= TERM
                ranked.append((may_go, self._due(worker), name))
            else:
                state.first.pop(name, None)
        for _, _, name in sorted(ranked):
            worker = state.workers[name]
            need = min(self._first(worker), worker.pool)
            more = max(0, need - found[name])
            if more > left:
                state.first.pop(name, None)
                self._again(device, state.now + TERM)
                continue
            left -= more
            found[name] += more
            state.first.setdefault(name, state.now)
        return found

    def _asked(self, worker: WorkerState) -> list[Request]:
        """What an instance has, and what waits for it."""
        service = self._state.services[worker.service]
        return [*on_worker(self._state, service, worker), *queued(self._state, service, worker)]

    def _due(self, worker: WorkerState) -> int:
        """When the first of that is due (ns)."""
        asked = self._asked(worker)
        return min([request.deadline for request in asked], default=self._state.now)

    def _first(self, worker: WorkerState) -> int:
        """Bytes for its first answer alone: as it says, or of one that it does not know yet."""
        asked = self._asked(worker)
        if worker.least or not asked:
            return worker.least
        return self._bytes(worker, asked[0].prompt + asked[0].most)

    def _bytes(self, worker: WorkerState, tokens: int) -> int:
        return -(-tokens * worker.pool // max(1, worker.most_room))

    def _enter(self, ledger: Ledger, worker: WorkerState) -> None:
        wanted = worker.wanted + self._queued(worker)
        ledger.holds(worker.id + KV, Report(worker.held, wanted, worker.evictable, worker.cold))

    def _queued(self, worker: WorkerState) -> int:
        """Bytes that a worker's part of those who wait for a first turn will need at most."""
        service = self._state.services[worker.service]
        waiting = queued(self._state, service, worker)
        tokens = sum([request.prompt + request.most for request in waiting])
        return self._bytes(worker, tokens) // max(1, service.workers)

    def _reach(self, ledger: Ledger) -> None:
        """How large each pool could be: beside what the others want or, where that is more, its
        even part. Admission goes by this, for a pool grows only for what was admitted."""
        pools = self._pools(ledger)
        together = sum([holder.wanted for _, holder in pools])
        wanting = sum([holder.wanted > 0 for _, holder in pools])
        all_pools = ledger.reach(Kind.KV, self._state.now)
        for worker, holder in pools:
            others = wanting - (holder.wanted > 0)
            beside = all_pools - (together - holder.wanted)
            size = min(holder.terms.limit, max(beside, all_pools // (others + 1)))
            worker.reach = worker.most_room * size // worker.pool

    def _pools(self, ledger: Ledger) -> list[tuple[WorkerState, Holder]]:
        """The pools among the holders, with their instances."""
        workers = self._state.workers
        return [
            (workers[name.removesuffix(KV)], holder)
            for name, holder in ledger.account.holders.items()
            if holder.terms.kind == Kind.KV
        ]

    def _tell(self, device: str, ledger: Ledger) -> list[ServiceState]:
        """Order the sizes that are others now. The services whose pools grew."""
        grown: list[ServiceState] = []
        self._reach(ledger)
        moved = ledger.free, ledger.coming
        if ledger is self._books.devices.get(device) and self._state.moved.get(device) != moved:
            self._state.moved[device] = moved
            self._books.touched[device] = None
        for worker, holder in self._pools(ledger):
            size = holder.keeps // worker.block * worker.block
            if size == worker.pool_now:
                continue
            if size > worker.pool_now:
                grown.append(self._state.services[worker.service])
            worker.pool_now = size
            worker.room = max(1, worker.most_room * size // worker.pool)
            self._desk.out.append(a.Resize(self._desk.cause, worker.id, size))
        return grown
