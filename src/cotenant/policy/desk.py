"""What the dispatcher's rooms share: the state, the devices, and the actions decided on so far."""

from __future__ import annotations

from heapq import heappop, heappush

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import DeviceSpec
from cotenant.domain.request import Refusal
from cotenant.policy.state import DispatcherState, PartitionState, ServiceState


class Desk:
    """One event at a time is on it; ``out`` are the actions that it leads to."""

    def __init__(self, devices: tuple[DeviceSpec, ...], state: DispatcherState) -> None:
        self.compute: dict[str, int] = {}
        """Units of each kind of device that trains: what jobs can have shares of."""
        self.specs: dict[str, DeviceSpec] = {}
        self.know(devices)
        self.state = state
        self.out: list[a.Action] = []
        self._event: e.Event = e.Woke()
        self._caused_by = ""

    def know(self, devices: tuple[DeviceSpec, ...]) -> None:
        """This is what the devices say of themselves."""
        self.devices = devices
        self.specs = {d.id: d for d in devices}
        self.compute.clear()
        for device in devices:
            if device.trains:
                self.compute[device.kind] = self.compute.get(device.kind, 0) + device.compute

    def begin(self, now: int, event: e.Event) -> None:
        """Take up an event. A clock that went backwards is held still."""
        if now > self.state.now:
            self.state.now = now
        self.out = []
        self._event, self._caused_by = event, ""

    @property
    def cause(self) -> str:
        """Type and subject of the event, as actions name it."""
        self._caused_by = self._caused_by or cause_of(self._event)
        return self._caused_by

    def reject(
        self, request_id: int, refusal: Refusal, retry_after: int = 0, detail: str = ""
    ) -> None:
        """Answer a request with an error."""
        self.state.retried.pop(request_id, None)
        self.state.residents.pop(request_id, None)
        self.out.append(a.Reject(self.cause, request_id, refusal, retry_after, detail))

    # --- time -------------------------------------------------------------------------------

    def set_wake(self, partition: PartitionState, at: int) -> None:
        """Look at a partition again at this time (ns), if not before."""
        if partition.wake and self.state.now < partition.wake <= at:
            return
        at = max(at, self.state.now + 1)
        partition.wake = at
        heappush(self.state.timers, (at, partition.id))

    def due(self) -> PartitionState | None:
        """The next partition whose time has come, once each; None if there is no more."""
        state = self.state
        while state.timers and state.timers[0][0] <= state.now:
            at, name = heappop(state.timers)
            partition = state.partitions.get(name)
            if partition is not None and partition.wake == at:
                partition.wake = 0
                return partition
        return None

    def watch(self, at: int, what: str, name: str) -> None:
        """Look at this time (ns) what became of something."""
        heappush(self.state.watches, (at, what, name))

    def watch_service(self, service: ServiceState, at: int) -> None:
        """Look at this time (ns) whether somebody waits for a service in vain, if not before."""
        if service.looked_at <= self.state.now or at < service.looked_at:
            service.looked_at = at
            self.watch(at, "service", service.name)

    def watched(self) -> list[tuple[str, str]]:
        """What is to be looked at now."""
        state, found = self.state, []
        while state.watches and state.watches[0][0] <= state.now:
            found.append(heappop(state.watches)[1:])
        return found

    def arm(self) -> None:
        """Order a wake-up for the earliest thing that is due, unless one is ordered."""
        state = self.state
        timers, expiries = state.timers, state.expiries
        while timers:
            partition = state.partitions.get(timers[0][1])
            if partition is not None and partition.wake == timers[0][0]:
                break
            heappop(timers)
        while expiries and expiries[0][1] not in state.queued:
            heappop(expiries)
        due = timers[0][0] if timers else 0
        if expiries and (not due or expiries[0][0] < due):
            due = expiries[0][0]
        if state.watches and (not due or state.watches[0][0] < due):
            due = state.watches[0][0]
        if due and (not state.armed or due < state.armed):
            state.armed = due
            self.out.append(a.WakeAt(self.cause, due))


def cause_of(event: e.Event) -> str:
    """``Type:subject`` of an event, for the ``cause`` of actions and for people."""
    match event:
        case e.Arrived(request=request):
            return f"Arrived:{request.id}"
        case e.BatchDone(batch=batch) | e.BatchFailed(batch=batch):
            return f"{type(event).__name__}:{batch}"
        case e.Planned(plan=plan):
            return f"Planned:{plan.version}"
        case e.Revoked(job=job, partition=partition) | e.Granted(job=job, partition=partition):
            return f"{type(event).__name__}:{job}@{partition}"
        case (
            e.ServiceAdded(service=service)
            | e.ServiceRemoved(service=service)
            | e.VersionOffered(service=service)
            | e.VersionGone(service=service)
            | e.VariantsKnown(service=service)
        ):
            return f"{type(event).__name__}:{service}"
        case e.DeviceChanged(spec=spec):
            return f"DeviceChanged:{spec.id}"
        case (
            e.JobQueued(job=job) | e.JobReady(job=job) | e.JobLevel(job=job) | e.JobExited(job=job)
        ):
            return f"{type(event).__name__}:{job}"
        case e.WorkerUp(worker=worker) | e.WorkerDown(worker=worker) | e.LoadFailed(worker=worker):
            return f"{type(event).__name__}:{worker}"
        case _:
            return type(event).__name__
