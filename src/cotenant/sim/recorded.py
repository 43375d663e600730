"""Scenarios from journals: what a live node was asked, on its devices, at the costs it showed.

Arrivals, objectives, instances, jobs and devices are those of the record. Costs are fitted:

* executions: the mean of what workers measured, by units and rows, and their coefficient of
  variation; what else a batch holds its partition for is the time to start and to hand over;
* contention: how much longer executions took while jobs held other units;
* revocations and grants: their measured times;
* jobs: progress/s on ``u`` units as ``rate x speed_up(parallel, u)``, least squares over the
  progress that the record shows against the units that the job held.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import DeviceSpec
from cotenant.domain.errors import JournalError
from cotenant.domain.request import Request
from cotenant.domain.snapshot import RATE_WINDOW
from cotenant.domain.units import S
from cotenant.domain.workload import BatchSpec, JobSpec, ServiceSpec, Slo
from cotenant.policy.state import DispatcherState, ServiceState
from cotenant.policy.utility import speed_up
from cotenant.sim.arrivals import Recorded
from cotenant.sim.costs import DEVICES, DeviceCost, ExecCost, JobCost, Spread
from cotenant.sim.scenario import Scenario, SimDevice, SimJob, SimService
from cotenant.telemetry.records import Entry, Gap, Header, PlanRecord, Record

_LEAST_SAMPLES = 5
_PARALLEL = tuple(i / 20 for i in range(21))


class _Executed(msgspec.Struct):
    service: str
    units: int
    rows: int
    exec_ns: int
    held_ns: int
    preempting: bool
    at_hand: bool
    """Whether the worker had it already when the batch before it ended."""
    follows: bool
    """Whether it was dispatched the moment that another batch ended there."""
    beside: float
    """Share of the other units that jobs held when it was dispatched."""


class Costs(msgspec.Struct, frozen=True):
    """What a record says of costs. ``executions`` by service, ``jobs`` by id."""

    device: DeviceCost
    executions: dict[str, ExecCost]
    jobs: dict[str, JobCost]


class Recording:
    """One run of a node as its journal tells it. Raises JournalError if there is nothing to use.

    ``windows``: stretches (ns, monotonic) to look at alone; they are put end to end.
    """

    def __init__(
        self, entries: Iterable[Entry], windows: Sequence[tuple[int, int]] | None = None
    ) -> None:
        self._windows = list(windows) if windows is not None else None
        self.devices: tuple[DeviceSpec, ...] = ()
        self.services: dict[str, ServiceSpec] = {}
        self.jobs: dict[str, JobSpec] = {}
        self.arrivals: dict[str, list[Request]] = defaultdict(list)
        self.began = self.ended = 0
        self.latencies: dict[str, list[int]] = defaultdict(list)
        self._executed: list[_Executed] = []
        self._revoked: list[int] = []
        self._granted: list[int] = []
        self._holds: dict[str, list[tuple[int, int]]] = defaultdict(list)
        """Of each job: (when, change of the units it holds)."""
        self._ready: dict[str, int] = {}
        self._rates: dict[str, list[tuple[int, int, float]]] = defaultdict(list)
        """Of each job: from when, until when, and its progress per second meanwhile."""
        self._units: dict[str, int] = {}
        self._dispatched: dict[int, tuple[a.Dispatch, int, bool, float]] = {}
        self._ended: dict[str, int] = {}
        self._open: dict[int, Request] = {}
        self._orders: dict[tuple[str, str], int] = {}
        self._held: dict[tuple[str, str], int] = {}
        for entry in entries:
            self._read(entry)
        if not self.services or not any(self.arrivals.values()):
            raise JournalError("the journal holds no service that was asked anything")

    # --- reading ----------------------------------------------------------------------------

    def _read(self, entry: Entry) -> None:
        match entry:
            case Header():
                if not self.began:
                    self.began = entry.now
                    self._take(entry.dispatcher_state())
                self.devices = entry.devices
            case PlanRecord(now=now, snapshot=snapshot):
                for service in snapshot.services:
                    known = self.services.get(service.name)
                    if known is not None:
                        self.services[service.name] = msgspec.structs.replace(
                            known,
                            slo=Slo(service.objective, service.percentile),
                            guaranteed=service.guaranteed,
                            limit=service.limit,
                            instances=service.instances,
                            variants=service.variants,
                        )
                for job in snapshot.jobs:
                    self.jobs[job.id] = JobSpec(
                        id=job.id,
                        name=job.id,
                        command=(job.id,),
                        weight=job.weight,
                        guaranteed=job.guaranteed,
                        limit=job.limit,
                    )
                    since = max(self._ready.get(job.id, self.began), now - RATE_WINDOW)
                    if self._windows is None and job.rate > 0 and now - since >= 5 * S:
                        self.note_progress(job.id, since, now, job.rate)
                self._units |= {p.id: p.compute for p in snapshot.plan.partitions}
            case Record(now=now, event=event, actions=actions):
                self.ended = now
                self._event(now, event)
                for action in actions:
                    self._action(now, action)
            case Gap():
                # What was open may have ended unseen.
                self._dispatched.clear()

    def _take(self, state: DispatcherState) -> None:
        for service in state.services.values():
            self.services[service.name] = _spec(service.name, service, max(1, service.workers))
        self._units |= {p.id: p.compute for p in state.partitions.values()}
        for partition in state.partitions.values():
            if partition.job:
                self._hold(partition.held_since, partition.job, partition.id)
        for job in state.jobs.values():
            self._ready[job.id] = self.began

    def _event(self, now: int, event: e.Event) -> None:
        match event:
            case e.ServiceAdded():
                self.services[event.service] = _spec(event.service, event)
            case e.Arrived(request=request):
                if self._at(now) is not None:
                    self.arrivals[request.service].append(request)
                self._open[request.id] = request
            case e.BatchDone():
                self._batch_done(now, event)
            case e.BatchFailed(batch=batch):
                found = self._dispatched.pop(batch, None)
                if found is not None:
                    self._ended[found[0].partition] = now
            case e.DeviceChanged(spec=spec):
                self.devices = tuple(spec if d.id == spec.id else d for d in self.devices)
            case e.Planned(plan=plan):
                self._units |= {p.id: p.compute for p in plan.partitions}
            case _:
                self._job_event(now, event)

    def _job_event(self, now: int, event: e.Event) -> None:
        match event:
            case e.JobReady(job=job):
                self._ready[job] = now
            case e.Granted(job=job, partition=partition):
                since = self._orders.pop((job, partition), None)
                if since is not None:
                    self._granted.append(now - since)
                    self._hold(now, job, partition)
            case e.Revoked(job=job, partition=partition, took_ns=took):
                self._revoked.append(took)
                self._let_go(now, job, partition)
            case e.JobExited(job=job):
                for holder, partition in list(self._held):
                    if holder == job:
                        self._let_go(now, job, partition)
            case _:
                pass

    def _batch_done(self, now: int, event: e.BatchDone) -> None:
        found = self._dispatched.pop(event.batch, None)
        if found is None:
            return
        order, since, follows, beside = found
        if order.after:
            since = max(since, self._ended.get(order.partition, since))
        self._ended[order.partition] = now
        if self._at(since) is None:
            return
        self._executed.append(
            _Executed(
                service=order.batch.service,
                units=self._units.get(order.partition, 1),
                rows=order.batch.rows,
                exec_ns=event.exec_ns,
                held_ns=now - since,
                preempting=order.preempting,
                at_hand=order.after > 0,
                follows=follows,
                beside=beside,
            )
        )

    def _complete(self, now: int, requests: tuple[int, ...]) -> None:
        for request in requests:
            found = self._open.pop(request, None)
            if found is not None and self._at(found.arrived) is not None:
                self.latencies[found.service].append(now - found.arrived)

    def _action(self, now: int, action: a.Action) -> None:
        match action:
            case a.Dispatch():
                others = sum(self._held.values())
                total = sum(d.compute for d in self.devices)
                rest = max(1, total - self._units.get(action.partition, 1))
                follows = self._ended.get(action.partition) == now
                beside = min(1.0, others / rest)
                self._dispatched[action.batch.id] = (action, now, follows, beside)
            case a.Grant(job=job, partition=partition):
                self._orders[job, partition] = now
            case a.Complete(requests=requests):
                self._complete(now, requests)
            case a.Reject(request=request):
                self._open.pop(request, None)
            case _:
                pass

    def _hold(self, now: int, job: str, partition: str) -> None:
        units = self._units.get(partition, 1)
        self._held[job, partition] = units
        self._holds[job].append((now, units))

    def _let_go(self, now: int, job: str, partition: str) -> None:
        units = self._held.pop((job, partition), 0)
        if units:
            self._holds[job].append((now, -units))

    def note_progress(self, job: str, since: int, until: int, rate: float) -> None:
        """What a job made per second between two times (ns): a journal tells it only over a
        minute."""
        self._rates[job].append((since, until, rate))

    def _at(self, now: int) -> int | None:
        """Ns from the start of the windows put end to end; None outside of them."""
        if self._windows is None:
            return now - self.began
        before = 0
        for start, end in self._windows:
            if start <= now < end:
                return before + now - start
            before += end - start
        return None

    # --- fitting ----------------------------------------------------------------------------

    def costs(self) -> Costs:
        """Costs fitted to this record; raises JournalError if a service never executed."""
        kind = self.devices[0].kind
        contention = self._contention()
        sent = [x for x in self._executed if not x.at_hand]
        idle = [x for x in sent if not x.follows]
        overhead = [x.held_ns - x.exec_ns for x in idle if not x.preempting]
        preempting = [x.held_ns - x.exec_ns for x in idle if x.preempting]
        following = [x.held_ns - x.exec_ns for x in sent if x.follows]
        at_hand = [x.held_ns - x.exec_ns for x in self._executed if x.at_hand]
        if len(overhead) < _LEAST_SAMPLES:
            # The job held the space whenever a request came: what it costs is part of every start.
            overhead = preempting
        more = 0.0
        if overhead and len(preempting) >= _LEAST_SAMPLES:
            more = max(0.0, statistics.median(preempting) - statistics.median(overhead))
        device = msgspec.structs.replace(
            DEVICES.get(kind, DEVICES["cpu"]),
            start=_spread(overhead),
            follow=_spread(following) if len(following) >= _LEAST_SAMPLES else None,
            at_hand=_spread(at_hand) if len(at_hand) >= _LEAST_SAMPLES else Spread(0),
            preempt=Spread(round(more), 0.5),
            grant=_spread(self._granted),
            revoke=_spread(self._revoked),
            contention=contention,
            source=f"fitted to a journal of {(self.ended - self.began) / S:.0f} s",
        )
        executions = {name: self._execution(name, contention) for name in self.services}
        return Costs(device, executions, {job: self._progress(job) for job in self.jobs})

    def _contention(self) -> float:
        """Relative lengthening of executions when jobs hold all other units."""
        ratios = []
        by_size: dict[tuple[str, int, int], list[_Executed]] = defaultdict(list)
        for x in self._executed:
            by_size[x.service, x.units, x.rows].append(x)
        for group in by_size.values():
            quiet = [x.exec_ns for x in group if x.beside < 0.1]
            beside = [x for x in group if x.beside > 0.5]
            if len(quiet) >= _LEAST_SAMPLES and len(beside) >= _LEAST_SAMPLES:
                level = statistics.median(x.beside for x in beside)
                slow = statistics.median(x.exec_ns for x in beside) / statistics.median(quiet)
                ratios.append(max(0.0, slow - 1) / level)
        return min(1.0, statistics.median(ratios)) if ratios else 0.0

    def _execution(self, service: str, contention: float) -> ExecCost:
        """Means by size, without what contention adds; the spread that is left."""
        by_size: dict[tuple[int, int], list[float]] = defaultdict(list)
        for x in self._executed:
            if x.service == service:
                alone = x.exec_ns / (1 + contention * x.beside)
                by_size[x.units, x.rows].append(alone)
        if not by_size:
            raise JournalError(f"{service} never executed in this journal; nothing to fit")
        profile = tuple(
            (units, rows, max(1, round(statistics.mean(_kept(times)))))
            for (units, rows), times in sorted(by_size.items())
        )
        spreads = [
            statistics.stdev(_kept(times)) / statistics.mean(_kept(times))
            for times in by_size.values()
            if len(times) >= _LEAST_SAMPLES
        ]
        first = profile[0][2]
        cv = min(1.0, statistics.median(spreads)) if spreads else 0.05
        return ExecCost(first=first, per_row=first, cv=cv, profile=profile)

    def _progress(self, job: str) -> JobCost:
        """``rate`` and ``parallel`` by least squares over the rates reported."""
        shares = [self._shares(job, since, until) for since, until, _ in self._rates[job]]
        rates = [rate for _, _, rate in self._rates[job]]
        if not rates:
            return JobCost(rate=1.0, resume=0)
        most = max(max(s) for s in shares)
        best = (float("inf"), 1.0, 0.0)
        seen = np.array(rates)
        for parallel in _PARALLEL:
            speeds = [0.0, *(speed_up(parallel, 0, units) for units in range(1, most + 1))]
            made = np.array([sum(speeds[u] * part for u, part in s.items()) for s in shares])
            norm = float(made @ made)
            rate = float(made @ seen) / norm if norm else 0.0
            left = float(((made * rate - seen) ** 2).sum())
            if left < best[0]:
                best = left, rate, parallel
        return JobCost(rate=max(best[1], 1e-9), parallel=best[2], resume=0)

    def _shares(self, job: str, since: int, until: int) -> dict[int, float]:
        """How much of a stretch of time the job held so many units."""
        found: dict[int, float] = defaultdict(float)
        units, at = 0, since
        for when, change in sorted(self._holds[job]):
            if when > until:
                break
            if when > at:
                found[units] += when - at
                at = when
            units += change
        found[units] += until - at
        return {u: t / (until - since) for u, t in found.items()}

    # --- the scenario -----------------------------------------------------------------------

    def scenario(
        self, costs: Costs | None = None, devices: tuple[SimDevice, ...] | None = None
    ) -> Scenario:
        """What was asked, at these costs (its own if not given) or on other devices."""
        costs = costs or self.costs()
        there = devices or tuple(SimDevice(spec, costs.device) for spec in self.devices)
        kinds = {d.spec.kind for d in there}
        services = []
        for name, spec in self.services.items():
            requests = self.arrivals.get(name, [])
            at = [max(0, self._at(r.arrived) or 0) for r in requests]
            execution = costs.executions.get(name)
            if execution is None:
                raise JournalError(
                    f"the costs say nothing of {name}; take them from its own journal"
                )
            services.append(
                SimService(
                    spec=spec,
                    costs=dict.fromkeys(kinds, execution),
                    load=0,
                    arrivals=Recorded(
                        at=tuple(at),
                        rows=tuple(r.rows for r in requests),
                        priorities=tuple(r.priority for r in requests),
                        budgets=tuple(r.deadline - r.arrived for r in requests),
                    ),
                )
            )
        jobs = tuple(SimJob(spec, _of_job(costs, job)) for job, spec in self.jobs.items())
        if self._windows is None:
            duration = self.ended - self.began
        else:
            duration = sum(end - start for start, end in self._windows)
        return Scenario(
            name="journal",
            story="a recorded run's arrivals",
            duration=max(1, duration),
            devices=there,
            services=tuple(services),
            jobs=jobs,
        )

    def leave_out(self) -> dict[str, str]:
        """Forget services that cannot be told again from this record; why, by name."""
        executed = {x.service for x in self._executed}
        why: dict[str, str] = {}
        for name in self.services:
            if any(request.prompt for request in self.arrivals.get(name, ())):
                why[name] = "it answers in turns, which are not modelled from a journal"
            elif name not in executed:
                why[name] = "it executed nothing"
        for name in why:
            del self.services[name]
            self.arrivals.pop(name, None)
        return why

    def job_rate(self, job: str) -> float:
        """Mean progress per second that was noted; 0 if none was."""
        return statistics.mean(rate for *_, rate in self._rates[job]) if self._rates[job] else 0.0


def _of_job(costs: Costs, job: str) -> JobCost:
    """Ids differ from run to run: the only job of another record is taken for the same."""
    if job in costs.jobs:
        return costs.jobs[job]
    if len(costs.jobs) == 1:
        return next(iter(costs.jobs.values()))
    raise JournalError(f"the costs say nothing of job {job}; use its own journal's")


def _kept(samples: Sequence[float]) -> list[float]:
    """All but the slowest fiftieth, at least one of ten: that is the host's doing."""
    return sorted(samples)[: max(1, len(samples) - max(len(samples) // 50, len(samples) >= 10))]


def _spread(samples: Sequence[int]) -> Spread:
    """Mean and coefficient of variation of what is kept."""
    if not samples:
        return Spread(0)
    kept = [max(0.0, s) for s in _kept(samples)]
    mean = statistics.mean(kept)
    spread = statistics.stdev(kept) / mean if len(kept) > 1 and mean > 0 else 0.0
    return Spread(round(mean), min(2.0, spread))


def _spec(name: str, known: ServiceState | e.ServiceAdded, instances: int = 1) -> ServiceSpec:
    return ServiceSpec(
        name=name,
        model=name,
        slo=Slo(known.objective),
        batch=BatchSpec(known.max_batch, known.preferred, known.max_queue_delay),
        max_queue=known.max_queue,
        strict=known.strict,
        instances=instances,
    )
