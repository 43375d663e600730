"""Measurements: what happened, by service, job and partition. Feeds snapshots and metrics.

``observe`` sees every event with its actions, in order, and costs a few microseconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, Final

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import DeviceSpec
from cotenant.domain.request import Refusal, Request
from cotenant.domain.snapshot import (
    SEASON_AHEAD,
    JobFacts,
    ServiceFacts,
    Snapshot,
)
from cotenant.domain.units import S
from cotenant.domain.workload import ORIGINAL, ServiceSpec, Share, share_on
from cotenant.policy.forecast import Season
from cotenant.policy.memory.budgets import gives
from cotenant.policy.state import DispatcherState, Phase, ServiceState, Tenant, unfit
from cotenant.telemetry.meters import JobMeter, PartitionMeter, ServiceMeter, Span
from cotenant.telemetry.turns import turns_of
from cotenant.telemetry.variants import others_of

_WANT_OF_CAPACITY = (Refusal.OVERLOADED, Refusal.QUEUE_FULL)
DAY: Final = 24 * 3600 * S
SEASON_SLOTS: Final = 288
"""Slots of a season: five minutes of a day."""
PAST: Final = 60 * S
MOST_SPANS: Final = 600
"""For how long (ns) it is kept who held what, and in how many pieces at most."""


class _Talk:
    """An answer that comes in pieces. ``first``: when its first one was sent; ``due``: when the
    next one is. With a pace, an answer is in time if its first piece is, and its last one."""

    __slots__ = ("due", "first", "late", "said")

    def __init__(self, first: int, due: int) -> None:
        self.first = first
        self.due = due
        self.late = False
        self.said = 0

    def next_due(self, now: int, request: Request, pace: int) -> int:
        """When the piece after those so far is due."""
        if pace:
            return request.deadline + self.said * pace
        return now + request.deadline - request.arrived

    def fell_behind(self, now: int, pace: int) -> bool:
        """Whether the last piece was late, where there is a pace."""
        return bool(pace) and now > self.due - pace


class _UnderWay:
    """A batch that executes since ``begun`` (ns): of so many ``requests``, in its present turn."""

    __slots__ = ("begun", "dispatch", "requests")

    def __init__(self, dispatch: a.Dispatch, begun: int) -> None:
        self.dispatch = dispatch
        self.begun = begun
        self.requests = len(dispatch.batch.requests)

    def way_there(self, now: int, event: e.BatchDone) -> int:
        """Ns until its worker began. What one at hand waited there for the batch before it is not
        counted twice: that is time in the queue."""
        return min(event.start_ns, max(0, now - self.begun - event.exec_ns))


class Monitor:
    """Keeps every meter; see the module's docstring. ``season``: the period of demand, ns."""

    def __init__(self, season: int = DAY) -> None:
        self._season = season
        self.services: dict[str, ServiceMeter] = {}
        self.partitions: dict[str, PartitionMeter] = {}
        self.jobs: dict[str, JobMeter] = {}
        self._open: dict[int, Request] = {}
        self._talks: dict[int, _Talk] = {}
        """Answers of which a piece was sent."""
        self._paces: dict[str, int] = {}
        """Of services: after how long (ns) each further piece of an answer is due."""
        self._resident: set[int] = set()
        """Those that have had a turn and are to have another: they wait in no queue."""
        self._variants: dict[str, str] = {}
        """Which one each instance is of."""
        self._running: dict[int, _UnderWay] = {}
        self._at_hand: dict[int, a.Dispatch] = {}
        """Batches that workers have at hand, by the batch that they follow."""
        self._granted: dict[tuple[str, str], int] = {}
        self._compute: dict[str, int] = {}
        self._last_tick = 0
        self.past: deque[Span] = deque(maxlen=MOST_SPANS)
        """Who held what in the last minute, a piece for each interval."""
        self._heard: dict[type, Callable[[int, Any], None]] = {
            e.Arrived: self._arrived,
            e.Planned: self._planned,
            e.ServiceAdded: self._service_added,
            e.BatchDone: self._batch_done,
            e.BatchFailed: self._batch_failed,
            e.Revoked: self._revoked,
            e.ActionFailed: self._action_failed,
            e.JobExited: self._job_exited,
            e.WorkerDown: self._worker_down,
            e.VersionGone: self._version_gone,
            e.LoadFailed: self._load_failed,
        }
        self._seen: dict[type, Callable[[int, Any], None]] = {
            a.Load: self._loading,
            a.Serve: self._serving,
            a.Dispatch: self._dispatched,
            a.Complete: self._completed,
            a.Reject: self._rejected,
            a.Grant: self._granting,
        }

    # --- observing --------------------------------------------------------------------------

    def observe(self, now: int, event: e.Event, actions: list[a.Action]) -> None:
        """Learn from one step of the dispatcher."""
        if not self._last_tick:
            self._last_tick = now
        heard = self._heard.get(type(event))
        if heard is not None:
            heard(now, event)
        for action in actions:
            seen = self._seen.get(type(action))
            if seen is not None:
                seen(now, action)

    def _arrived(self, _: int, event: e.Arrived) -> None:
        request = event.request
        self._open[request.id] = request
        meter = self.service(request.service)
        meter.arrive(request.rows)
        meter.prompt.add(request.prompt)

    def _service_added(self, _: int, event: e.ServiceAdded) -> None:
        self._paces[event.service] = event.pace

    def _planned(self, _: int, event: e.Planned) -> None:
        self._compute |= {p.id: p.compute for p in event.plan.partitions}
        for partition in event.plan.partitions:
            self.partition(partition.id).device = partition.device

    def _batch_done(self, now: int, event: e.BatchDone) -> None:
        for request, tokens in event.said:
            self._spoke(now, request, tokens)
        self._executed(now, event)
        if event.more:
            self._turn_over(event)
        else:
            self._count_variant(event)
            self._batch_over(now, event.batch, event.exec_ns, event.failed)
        self._resident.update(event.unfinished)

    def _spoke(self, now: int, request_id: int, tokens: int) -> None:
        """A piece of an answer. Without a pace each has as long as the first one had."""
        request = self._open.get(request_id)
        if request is None:
            return
        meter = self.service(request.service)
        talk = self._talks.get(request_id)
        if talk is None:
            talk = self._talks[request_id] = _Talk(now, request.deadline)
            meter.first.add(now - request.arrived)
            meter.recent.add(now, now - request.arrived)
            meter.prompt_tokens += request.prompt
            talk.late = now > talk.due
        elif not self._paces.get(request.service):
            talk.late = talk.late or now > talk.due
        talk.said += tokens
        meter.tokens += tokens
        talk.due = talk.next_due(now, request, self._paces.get(request.service, 0))

    def _turn_over(self, event: e.BatchDone) -> None:
        for request in event.failed:
            self._refused(request, Refusal.FAILED)
        under_way = self._running.get(event.batch)
        if under_way is not None:
            self.service(under_way.dispatch.batch.service).exec_ns += event.exec_ns

    def _executed(self, now: int, event: e.BatchDone) -> None:
        """Count an execution for each request that had part in it and did not fail."""
        under_way = self._running.get(event.batch)
        if under_way is None:
            return
        read, written = event.moved
        count = under_way.requests - len(event.failed)
        there = read + under_way.way_there(now, event)
        meter = self.service(under_way.dispatch.batch.service)
        meter.execute(count, there, event.exec_ns - read - written, written)
        under_way.requests, under_way.begun = len(event.unfinished), now

    def _batch_failed(self, now: int, event: e.BatchFailed) -> None:
        self._batch_over(now, event.batch, 0)

    def _revoked(self, now: int, event: e.Revoked) -> None:
        meter = self.partition(event.partition)
        meter.revoke.add(event.took_ns)
        meter.recent_revoke.add(now, event.took_ns)
        self._grant_over(now, event.job, event.partition)

    def _action_failed(self, now: int, event: e.ActionFailed) -> None:
        if event.action == "Grant":
            self._grant_over(now, event.job, event.target)
        elif event.action == "Dispatch":
            self._batch_over(now, int(event.target), 0)

    def _job_exited(self, now: int, event: e.JobExited) -> None:
        for held in [p for j, p in self._granted if j == event.job]:
            self._grant_over(now, event.job, held)

    def _loading(self, _: int, action: a.Load) -> None:
        self._variants[action.worker] = action.variant

    def _serving(self, _: int, action: a.Serve) -> None:
        self.service(action.service).serve(action.version)

    def _version_gone(self, _: int, event: e.VersionGone) -> None:
        meter = self.service(event.service)
        if meter.version == event.version:
            meter.serve("")

    def _load_failed(self, _: int, event: e.LoadFailed) -> None:
        self._variants.pop(event.worker, None)

    def _count_variant(self, event: e.BatchDone) -> None:
        """Count what is answered by the variant that did it."""
        under_way = self._running.get(event.batch)
        if under_way is not None:
            dispatch = under_way.dispatch
            answered = len(dispatch.batch.requests) - len(event.failed) - len(event.unfinished)
            variant = self._variants.get(dispatch.worker, ORIGINAL)
            self.service(dispatch.batch.service).by_variant[variant] += answered

    def _worker_down(self, now: int, event: e.WorkerDown) -> None:
        self._variants.pop(event.worker, None)
        running = [under_way.dispatch for under_way in self._running.values()]
        lost = [dispatch for dispatch in running if dispatch.worker == event.worker]
        for dispatch in lost:
            self._at_hand.pop(dispatch.batch.id, None)
            self._resident.difference_update(dispatch.batch.requests)
            self._batch_over(now, dispatch.batch.id, 0)

    def _dispatched(self, now: int, action: a.Dispatch) -> None:
        if action.after:
            self._at_hand[action.after] = action
        else:
            self._begin(now, action)

    def _completed(self, now: int, action: a.Complete) -> None:
        for request_id in action.requests:
            request = self._open.pop(request_id, None)
            if request is not None:
                self._answered(now, request)

    def _rejected(self, _: int, action: a.Reject) -> None:
        self._refused(action.request, action.refusal)

    def _granting(self, now: int, action: a.Grant) -> None:
        self._granted[action.job, action.partition] = now
        self.job(action.job).grant(now, self._compute.get(action.partition, 1))
        self.partition(action.partition).hold(f"job:{action.job}", now)

    def _begin(self, now: int, dispatch: a.Dispatch) -> None:
        batch = dispatch.batch
        self._running[batch.id] = _UnderWay(dispatch, now)
        self.partition(dispatch.partition).hold(f"service:{batch.service}", now)
        meter = self.service(batch.service)
        meter.batches += 1
        meter.batched_rows += batch.rows
        meter.rows[batch.rows] += 1
        meter.executed_rows += batch.rows
        if self._resident:  # a row each
            meter.executed_rows -= len(self._resident.intersection(batch.requests))
        for request in batch.requests:
            if request not in self._resident:
                meter.queue_ns += now - self._open[request].arrived

    def _answered(self, now: int, request: Request) -> None:
        self._resident.discard(request.id)
        meter = self.service(request.service)
        latency = now - request.arrived
        meter.answered += 1
        talk = self._talks.pop(request.id, None)
        if talk is None:
            meter.misses += now > request.deadline
            meter.recent.add(now, latency)
        else:
            meter.misses += talk.late or talk.fell_behind(now, self._paces.get(request.service, 0))
            meter.answer.add(talk.said)
            if talk.said > 1:
                meter.pace.add((now - talk.first) // (talk.said - 1))
                meter.recent_pace.add(now, (now - talk.first) // (talk.said - 1))
        meter.latency.add(latency)
        meter.latency_ns += latency
        meter.last_answer = now

    def _refused(self, request_id: int, refusal: Refusal) -> None:
        request = self._open.pop(request_id, None)
        self._resident.discard(request_id)
        self._talks.pop(request_id, None)
        if request is not None:
            meter = self.service(request.service)
            meter.refused[refusal.name] += 1
            meter.failed += refusal == Refusal.FAILED

    def turned_away(self, service: str, refusal: Refusal) -> None:
        """A request was refused before the dispatcher knew of it."""
        meter = self.service(service)
        meter.arrived += 1
        meter.refused[refusal.name] += 1

    def _batch_over(self, now: int, batch: int, exec_ns: int, failed: tuple[int, ...] = ()) -> None:
        for request in failed:
            self._refused(request, Refusal.FAILED)
        under_way = self._running.pop(batch, None)
        if under_way is None:
            return
        dispatch = under_way.dispatch
        self.service(dispatch.batch.service).exec_ns += exec_ns
        self.partition(dispatch.partition).hold("", now)
        at_hand = self._at_hand.pop(batch, None)
        if at_hand is not None:
            self._begin(now, at_hand)

    def _grant_over(self, now: int, job: str, partition: str) -> None:
        since = self._granted.pop((job, partition), None)
        if since is None:
            return
        meter = self.job(job)
        meter.held_ns += (now - since) * self._compute.get(partition, 1)
        meter.change(now, -self._compute.get(partition, 1))
        meter.pauses += not any(j == job for j, _ in self._granted)
        occupied = self.partition(partition)
        if occupied.holder == f"job:{job}":
            occupied.hold("", now)

    # --- meters -----------------------------------------------------------------------------

    def service(self, name: str) -> ServiceMeter:
        """The meter of a service, made at need."""
        if name not in self.services:
            self.services[name] = ServiceMeter(Season.of(self._season, SEASON_SLOTS))
        return self.services[name]

    def partition(self, name: str) -> PartitionMeter:
        """The meter of a partition, made at need."""
        if name not in self.partitions:
            self.partitions[name] = PartitionMeter()
        return self.partitions[name]

    def job(self, name: str) -> JobMeter:
        """The meter of a job, made at need."""
        if name not in self.jobs:
            self.jobs[name] = JobMeter(self._last_tick)
        return self.jobs[name]

    def held_ns(self, job: str, now: int) -> int:
        """Unit-nanoseconds granted to a job up to now, grants under way included."""
        running = sum(
            (now - since) * self._compute.get(partition, 1)
            for (j, partition), since in self._granted.items()
            if j == job
        )
        return self.job(job).held_ns + running

    def forget_jobs(self, kept: Collection[str]) -> None:
        """Drop the meters of all jobs but these."""
        for name in [n for n in self.jobs if n not in kept]:
            del self.jobs[name]

    # --- reading ----------------------------------------------------------------------------

    def tick(self, now: int) -> None:
        """Close an observation interval (about a second)."""
        window = now - self._last_tick
        if window <= 0:
            return
        for meter in self.services.values():
            meter.tick(now, window / S)
        for job in self.jobs.values():
            job.tick(now)
        for partition in self.partitions.values():
            partition.hold(partition.holder, now)
            partition.last_window = {w: ns / window for w, ns in partition.window.items()}
            partition.window.clear()
        self._last_tick = now
        self._keep(now, window)

    def _keep(self, now: int, window: int) -> None:
        """Note who held what in the interval that was closed, and forget what is old."""
        held: dict[str, dict[str, float]] = {}
        for name, partition in self.partitions.items():
            units = self._compute.get(name, 1)
            device = held.setdefault(partition.device, {})
            for workload, share in partition.last_window.items():
                device[workload] = device.get(workload, 0.0) + share * units
        while self.past and now - self.past[0].end >= PAST:
            self.past.popleft()
        self.past.append(Span(now, window, held))

    def snapshot(
        self,
        now: int,
        devices: tuple[DeviceSpec, ...],
        state: DispatcherState,
        specs: Mapping[str, ServiceSpec],
        rates: Mapping[str, float],
        resident: Mapping[str, int] = MappingProxyType({}),
    ) -> Snapshot:
        """Facts for the planner: of services by their ``specs``, of jobs with their progress
        ``rates`` (per second) and the bytes that they have ``resident``."""
        kinds = {device.id: device.kind for device in devices}
        return Snapshot(
            now=now,
            devices=devices,
            plan=state.plan,
            services=tuple(
                self._service_facts(now, spec, state, kinds)
                for spec in specs.values()
                if spec.name in state.services
            ),
            jobs=tuple(
                JobFacts(
                    id=job.id,
                    weight=job.weight,
                    guaranteed=_of_its_devices(job, job.guaranteed, devices),
                    limit=_of_its_devices(job, job.limit, devices),
                    rate=rates.get(job.id, 0.0),
                    held_ns=self.held_ns(job.id, now),
                    kind=job.kind,
                    memory=job.kept
                    if gives(job, job.kind, devices)
                    else max(job.memory, resident.get(job.id, 0)),
                    units=self.job(job.id).shares(),
                    grants=self.job(job.id).grant_rate(),
                    apart=job.apart,
                    device=job.device,
                    own=job.own,
                )
                for job in _counted(state)
            ),
            changing=tuple(state.changes),
        )

    def _service_facts(
        self,
        now: int,
        spec: ServiceSpec,
        state: DispatcherState,
        kinds: Mapping[str, str],
    ) -> ServiceFacts:
        meter, known = self.service(spec.name), state.services[spec.name]
        (p95,) = meter.recent.quantiles(now, 0.95)
        exec_ns = {
            kind: {
                f"{units}x{rows}": ns
                for units, times in table.expected().items()
                for rows, ns in times.items()
            }
            for kind, table in known.exec.items()
        }
        return ServiceFacts(
            name=spec.name,
            objective=spec.slo.latency,
            percentile=spec.slo.percentile,
            guaranteed=spec.guaranteed,
            limit=spec.limit,
            max_batch=known.max_batch,
            rate=meter.rate.level,
            rate_trend=meter.rate.trend,
            p95=p95 or 0,
            refused=sum(meter.refused.values()),
            answered=meter.answered,
            exec_ns=exec_ns,
            instances=spec.instances,
            pressed=meter.misses + sum(meter.refused[r.name] for r in _WANT_OF_CAPACITY),
            rate_season=meter.season.factor(now, now + SEASON_AHEAD),
            accuracy_floor=spec.accuracy_floor,
            variants=spec.variants,
            others=others_of(known) if spec.chooses else {},
            serving=dict(known.serving),
            kinds=spec.kinds,
            memory=_occupied(spec, state, kinds),
            unloads=spec.unloads,
            load_ns=known.load_ns,
            offer=known.offer_revision if known.offer else 0,
            unfit=_unfit(known),
            turns=turns_of(state, known, meter),
        )


def _counted(state: DispatcherState) -> list[Tenant]:
    """The jobs that are planned for: those that may run at one time, and all reservations."""
    free = [t for t in state.tenants.values() if not t.device][: state.most_jobs or None]
    there = {t.id for t in free}
    return [
        t
        for t in state.tenants.values()
        if t.kind and t.phase != Phase.STOPPING and (t.device or t.id in there)
    ]


def _of_its_devices(job: Tenant, share: Share, devices: tuple[DeviceSpec, ...]) -> float:
    """A share of the compute of a job's kind of device, as one of those that it may be on."""
    found = share_on(share, job.kind)
    alike = [d for d in devices if d.kind == job.kind]
    mine = [d for d in alike if d.id == job.device]
    if not mine:
        return found
    return min(1.0, found * sum(d.compute for d in alike) / mine[0].compute)


def _unfit(known: ServiceState) -> dict[str, str]:
    """Devices that could not load a service: of those that bind instances, no partition could."""
    failed = {site: why for site, why in unfit(known).items() if not known.at.get(site)}
    for device, places in known.places.items():
        reasons = [failed.pop(place) for place in places if place in failed]
        if reasons and len(reasons) == len(places):
            failed[device] = reasons[0]
    return failed


def _occupied(
    spec: ServiceSpec, state: DispatcherState, kinds: Mapping[str, str]
) -> dict[str, int]:
    """Bytes that an instance occupies, by kind of device (``kinds``: of each): what its owner says,
    or more where more was measured."""
    found = dict.fromkeys(kinds.values(), spec.memory)
    found |= {kind: variant.memory for kind, variant in spec.variants.items() if variant.memory}
    for worker in state.workers.values():
        if worker.service == spec.name:
            kind = kinds[worker.device]
            found[kind] = max(found[kind], worker.memory)
    return {kind: need for kind, need in found.items() if need}
