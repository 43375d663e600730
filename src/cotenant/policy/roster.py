"""The roster: which services there are, and which instances of their models serve."""

from __future__ import annotations

from collections.abc import Callable

from cotenant.domain import events as e
from cotenant.domain.request import Refusal, Request
from cotenant.domain.units import S
from cotenant.policy import builds, queues
from cotenant.policy.desk import Desk
from cotenant.policy.estimate import Costs, Median, Quantile, size_class
from cotenant.policy.state import (
    ServiceState,
    WorkerState,
    coming,
    enter_pool,
    leave_pool,
    served,
)
from cotenant.policy.tail import caution, missable, watched
from cotenant.policy.turns import Turns


class Roster:
    """See the module's text."""

    def __init__(self, desk: Desk, turns: Turns) -> None:
        self._desk = desk
        self._turns = turns
        self._state = desk.state

    # --- services ---------------------------------------------------------------------------

    def service_added(self, event: e.ServiceAdded) -> None:
        """A service comes, or its bounds are others from now on."""
        state = self._state
        old = state.services.get(event.service)
        if old is not None:
            old.objective, old.max_batch = event.objective, event.max_batch
            old.max_queue, old.preferred = event.max_queue, event.preferred
            old.max_queue_delay, old.strict = event.max_queue_delay, event.strict
            old.missable, old.caution = missable(event.percentile), caution(event.percentile)
            old.tail.ppm = watched(event.percentile)
            old.instances, old.keep, old.memory = event.instances, event.keep, event.memory
            old.pace, old.kv, old.unloads = event.pace, event.kv, event.unloads
            if not old.unloads:
                old.asleep.clear()
            return
        state.services[event.service] = ServiceState(
            name=event.service,
            objective=event.objective,
            max_batch=event.max_batch,
            max_queue=event.max_queue,
            preferred=event.preferred,
            max_queue_delay=event.max_queue_delay,
            strict=event.strict,
            missable=missable(event.percentile),
            caution=caution(event.percentile),
            tail=Quantile(max(1, event.objective // 16), watched(event.percentile)),
            back=Median(),
            instances=event.instances,
            keep=event.keep,
            memory=event.memory,
            pace=event.pace,
            kv=event.kv,
            unloads=event.unloads,
        )
        self.link()

    def service_removed(self, event: e.ServiceRemoved) -> None:
        """Refuse what the service has queued; it goes when the last of its instances is down."""
        service = self._state.services.get(event.service)
        if service is None:
            return
        self._refuse_where(service, Refusal.UNAVAILABLE, lambda _: True)
        service.max_queue = 0
        self.forget_if_empty(service)

    def forget_if_empty(self, service: ServiceState) -> None:
        """Forget a service that was removed, once no instance of it is left."""
        workers = self._state.workers.values()
        if service.max_queue == 0 and all(w.service != service.name for w in workers):
            del self._state.services[service.name]
            self.link()

    def version_changed(self, service: ServiceState) -> None:
        """Requests go to other instances than before: what is queued may run now."""
        self._turns.place(service)

    def link(self) -> None:
        """Connect services and jobs with the partitions that the plan in force gives them."""
        state, plan = self._state, self._state.plan
        leaving = self._bound()
        for partition in state.partitions.values():
            partition.services = [
                s for s, ps in plan.services.items() if partition.id in ps and s in state.services
            ]
            partition.services += [
                s for s in leaving.get(partition.id, {}) if s not in partition.services
            ]
            partition.owners = [j for j, ps in plan.jobs.items() if partition.id in ps]
            partition.lendable = partition.id in plan.lendable
            partition.waiting = {s: None for s in partition.services if state.services[s].queued}
        for service in state.services.values():
            mine = plan.services.get(service.name, ())
            service.partitions = [p for p in mine if p in state.partitions]
            service.partitions += [
                p for p, names in leaving.items() if service.name in names and p not in mine
            ]
            kinds = [state.partitions[p].kind for p in service.partitions]
            service.home = kinds[0] if kinds else service.home
            for kind in kinds:
                service.exec.setdefault(kind, Costs())

    def _bound(self) -> dict[str, dict[str, None]]:
        """Services by the partition that instances of theirs are bound to and are to leave: until
        these go they serve there, and they finish what they have begun, whoever has it by the plan.
        One that is warm before the plan is in force waits for that."""
        state = self._state
        found: dict[str, dict[str, None]] = {}
        for worker in state.workers.values():
            if worker.place not in state.partitions or not worker.up:
                continue
            residents = (resident.worker for resident in state.residents.values())
            leaves = worker.place not in state.services[worker.service].places.get(
                worker.device, ()
            )
            if worker.batch or worker.id in residents or (leaves and not worker.retiring):
                found.setdefault(worker.place, {})[worker.service] = None
        return found

    # --- workers ----------------------------------------------------------------------------

    def worker_up(self, event: e.WorkerUp) -> None:
        """An instance takes batches from now on."""
        state = self._state
        worker = state.workers.get(event.worker)
        if worker is None or worker.up or worker.retiring:
            return
        service = state.services[worker.service]
        service.load_ns = event.load_ns or state.now - worker.since
        worker.up, worker.since = True, state.now
        worker.memory = max(worker.memory, event.memory)
        worker.room = worker.most_room = event.room
        worker.pool = worker.pool_now = worker.held = event.pool
        worker.block = event.block
        service.turns = event.turns
        kind = self._desk.specs[event.device].kind
        service.home = service.home or kind
        service.occupies[kind] = max(event.memory, service.occupies.get(kind, 0))
        builds.shown(service, kind)
        if not any(w.up and w.id != worker.id for w in self._alike(worker, kind)):
            worker.standby = False
            builds.serve(service, kind, worker.variant)
        costs = builds.costs(service, kind, worker.variant)
        for units, rows, ns in event.profile:
            costs.profile(units, rows, ns, size_class(event.size))
        if not worker.standby:
            self._enter(service, worker)

    def _enter(self, service: ServiceState, worker: WorkerState) -> None:
        """An instance is given batches from now on."""
        service.workers += 1
        service.at[worker.site] = service.at.get(worker.site, 0) + 1
        if not worker.batch:
            enter_pool(service, worker)
        if worker.place:
            self.link()

    def call(self, worker: WorkerState) -> None:
        """An instance that stood by serves."""
        worker.standby = False
        if worker.up:
            self._enter(self._state.services[worker.service], worker)

    def stand_by(self, worker: WorkerState) -> None:
        """An instance that served is kept, and given nothing new."""
        worker.standby = True
        if worker.up:
            leave_pool(self._state.services[worker.service], worker)

    def _alike(self, worker: WorkerState, kind: str) -> list[WorkerState]:
        """A worker and the others of its service on devices of its kind."""
        return [
            w
            for w in self._state.workers.values()
            if w.service == worker.service and self._desk.specs[w.device].kind == kind
        ]

    def worker_down(self, worker: WorkerState) -> None:
        """An instance is gone. What it executed is tried once more elsewhere."""
        state = self._state
        residents = self._residents(worker)
        del state.workers[worker.id]
        service = state.services[worker.service]
        lost = [r for r in state.running.values() if r.worker == worker.id]
        for running in lost:
            del state.running[running.batch.id]
        if lost:
            state.partitions[lost[0].partition].at_hand = 0
        partition = self._turns.free(lost[0]) if lost else None
        if not worker.rests:
            leave_pool(service, worker)
        for running in lost:
            begun = running.batch.id == worker.batch
            self._turns.give_back(service, running.requests, begun)
        self._turns.give_back(service, residents, begun=True)
        self.refuse_orphans(service)
        self.forget_if_empty(service)
        if worker.place:
            self._unbind(worker)
        if partition is not None:
            self._turns.go_on(service, partition)
        elif residents:
            self._turns.place(service)

    def retire(self, worker: WorkerState) -> None:
        """An instance is given nothing new."""
        worker.retiring = True
        service = self._state.services[worker.service]
        if worker.up and not worker.standby:
            leave_pool(service, worker)
            self.refuse_orphans(service)
            if worker.place:
                self._unbind(worker)

    def _unbind(self, worker: WorkerState) -> None:
        """An instance leaves its partition to who has it by the plan."""
        self.link()
        partition = self._state.partitions.get(worker.place)
        if partition is not None:
            self._turns.run(partition)

    def _residents(self, worker: WorkerState) -> list[Request]:
        """Take the requests that a worker had between two turns out of the queue."""
        state = self._state
        ids = [r for r, resident in state.residents.items() if resident.worker == worker.id]
        found = [queues.withdraw(state, request) for request in ids]
        return [request for request in found if request is not None]

    def refuse_orphans(self, service: ServiceState) -> None:
        """Refuse what waits for a version that no instance serves any more, unless one is being
        loaded and may yet be in time: that is looked at again when the first of it is due."""
        there = served(self._state, service)
        awaited, now = coming(self._state, service), self._state.now

        due: list[int] = []

        def in_vain(request: Request) -> bool:
            version = request.version or service.version
            if version in there or request.id in self._state.residents:
                return False
            if (version or service.offer) not in awaited or request.deadline <= now:
                return True
            due.append(request.deadline)
            return False

        self._refuse_where(service, Refusal.UNAVAILABLE, in_vain)
        if due:
            self._desk.watch_service(service, min(due))

    def _refuse_where(
        self, service: ServiceState, refusal: Refusal, condition: Callable[[Request], bool]
    ) -> None:
        queued = self._state.queued.values()
        chosen = [r.id for r in queued if r.service == service.name and condition(r)]
        for request_id in chosen:
            queues.withdraw(self._state, request_id)
            self._desk.reject(request_id, refusal, retry_after=1 * S)
