"""The dispatcher: decides in time. ``handle(now, event)`` returns the actions to carry out.

Laws (docs/design.md says why):

1. A partition serves one holder at a time, a batch or the job it is granted to; both only on a
   device of level ``PRIORITY``, and only while the job is being taken off. A worker has at most
   one more batch at hand, which it goes on with.
2. Inference never waits for a slice to end: an arrival on a lent partition revokes the grant
   at once.
3. Order: priority class, then least slack; ageing keeps the lowest class alive. What cannot be in
   time any more makes way, once.
4. Batching is work-conserving; a batch is held back only if its service says so. Of requests that
   arrive together each idle worker gets its share. A batch that can grow no more and is short is
   handed to a worker while it executes the one before.
5. What cannot make its deadline is refused on arrival; what was accepted is answered exactly
   once, with a result or an error.
6. An idle partition is lent at once.
7. Slices grow while the objective has headroom, are halved near it, zero beyond it.
8. A guaranteed share is a debt that is paid: it tightens admission.
9. Same events, same state: same actions, in the same order.

``cotenant.policy.invariants.check`` states what must hold after every event. What is decided where:

=========== ====================================================================
room        decides
=========== ====================================================================
`relayout`  when a device's layout gives way to that of a new plan
`residency` which version is loaded on which device, in which variant; what is unloaded
`roster`    which services and instances there are
`turns`     which batch runs next, where; what follows from its end
`tenancy`   which jobs run, on which devices; when one is stopped
`holds`     which job has which partition; taking it back
`pools`     how large which pool of keys and values is
`budgets`   whether there is memory for an instance, a job; who gives it
=========== ====================================================================

Each uses those below it only; what one event means for several is said here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import DeviceSpec
from cotenant.policy.desk import Desk
from cotenant.policy.holds import Holds
from cotenant.policy.memory.books import Books
from cotenant.policy.memory.budgets import Budgets
from cotenant.policy.memory.pools import Pools
from cotenant.policy.relayout import Relayout
from cotenant.policy.residency import Residency
from cotenant.policy.roster import Roster
from cotenant.policy.state import DispatcherState, PartitionState, ServiceState
from cotenant.policy.tenancy import Tenancy
from cotenant.policy.turns import Turns


class Dispatcher:
    """Owns a ``DispatcherState`` and turns events into actions.

    ``devices`` are those of the box; ``state`` may be a checkpoint.
    """

    def __init__(
        self, devices: tuple[DeviceSpec, ...], state: DispatcherState | None = None
    ) -> None:
        self.state = state if state is not None else DispatcherState()
        self._desk = Desk(devices, self.state)
        self.compute = self._desk.compute
        self.books = books = Books(devices, self.state.accounts)
        self.budgets = budgets = Budgets(self._desk, books)
        self._holds = holds = Holds(self._desk)
        self._tenancy = tenancy = Tenancy(self._desk, holds, budgets)
        self._turns = turns = Turns(self._desk, holds)
        self._roster = roster = Roster(self._desk, turns)
        self._residency = residency = Residency(self._desk, roster, budgets)
        self._relayout = Relayout(self._desk, holds, tenancy, turns, roster, residency)
        self._pools = Pools(self._desk, books)
        self._handlers: dict[type, Callable[[Any], None]] = {
            e.ServiceAdded: self._service_added,
            e.ServiceRemoved: self._service_removed,
            e.VersionOffered: residency.offered,
            e.VersionGone: residency.gone,
            e.VariantsKnown: residency.variants,
            e.WorkerUp: self._worker_up,
            e.LoadFailed: self._load_failed,
            e.WorkerDown: self._worker_down,
            e.Held: self._held,
            e.Arrived: self._arrived,
            e.Cancelled: turns.cancelled,
            e.BatchDone: self._batch_done,
            e.BatchFailed: self._batch_failed,
            e.JobQueued: tenancy.queued,
            e.JobReady: self._job_ready,
            e.JobLevel: self._job_level,
            e.JobExited: self._job_exited,
            e.Granted: holds.granted,
            e.Revoked: self._revoked,
            e.ActionFailed: self._action_failed,
            e.Repartitioned: self._relayout.repartitioned,
            e.DeviceChanged: self._device_changed,
            e.Planned: self._planned,
            e.Woke: self._woke,
            e.Draining: self._draining,
        }

    @property
    def devices(self) -> tuple[DeviceSpec, ...]:
        """What the devices say of themselves, as was told last."""
        return self._desk.devices

    def handle(self, now: int, event: e.Event) -> list[a.Action]:
        """Decide. ``now`` is in ns; a clock that went backwards is held still."""
        self._desk.begin(now, event)
        self._handlers[type(event)](event)
        if self.books.pools:
            self._place(self._pools.look())
        if self.books.touched:
            self._memory()
        if self.state.leaving:
            self._residency.let_go()
        self._desk.arm()
        return self._desk.out

    # --- what concerns several rooms --------------------------------------------------------

    def _service_added(self, event: e.ServiceAdded) -> None:
        self._roster.service_added(event)
        self._tenancy.part()
        self.budgets.changed(self.state.services[event.service])
        self._residency.settle(event.service)

    def _service_removed(self, event: e.ServiceRemoved) -> None:
        self._residency.removed(event)
        self._roster.service_removed(event)

    def _worker_up(self, event: e.WorkerUp) -> None:
        worker = self.state.workers.get(event.worker)
        was_up = worker is not None and worker.up
        self._roster.worker_up(event)
        if worker is not None and worker.up and not was_up:
            self.budgets.up(worker)
            self._place([*self._pools.worker_up(worker), self.state.services[worker.service]])
        self._residency.settle(event.service)
        self._relayout.settle()

    def _load_failed(self, event: e.LoadFailed) -> None:
        self._residency.load_failed(event)
        self._relayout.settle()
        self._tenancy.settle()

    def _worker_down(self, event: e.WorkerDown) -> None:
        worker = self.state.workers.get(event.worker)
        if worker is None:
            return
        if not worker.up:
            self._load_failed(e.LoadFailed(event.worker, event.reason))
            return
        grown = self._pools.worker_down(worker)
        self.budgets.down(worker)
        self._roster.worker_down(worker)
        self._place(grown)
        self._residency.lost(worker)
        self._relayout.settle()
        self._tenancy.settle()

    def _arrived(self, event: e.Arrived) -> None:
        self._residency.wake(event.request)
        self._turns.arrived(event)

    def _held(self, event: e.Held) -> None:
        self.budgets.reported(event)
        self._place(self._pools.reported(event))

    def _memory(self) -> None:
        """What became of the ledgers is told those whom it concerns."""
        for device in self.books.touched:
            self.budgets.take_back(device)
        self._tenancy.settle()
        for device in list(self.books.touched):
            self.budgets.ask_back(device)
            for worker in self.budgets.waiting(device):
                if self.budgets.load(worker):  # begun at once: else the next takes it back
                    self._residency.begin(worker)
            self._residency.give_up(device)
            for worker in self.budgets.to_give(device):
                if not worker.retiring:
                    self._residency.put_to_sleep(worker)
            self._place(self._pools.changed(device))
            self.budgets.tell_caches(device)
            self.budgets.again(device)
        self.budgets.tell_jobs()
        self.books.touched.clear()

    def _place(self, grown: list[ServiceState]) -> None:
        """Who waited for memory may have found it."""
        for service in grown:
            if service.queued and service.name in self.state.services:
                self._turns.place(service)

    def _batch_done(self, event: e.BatchDone) -> None:
        self._turns.batch_done(event)
        if self.state.changes:
            self._relayout.settle()

    def _batch_failed(self, event: e.BatchFailed) -> None:
        self._turns.batch_failed(event)
        self._relayout.settle()

    def _revoked(self, event: e.Revoked) -> None:
        self._freed(self._holds.revoked(event))

    def _job_exited(self, event: e.JobExited) -> None:
        for partition in self._tenancy.exited(event):
            self._freed(partition)
        self._relayout.settle()
        self._tenancy.settle()

    def _action_failed(self, event: e.ActionFailed) -> None:
        match event.action:
            case "Repartition":
                self._relayout.refused(event.target)
            case "Dispatch":
                self._turns.dispatch_failed(event)
                self._relayout.settle()
            case "Revoke":
                self._tenancy.failed(event)
                self._stopped(event.job)
            case _:
                self._freed(self._holds.failed(event))

    def _freed(self, partition: PartitionState | None) -> None:
        """A job left a partition: use it, and look again at whoever did not get it."""
        if partition is None:
            return
        self._turns.run(partition)
        self._turns.place_waiting(partition)
        for other in self._holds.below_limit():
            self._turns.run(other)
        self._relayout.settle()

    def _stopped(self, job: str) -> None:
        """It may be long until a job has left what it has: who waits for that uses others."""
        share = self.state.jobs.get(job)
        for name in share.held if share is not None else ():
            self._turns.place_waiting(self.state.partitions[name])

    def _job_ready(self, event: e.JobReady) -> None:
        if self._tenancy.ready(event):
            for partition in self.state.partitions.values():
                if not self._holds.rotate(partition):
                    self._turns.run(partition)

    def _job_level(self, event: e.JobLevel) -> None:
        self._tenancy.level(event)
        share = self.state.jobs.get(event.job)
        if share is not None and share.stopping:
            self._stopped(event.job)

    def _device_changed(self, event: e.DeviceChanged) -> None:
        spec, before = event.spec, self._desk.specs.get(event.spec.id)
        if before is None:
            return
        self._desk.know(tuple(spec if d.id == spec.id else d for d in self.devices))
        if spec.preempt < before.preempt:
            for job in self._tenancy.weakened(spec):
                self._stopped(job)
        if spec.id in self.books.devices:  # jobs may have to give otherwise than before
            self.books.touched[spec.id] = None

    def _planned(self, event: e.Planned) -> None:
        self._residency.planned(event.plan)
        self._relayout.planned(event)

    def _woke(self, _: e.Woke) -> None:
        self.state.armed = 0
        self._turns.expire()
        for what, name in self._desk.watched():
            match what:
                case "partition":
                    self._stopped(self._tenancy.partition_overdue(name))
                case "job":
                    self._tenancy.job_overdue(name)
                case "service":
                    self._residency.settle(name)
                case "memory":
                    self._pools.due(name)
                case "budget":
                    self.budgets.due(name)
        while (partition := self._desk.due()) is not None:
            self._turns.run(partition)
            self._turns.place_waiting(partition)
            self._holds.slice_over(partition)

    def _draining(self, _: e.Draining) -> None:
        self.state.draining = True
