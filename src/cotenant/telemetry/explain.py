"""Why the node did what it did: answers for people, made from journal records.

Pure, like the policy. Beside the records themselves a dispatcher is driven along with them, so
that the state behind a decision (queues, batches under way, slices) can be told too.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from heapq import heappush, heappushpop
from typing import TypeVar

import msgspec

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import DeviceSpec
from cotenant.domain.plan import Plan
from cotenant.domain.request import Request
from cotenant.policy.dispatcher import Dispatcher
from cotenant.policy.state import DispatcherState
from cotenant.telemetry import sentences
from cotenant.telemetry.records import Entry, Gap, Header, PlanRecord, Record

_T = TypeVar("_T")


class PlanChange(msgspec.Struct, frozen=True):
    """A new plan: why, and the layout before and after. ``wall`` in seconds since the epoch."""

    wall: float
    version: int
    reasons: tuple[str, ...]
    before: str
    after: str


class RefusalGroup(msgspec.Struct):
    """Refusals of one service for one reason (a name of ``Refusal``); ``per_s`` over the time
    explained, ``share`` of the service's arrivals, ``example`` one of them worked out."""

    service: str
    reason: str
    meaning: str
    count: int = 0
    per_s: float = 0.0
    share: float = 0.0
    first: float = 0.0
    last: float = 0.0
    example: str = ""


class Incident(msgspec.Struct, frozen=True):
    """Something that happened to ``subject`` (a device, a job, a worker, a service, a layout)."""

    wall: float
    subject: str
    text: str


class SlowRequest(msgspec.Struct, frozen=True, order=True):
    """An answered request and where its time went."""

    total_ms: float
    request: int
    service: str
    wall: float
    text: str


class Pause(msgspec.Struct):
    """A time in which a service's partition was not lent because an objective was in danger;
    ``seconds`` is None while it lasts."""

    wall: float
    partition: str
    services: tuple[str, ...]
    text: str
    seconds: float | None = None


class Explanation(msgspec.Struct):
    """Everything that ``cotenant explain`` says. Times in seconds since the epoch; ``since`` and
    ``until`` bound the events looked at (plans may be older); ``asked`` is now."""

    asked: float
    since: float = 0.0
    until: float = 0.0
    arrived: int = 0
    answered: int = 0
    plans: list[PlanChange] = []
    refusals: list[RefusalGroup] = []
    devices: list[Incident] = []
    jobs: list[Incident] = []
    workers: list[Incident] = []
    services: list[Incident] = []
    layouts: list[Incident] = []
    slowest: list[SlowRequest] = []
    pauses: list[Pause] = []
    gaps: list[str] = []


def explain(records: Iterable[Entry], asked: float, last: int = 10) -> Explanation:
    """Explain a journal's entries, with at most ``last`` plans, incidents of a kind, slow
    requests and pauses. ``asked`` is the time now in seconds since the epoch.

    Raises JournalError as the reader does.
    """
    witness = _Witness(asked, last)
    for entry in records:
        witness.feed(entry)
    return witness.finish()


def moment(wall: float, asked: float) -> str:
    """``14:03:22 (12 s ago)``, with the date unless it is today's."""
    then, now = datetime.fromtimestamp(wall), datetime.fromtimestamp(asked)
    shown = then.strftime("%H:%M:%S" if then.date() == now.date() else "%Y-%m-%d %H:%M:%S")
    return f"{shown} ({ago(asked - wall)})"


