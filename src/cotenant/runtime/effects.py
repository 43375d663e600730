"""Effects: what the dispatcher orders becomes batches sent, instances loaded, jobs started; and
what instances report becomes events."""

from __future__ import annotations

from collections.abc import Callable

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import DeviceSpec, Launch, Partition, Tenant
from cotenant.runtime.core import Clock, Core
from cotenant.runtime.fleet import Fleet
from cotenant.runtime.jobtenants import JobTenants
from cotenant.runtime.messages import Done, Failed, Run
from cotenant.runtime.models import Models
from cotenant.runtime.requests import Requests


class Effects:
    """The ``Hands`` of the core and the ``Shell`` of the instances; see there. The parts that it
    joins are set once they are made."""

    core: Core
    models: Models
    requests: Requests
    jobs: JobTenants

    def __init__(self, fleet: Fleet, clock: Clock, plan_soon: Callable[[], None]) -> None:
        self._fleet = fleet
        self._clock = clock
        self._plan_soon = plan_soon

    # --- what instances need ----------------------------------------------------------------

    def now(self) -> int:
        """See Shell."""
        return self._clock()

    def feed(self, event: e.Event) -> None:
        """Hand an event to the dispatcher; a change of membership also wakes the planner."""
        self.core.feed(event)
        if isinstance(event, e.ServiceAdded | e.ServiceRemoved | e.WorkerUp | e.LoadFailed):
            self._plan_soon()

    async def launch_worker(self, device: str, place: str, tenant: Tenant) -> Launch:
        """See Shell."""
        partition = self._fleet.partition(place) if place else None
        return await self._fleet.launch((device,), tenant, partition)

    async def attach_worker(self, device: str, tenant: Tenant, pid: int) -> None:
        """See Shell."""
        await self._fleet.attached((device,), tenant, pid)

    def detach_worker(self, device: str, worker: str) -> None:
        """See Shell."""
        self._fleet.detach((device,), worker)

    def units_of(self, device: str, place: str) -> tuple[int, ...]:
        """See Shell."""
        partition = self._fleet.partition(place) if place else None
        if partition is not None:
            return (partition.compute,)
        return next(spec.shapes for spec in self._fleet.specs if spec.id == device)

    def partitions_of(self, device: str) -> tuple[tuple[int, ...], ...]:
        """See Shell."""
        partitions = self.core.dispatcher.state.partitions.values()
        return tuple(p.units for p in partitions if p.device == device and p.services)

    def specs(self) -> tuple[DeviceSpec, ...]:
        """See Shell."""
        return self._fleet.specs

    def kv_of(self, device: str) -> int:
        """See Shell."""
        return next(spec.kv for spec in self._fleet.specs if spec.id == device)

    async def unload(self, name: str) -> None:
        """See Shell."""
        self.models.find(name)
        try:
            await self.models.unload(name, self.requests.drained(name))
        finally:
            self.requests.forget(name)

    def on_result(self, message: Done | Failed) -> None:
        """A batch came back from a worker."""
        self.requests.on_result(message)

    # --- what the dispatcher orders ---------------------------------------------------------

    def on_dispatch(self, action: a.Dispatch, partition: Partition) -> None:
        """See Hands."""
        batch = action.batch
        instances = self.models.services.get(batch.service)
        if instances is None:
            return  # unloaded this very turn: WorkerDown is on its way
        items = self.requests.items(batch, action.worker)
        threads = min(partition.compute, instances.spec.threads or partition.compute)
        run = Run(batch.id, partition.units, threads, self._clock(), items, action.lease)
        instances.send(action.worker, run)

    def on_recall(self, action: a.Recall) -> None:
        """See Hands."""
        for instances in self.models.services.values():
            instances.recall(action.worker, action.batch)

    def on_resize(self, action: a.Resize) -> None:
        """See Hands."""
        self.jobs.resize(action)
        self.requests.results.resize(action.holder, action.size)
        for instances in self.models.services.values():
            instances.resize(action.holder, action.size)

    def on_emit(self, action: a.Emit) -> None:
        """See Hands."""
        self.requests.on_emit(action)

    def on_complete(self, action: a.Complete) -> None:
        """See Hands."""
        self.requests.on_complete(action)

    def on_reject(self, action: a.Reject) -> None:
        """See Hands."""
        self.requests.on_reject(action)

    def on_load(self, action: a.Load) -> None:
        """See Hands."""
        instances = self.models.services.get(action.service)
        if instances is None:
            self.core.feed(e.LoadFailed(action.worker, "the service is gone", final=True))
        else:
            instances.load(action)

    def on_unload(self, action: a.Unload) -> None:
        """See Hands."""
        for instances in self.models.services.values():
            instances.unload(action.worker)

    def on_serve(self, action: a.Serve) -> None:
        """See Hands."""
        self.requests.results.forget(action.service)
        instances = self.models.services.get(action.service)
        if instances is not None:
            instances.serve(action)

    def on_start(self, action: a.Start) -> None:
        """See Hands."""
        self.jobs.start(action)

    def on_stop(self, action: a.Stop) -> None:
        """See Hands."""
        self.jobs.stop(action)

    def on_decline(self, action: a.Decline) -> None:
        """See Hands."""
        instances = self.models.services.get(action.service)
        if instances is not None:
            instances.decline(action)
