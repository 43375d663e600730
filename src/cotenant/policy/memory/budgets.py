"""The dispatcher's room for what instances and jobs occupy of a device's memory.

An instance is loaded, and a job started, once there is room for what it is guaranteed; others give
it where it was lent to them. An instance that may be unloaded while it idles gives all that it has,
a job what it has above its guarantee. What a job cannot be made to give is not lent to it: its
whole limit is guaranteed then.

A job is not asked before it takes memory: what it has is measured, and booked as far as there is
some. What it has beyond that it is told to give.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import DeviceSpec
from cotenant.domain.units import S, format_bytes
from cotenant.policy import returning
from cotenant.policy.desk import Desk
from cotenant.policy.memory.account import Kind, Line, Report, Terms
from cotenant.policy.memory.books import KV, Books
from cotenant.policy.memory.ledger import Ledger
from cotenant.policy.state import Phase, ServiceState, Tenant, WorkerState

AGAIN: Final = 1 * S
"""Who waits for memory that nobody can spare asks again so often."""
RESULTS: Final = "/results"
"""Behind the name of a service: the results of it that the node keeps, in the host's memory."""


class Budgets:
    """See the module's text."""

    def __init__(self, desk: Desk, books: Books) -> None:
        self._desk = desk
        self._books = books
        self._state = desk.state

    # --- instances --------------------------------------------------------------------------

    def load(self, worker: WorkerState) -> bool:
        """Whether there is memory for an instance now; else it is asked for."""
        ledger = self._books.devices.get(worker.device)
        if ledger is None or not worker.memory:
            return True
        if worker.id not in ledger.account.holders and not self._admit(ledger, worker):
            return False
        self._ask(worker.device, ledger, worker.id, worker.memory)
        holder = ledger.account.holders[worker.id]
        worker.coming = holder.promised + holder.waiting >= worker.memory
        worker.waits_ns = ledger.gives_in()
        if not worker.coming and not holder.terms.guaranteed:
            ledger.waive(worker.id)  # a part is of no use to it, and perhaps to others
        return holder.promised >= worker.memory

    def hopeless(self, worker: WorkerState) -> str:
        """Why an instance that waits for memory cannot expect it; "" if others are to give it."""
        ledger = self._books.devices[worker.device]
        left = ledger.unpromised
        if self._state.services[worker.service].unloads:  # others may idle one day
            holders = ledger.account.holders.values()
            kept = [h.terms.guaranteed for h in holders if h.terms.kind == Kind.INSTANCE]
            left = ledger.usable - sum(kept)
        if worker.coming or worker.memory <= left:
            return ""
        need = format_bytes(worker.memory)
        return f"it needs {need} of memory, others leave {format_bytes(left)}"

    def up(self, worker: WorkerState) -> None:
        """An instance is there, and what it occupies is known."""
        ledger = self._books.devices.get(worker.device)
        if ledger is None or not worker.memory:
            return
        if worker.id not in ledger.account.holders:
            self._admit(ledger, worker, there=True)
        holder = ledger.account.holders[worker.id]
        holder.terms.load_ns = self._state.services[worker.service].load_ns
        holder.terms.back_cost = holder.terms.load_ns / worker.memory
        if worker.memory > holder.terms.limit:
            ledger.outgrew(worker.id, worker.memory)
        if worker.memory > holder.has:
            self._ask(worker.device, ledger, worker.id, worker.memory)
        ledger.holds(worker.id, Report(worker.memory, worker.memory))
        self._touch(worker.device)

    def changed(self, service: ServiceState) -> None:
        """A service's instances may be unloaded from now on, or may not any more."""
        for worker in self._state.workers.values():
            ledger = self._books.devices.get(worker.device)
            if worker.service != service.name or ledger is None:
                continue
            holder = ledger.account.holders.get(worker.id)
            if holder is not None:
                size = 0 if service.unloads else holder.terms.limit
                if size <= ledger.unpromised + holder.terms.guaranteed:
                    ledger.guarantee(worker.id, size)
                    self._touch(worker.device)

    def down(self, worker: WorkerState) -> None:
        """An instance is gone, or is not loaded after all."""
        ledger = self._books.devices.get(worker.device)
        if ledger is not None and worker.id in ledger.account.holders:
            ledger.left(worker.id)
            self._touch(worker.device)

    # --- jobs -------------------------------------------------------------------------------

    def left(self, kind: str, job: str, only: str = "") -> int:
        """Bytes that may be guaranteed to a job on devices of a kind, or on one of them ``only``; a
        very large number where memory is no constraint."""
        devices = [d for d in self._training(kind) if only in ("", d.id)]
        found = []
        for device in devices:
            ledger = self._books.devices.get(device.id)
            if ledger is None:
                return 1 << 62
            found.append(ledger.usable - self._promised(device.id, ledger, job))
        pins = any(d.pins_jobs for d in devices)
        return max(0, max(found) if pins else len(found) * min(found))

    def guaranteed(self, tenant: Tenant, kind: str) -> int:
        """Bytes that a job is guaranteed on a kind of device: what it asked for or, if it cannot be
        made to give what is above that, all up to its limit."""
        return tenant.kept if gives(tenant, kind, self._desk.devices) else tenant.memory

    def start(self, tenant: Tenant, devices: tuple[str, ...]) -> bool:
        """Whether there is memory for a job on these devices now; else it is asked for."""
        there = True
        part = _part(self.guaranteed(tenant, tenant.kind), devices)
        self._leave(tenant.id, devices)
        for device in devices:
            ledger = self._books.devices.get(device)
            if ledger is None or not tenant.memory:
                continue
            if tenant.id not in ledger.account.holders:
                terms = Terms(tenant.id, Kind.JOB, part, _part(tenant.memory, devices))
                self._price(device, terms)
                if ledger.admit(terms):
                    there = False
                    continue
            self._ask(device, ledger, tenant.id, part)
            there = there and ledger.account.holders[tenant.id].promised >= part
        return there

    def reported(self, event: e.Held) -> None:
        """What a job has was measured, or a cache of results says what it has."""
        if event.holder.endswith(RESULTS):
            self._cache(event)
            return
        tenant = self._state.tenants.get(event.holder)
        if tenant is None or tenant.phase == Phase.QUEUED:
            return
        tenant.gives = event.evictable > 0
        parts = [_part(n, tenant.devices) for n in (event.held, event.evictable, event.cold)]
        wanted = _part(event.wanted, tenant.devices)
        report = Report(parts[0], wanted, parts[1], parts[2])
        for device in tenant.devices:
            ledger = self._books.devices.get(device)
            if ledger is not None:
                self._enter(device, ledger, tenant, report)

    def exited(self, job: str) -> None:
        """A job is gone, or wants to run no more."""
        self._leave(job, ())

    def _leave(self, job: str, but: tuple[str, ...]) -> None:
        """A job has nothing on devices but these."""
        for device, ledger in self._books.devices.items():
            if device not in but and job in ledger.account.holders:
                ledger.left(job)
                self._touch(device)

    def lines(self, device: str) -> list[Line]:
        """Who has how much of a device's memory; [] where that is not known."""
        ledger = self._books.devices.get(device)
        return ledger.view() if ledger is not None else []

    # --- what follows -----------------------------------------------------------------------

    def take_back(self, device: str) -> None:
        """What jobs, and instances that wait, are to give and have not taken is given at once; and
        what caches are to give."""
        ledger = self._books.devices[device]
        for name, holder in ledger.account.holders.items():
            kind = holder.terms.kind
            if holder.asked and kind == Kind.RESULTS:  # they go as soon as it is told
                ledger.gave(name, holder.asked)
            if not holder.asked or not holder.promised:
                continue
            if kind == Kind.JOB or (kind == Kind.INSTANCE and self._state.workers[name].pending):
                ledger.yields(name)

    def waiting(self, device: str) -> list[WorkerState]:
        """Instances that wait for memory there."""
        return [w for w in self._state.workers.values() if w.device == device and w.pending]

    def to_give(self, device: str) -> list[WorkerState]:
        """Instances there that are to give what they have. Who has work is left at it: its turn
        comes when it idles."""
        holders = self._books.devices[device].account.holders
        workers = self._state.workers
        asked = [n for n, h in holders.items() if h.terms.kind == Kind.INSTANCE and h.asked]
        return [workers[n] for n in asked if self._idles(workers[n])]

    def _idles(self, worker: WorkerState) -> bool:
        """Whether an instance may be unloaded now."""
        there = worker.up and not worker.retiring
        return there and returning.idles(self._state, worker)

    def tell_jobs(self) -> None:
        """Order what jobs may have, where that has changed: at least what they are guaranteed, also
        where others do not give it at once."""
        for tenant in self._state.tenants.values():
            held = most = 0
            for device in tenant.devices:
                ledger = self._books.devices.get(device)
                holder = ledger.account.holders.get(tenant.id) if ledger is not None else None
                if holder is not None:
                    held += holder.held + holder.over
                    most += max(holder.keeps, holder.sure)
            if held <= most or not gives(tenant, tenant.kind, self._desk.devices):
                most = -1
            if most != tenant.most:
                tenant.most = most
                self._desk.out.append(a.Resize(self._desk.cause, tenant.id, most))

    def tell_caches(self, device: str) -> None:
        """Order what caches of results may have, where that has changed."""
        state, ledger = self._state, self._books.devices[device]
        for name, holder in ledger.account.holders.items():
            if holder.terms.kind == Kind.RESULTS:
                most = holder.keeps if holder.over or not ledger.free else -1
                if most != state.caches.get(name, -1):
                    state.caches[name] = most
                    self._desk.out.append(a.Resize(self._desk.cause, name, most))

    def ask_back(self, device: str) -> None:
        """Ask for what was taken from jobs and has no room yet: they rest until all is back."""
        ledger = self._books.devices[device]
        lacking = {n: h for n, h in ledger.account.holders.items() if h.lacks}
        if not lacking:
            return
        self._refresh(ledger)
        for name, holder in lacking.items():
            ledger.ask(name, holder.wanted - holder.held, self._state.now)
        self.take_back(device)

    def again(self, device: str) -> None:
        """Look at a device again before long, if somebody waits for its memory."""
        state, holders = self._state, self._books.devices[device].account.holders
        waiting = any(w.pending and w.device == device for w in state.workers.values())
        waiting = waiting or any(h.waiting or h.lacks for h in holders.values())
        if waiting and state.again.get(device, 0) <= state.now:
            state.again[device] = state.now + AGAIN
            self._desk.watch(state.again[device], "budget", device)

    def due(self, device: str) -> None:
        """The time has come that ``again`` set."""
        self._touch(device)

    # --- inside -----------------------------------------------------------------------------

    def _ask(self, device: str, ledger: Ledger, name: str, size: int) -> None:
        """Ask for what a holder needs beyond what it holds."""
        self._refresh(ledger)
        ledger.ask(name, size, self._state.now)
        self.take_back(device)
        self._touch(device)

    def _touch(self, device: str) -> None:
        self._books.touched[device] = None

    def _training(self, kind: str) -> list[DeviceSpec]:
        return [d for d in self._desk.devices if d.kind == kind and d.trains]

    def _admit(self, ledger: Ledger, worker: WorkerState, there: bool = False) -> bool:
        """Take an instance in: with what it needs as its guarantee, if others leave that, or to
        borrow it if it may be unloaded. One that is ``there`` already has what they leave."""
        service, need = self._state.services[worker.service], worker.memory
        if not service.unloads:
            self._end_terms(ledger, need)
        if not service.unloads and need > ledger.unpromised:
            if not there:
                return False
            need = ledger.unpromised
        guaranteed = 0 if service.unloads else need
        terms = Terms(worker.id, Kind.INSTANCE, guaranteed, need, cooperative=False)
        refused = ledger.admit(terms)
        assert not refused, refused
        return True

    def _end_terms(self, ledger: Ledger, need: int) -> None:
        """Pools that have what their first answer needs for a while (``pools.TERM``) make way for
        who needs its guarantee for good."""
        for name, holder in ledger.account.holders.items():
            if holder.terms.kind == Kind.KV and need > ledger.unpromised:
                worker = self._state.workers[name.removesuffix(KV)]
                own = self._state.services[worker.service].kv
                ledger.guarantee(name, min(own, holder.terms.guaranteed))
                self._state.first.pop(worker.id, None)

    def _promised(self, device: str, ledger: Ledger, job: str) -> int:
        """Bytes that are guaranteed there to others than a job, also to those who do not want them
        now."""
        found, services = 0, self._state.services
        instances = dict.fromkeys(services, 0)
        for name, holder in ledger.account.holders.items():
            if holder.terms.kind == Kind.INSTANCE:
                instances[self._state.workers[name].service] += holder.terms.guaranteed
            elif holder.terms.kind == Kind.JOB and name != job:
                found += holder.terms.guaranteed
        for service in services.values():
            if not service.offer and not service.versions:
                continue  # it was declined: nothing of it is loaded
            if device in service.wanted and not service.unloads:
                places = service.places.get(device)
                count = service.instances if places is None else len(places)
                need = count * self.need(service.name, device)
                instances[service.name] = max(need, instances[service.name])
            if device in service.wanted and ledger is self._books.pools.get(device):
                found += service.instances * service.kv
        return found + sum(instances.values())

    def need(self, service: str, device: str) -> int:
        """Bytes that an instance needs on a device: as declared or, if that is more, as measured; 0
        if neither is known."""
        found, kind = self._state.services[service], self._desk.specs[device].kind
        declared = found.memory.get(kind, found.memory.get("", 0))
        return max(declared, found.occupies.get(kind, 0))

    def _cache(self, event: e.Held) -> None:
        """A cache has what nobody else needs: it is booked as far as that is free."""
        host = [d.id for d in self._desk.devices if d.kind == "cpu" and d.id in self._books.devices]
        for device in host[:1]:
            ledger, name = self._books.devices[device], event.holder
            there = name in ledger.account.holders
            if not event.held:
                if there:
                    ledger.left(name)
                self._state.caches.pop(name, None)
            else:
                if not there:
                    ledger.admit(Terms(name, Kind.RESULTS, 0, ledger.usable))
                report = Report(event.held, event.held, event.held, event.held)
                ledger.holds(name, report)
                if ledger.account.holders[name].over:
                    self._ask(device, ledger, name, ledger.account.holders[name].over)
                    ledger.holds(name, report)
            self._touch(device)

    def _enter(self, device: str, ledger: Ledger, tenant: Tenant, report: Report) -> None:
        holder = ledger.account.holders.get(tenant.id)
        if holder is None:
            if not gives(tenant, tenant.kind, self._desk.devices):
                return  # it has no limit: nobody could rely on what it leaves
            ledger.admit(Terms(tenant.id, Kind.JOB, 0, ledger.usable))
            holder = ledger.account.holders[tenant.id]
        self._price(device, holder.terms)
        part = _part(self.guaranteed(tenant, tenant.kind), tenant.devices)
        if part <= ledger.unpromised + holder.terms.guaranteed:
            ledger.guarantee(tenant.id, min(part, holder.terms.limit))
        ledger.holds(tenant.id, report)
        if holder.over:
            self._ask(device, ledger, tenant.id, holder.promised + holder.over)
            ledger.holds(tenant.id, report)
        self._touch(device)

    def _price(self, device: str, terms: Terms) -> None:
        """Enter what a job's memory costs it there."""
        cost = self._desk.specs[device].eviction
        terms.give_cost, terms.back_cost, terms.rest_ns = cost.out.byte, cost.back.byte, cost.rest

    def _refresh(self, ledger: Ledger) -> None:
        """Enter which instances idle, before others may be asked to give."""
        state = self._state
        for name, holder in ledger.account.holders.items():
            if holder.terms.kind != Kind.INSTANCE or not state.workers[name].up:
                continue
            worker = state.workers[name]
            idle = self._idles(worker)
            wanted = 0 if idle else worker.memory
            report = Report(worker.memory, wanted, worker.memory if idle else 0)
            report.returns_at = returning.expected(state.services[worker.service], state.now)
            ledger.holds(name, report)


def gives(tenant: Tenant, kind: str, devices: Iterable[DeviceSpec]) -> bool:
    """Whether a job can be made to give memory on devices of a kind."""
    return tenant.gives or all(d.evicts for d in devices if d.kind == kind and d.trains)


def _part(size: int, devices: tuple[str, ...]) -> int:
    """What of a job's memory is on each of its devices: there is no telling, so as much on each."""
    return -(-size // max(1, len(devices)))