def ago(seconds: float) -> str:
    """``0.4 s ago``, ``12 s ago``, ``3 min ago``, ``2.5 h ago``, ``3 days ago``."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s ago"
    if seconds < 119.5:
        return f"{seconds:.0f} s ago"
    if seconds < 7170:
        return f"{seconds / 60:.0f} min ago"
    if seconds < 2 * 86400:
        return f"{seconds / 3600:.1f} h ago"
    return f"{seconds / 86400:.0f} days ago"


def layout(plan: Plan) -> str:
    """``cpu:0 (1 unit) for digits, lent; cpu:1 (1 unit) for jobs``."""
    if not plan.partitions:
        return "no partitions"
    parts: list[str] = []
    for p in plan.partitions:
        services = sorted(s for s, where in plan.services.items() if p.id in where)
        owners = sorted(j for j, where in plan.jobs.items() if p.id in where)
        users = [*services, *(f"job {j}" for j in owners)] or ["jobs"]
        lent = ", lent when idle" if services and p.id in plan.lendable else ""
        units = f"{p.compute} unit" + "s" * (p.compute != 1)
        parts.append(f"{p.id} ({units}) for {', '.join(users)}{lent}")
    return "; ".join(parts)


def _gap(gap: Gap) -> str:
    count = f"{gap.records} records were lost" if gap.records else "records were lost"
    return f"{count}: {gap.reason}"


class _Witness:
    """Goes through the entries once and keeps what is worth telling."""

    def __init__(self, asked: float, last: int) -> None:
        self.told = Explanation(asked=asked)
        self.last = last
        self.header: Header | None = None
        self.dispatcher: Dispatcher | None = None
        self.requests: dict[int, Request] = {}
        self.dispatched: dict[int, tuple[int, a.Dispatch]] = {}
        self.arrivals: dict[str, int] = {}
        self.groups: dict[tuple[str, str], RefusalGroup] = {}
        self.paused: dict[str, Pause] = {}
        self.notes: dict[str, tuple[str, ...]] = {}
        self.devices: tuple[DeviceSpec, ...] = ()

    def feed(self, entry: Entry) -> None:
        match entry:
            case Header():
                self._resume(entry)
            case Gap():
                self._keep(self.told.gaps, _gap(entry))
                self.dispatcher = None
            case PlanRecord(now=now, snapshot=snapshot, plan=plan) if plan is not None:
                before, after = layout(snapshot.plan), layout(plan)
                change = PlanChange(self._wall(now), plan.version, plan.reasons, before, after)
                self._keep(self.told.plans, change)
            case Record():
                self._record(entry)

    def _resume(self, header: Header) -> None:
        if self.header is None or header.run != self.header.run:
            for partition in list(self.paused):
                self._end_pause(partition)
        # Records may be missing before a header, so what it says replaces what was known.
        self.header = header
        self.requests.clear()
        self.dispatched.clear()
        state = header.dispatcher_state()
        self.devices = header.devices
        self.dispatcher = Dispatcher(header.devices, state)
        self.requests.update(state.queued)
        for running in state.running.values():
            batch = running.batch
            where = running.worker, running.partition, running.preempting, running.after
            order = a.Dispatch("", batch, *where)
            self.dispatched[batch.id] = (running.started, order)
            self.requests.update((request.id, request) for request in running.requests)

    def _record(self, record: Record) -> None:
        now, event = record.now, record.event
        wall = self._wall(now)
        self.told.since = self.told.since or wall
        self.told.until = wall
        match event:
            case e.Arrived(request=request):
                self.requests[request.id] = request
                self.arrivals[request.service] = self.arrivals.get(request.service, 0) + 1
                self.told.arrived += 1
            case e.ServiceAdded():
                self._noted(wall, event)
            case e.WorkerDown():
                self._worker_down(wall, event, record)
            case e.JobExited(job=job):
                self._keep(self.told.jobs, Incident(wall, job, "its processes ended"))
            case e.ActionFailed():
                self._failed(wall, event)
            case e.DeviceChanged(spec=spec):
                self._device_changed(wall, spec)
            case _:
                pass
        self._drive(record)
        for action in record.actions:
            self._action(wall, now, event, action)
        if isinstance(event, e.BatchDone):
            self.dispatched.pop(event.batch, None)

    def _action(self, wall: float, now: int, event: e.Event, action: a.Action) -> None:
        match action:
            case a.Dispatch(batch=batch):
                self.dispatched[batch.id] = (now, action)
            case a.Complete(requests=requests):
                self._completed(now, event, requests)
            case a.Reject():
                self._refused(wall, now, event, action)
            case a.Stop(job=job, reason=reason, kill=kill):
                text = f"{'killed' if kill else 'stopped'}: {reason}"
                self._keep(self.told.jobs, Incident(wall, job, text))
            case _:
                pass

    def _drive(self, record: Record) -> None:
        if self.dispatcher is None:
            return
        try:
            self.dispatcher.handle(record.now, record.event)
        except Exception:  # another policy than the journal's: tell what the records say alone
            self.dispatcher = None
            return
        self._watch_slices(self.dispatcher.state)

    def _watch_slices(self, state: DispatcherState) -> None:
        for p in state.partitions.values():
            if p.slice_ns == 0 and p.id not in self.paused:
                text = sentences.pause(state, p)
                pause = Pause(self.told.until, p.id, tuple(p.services), text)
                self.paused[p.id] = pause
                self._keep(self.told.pauses, pause)
        if self.paused:
            for name in list(self.paused):
                if name not in state.partitions or state.partitions[name].slice_ns:
                    self._end_pause(name)

    def _completed(self, now: int, event: e.Event, requests: tuple[int, ...]) -> None:
        self.told.answered += len(requests)
        known = [self.requests.pop(r) for r in requests if r in self.requests]
        if not isinstance(event, e.BatchDone):
            return
        started, order = self.dispatched.pop(event.batch, (0, None))
        if order is None:
            return
        for request in known:
            total = (now - request.arrived) / 1e6
            slowest = self.told.slowest
            if len(slowest) >= self.last and total <= slowest[0].total_ms:
                continue
            text = sentences.slow(request, now, started, order, event)
            wall = self._wall(request.arrived)
            found = SlowRequest(total, request.id, request.service, wall, text)
            (heappush if len(slowest) < self.last else heappushpop)(slowest, found)

    def _refused(self, wall: float, now: int, event: e.Event, action: a.Reject) -> None:
        request = self.requests.pop(action.request, None)
        service = request.service if request is not None else "(unknown)"
        key = service, action.refusal.name
        group = self.groups.get(key)
        if group is None:
            group = RefusalGroup(*key, meaning=action.refusal.value, first=wall)
            self.groups[key] = group
        group.count += 1
        group.last = wall
        # Working an example out costs more than counting: now and then is often enough.
        if request is not None and (group.count & (group.count - 1) == 0 or not group.example):
            state = self.dispatcher.state if self.dispatcher is not None else None
            group.example = sentences.refusal(request, now, action, event, state)

    def _noted(self, wall: float, event: e.ServiceAdded) -> None:
        old, self.notes[event.service] = self.notes.get(event.service, ()), event.notes
        for note in event.notes:
            if note not in old:
                self._keep(self.told.services, Incident(wall, event.service, note))

    def _worker_down(self, wall: float, event: e.WorkerDown, record: Record) -> None:
        state = self.dispatcher.state if self.dispatcher is not None else None
        worker = state.workers.get(event.worker) if state is not None else None
        if state is not None and (state.draining or worker is None or worker.retiring):
            return  # it was told to go, or was not there
        text = sentences.worker_lost(event, worker, record.actions, state)
        self._keep(self.told.workers, Incident(wall, event.worker, text))

    def _failed(self, wall: float, event: e.ActionFailed) -> None:
        if event.action == "Repartition":
            text = f"the layout of {event.target} could not be changed: {event.reason}"
            self._keep(self.told.layouts, Incident(wall, "layout", text))
        else:
            text = f"{event.action} on {event.target} failed: {event.reason}"
            self._keep(self.told.jobs, Incident(wall, event.job, text))

    def _device_changed(self, wall: float, spec: DeviceSpec) -> None:
        before = next((d for d in self.devices if d.id == spec.id), None)
        self.devices = (*(d for d in self.devices if d.id != spec.id), spec)
        text = sentences.device_changed(before, spec)
        if text:
            self._keep(self.told.devices, Incident(wall, spec.id, text))

    def _end_pause(self, partition: str) -> None:
        pause = self.paused.pop(partition)
        pause.seconds = self.told.until - pause.wall

    def _wall(self, now: int) -> float:
        return self.header.wall_at(now) if self.header is not None else 0.0

    def _keep(self, kept: list[_T], item: _T) -> None:
        kept.append(item)
        if len(kept) > self.last:
            del kept[0]

    def finish(self) -> Explanation:
        told = self.told
        seconds = max(told.until - told.since, 1e-3)
        for group in self.groups.values():
            group.per_s = group.count / seconds
            group.share = group.count / max(1, self.arrivals.get(group.service, 0))
        told.refusals = sorted(self.groups.values(), key=lambda g: -g.count)
        told.slowest.sort(reverse=True)
        return told
