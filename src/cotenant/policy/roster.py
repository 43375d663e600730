"""The roster: which services there are, and which instances of their models serve."""

from __future__ import annotations

from collections.abc import Callable

from cotenant.domain import events as e
from cotenant.domain.request import Refusal, Request
from cotenant.domain.units import S
from cotenant.policy import queues
from cotenant.policy.desk import Desk
from cotenant.policy.estimate import Costs, Median, Quantile, size_class
from cotenant.policy.relayout import Relayout
from cotenant.policy.state import ServiceState, WorkerState, enter_pool, leave_pool, served
from cotenant.policy.tail import caution, missable, watched
from cotenant.policy.turns import Turns


class Roster:
    """See the module's text."""

    def __init__(self, desk: Desk, turns: Turns, relayout: Relayout) -> None:
        self._desk = desk
        self._turns = turns
        self._relayout = relayout
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
        )
        self._relayout.link()

    def service_removed(self, event: e.ServiceRemoved) -> None:
        """Refuse what the service has queued; it goes when the last of its instances is down."""
        service = self._state.services.get(event.service)
        if service is None:
            return
        self._refuse_where(service, Refusal.UNAVAILABLE, lambda _: True)
        service.max_queue = 0
        if not self._has_workers(service):
            self._forget(service)

    def _forget(self, service: ServiceState) -> None:
        del self._state.services[service.name]
        self._relayout.link()

    def version_current(self, event: e.VersionCurrent) -> None:
        """Requests that name no version go to this one."""
        service = self._state.services.get(event.service)
        if service is not None:
            service.version = event.version
            self._turns.place(service)

    # --- workers ----------------------------------------------------------------------------

    def worker_up(self, event: e.WorkerUp) -> None:
        """An instance takes batches from now on."""
        state = self._state
        service = state.services.get(event.service)
        if service is None or event.worker in state.workers:
            return
        kind = self._desk.specs[event.device].kind
        service.home = service.home or kind
        costs = service.exec.setdefault(kind, Costs())
        for units, rows, ns in event.profile:
            costs.profile(units, rows, ns, size_class(event.size))
        worker = WorkerState(event.worker, event.service, event.version, event.device)
        state.workers[event.worker] = worker
        enter_pool(service, worker)
        service.workers += 1
        service.at[event.device] = service.at.get(event.device, 0) + 1
        if not service.version:
            service.version = event.version
        self._turns.place(service)

    def worker_down(self, event: e.WorkerDown) -> None:
        """An instance is gone. What it executed is tried once more elsewhere."""
        state = self._state
        worker = state.workers.get(event.worker)
        if worker is None:
            return
        residents = self._residents(worker)
        del state.workers[worker.id]
        service = state.services[worker.service]
        lost = [r for r in state.running.values() if r.worker == worker.id]
        for running in lost:
            del state.running[running.batch.id]
        if lost:
            state.partitions[lost[0].partition].at_hand = 0
        partition = self._turns.free(lost[0]) if lost else None
        if not worker.retiring:
            leave_pool(service, worker)
        for running in lost:
            begun = running.batch.id == worker.batch
            self._turns.give_back(service, running.requests, begun)
        self._turns.give_back(service, residents, begun=True)
        self._refuse_orphans(service)
        if service.workers == 0 and service.max_queue == 0 and not self._has_workers(service):
            self._forget(service)
        if partition is not None:
            self._turns.go_on(service, partition)
        elif residents:
            self._turns.place(service)

    def worker_retiring(self, event: e.WorkerRetiring) -> None:
        """An instance takes no further batch."""
        worker = self._state.workers.get(event.worker)
        if worker is None or worker.retiring:
            return
        worker.retiring = True
        service = self._state.services[worker.service]
        leave_pool(service, worker)
        self._refuse_orphans(service)

    def _residents(self, worker: WorkerState) -> list[Request]:
        """Take the requests that a worker had between two turns out of the queue."""
        state = self._state
        ids = [r for r, resident in state.residents.items() if resident.worker == worker.id]
        found = [queues.withdraw(state, request) for request in ids]
        return [request for request in found if request is not None]

    def _has_workers(self, service: ServiceState) -> bool:
        return any(w.service == service.name for w in self._state.workers.values())

    def _refuse_orphans(self, service: ServiceState) -> None:
        """Refuse what waits for a version that no instance serves any more."""
        versions = served(self._state, service)
        self._refuse_where(
            service,
            Refusal.UNAVAILABLE,
            lambda request: (
                (request.version or service.version) not in versions
                and request.id not in self._state.residents
            ),
        )

    def _refuse_where(
        self, service: ServiceState, refusal: Refusal, condition: Callable[[Request], bool]
    ) -> None:
        queued = self._state.queued.values()
        chosen = [r.id for r in queued if r.service == service.name and condition(r)]
        for request_id in chosen:
            queues.withdraw(self._state, request_id)
            self._desk.reject(request_id, refusal, retry_after=1 * S)
