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
6. An idle partition is lent after a linger of at most the cost of taking it back.
7. Slices grow while the objective has headroom, are halved near it, zero beyond it.
8. A guaranteed share is a debt that is paid: it tightens admission.
9. Same events, same state: same actions, in the same order.

``cotenant.policy.invariants.check`` states what must hold after every event.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Final

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import DeviceSpec, PreemptLevel
from cotenant.domain.plan import Plan
from cotenant.domain.request import Batch, Refusal, Request
from cotenant.domain.units import MS, S
from cotenant.policy import admission, lending, queues
from cotenant.policy.estimate import Costs, Median, Quantile, size_class
from cotenant.policy.state import (
    DispatcherState,
    Hold,
    JobShare,
    PartitionState,
    Running,
    ServiceState,
    WorkerState,
)

BLOCKED_AFTER_FAILED_GRANT: Final = 1 * S
AHEAD_SHARE, AHEAD_MOST = 16, 20 * MS
"""A batch is handed to a busy worker if it is predicted to take at most 1/AHEAD_SHARE of the
objective and at most AHEAD_MOST. So much longer may somebody more urgent, who comes meanwhile,
be predicted to wait; and of more, the time to send it is no part worth speaking of."""


class Dispatcher:
    """Owns a ``DispatcherState`` and turns events into actions.

    ``devices`` are those of the box; ``state`` may be a checkpoint.
    """

    def __init__(
        self, devices: tuple[DeviceSpec, ...], state: DispatcherState | None = None
    ) -> None:
        self.devices = devices
        self.total_units = sum(d.compute for d in devices if d.trains)
        """Compute units that jobs can have shares of."""
        self._specs = {d.id: d for d in devices}
        self.state = state if state is not None else DispatcherState()
        self._out: list[a.Action] = []
        self._event: e.Event = e.Woke()
        self._caused_by = ""
        self._handlers: dict[type, Callable[[Any], None]] = {
            e.ServiceAdded: self._service_added,
            e.ServiceRemoved: self._service_removed,
            e.Arrived: self._arrived,
            e.Cancelled: self._cancelled,
            e.BatchDone: self._batch_done,
            e.BatchFailed: self._batch_failed,
            e.WorkerUp: self._worker_up,
            e.WorkerRetiring: self._worker_retiring,
            e.WorkerDown: self._worker_down,
            e.VersionCurrent: self._version_current,
            e.JobReady: self._job_ready,
            e.JobExited: self._job_exited,
            e.Granted: self._granted,
            e.Revoked: self._revoked,
            e.ActionFailed: self._action_failed,
            e.Repartitioned: self._repartitioned,
            e.Planned: self._planned,
            e.Woke: self._woke,
            e.Draining: self._draining,
        }

    def handle(self, now: int, event: e.Event) -> list[a.Action]:
        """Decide. ``now`` is in ns; a clock that went backwards is held still."""
        state = self.state
        if now > state.now:
            state.now = now
        self._out = []
        self._event, self._caused_by = event, ""
        self._handlers[type(event)](event)
        self._arm()
        return self._out

    @property
    def _cause(self) -> str:
        self._caused_by = self._caused_by or _cause(self._event)
        return self._caused_by

    # --- requests ---------------------------------------------------------------------------

    def _arrived(self, event: e.Arrived) -> None:
        state, service = self.state, self.state.services.get(event.request.service)
        self._admit(event.request)
        if event.more:
            if service is not None and self._has_share(service):
                state.unplaced.pop(service.name, None)
                self._place(service)
            return
        arrived, state.unplaced = state.unplaced, {}
        for name in arrived:
            service = state.services.get(name)
            if service is not None and service.queued:
                self._place(service)

    def _has_share(self, service: ServiceState) -> bool:
        """Whether what is queued is one free partition's share of a full batch: then it begins, and
        what follows is for the others. Else the first would take all. Lent partitions do not count,
        or they would be taken back for what the free ones can do together."""
        idle = sum(queues.idle_count(service, device) for device in service.idle)
        if not idle:
            return False
        partitions = (self.state.partitions[p] for p in service.partitions)
        free = sum(p.hold == Hold.NONE and not p.batch and not p.retiring for p in partitions)
        return sum(service.rows) * min(free, idle) >= service.max_batch

    def _admit(self, request: Request) -> None:
        state = self.state
        service = state.services.get(request.service)
        if service is None:
            self._reject(request.id, Refusal.UNAVAILABLE)
            return
        if request.version and request.version not in self._served(service):
            self._reject(request.id, Refusal.UNAVAILABLE, retry_after=1 * S)
            return
        lending.note_arrival(service, state.now)
        refused = admission.refuse(state, service, request, state.now, self.total_units)
        if refused is not None:
            self._reject(request.id, *refused)
            return
        queues.enqueue(state, service, request)
        state.unplaced[service.name] = None

    def _place(self, service: ServiceState) -> None:
        """Use more of a service's partitions for what it has queued: free ones first, then take
        back as many lent ones of each device as it has idle workers for there."""
        lent: list[PartitionState] = []
        closing: dict[str, int] = {}
        for name in service.partitions:
            partition = self.state.partitions[name]
            if partition.batch or partition.retiring:
                continue
            if partition.hold in (Hold.GRANTING, Hold.HELD):
                lent.append(partition)
                continue
            self._run(partition)
            if service.queued == 0:
                return
            closing[partition.device] = closing.get(partition.device, 0) + (partition.batch == 0)
        for partition in lent:
            if service.queued == 0:
                return
            device = partition.device
            if closing.get(device, 0) < queues.idle_count(service, device):
                self._run(partition)
                closing[device] = closing.get(device, 0) + (partition.batch == 0)
        if self._plenty(service):
            for name in service.partitions:
                self._hand_ahead(self.state.partitions[name])

    def _cancelled(self, event: e.Cancelled) -> None:
        if queues.withdraw(self.state, event.request) is not None:
            self._reject(event.request, Refusal.CANCELLED)

    def _expire(self) -> None:
        state = self.state
        while state.expiries and state.expiries[0][0] <= state.now:
            _, request_id = heappop(state.expiries)
            if queues.withdraw(state, request_id) is not None:
                self._reject(request_id, Refusal.EXPIRED)

    def _reject(
        self, request_id: int, refusal: Refusal, retry_after: int = 0, detail: str = ""
    ) -> None:
        self.state.retried.pop(request_id, None)
        self._out.append(a.Reject(self._cause, request_id, refusal, retry_after, detail))

    # --- batches ----------------------------------------------------------------------------

    def _run(self, partition: PartitionState) -> None:
        """Start the next batch on a partition that has none, or else see to lending it."""
        state = self.state
        if partition.batch or partition.retiring:
            return
        name, lane_key = self._next_lane(partition)
        if not name:
            self._lend(partition)
            return
        service = state.services[name]
        preempting = partition.hold != Hold.NONE
        if preempting:
            self._revoke(partition)
            if self._specs[partition.device].preempt < PreemptLevel.PRIORITY:
                return
        self._dispatch(partition, service, lane_key, preempting)

    def _next_lane(self, partition: PartitionState) -> tuple[str, str]:
        """The service and lane to run now; services that hold a batch back are passed over."""
        state = self.state
        held: set[str] = set()
        while len(held) < len(partition.waiting):
            name, lane_key = queues.choose_service(state, partition, held)
            if not name:
                break
            service = state.services[name]
            until = queues.hold_until(state, service, lane_key, partition)
            if until <= state.now:
                return name, lane_key
            self._set_wake(partition, until)
            held.add(name)
        return "", ""

    def _dispatch(
        self, partition: PartitionState, service: ServiceState, lane_key: str, preempting: bool
    ) -> None:
        version = service.lanes[lane_key].version or service.version
        worker = self._pick_worker(service, version, partition)
        batch = self._send(partition, service, lane_key, worker, preempting)
        worker.batch = partition.batch = batch
        worker.partition = partition.id
        service.last_start = self.state.now

    def _send(
        self,
        partition: PartitionState,
        service: ServiceState,
        lane_key: str,
        worker: WorkerState,
        preempting: bool = False,
        before: Running | None = None,
    ) -> int:
        """Take a batch from a lane and give it to a worker, to start now or when the one
        ``before`` is done."""
        state = self.state
        start = before.expected_end if before is not None else state.now
        after = before.batch.id if before is not None else 0
        size = service.lanes[lane_key].size
        requests = queues.take_batch(state, service, lane_key, partition, start)
        rows = sum(r.rows for r in requests)
        ids = tuple(r.id for r in requests)
        batch = Batch(state.next_batch, service.name, worker.version, ids, rows)
        state.next_batch += 1
        took = service.exec[partition.kind].predict(partition.compute, rows, size)
        state.running[batch.id] = Running(
            batch=batch,
            requests=requests,
            worker=worker.id,
            partition=partition.id,
            started=state.now,
            expected_end=start + took,
            preempting=preempting,
            after=after,
            size=size,
        )
        self._out.append(a.Dispatch(self._cause, batch, worker.id, partition.id, preempting, after))
        return batch.id

    def _plenty(self, service: ServiceState) -> bool:
        """Whether a batch can be handed ahead and each other partition that has none at hand
        still finds a request."""
        spare = service.queued - service.max_batch
        if spare < 0:
            return False
        return spare >= sum(not self.state.partitions[p].at_hand for p in service.partitions) - 1

    def _hand_ahead(self, partition: PartitionState) -> None:
        """Let a busy worker have its next batch at hand, so that it need not wait for it to be
        sent: one that can grow no more, is short, and takes nothing from other services."""
        state = self.state
        if not partition.batch or partition.at_hand or partition.retiring:
            return
        running = state.running[partition.batch]
        worker = state.workers[running.worker]
        if worker.retiring or partition.services != [worker.service]:
            return
        service = state.services[worker.service]
        if running.expected_end < state.now:
            return
        costs, lanes = service.exec[partition.kind], service.lanes.values()
        longest = max(
            (costs.predict(partition.compute, service.max_batch, lane.size) for lane in lanes),
            default=0,
        )
        if not 0 < longest <= min(AHEAD_MOST, service.objective // AHEAD_SHARE):
            return
        if not self._plenty(service):
            return
        lane_key = queues.full_lane(state, service, running, worker.version)
        if lane_key:
            partition.at_hand = self._send(partition, service, lane_key, worker, before=running)

    def _pick_worker(
        self, service: ServiceState, version: str, partition: PartitionState
    ) -> WorkerState:
        """An idle worker, preferably one that last ran on this partition."""
        idle = service.idle[partition.device][version]
        index = 0
        for i, name in enumerate(idle):
            if self.state.workers[name].partition == partition.id:
                index = i
                break
        return self.state.workers[idle.pop(index)]

    def _batch_done(self, event: e.BatchDone) -> None:
        state = self.state
        running = state.running.pop(event.batch, None)
        if running is None:
            return
        now, service = state.now, state.services[running.batch.service]
        partition = self._free(running)
        if partition is not None:
            self._learn(event, running, partition)
            for request in running.requests:
                service.p95.add(now - request.arrived)
            # What no execution ever met, pausing jobs does not help either.
            goal = admission.aim(service, service.exec[partition.kind].least(running.size))
            lending.note_headroom(partition, service.p95.value * 1000 // goal)
            lending.adjust_slice(state, partition, now)
        admission.learn_margin(service, running, now)
        for request in running.requests:
            state.retried.pop(request.id, None)
        self._out.append(a.Complete(self._cause, event.batch, running.batch.requests))
        self._after_batch(service, partition)

    def _learn(self, event: e.BatchDone, running: Running, partition: PartitionState) -> None:
        """What a batch cost: what it held the partition, the way there and back included, for those
        behind it wait for that. The worker measured all but the way back. Of that the median is
        taken: a stall of the node is not what executions cost. And where the worker went on with a
        batch that it had at hand nothing waited for the way."""
        service = self.state.services[running.batch.service]
        held = event.exec_ns
        if not running.after:
            held += event.start_ns
            lending.note_start(partition, event.start_ns, running.preempting)
        if not partition.batch:
            service.back.add(max(0, self.state.now - running.started - held))
            held += service.back.value
        costs = service.exec[partition.kind]
        costs.observe(partition.compute, running.batch.rows, held, running.size)

    def _batch_failed(self, event: e.BatchFailed) -> None:
        running = self.state.running.pop(event.batch, None)
        if running is None:
            return
        partition = self._free(running)
        for request in running.requests:
            self._reject(request.id, Refusal.FAILED, detail=event.reason)
        self._after_batch(self.state.services[running.batch.service], partition)

    def _free(self, running: Running) -> PartitionState | None:
        """Note that worker and partition of a finished batch are idle, or go on with the next."""
        state = self.state
        worker = state.workers.get(running.worker)
        partition = state.partitions.get(running.partition)
        if worker is not None and partition is not None and partition.at_hand:
            worker.batch = partition.batch = partition.at_hand
            partition.at_hand = 0
            self._begin(state.running[partition.batch], partition)
            return partition
        if worker is not None:
            worker.batch = 0
            service = state.services.get(worker.service)
            if service is not None and not worker.retiring:
                self._enter_pool(service, worker)
        if partition is not None:
            partition.batch = 0
            partition.idle_since = state.now
        return partition

    def _begin(self, running: Running, partition: PartitionState) -> None:
        """The batch that a worker had at hand is under way. More may be known now of what it
        takes."""
        now, service = self.state.now, self.state.services[running.batch.service]
        costs, rows = service.exec[partition.kind], running.batch.rows
        took = costs.predict(partition.compute, rows, running.size)
        running.started = service.last_start = now
        running.expected_end = now + took

    def _after_batch(self, service: ServiceState, partition: PartitionState | None) -> None:
        if partition is not None:
            self._run(partition)
        elsewhere = partition is None or service.partitions != [partition.id]
        if service.queued and elsewhere:
            self._place(service)
        elif partition is not None:
            self._hand_ahead(partition)
        self._settle_layout()

    # --- workers and services ---------------------------------------------------------------

    def _service_added(self, event: e.ServiceAdded) -> None:
        state = self.state
        old = state.services.get(event.service)
        if old is not None:
            old.objective, old.max_batch = event.objective, event.max_batch
            old.max_queue, old.preferred = event.max_queue, event.preferred
            old.max_queue_delay, old.strict = event.max_queue_delay, event.strict
            return
        state.services[event.service] = ServiceState(
            name=event.service,
            objective=event.objective,
            max_batch=event.max_batch,
            max_queue=event.max_queue,
            preferred=event.preferred,
            max_queue_delay=event.max_queue_delay,
            strict=event.strict,
            p95=Quantile(step=max(1, event.objective // 16)),
            back=Median(),
        )
        self._link(state.plan)

    def _service_removed(self, event: e.ServiceRemoved) -> None:
        service = self.state.services.get(event.service)
        if service is None:
            return
        self._refuse_where(service, Refusal.UNAVAILABLE, lambda _: True)
        # Instances may still be executing: the service goes when the last of them is down.
        service.max_queue = 0
        if not self._has_workers(service):
            self._forget(service)

    def _forget(self, service: ServiceState) -> None:
        del self.state.services[service.name]
        self._link(self.state.plan)

    def _worker_up(self, event: e.WorkerUp) -> None:
        state = self.state
        service = state.services.get(event.service)
        if service is None or event.worker in state.workers:
            return
        kind = self._specs[event.device].kind
        service.home = service.home or kind
        costs = service.exec.setdefault(kind, Costs())
        for units, rows, ns in event.profile:
            costs.profile(units, rows, ns, size_class(event.size))
        worker = WorkerState(event.worker, event.service, event.version, event.device)
        state.workers[event.worker] = worker
        self._enter_pool(service, worker)
        service.workers += 1
        service.at[event.device] = service.at.get(event.device, 0) + 1
        if not service.version:
            service.version = event.version
        self._place(service)

    def _worker_down(self, event: e.WorkerDown) -> None:
        state = self.state
        worker = state.workers.pop(event.worker, None)
        if worker is None:
            return
        service = state.services[worker.service]
        lost = [r for r in state.running.values() if r.worker == worker.id]
        for running in lost:
            del state.running[running.batch.id]
        if lost:
            state.partitions[lost[0].partition].at_hand = 0
        partition = self._free(lost[0]) if lost else None
        if not worker.retiring:
            self._leave_pool(service, worker)
        for running in lost:
            self._retry(service, running.requests, begun=running.batch.id == worker.batch)
        self._refuse_orphans(service)
        if service.workers == 0 and service.max_queue == 0 and not self._has_workers(service):
            self._forget(service)
        if partition is not None:
            self._after_batch(service, partition)

    def _worker_retiring(self, event: e.WorkerRetiring) -> None:
        worker = self.state.workers.get(event.worker)
        if worker is None or worker.retiring:
            return
        worker.retiring = True
        service = self.state.services[worker.service]
        self._leave_pool(service, worker)
        self._refuse_orphans(service)

    @staticmethod
    def _enter_pool(service: ServiceState, worker: WorkerState) -> None:
        versions = service.idle.setdefault(worker.device, {})
        versions.setdefault(worker.version, []).append(worker.id)

    @staticmethod
    def _leave_pool(service: ServiceState, worker: WorkerState) -> None:
        service.workers -= 1
        service.at[worker.device] -= 1
        versions = service.idle.get(worker.device, {})
        idle = versions.get(worker.version, [])
        if worker.id in idle:
            idle.remove(worker.id)
        if not idle:
            versions.pop(worker.version, None)

    def _has_workers(self, service: ServiceState) -> bool:
        return any(w.service == service.name for w in self.state.workers.values())

    def _retry(self, service: ServiceState, requests: list[Request], begun: bool) -> None:
        """Requests of a lost batch go back to the queue, once if it was ``begun``: what was not
        cannot have been the cause."""
        state = self.state
        for request in requests:
            if begun and request.id in state.retried:
                self._reject(request.id, Refusal.WORKER_LOST, retry_after=1 * S)
            elif request.expires and request.expires <= state.now:
                self._reject(request.id, Refusal.EXPIRED)
            else:
                if begun:
                    state.retried[request.id] = None
                queues.enqueue(state, service, request)

    def _served(self, service: ServiceState) -> set[str]:
        """Versions that some instance takes requests for."""
        workers = self.state.workers.values()
        return {w.version for w in workers if w.service == service.name and not w.retiring}

    def _refuse_orphans(self, service: ServiceState) -> None:
        """Refuse what waits for a version that no instance serves any more."""
        served = self._served(service)
        self._refuse_where(
            service,
            Refusal.UNAVAILABLE,
            lambda request: (request.version or service.version) not in served,
        )

    def _refuse_where(
        self, service: ServiceState, refusal: Refusal, condition: Callable[[Request], bool]
    ) -> None:
        queued = self.state.queued.values()
        chosen = [r.id for r in queued if r.service == service.name and condition(r)]
        for request_id in chosen:
            queues.withdraw(self.state, request_id)
            self._reject(request_id, refusal, retry_after=1 * S)

    def _version_current(self, event: e.VersionCurrent) -> None:
        service = self.state.services.get(event.service)
        if service is not None:
            service.version = event.version
            self._place(service)

    # --- lending ----------------------------------------------------------------------------

    def _lend(self, partition: PartitionState) -> None:
        """Lend an idle partition now, or set the time to think of it again."""
        state = self.state
        if partition.hold != Hold.NONE or partition.batch or partition.retiring:
            return
        if not state.jobs or state.draining or (partition.waiting and partition.wake):
            return
        now = state.now
        job = self._choose_job(partition)
        if job is None:
            blocked = [j.blocked_until for j in state.jobs.values() if j.blocked_until > now]
            if blocked:
                self._set_wake(partition, min(blocked))
            return
        lending.adjust_slice(state, partition, now)
        if not lending.lendable_now(state, partition, job, self.total_units):
            if partition.lendable:
                self._set_wake(partition, now + lending.ADJUST_EVERY)
            return
        if partition.services and not lending.in_debt(state, job, now, self.total_units):
            due = partition.idle_since + lending.linger(state, partition)
            if due > now:
                self._set_wake(partition, due)
                return
        self._grant(partition, job)

    def _choose_job(self, partition: PartitionState) -> JobShare | None:
        pinned = self._specs[partition.device].pins_jobs
        return lending.choose_job(self.state, partition, self.state.now, self.total_units, pinned)

    def _grant(self, partition: PartitionState, job: JobShare) -> None:
        state = self.state
        if not job.held:
            # A job that held nothing must not cash in the time it was away.
            floor = min((j.vtime for j in state.jobs.values() if j.held), default=job.vtime)
            job.vtime = max(job.vtime, floor)
        slice_ns = self._slice(partition)
        partition.job, partition.hold = job.id, Hold.GRANTING
        partition.held_since = state.now
        partition.slice_end = state.now + slice_ns
        job.held.append(partition.id)
        job.units += partition.compute
        self._out.append(a.Grant(self._cause, job.id, partition.id, slice_ns))
        if len(state.jobs) > 1:
            self._set_wake(partition, partition.slice_end)

    def _slice(self, partition: PartitionState) -> int:
        plan = self.state.plan
        return max(plan.slice_min, partition.slice_ns) if partition.services else plan.slice_max

    def _granted(self, event: e.Granted) -> None:
        partition = self.state.partitions.get(event.partition)
        if partition is None or partition.job != event.job or partition.hold != Hold.GRANTING:
            return
        partition.hold = Hold.HELD

    def _revoke(self, partition: PartitionState) -> None:
        if partition.hold in (Hold.GRANTING, Hold.HELD):
            partition.hold = Hold.CLOSING
            self._out.append(a.Revoke(self._cause, partition.job, partition.id))

    def _revoked(self, event: e.Revoked) -> None:
        partition = self.state.partitions.get(event.partition)
        if partition is None or partition.job != event.job or partition.hold != Hold.CLOSING:
            return
        lending.note_revoked(partition, event.took_ns)
        self._vacate(partition)
        self._freed(partition)

    def _freed(self, partition: PartitionState) -> None:
        """A job left a partition: use it, and look again at whoever did not get it."""
        self._run(partition)
        self._place_waiting(partition)
        self._lend_idle()
        self._settle_layout()

    def _place_waiting(self, partition: PartitionState) -> None:
        """Let services that still wait for this partition use their others."""
        for name in list(partition.waiting):
            self._place(self.state.services[name])

    def _lend_idle(self) -> None:
        """A job below its limit again may take what nobody could take before."""
        if any(job.limit < self.total_units for job in self.state.jobs.values()):
            for partition in self.state.partitions.values():
                if partition.hold == Hold.NONE:
                    self._run(partition)

    def _vacate(self, partition: PartitionState) -> None:
        """Book what the job used and clear the hold."""
        job = self.state.jobs.get(partition.job)
        if job is not None:
            lending.settle(job, self.state.now, partition.compute, partition.held_since)
            job.held.remove(partition.id)
            job.units -= partition.compute
            lending.roll_window(self.state, job, self.state.now, self.total_units)
        partition.job, partition.hold = "", Hold.NONE

    def _slice_over(self, partition: PartitionState) -> None:
        """A slice ended: rotate if another job should have the partition, else go on."""
        state, now = self.state, self.state.now
        lending.adjust_slice(state, partition, now)
        holder = state.jobs[partition.job]
        rival = self._choose_job(partition)
        if rival is not None and rival is not holder:
            owed = lending.in_debt(state, rival, now, self.total_units)
            behind = lending.virtual_time(state, rival, now)
            guest = rival.id in partition.owners and holder.id not in partition.owners
            if owed or guest or behind < lending.virtual_time(state, holder, now):
                self._revoke(partition)
                return
        partition.slice_end = now + self._slice(partition)
        if len(state.jobs) > 1:
            self._set_wake(partition, partition.slice_end)

    def _job_ready(self, event: e.JobReady) -> None:
        state = self.state
        if event.job in state.jobs:
            return
        # What others hold right now counts: a newcomer has no claim on the time before it came.
        others = (lending.virtual_time(state, j, state.now) for j in state.jobs.values())
        floor = min(others, default=0)
        state.jobs[event.job] = JobShare(
            id=event.job,
            weight=max(1, round(event.weight * 1000)),
            guaranteed=round(event.guaranteed * 1_000_000),
            limit=event.limit,
            window=event.window,
            vtime=floor,
            since=state.now,
            target=lending.target(state.plan, event.job),
        )
        for partition in state.partitions.values():
            if partition.hold == Hold.HELD and not partition.wake:
                self._set_wake(partition, max(state.now, partition.slice_end))
            else:
                self._run(partition)

    def _job_exited(self, event: e.JobExited) -> None:
        job = self.state.jobs.get(event.job)
        if job is None:
            return
        vacated = [self.state.partitions[p] for p in job.held]
        for partition in vacated:
            self._vacate(partition)
        del self.state.jobs[event.job]
        for partition in vacated:
            self._freed(partition)

    def _action_failed(self, event: e.ActionFailed) -> None:
        state = self.state
        if event.action == "Repartition":
            self._abandon_layout()
            return
        partition = state.partitions.get(event.target)
        if partition is None or partition.job != event.job:
            return
        if event.action == "Grant" and partition.hold in (Hold.GRANTING, Hold.CLOSING):
            state.jobs[event.job].blocked_until = state.now + BLOCKED_AFTER_FAILED_GRANT
            self._vacate(partition)
            self._freed(partition)
        elif event.action == "Revoke" and partition.hold == Hold.CLOSING:
            partition.hold = Hold.STOPPING
            self._out.append(a.StopJob(self._cause, event.job, event.reason))

    # --- layout -----------------------------------------------------------------------------

    def _planned(self, event: e.Planned) -> None:
        state, plan = self.state, event.plan
        if state.moving:
            state.successor = plan
            return
        new = {p.id: p.units for p in plan.partitions}
        state.pending = plan
        for partition in state.partitions.values():
            spared, partition.retiring = (
                partition.retiring,
                new.get(partition.id) != partition.units,
            )
            if partition.retiring:
                self._revoke(partition)
            elif spared:
                self._run(partition)
        self._settle_layout()

    def _settle_layout(self) -> None:
        """Once every partition that changes is idle, order (or make) the new layout."""
        state = self.state
        if state.pending is None or state.moving:
            return
        retiring = [p for p in state.partitions.values() if p.retiring]
        if any(p.batch or p.hold != Hold.NONE for p in retiring):
            return
        known = {p.id for p in state.partitions.values() if not p.retiring}
        if retiring or any(p.id not in known for p in state.pending.partitions):
            state.moving = True
            self._out.append(a.Repartition(self._cause, state.pending))
        else:
            self._adopt(state.pending)

    def _repartitioned(self, event: e.Repartitioned) -> None:
        state = self.state
        if not state.moving or state.pending is None or state.pending.version != event.version:
            return
        state.moving = False
        self._adopt(state.pending)
        self._next_plan()

    def _abandon_layout(self) -> None:
        state = self.state
        state.pending, state.moving = None, False
        for partition in state.partitions.values():
            partition.retiring = False
            self._run(partition)
        self._next_plan()

    def _next_plan(self) -> None:
        successor, self.state.successor = self.state.successor, None
        if successor is not None:
            self._planned(e.Planned(successor))

    def _adopt(self, plan: Plan) -> None:
        state = self.state
        state.pending, state.plan = None, plan
        lending.aim(state)
        old, state.partitions = state.partitions, {}
        for spec in plan.partitions:
            kept = old.get(spec.id)
            if kept is None or kept.retiring:
                kept = PartitionState(
                    id=spec.id,
                    device=spec.device,
                    kind=self._specs[spec.device].kind,
                    units=spec.units,
                    compute=spec.compute,
                    slice_ns=plan.slice_min,
                    idle_since=state.now,
                )
            kept.slice_ns = min(kept.slice_ns, plan.slice_max)
            state.partitions[spec.id] = kept
        self._link(plan)
        for partition in state.partitions.values():
            if (partition.owners and partition.job and partition.job not in partition.owners) or (
                partition.services and not partition.lendable
            ):
                self._revoke(partition)
            self._run(partition)

    def _link(self, plan: Plan) -> None:
        """Connect services and jobs with the partitions that the plan gives them."""
        state = self.state
        for partition in state.partitions.values():
            partition.services = [
                s for s, ps in plan.services.items() if partition.id in ps and s in state.services
            ]
            partition.owners = [j for j, ps in plan.jobs.items() if partition.id in ps]
            partition.lendable = partition.id in plan.lendable
            partition.waiting = {s: None for s in partition.services if state.services[s].queued}
        for service in state.services.values():
            mine = plan.services.get(service.name, ())
            service.partitions = [p for p in mine if p in state.partitions]
            kinds = [state.partitions[p].kind for p in service.partitions]
            service.home = kinds[0] if kinds else service.home
            for kind in kinds:
                service.exec.setdefault(kind, Costs())

    # --- time -------------------------------------------------------------------------------

    def _woke(self, _: e.Woke) -> None:
        state = self.state
        state.armed = 0
        self._expire()
        while state.timers and state.timers[0][0] <= state.now:
            due, name = heappop(state.timers)
            partition = state.partitions.get(name)
            if partition is None or partition.wake != due:
                continue
            partition.wake = 0
            self._run(partition)
            self._place_waiting(partition)
            if partition.hold != Hold.HELD or partition.held_since == state.now:
                continue
            if partition.slice_end <= state.now:
                self._slice_over(partition)
            elif len(state.jobs) > 1:
                self._set_wake(partition, partition.slice_end)

    def _set_wake(self, partition: PartitionState, at: int) -> None:
        if partition.wake and self.state.now < partition.wake <= at:
            return
        at = max(at, self.state.now + 1)
        partition.wake = at
        heappush(self.state.timers, (at, partition.id))

    def _arm(self) -> None:
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
        if due and (not state.armed or due < state.armed):
            state.armed = due
            self._out.append(a.WakeAt(self._cause, due))

    def _draining(self, _: e.Draining) -> None:
        self.state.draining = True


def _cause(event: e.Event) -> str:
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
        case e.JobReady(job=job) | e.JobExited(job=job):
            return f"{type(event).__name__}:{job}"
        case e.WorkerUp(worker=worker) | e.WorkerDown(worker=worker):
            return f"{type(event).__name__}:{worker}"
        case _:
            return type(event).__name__
