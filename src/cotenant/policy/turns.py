"""Turns: which batch runs next, where, and what follows from its end.

``run`` is the one verb for a partition that may be free: its next batch starts there, or it is
lent. ``place`` is the one for a service: what it has queued goes to as many of its partitions as
that takes.
"""

from __future__ import annotations

from heapq import heappop

import msgspec

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import PreemptLevel
from cotenant.domain.request import Batch, Lease, Refusal, Request
from cotenant.domain.units import MS, S
from cotenant.domain.workload import ORIGINAL
from cotenant.policy import admission, builds, generation, lending, queues
from cotenant.policy.desk import Desk
from cotenant.policy.holds import Holds
from cotenant.policy.iterations import Load
from cotenant.policy.state import (
    Hold,
    Lane,
    PartitionState,
    Resident,
    Running,
    ServiceState,
    WorkerState,
    enter_pool,
    served,
)

AHEAD_SHARE, AHEAD_MOST = 16, 20 * MS
"""A batch is handed to a busy worker if it is predicted to take at most 1/AHEAD_SHARE of the
objective and at most AHEAD_MOST. So much longer may somebody more urgent, who comes meanwhile,
be predicted to wait; and of more, the time to send it is no part worth speaking of."""


class Turns:
    """See the module's text."""

    def __init__(self, desk: Desk, holds: Holds) -> None:
        self._desk = desk
        self._holds = holds
        self._state = desk.state

    # --- requests ---------------------------------------------------------------------------

    def arrived(self, event: e.Arrived) -> None:
        """Admit a request or refuse it. What came together is placed together, with the last."""
        state, service = self._state, self._state.services.get(event.request.service)
        self._admit(event.request)
        if event.more:
            if service is not None and self._has_share(service):
                state.unplaced.pop(service.name, None)
                self.place(service)
            return
        arrived, state.unplaced = state.unplaced, {}
        for name in arrived:
            service = state.services.get(name)
            if service is not None and service.queued:
                self.place(service)

    def _has_share(self, service: ServiceState) -> bool:
        """Whether what is queued is one free partition's share of a full batch: then it begins, and
        what follows is for the others. Else the first would take all. Lent partitions do not count,
        or they would be taken back for what the free ones can do together."""
        idle = sum(queues.idle_count(service, site) for site in service.idle)
        if not idle:
            return False
        partitions = (self._state.partitions[p] for p in service.partitions)
        free = sum(p.hold == Hold.NONE and not p.batch and not p.retiring for p in partitions)
        return sum(service.rows) * min(free, idle) >= service.max_batch

    def _admit(self, request: Request) -> None:
        state, desk = self._state, self._desk
        service = state.services.get(request.service)
        if service is None:
            desk.reject(request.id, Refusal.UNAVAILABLE)
            return
        if request.version and request.version not in served(state, service):
            desk.reject(request.id, Refusal.UNAVAILABLE, retry_after=1 * S)
            return
        lending.note_arrival(service, state.now)
        refused = admission.refuse(state, service, request, state.now, desk.compute)
        if refused is not None:
            desk.reject(request.id, *refused)
            return
        queues.enqueue(state, service, request)
        state.unplaced[service.name] = None
        waits = service.unloads and (request.version or service.version)
        if waits and waits not in served(state, service):  # it may be loaded too late
            desk.watch_service(service, request.deadline)

    def cancelled(self, event: e.Cancelled) -> None:
        """The client went away: what is queued goes too; what has a turn, at the end of it."""
        state = self._state
        if queues.withdraw(state, event.request) is not None:
            self._desk.reject(event.request, Refusal.CANCELLED)
            return
        for running in state.running.values():
            if event.request in running.batch.requests:
                first = next(r for r in running.requests if r.id == event.request)
                resident = Resident(running.worker, first.deadline)
                state.residents.setdefault(event.request, resident).withdrawn = True

    def expire(self) -> None:
        """Refuse what is queued beyond its client's own time-out."""
        state = self._state
        while state.expiries and state.expiries[0][0] <= state.now:
            _, request_id = heappop(state.expiries)
            if request_id in state.residents:
                continue
            if queues.withdraw(state, request_id) is not None:
                self._desk.reject(request_id, Refusal.EXPIRED)

    # --- where ------------------------------------------------------------------------------

    def place(self, service: ServiceState) -> None:
        """Use more of a service's partitions for what it has queued: free ones first, then take
        back as many lent ones of each site as it has idle workers for there. One whose job is
        being stopped is not waited for."""
        lent: list[PartitionState] = []
        busy: list[PartitionState] = []
        closing: dict[str, int] = {}
        for name in service.partitions:
            partition = self._state.partitions[name]
            if partition.retiring and not partition.binds:
                continue
            if partition.batch:
                busy.append(partition)
                continue
            if partition.hold in (Hold.GRANTING, Hold.HELD):
                lent.append(partition)
                continue
            self.run(partition)
            if service.queued == 0:
                return
            if not partition.batch and partition.hold != Hold.STOPPING:
                closing[partition.site] = closing.get(partition.site, 0) + 1
        for partition in lent:
            if service.queued == 0:
                return
            site = partition.site
            if closing.get(site, 0) < queues.able_count(self._state, service, site):
                self.run(partition)
                closing[site] = closing.get(site, 0) + (partition.batch == 0)
        if self._plenty(service):
            for name in service.partitions:
                self._hand_ahead(self._state.partitions[name])
        for partition in busy:
            self._recall(partition, service)

    def _recall(self, partition: PartitionState, service: ServiceState) -> None:
        """End a lease after the turn under way, if the service has what could run then."""
        state, running = self._state, self._state.running[partition.batch]
        if running.turns == 1 or running.recalled:
            return
        if running.batch.service == service.name:
            worker = state.workers[running.worker]
            lanes = generation.first_lanes(service, worker)
            wanted = not worker.rests and any(
                queues.has_room(state, service, worker, lane) for _, lane in lanes
            )
        else:
            wanted = queues.able_count(state, service, partition.site) > 0
        if wanted:
            self.end_lease(partition)

    def end_lease(self, partition: PartitionState) -> None:
        """What runs on a partition has no further turn by itself."""
        running = self._state.running.get(partition.batch)
        if running is not None and running.turns > 1 and not running.recalled:
            running.recalled = True
            self._desk.out.append(a.Recall(self._desk.cause, running.batch.id, running.worker))

    def place_waiting(self, partition: PartitionState) -> None:
        """Let services that still wait for this partition use their others."""
        for name in list(partition.waiting):
            self.place(self._state.services[name])

    def run(self, partition: PartitionState) -> None:
        """Start the next batch on a partition that has none, or else see to lending it. One that
        goes has no batch any more; but where instances are bound to it, they finish what they have
        begun."""
        state = self._state
        if partition.batch or (partition.retiring and not partition.binds):
            return
        name, lane_key = self._next_lane(partition)
        if not name:
            if not partition.retiring:
                self._holds.lend(partition)
            return
        service = state.services[name]
        preempting = partition.hold != Hold.NONE
        if preempting:
            self._holds.revoke(partition)
            if self._holds.level(partition) < PreemptLevel.PRIORITY:
                return
        self._dispatch(partition, service, lane_key, preempting)

    def _next_lane(self, partition: PartitionState) -> tuple[str, str]:
        """The service and lane to run now; services that hold a batch back are passed over."""
        state = self._state
        held: set[str] = set()
        while len(held) < len(partition.waiting):
            name, lane_key = queues.choose_service(state, partition, held)
            if not name:
                break
            service = state.services[name]
            until = queues.hold_until(state, service, lane_key, partition)
            if until <= state.now:
                return name, lane_key
            self._desk.set_wake(partition, until)
            held.add(name)
        return "", ""

    # --- batches ----------------------------------------------------------------------------

    def _dispatch(
        self, partition: PartitionState, service: ServiceState, lane_key: str, preempting: bool
    ) -> None:
        worker = self._pick_worker(service, service.lanes[lane_key], partition)
        batch = self._send(partition, service, lane_key, worker, preempting)
        worker.batch = partition.batch = batch
        worker.partition = partition.id
        service.last_start = self._state.now

    def _pick_worker(
        self, service: ServiceState, lane: Lane, partition: PartitionState
    ) -> WorkerState:
        """The worker that has a lane's requests, or an idle one, preferably one that last ran on
        this partition."""
        workers, index = self._state.workers, -1
        if lane.worker:
            worker = workers[lane.worker]
            if not worker.rests:
                service.idle[worker.site][worker.version].remove(worker.id)
            return worker
        idle = service.idle[partition.site][lane.version or service.version]
        for i, name in enumerate(idle):
            worker = workers[name]
            if worker.stalled or not self._may_join(service, worker, lane):
                continue
            if index < 0 or workers[name].partition == partition.id:
                index = i
            if workers[name].partition == partition.id:
                break
        return workers[idle.pop(index)]

    def _may_join(self, service: ServiceState, worker: WorkerState, lane: Lane) -> bool:
        return not service.turns or queues.has_room(self._state, service, worker, lane)

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
        state, desk = self._state, self._desk
        start = before.expected_end if before is not None else state.now
        after = before.batch.id if before is not None else 0
        size = service.lanes[lane_key].size
        lease = Lease()
        if service.turns:
            requests = queues.take_turn(state, service, worker)
            lease = generation.lease(state, service, partition, requests)
        else:
            requests = queues.take_batch(state, service, lane_key, partition, start)
        rows = sum(r.rows for r in requests)
        ids = tuple(r.id for r in requests)
        batch = Batch(state.next_batch, service.name, worker.version, ids, rows)
        state.next_batch += 1
        took = self._takes(service, partition, requests, rows, size)
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
            turns=lease.turns,
        )
        desk.out.append(
            a.Dispatch(desk.cause, batch, worker.id, partition.id, preempting, after, lease)
        )
        return batch.id

    def _takes(
        self,
        service: ServiceState,
        partition: PartitionState,
        requests: list[Request],
        rows: int,
        size: int,
    ) -> int:
        """Predicted ns of a batch or, of a lease, of its next turn."""
        if service.turns:
            known = generation.turn_ns(self._state, service, partition, requests)
            if known:
                return known
        return service.exec[partition.kind].predict(partition.compute, rows, size)

    def _plenty(self, service: ServiceState) -> bool:
        """Whether a batch can be handed ahead and each other partition that has none at hand
        still finds a request."""
        spare = service.queued - service.max_batch
        if spare < 0:
            return False
        return spare >= sum(not self._state.partitions[p].at_hand for p in service.partitions) - 1

    def _hand_ahead(self, partition: PartitionState) -> None:
        """Let a busy worker have its next batch at hand, so that it need not wait for it to be
        sent: one that can grow no more, is short, and takes nothing from other services."""
        state = self._state
        if not partition.batch or partition.at_hand or partition.retiring:
            return
        running = state.running[partition.batch]
        worker = state.workers[running.worker]
        service = state.services[worker.service]
        if worker.rests or service.turns or partition.services != [service.name]:
            return
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

    # --- their ends -------------------------------------------------------------------------

    def batch_done(self, event: e.BatchDone) -> None:
        """Answer the requests of a batch that are finished, queue the others for their next turn
        unless their lease goes on, and learn from it."""
        state = self._state
        running = state.running.get(event.batch)
        if running is None:
            return
        service = state.services[running.batch.service]
        if event.more:
            partition = state.partitions.get(running.partition)
        else:
            del state.running[event.batch]
            partition = self.free(running)
        spoke = running.requests
        if event.unfinished:
            silent = set(event.unfinished).difference(event.emitted)
            spoke = [request for request in spoke if request.id not in silent]
        if partition is not None:
            self._learn(event, running, partition)
            self._watch(service, running, partition, spoke)
        self._margin(service, running, spoke)
        going_on = self._came_of(event, running, service)
        if event.more:
            self._next_turn(running, partition, service, going_on)
            return
        for request in going_on:
            queues.enqueue(state, service, request)
        worker = state.workers.get(running.worker)
        if worker is not None:
            short = worker.pool_now < worker.pool and not event.work[0]
            worker.stalled = short and bool(going_on) and not worker.told
            worker.told = False
        self.go_on(service, partition)

    def _watch(
        self,
        service: ServiceState,
        running: Running,
        partition: PartitionState,
        spoke: list[Request],
    ) -> None:
        """Let lending see how near the objective those come who were answered now, or had a piece:
        of a piece that is how long after it was due, and the objective."""
        now = self._state.now
        for request in spoke:
            took = now - request.arrived
            if service.turns:
                took = max(0, now - request.deadline + service.objective)
            service.tail.add(took)
        # What no execution ever met, pausing jobs does not help either.
        goal = admission.aim(service, service.exec[partition.kind].least(running.size))
        lending.note_headroom(partition, service.tail.value * 1000 // goal)
        lending.adjust_slice(self._state, partition, now)

    def _margin(self, service: ServiceState, running: Running, spoke: list[Request]) -> None:
        """Admission learns from those whose answer begins now."""
        residents, firsts = self._state.residents, spoke
        if service.turns:
            firsts = [r for r in spoke if r.id not in residents or not residents[r.id].said]
        admission.learn_margin(service, running, firsts, self._state.now)

    def _came_of(
        self, event: e.BatchDone, running: Running, service: ServiceState
    ) -> list[Request]:
        """Answer who is finished; those who are not, and are still waited for."""
        state = self._state
        finished, said = running.batch.requests, dict(event.said)
        going_on: list[Request] = []
        if event.unfinished:
            finished = tuple(r for r in finished if r not in event.unfinished)
            going_on = self._stay(event, running, service, said)
        if service.turns:
            self._learn_lengths(service, running, finished, said)
        for request_id in finished:
            state.retried.pop(request_id, None)
            state.residents.pop(request_id, None)
        if finished:
            self._desk.out.append(a.Complete(self._desk.cause, event.batch, finished))
        return going_on

    def _learn_lengths(
        self,
        service: ServiceState,
        running: Running,
        finished: tuple[int, ...],
        said: dict[int, int],
    ) -> None:
        for request in running.requests:
            if request.id in finished:
                resident = self._state.residents.get(request.id)
                before = resident.said if resident is not None else 0
                generation.learn_length(service, request, before + said.get(request.id, 0))

    def _next_turn(
        self,
        running: Running,
        partition: PartitionState | None,
        service: ServiceState,
        going_on: list[Request],
    ) -> None:
        """The lease of a batch goes on with those that are not finished. There may be room now for
        one that waits."""
        ids, rows = tuple(r.id for r in going_on), sum(r.rows for r in going_on)
        running.batch = msgspec.structs.replace(running.batch, requests=ids, rows=rows)
        running.requests, running.started = going_on, self._state.now
        if partition is not None:
            took = self._takes(service, partition, going_on, max(1, rows), running.size)
            running.expected_end = self._state.now + took
            if service.queued:
                self._recall(partition, service)

    def _stay(
        self, event: e.BatchDone, running: Running, service: ServiceState, said: dict[int, int]
    ) -> list[Request]:
        """Requests that are not finished stay on their worker. Each further piece is due the pace
        of the objective later, from when the first was due; without one, an objective later than
        the last one came."""
        state, desk, now = self._state, self._desk, self._state.now
        going_on = []
        for request in running.requests:
            if request.id not in event.unfinished:
                continue
            resident = state.residents.get(request.id)
            if resident is None:
                resident = Resident(running.worker, request.deadline)
                state.residents[request.id] = resident
            if resident.withdrawn:
                desk.reject(request.id, Refusal.CANCELLED)
                continue
            resident.emitted = resident.emitted or request.id in event.emitted
            resident.said += said.get(request.id, 0)
            if request.id in event.emitted:
                due = now + service.objective
                if service.pace:
                    due = resident.due + resident.said * service.pace
                request = msgspec.structs.replace(request, arrived=now, deadline=due)  # noqa: PLW2901
            going_on.append(request)
        spoke = tuple(r.id for r in going_on if r.id in event.emitted)
        if spoke:
            desk.out.append(a.Emit(desk.cause, event.batch, spoke))
        return going_on

    def _learn(self, event: e.BatchDone, running: Running, partition: PartitionState) -> None:
        """What a batch cost: what it held the partition, the way there and back included, for those
        behind it wait for that. The worker measured all but the way back. Of that the median is
        taken: a stall of the node is not what executions cost. And where the worker went on with a
        batch that it had at hand nothing waited for the way."""
        service = self._state.services[running.batch.service]
        if not running.batch.rows:
            return  # all of it were given up during the lease
        if event.work[0]:
            work = Load(*event.work)
            generation.costs_of(service, partition).observe(work, event.exec_ns)
        held = event.exec_ns
        if not running.after:
            held += event.start_ns
        if not partition.batch:
            service.back.add(max(0, self._state.now - running.started - held))
            held += service.back.value
        costs = builds.costs(service, partition.kind, self._variant(running, service, partition))
        costs.observe(partition.compute, running.batch.rows, held, running.size)

    def _variant(self, running: Running, service: ServiceState, partition: PartitionState) -> str:
        """The variant that executed a batch; the one that serves, if its worker is gone."""
        worker = self._state.workers.get(running.worker)
        return worker.variant if worker else service.serving.get(partition.kind, ORIGINAL)

    def batch_failed(self, event: e.BatchFailed) -> None:
        """Refuse the requests of a batch that the model failed on."""
        running = self._state.running.pop(event.batch, None)
        if running is None:
            return
        partition = self.free(running)
        for request in running.requests:
            self._desk.reject(request.id, Refusal.FAILED, detail=event.reason)
        self.go_on(self._state.services[running.batch.service], partition)

    def dispatch_failed(self, event: e.ActionFailed) -> None:
        """A batch did not reach its worker."""
        running = self._state.running.pop(int(event.target), None)
        if running is None:
            return
        service = self._state.services[running.batch.service]
        partition = self._state.partitions[running.partition]
        if partition.at_hand == running.batch.id:
            partition.at_hand = 0
        else:
            self.free(running)
        self.give_back(service, running.requests, begun=True)
        self.go_on(service, partition)

    def give_back(self, service: ServiceState, requests: list[Request], begun: bool) -> None:
        """Requests of a lost batch go back to the queue, once if it was ``begun``: what was not
        cannot have been the cause. Whose client has had a part of the answer cannot begin again."""
        state, desk = self._state, self._desk
        for request in requests:
            resident = state.residents.pop(request.id, None)
            if resident is not None and resident.withdrawn:
                desk.reject(request.id, Refusal.CANCELLED)
            elif (resident is not None and resident.emitted) or (
                begun and request.id in state.retried
            ):
                desk.reject(request.id, Refusal.WORKER_LOST, retry_after=1 * S)
            elif request.expires and request.expires <= state.now:
                desk.reject(request.id, Refusal.EXPIRED)
            else:
                if begun:
                    state.retried[request.id] = None
                queues.enqueue(state, service, request)

    def free(self, running: Running) -> PartitionState | None:
        """Note that worker and partition of a finished batch are idle, or go on with the next."""
        state = self._state
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
            if service is not None and not worker.rests:
                enter_pool(service, worker)
        if partition is not None:
            partition.batch = 0
        return partition

    def _begin(self, running: Running, partition: PartitionState) -> None:
        """The batch that a worker had at hand is under way. More may be known now of what it
        takes."""
        now, service = self._state.now, self._state.services[running.batch.service]
        costs, rows = service.exec[partition.kind], running.batch.rows
        took = costs.predict(partition.compute, rows, running.size)
        running.started = service.last_start = now
        running.expected_end = now + took

    def go_on(self, service: ServiceState, partition: PartitionState | None) -> None:
        """Use what the end of a batch has freed."""
        if partition is not None:
            self.run(partition)
        elsewhere = partition is None or service.partitions != [partition.id]
        if service.queued and elsewhere:
            self.place(service)
        elif partition is not None:
            self._hand_ahead(partition)
