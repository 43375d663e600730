"""The virtual-time shell: it turns a policy's actions into what a box would do, and back.

The dispatcher, the planner and the monitor are the live node's. Time is a heap of what will
happen; things due at the same nanosecond happen in this order: acknowledgements of the device,
ends of executions, arrivals, wake-ups, the planner's tick; among equals, what was scheduled
first. So a run is a function of scenario, policy and seed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Final, Protocol

import numpy as np

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import DeviceSpec, Partition
from cotenant.domain.plan import Plan
from cotenant.domain.request import Request
from cotenant.domain.snapshot import RATE_WINDOW, Snapshot
from cotenant.domain.units import S
from cotenant.domain.workload import JobSpec
from cotenant.policy.dispatcher import Dispatcher
from cotenant.policy.planner import Planner
from cotenant.sim.arrivals import Recorded
from cotenant.sim.costs import Spread
from cotenant.sim.moments import MOMENTS, SPANS, Moment, Span
from cotenant.sim.outcome import JobTally, Outcome, ServiceTally
from cotenant.sim.scenario import Scenario, SimDevice, SimJob, SimService, sizes
from cotenant.telemetry.monitor import Monitor

TICK: Final = 1 * S
DEBT_WINDOW: Final = 10 * S
_ACK: Final = 0
_DONE: Final = 1
_ARRIVAL: Final = 2
_WAKE: Final = 3
_TICK: Final = 4


class Draws:
    """Random factors of mean 1, drawn in blocks."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._normals: list[float] = []

    def factor(self, cv: float) -> float:
        """Log-normal with mean 1 and coefficient of variation ``cv``."""
        if cv <= 0:
            return 1.0
        if not self._normals:
            self._normals = self._rng.standard_normal(4096).tolist()
        variance = math.log1p(cv * cv)
        return math.exp(math.sqrt(variance) * self._normals.pop() - variance / 2)

    def time(self, spread: Spread) -> int:
        """Ns."""
        return round(spread.mean * self.factor(spread.cv))


class _Progress:
    """One job: what it holds and how far it came. ``bound``: it runs in one partition at a time
    (``place``, where it was started) and starts again elsewhere."""

    def __init__(self, job: SimJob, tally: JobTally, bound: bool) -> None:
        self.cost = job.cost
        self.tally = tally
        self.bound = bound
        self.place = ""
        self._speeds: dict[int, float] = {}
        self.held: dict[str, int] = {}
        self._units = 0
        self.owed: dict[str, float] = {}
        """Steps that are done over on a partition before there is progress there."""
        self.since = 0
        self.slowed = 0.0
        self._made: deque[tuple[int, float]] = deque()

    def grant(self, now: int, partition: str, units: int) -> None:
        """It may use a partition from now on."""
        self.settle(now)
        lost = self.cost.resume
        if self.bound and self.place != partition:
            lost = self.cost.move if self.place else lost
            self.place = partition
        self._units += units - self.held.get(partition, 0)
        self.held[partition] = units
        if lost:
            self.owed[partition] = self._speed(units) * lost / S
        self.tally.grants += 1

    def revoke(self, now: int, partition: str) -> None:
        """It may not use a partition any more."""
        self.settle(now)
        self._units -= self.held.pop(partition, 0)
        self.owed.pop(partition, None)

    def rate(self, now: int) -> float:
        """Progress per second over the last minute, as a node reports it."""
        self.settle(now)
        self._made.append((now, self.tally.steps))
        while len(self._made) > 1 and self._made[1][0] <= now - RATE_WINDOW:
            self._made.popleft()
        since, made = self._made[0]
        return max(0.0, self.tally.steps - made) / ((now - since) / S) if now > since else 0.0

    def settle(self, now: int) -> None:
        """Book progress up to ``now``."""
        if now <= self.since:
            return
        used = max(self.held.values(), default=0) if self.bound else self._units
        made = self._speed(used) * (now - self.since) / S * (1 - self.slowed)
        self.tally.steps += made
        if self.owed:
            owed = sum(self.owed.values())
            self.tally.steps -= min(made, owed)
            left = max(0.0, 1.0 - made / owed)
            self.owed = {name: steps * left for name, steps in self.owed.items()} if left else {}
        self.tally.held_ns += self._units * (now - self.since)
        self.since = now

    def _speed(self, units: int) -> float:
        if units not in self._speeds:
            self._speeds[units] = self.cost.speed(units)
        return self._speeds[units]


class _Place:
    """A partition of the layout in force and what its device charges. ``first``: where the
    device's units begin if all are numbered through."""

    def __init__(self, partition: Partition, device: SimDevice, first: int) -> None:
        self.id = partition.id
        self.device = partition.device
        self.compute = partition.compute
        self.kind = device.spec.kind
        self.cost = device.cost
        self.rows = tuple(first + unit for unit in partition.units)


class _Execution:
    """A batch under way: where, since when, and how long starting and executing it take (ns)."""

    def __init__(self, action: a.Dispatch, place: _Place, began: int, start: int, took: int):
        self.action = action
        self.place = place
        self.began = began
        self.start = start
        self.took = took


class _Source:
    """Where a service's requests come from."""

    def __init__(self, service: SimService, tally: ServiceTally, rng: np.random.Generator) -> None:
        self._service = service.spec.name
        self._objective = service.spec.slo.latency
        self._recorded = service.arrivals if isinstance(service.arrivals, Recorded) else None
        self._times = service.arrivals.times(rng)
        self._tally = tally

    def next(self) -> int | None:
        """When the next one comes (ns); None if none does."""
        return next(self._times, None)

    def request(self, number: int, now: int) -> Request:
        """The one that comes now."""
        nth = self._tally.offered
        self._tally.offered += 1
        recorded = self._recorded
        if recorded is None:
            return Request(number, self._service, now, now + self._objective)
        deadline = now + recorded.budgets[nth]
        priority, rows = recorded.priorities[nth], recorded.rows[nth]
        return Request(number, self._service, now, deadline, priority, rows)


class _Diary:
    """What goes on over a run, in at most ``MOMENTS`` pieces."""

    def __init__(self, scenario: Scenario) -> None:
        self._every = max(TICK, scenario.duration // MOMENTS)
        self._since = 0
        self._objective = {s.spec.name: s.spec.slo.latency for s in scenario.services}
        self._latencies: dict[str, list[int]] = {name: [] for name in self._objective}
        self._served = dict.fromkeys(self._objective, 0)
        self._held = {j.spec.id: 0 for j in scenario.jobs}

    def answered(self, service: str, latency: int) -> None:
        """A request was answered."""
        self._latencies[service].append(latency)

    def served(self, service: str, unit_ns: int) -> None:
        """A batch held compute."""
        self._served[service] += unit_ns

    def tick(self, now: int, outcome: Outcome) -> None:
        """Close a stretch if it is long enough."""
        if now - self._since < self._every:
            return
        p95, share, whole = {}, {}, (now - self._since) * outcome.units
        for name, latencies in self._latencies.items():
            latencies.sort()
            worst = latencies[int(0.95 * len(latencies))] if latencies else 0
            p95[name] = worst / self._objective[name]
            latencies.clear()
            share[name] = self._served[name] / whole
            self._served[name] = 0
        for job, tally in outcome.jobs.items():
            share[job] = (tally.held_ns - self._held[job]) / whole
            self._held[job] = tally.held_ns
        outcome.moments.append(Moment(now, p95, share))
        self._since = now


class Observer(Protocol):
    """Whoever wants to see each decision as it is made: what a node's journal would hold."""

    def decided(self, now: int, event: e.Event, actions: list[a.Action]) -> None:
        """The dispatcher decided on an event."""

    def planned(self, now: int, snapshot: Snapshot, plan: Plan | None) -> None:
        """The planner looked at a snapshot."""


class World:
    """One run of a scenario on one box. ``seed``: of the run, and of the box in it."""

    def __init__(
        self,
        scenario: Scenario,
        planner: Planner,
        seed: tuple[int, int],
        record: bool = False,
        observer: Observer | None = None,
    ) -> None:
        self._observer = observer
        self._scenario = scenario
        self._specs = tuple(d.spec for d in scenario.devices)
        self._devices = {d.spec.id: d for d in scenario.devices}
        self._compute = {d.id: d.compute for d in self._specs} | {"": scenario.compute}
        trainers = [d for d in scenario.devices if d.spec.trains] or [scenario.device]
        self._only_trainer = trainers[0].spec.id if len(trainers) == 1 else ""
        self._contended = {
            d.spec.id: (d.cost.contention, d.spec.compute) for d in trainers if d.cost.contention
        }
        """By how much jobs on a device are slowed down if all its units serve, and their number."""
        self._dispatcher = Dispatcher(self._specs)
        self._planner = planner
        self._monitor = Monitor(scenario.season)
        self._draws = Draws(np.random.default_rng((*seed, 0)))
        self._now = 0
        self._heap: list[tuple[int, int, int, Any]] = []
        self._order = 0
        self._wake_token = 0
        self._places: dict[str, _Place] = {}
        self._rows = _rows(self._specs)
        self._instances: dict[tuple[str, str], set[str]] = {}
        """Instances of a service on a device that serve."""
        self._ending: set[str] = set()
        self._loading = 0
        """Loads that the next plan waits for."""
        self._settled: dict[str, int] = {}
        self._running: dict[str, int] = {}
        self._at_hand: dict[int, a.Dispatch] = {}
        """Batches that instances have at hand, by the batch that they follow."""
        self._served = dict.fromkeys(self._compute, 0)
        """Units that executions use, by device and (under "") of all the box."""
        self._load_changed = False
        """Whether jobs are to be slowed down by more or less than up to now."""
        self._ended: dict[str, int] = {}
        """When a batch last ended on a partition."""
        self._services = {s.spec.name: s for s in scenario.services}
        self._means: dict[tuple[str, str, int, int], int] = {}
        self._open: dict[int, Request] = {}
        middle = scenario.duration // 2
        self._recorded = (middle - SPANS // 2, middle + SPANS // 2) if record else None
        self._granted: dict[tuple[str, str], int] = {}
        self._diary = _Diary(scenario) if record else None
        self._next_request = 1
        self.outcome = Outcome(
            duration=scenario.duration,
            units=scenario.compute,
            services={s.spec.name: ServiceTally(s.spec.slo.latency) for s in scenario.services},
            jobs={j.spec.id: JobTally() for j in scenario.jobs},
        )
        bound = any(d.pins_jobs for d in self._specs)
        self._jobs = {
            j.spec.id: _Progress(j, self.outcome.jobs[j.spec.id], bound) for j in scenario.jobs
        }
        self._hands: dict[type, Callable[[Any], None]] = {
            a.Dispatch: self._dispatch,
            a.Complete: self._complete,
            a.Reject: self._reject,
            a.WakeAt: self._wake_at,
            a.Grant: self._grant,
            a.Revoke: self._revoke,
            a.Repartition: self._repartition,
            a.StopJob: self._stop_job,
        }
        self._sources = {
            s.spec.name: _Source(
                s, self.outcome.services[s.spec.name], np.random.default_rng((*seed, 1 + i))
            )
            for i, s in enumerate(scenario.services)
        }

    def run(self) -> Outcome:
        """Run to the end of the scenario. What is under way then is not counted."""
        self._set_up()
        end, heap = self._scenario.duration, self._heap
        while heap and heap[0][0] <= end:
            self._now, kind, _, what = heappop(heap)
            if kind == _ARRIVAL:
                self._arrive(what)
            elif kind == _DONE:
                self._executed(what)
            elif kind == _WAKE:
                if what == self._wake_token:
                    self._feed(e.Woke())
            elif kind == _TICK:
                self._tick()
            else:
                what()
            if self._load_changed:
                self._slow_jobs()
        self._now = end
        for (job, name), began in self._granted.items():
            self._record(job, self._places[name], began)
        for progress in self._jobs.values():
            progress.settle(end)
        self.outcome.open = len(self._open)
        return self.outcome

    # --- setting up -------------------------------------------------------------------------

    def _set_up(self) -> None:
        for service in self._scenario.services:
            spec = service.spec
            self._feed(
                e.ServiceAdded(
                    spec.name,
                    spec.slo.latency,
                    spec.batch.max,
                    spec.max_queue,
                    spec.batch.preferred,
                    spec.batch.max_queue_delay,
                    spec.strict,
                    percentile=spec.slo.percentile,
                )
            )
            self._schedule_arrival(self._sources[spec.name])
        trains = sum(d.compute for d in self._specs if d.trains)
        for job in self._scenario.jobs:
            spec_ = job.spec
            limit = max(1, int(spec_.limit * trains + 1e-9))
            self._feed(e.JobReady(spec_.id, spec_.weight, spec_.guaranteed, limit, DEBT_WINDOW))
        self._plan()
        self._at(TICK, _TICK, None)

    def _at(self, when: int, kind: int, what: Any) -> None:
        self._order += 1
        heappush(self._heap, (when, kind, self._order, what))

    def _schedule_arrival(self, source: _Source) -> None:
        at = source.next()
        if at is not None:
            self._at(at, _ARRIVAL, source)

    def _arrive(self, source: _Source) -> None:
        self._schedule_arrival(source)
        request = source.request(self._next_request, self._now)
        self._next_request += 1
        self._open[request.id] = request
        self._feed(e.Arrived(request))

    # --- the policy -------------------------------------------------------------------------

    def _feed(self, event: e.Event) -> None:
        actions = self._dispatcher.handle(self._now, event)
        self._monitor.observe(self._now, event, actions)
        if self._observer is not None:
            self._observer.decided(self._now, event, actions)
        for action in actions:
            self._hands[type(action)](action)

    def _tick(self) -> None:
        if self._diary is not None:
            for progress in self._jobs.values():
                progress.settle(self._now)
            self._diary.tick(self._now, self.outcome)
        self._monitor.tick(self._now)
        self._plan()
        self._at(self._now + TICK, _TICK, None)

    def _plan(self) -> None:
        state = self._dispatcher.state
        if self._loading:
            return
        jobs: dict[str, tuple[JobSpec, float]] = {
            j.spec.id: (j.spec, self._jobs[j.spec.id].rate(self._now)) for j in self._scenario.jobs
        }
        snapshot = self._monitor.snapshot(
            self._now,
            self._specs,
            state,
            {name: (s.spec, s.spec.instances) for name, s in self._services.items()},
            jobs,
        )
        plan = self._planner.plan(snapshot)
        if self._observer is not None:
            self._observer.planned(self._now, snapshot, plan)
        if plan is not None:
            self.outcome.reasons.append((self._now, plan.reasons))
            self._prepare(plan)

    def _prepare(self, plan: Plan) -> None:
        """Load the models that a plan needs; it comes into force when they are there."""
        device_of = {p.id: p.device for p in plan.partitions}
        wanted = {(s, device_of[p]) for s, where in plan.services.items() for p in where}
        missing = sorted(key for key in wanted if not self._instances.get(key))
        self._loading = len(missing)

        def enact() -> None:
            self._feed(e.Planned(plan))
            for key in sorted(self._instances):
                if key not in wanted:
                    self._unload(key)

        if not missing:
            enact()
        for name, device in missing:

            def loaded(name: str = name, device: str = device) -> None:
                self._start(name, device)
                self._loading -= 1
                if not self._loading:
                    enact()

            # What is there when the run begins was loaded before it.
            took = self._services[name].load if self._now else 0
            self._at(self._now + took, _ACK, loaded)

    def _start(self, name: str, device: str) -> None:
        service, spec = self._services[name], self._devices[device].spec
        profile = tuple(
            (units, rows, service.costs[spec.kind].mean(units, rows))
            for units in sizes(spec)
            for rows in (1, service.spec.batch.max)
        )
        for index in range(service.spec.instances):
            worker = f"{name}@{device}/{index}/{self._now}"
            self._instances.setdefault((name, device), set()).add(worker)
            self._feed(e.WorkerUp(worker, name, "1", device, profile))

    def _unload(self, key: tuple[str, str]) -> None:
        for worker in sorted(self._instances.pop(key)):
            self._feed(e.WorkerRetiring(worker))
            if self._dispatcher.state.workers[worker].batch:
                self._ending.add(worker)
            else:
                self._feed(e.WorkerDown(worker, "unloaded"))

    # --- the device -------------------------------------------------------------------------

    def _dispatch(self, action: a.Dispatch) -> None:
        if action.after:
            self._at_hand[action.after] = action
        else:
            self._execute(action)

    def _complete(self, action: a.Complete) -> None:
        for request in action.requests:
            found = self._open.pop(request)
            latency = self._now - found.arrived
            self.outcome.services[found.service].answer(latency)
            if self._diary is not None:
                self._diary.answered(found.service, latency)

    def _reject(self, action: a.Reject) -> None:
        found = self._open.pop(action.request)
        self.outcome.services[found.service].refuse(action.refusal.name)

    def _wake_at(self, action: a.WakeAt) -> None:
        self._wake_token += 1
        self._at(max(action.at, self._now), _WAKE, self._wake_token)

    def _stop_job(self, action: a.StopJob) -> None:
        raise AssertionError(f"{action.job}: simulated devices never fail to revoke")

    def _execute(self, action: a.Dispatch) -> None:
        batch, place, draws = action.batch, self._places[action.partition], self._draws
        cost, units, rows = place.cost, place.compute, batch.rows
        if action.after:
            spread = cost.at_hand
        elif cost.follow is not None and self._ended.get(place.id) == self._now:
            spread = cost.follow
        else:
            spread = cost.start
        start = draws.time(spread)
        if action.preempting:
            start += draws.time(cost.preempt)
        model = self._services[batch.service].costs[place.kind]
        key = batch.service, place.kind, units, rows
        mean = self._means.get(key)
        if mean is None:
            mean = self._means[key] = model.mean(units, rows)
        took = round(mean * draws.factor(model.cv) * (1 + self._contention(place)))
        self._running[place.id] = units
        self._served[place.device] += units
        self._served[""] += units
        self._load_changed = True
        begun = _Execution(action, place, self._now, start, took)
        self._at(self._now + start + took, _DONE, begun)

    def _executed(self, execution: _Execution) -> None:
        action, place, now = execution.action, execution.place, self._now
        batch, units = action.batch, place.compute
        del self._running[place.id]
        self._served[place.device] -= units
        self._served[""] -= units
        self._load_changed = True
        self._ended[place.id] = now
        used = units * (now - execution.began)
        self.outcome.served_ns += used
        if self._diary is not None:
            self._diary.served(batch.service, used)
        self._record(batch.service, place, execution.began)
        at_hand = self._at_hand.pop(batch.id, None)
        if at_hand is not None:
            self._execute(at_hand)
        self._feed(e.BatchDone(batch.id, execution.took, execution.start))
        if at_hand is None and action.worker in self._ending:
            self._ending.remove(action.worker)
            self._feed(e.WorkerDown(action.worker, "unloaded"))

    def _record(self, who: str, place: _Place, began: int) -> None:
        if self._recorded is None:
            return
        start, end = max(began, self._recorded[0]), min(self._now, self._recorded[1])
        if start < end:
            self.outcome.spans.append(Span(who, place.rows, start, end))

    def _contention(self, place: _Place) -> float:
        """By how much an execution is slowed down by what else is busy: on its device, and, where
        all devices share a memory, in the box."""
        contention, shared = place.cost.contention, self._scenario.shared_bandwidth
        slowed = 0.0
        if contention:
            slowed += contention * self._busy(place.device, place)
        if shared:
            slowed += shared * self._busy("", place)
        return slowed

    def _busy(self, device: str, but: _Place) -> float:
        """Share of a device (of the box, if not named) that is busy, 0..1, one partition aside."""
        running, places, aside = self._running, self._places, but.id
        anywhere = not device or len(self._specs) == 1
        busy = 0
        for name, units in running.items():
            if name != aside and (anywhere or places[name].device == device):
                busy += units
        for job in self._jobs.values():
            for name, units in job.held.items():
                if name == aside or name in running:
                    continue
                if anywhere or places[name].device == device:
                    busy += units
        there = self._compute[device]
        return min(1.0, busy / max(1, there - but.compute))

    def _slow_jobs(self) -> None:
        """Jobs are slowed down by executions beside them."""
        self._load_changed = False
        shared = self._scenario.shared_bandwidth
        if not (shared or self._contended):
            return
        everywhere = shared * self._served[""] / self._compute[""]
        slow = {name: most * self._served[name] / n for name, (most, n) in self._contended.items()}
        alike = slow.get(self._only_trainer, 0.0)
        for job in self._jobs.values():
            slowed = alike
            if job.held:
                job.settle(self._now)
                if not self._only_trainer:  # by what it holds of each
                    held = [(slow.get(self._places[p].device, 0.0), n) for p, n in job.held.items()]
                    slowed = sum(s * n for s, n in held) / sum(n for _, n in held)
            job.slowed = 1 - 1 / (1 + slowed + everywhere)

    def _grant(self, action: a.Grant) -> None:
        job, place = action.job, self._places[action.partition]

        def done() -> None:
            self._jobs[job].grant(self._now, place.id, place.compute)
            if not self._only_trainer:
                self._load_changed = True
            self._granted[job, place.id] = self._now
            self._feed(e.Granted(job, place.id))

        self._acknowledge(place.id, self._draws.time(place.cost.grant), done)

    def _revoke(self, action: a.Revoke) -> None:
        job, place = action.job, self._places[action.partition]
        took = self._draws.time(place.cost.revoke)

        def done() -> None:
            self._jobs[job].revoke(self._now, place.id)
            began = self._granted.pop((job, place.id), None)
            if began is not None:
                self._record(job, place, began)
            self._feed(e.Revoked(job, place.id, took))

        self._acknowledge(place.id, took, done)

    def _acknowledge(self, partition: str, took: int, done: Callable[[], None]) -> None:
        """Orders for one partition are carried out one after the other."""
        at = max(self._now + took, self._settled.get(partition, 0))
        self._settled[partition] = at
        self._at(at, _ACK, done)

    def _repartition(self, action: a.Repartition) -> None:
        name = action.device
        device, wanted = self._devices[name], {p.id for p in action.partitions}
        gone = [p for p, old in self._places.items() if old.device == name and p not in wanted]
        made = [p for p in action.partitions if p.id not in self._places]
        took = 0
        if self._now:  # what is there when the run begins was made before it
            took = self._draws.time(device.cost.repartition)
            took += sum(self._draws.time(device.cost.make) for _ in made)
            took += sum(self._draws.time(device.cost.unmake) for _ in gone)
            self.outcome.repartitions += 1
            self.outcome.repartition_ns += took

        def done() -> None:
            for left in gone:
                del self._places[left]
            for partition in action.partitions:
                self._places[partition.id] = _Place(partition, device, self._rows[name])
            self._feed(e.Repartitioned(name, action.version))

        self._at(self._now + took, _ACK, done)


def _rows(devices: tuple[DeviceSpec, ...]) -> dict[str, int]:
    """Where each device's units begin if all are numbered through."""
    rows, at = {}, 0
    for device in devices:
        rows[device.id] = at
        at += len(device.units)
    return rows
