"""The virtual-time shell: it turns a policy's actions into what a box would do, and back.

The dispatcher, the planner and the monitor are the live node's. Time is a heap of what will
happen; things due at the same nanosecond happen in this order: acknowledgements of the device,
ends of executions, arrivals, wake-ups, the planner's tick; among equals, what was scheduled
first. So a run is a function of scenario, policy and seed.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Final, Protocol

import numpy as np

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import DeviceSpec
from cotenant.domain.plan import Plan
from cotenant.domain.request import Request
from cotenant.domain.snapshot import Snapshot
from cotenant.domain.units import S
from cotenant.domain.workload import Variant
from cotenant.policy.dispatcher import Dispatcher
from cotenant.policy.planner import Planner
from cotenant.sim.diary import Diary
from cotenant.sim.generates import Generates
from cotenant.sim.memory import JobMemory
from cotenant.sim.moments import SPANS, Span
from cotenant.sim.outcome import JobTally, Outcome, ServiceTally, TokenTally
from cotenant.sim.physics import Draws, Execution, Place, Progress, Source, Talk
from cotenant.sim.scenario import Scenario, SimService, pool_bytes, sizes
from cotenant.sim.talker import Talker, first_turns
from cotenant.telemetry.monitor import Monitor

TICK: Final = 1 * S
_ACK: Final = 0
_DONE: Final = 1
_ARRIVAL: Final = 2
_WAKE: Final = 3
_TICK: Final = 4


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
        self._places: dict[str, Place] = {}
        self._rows = _rows(self._specs)
        self._loading: set[str] = set()
        """Instances that are not up yet."""
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
        self._talkers: dict[str, Talker] = {}
        """Instances of language models."""
        self._talks: dict[int, Talk] = {}
        """Answers of language models that are under way."""
        middle = scenario.duration // 2
        self._recorded = (middle - SPANS // 2, middle + SPANS // 2) if record else None
        self._granted: dict[tuple[str, str], int] = {}
        self._diary = Diary(scenario) if record else None
        self._next_request = 1
        self.outcome = Outcome(
            duration=scenario.duration,
            units=scenario.compute,
            services={s.spec.name: _tally(s) for s in scenario.services},
            jobs={j.spec.id: JobTally() for j in scenario.jobs},
        )
        self._jobs = {j.spec.id: Progress(j, self.outcome.jobs[j.spec.id]) for j in scenario.jobs}
        trainer = trainers[0]
        self._memory = JobMemory(
            trainer.spec,
            lambda: self._now,
            lambda ns, what: self._at(self._now + ns, _ACK, what),
            self._feed,
            lambda: self._draws.time(trainer.cost.revoke),
        )
        self._hands: dict[type, Callable[[Any], None]] = {
            a.Dispatch: self._dispatch,
            a.Complete: self._complete,
            a.Reject: self._reject,
            a.WakeAt: self._wake_at,
            a.Grant: self._grant,
            a.Revoke: self._revoke,
            a.Repartition: self._repartition,
            a.Load: self._load,
            a.Unload: self._unload,
            a.Resize: self._resize,
            a.Recall: self._recall,
            a.Emit: lambda _: None,
            a.Serve: lambda _: None,
            a.Decline: lambda _: None,
            a.Start: self._start,
            a.Stop: self._stop,
        }
        self._sources = {
            s.spec.name: Source(
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
            self._feed(e.service_added(spec))
            if service.others:
                self._feed(e.VariantsKnown(spec.name, "1", service.others))
            self._feed(e.VersionOffered(spec.name, "1"))
            self._schedule_arrival(self._sources[spec.name])
        for job in self._scenario.jobs:
            self._feed(e.job_queued(job.spec))
        self._plan()
        self._at(TICK, _TICK, None)

    def _at(self, when: int, kind: int, what: Any) -> None:
        self._order += 1
        heappush(self._heap, (when, kind, self._order, what))

    def _schedule_arrival(self, source: Source) -> None:
        at = source.next()
        if at is not None:
            self._at(at, _ARRIVAL, source)

    def _arrive(self, source: Source) -> None:
        self._schedule_arrival(source)
        request = source.request(self._next_request, self._now)
        self._next_request += 1
        self._open[request.id] = request
        if request.id in source.answers:
            pace = self._services[request.service].spec.slo.pace
            self._talks[request.id] = Talk(request, pace)
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
        rates = {name: job.rate(self._now) for name, job in self._jobs.items()}
        snapshot = self._monitor.snapshot(
            self._now,
            self._specs,
            state,
            {name: s.spec for name, s in self._services.items()},
            rates,
        )
        plan = self._planner.plan(snapshot)
        if self._observer is not None:
            self._observer.planned(self._now, snapshot, plan)
        if plan is not None:
            self.outcome.reasons.append((self._now, plan.reasons))
            self._feed(e.Planned(plan))

    # --- residency --------------------------------------------------------------------------

    def _load(self, action: a.Load) -> None:
        service, spec = self._services[action.service], self._devices[action.device].spec
        variant = service.variant(spec.kind, action.variant)
        if variant.memory and spec.id == self._only_trainer:
            self._memory.occupies(action.worker, variant.memory)
        if service.generates is not None:
            self._bring_up(action, self._talker(action, service, service.generates), service.load)
            return
        profile = tuple(
            (units, rows, round(service.costs[spec.kind].mean(units, rows) * variant.relative))
            for units in sizes(spec)
            for rows in (1, service.spec.batch.max)
        )
        up = e.WorkerUp(
            action.worker,
            action.service,
            action.version,
            action.device,
            profile,
            load_ns=service.load,
        )
        self._bring_up(action, up, service.load)

    def _bring_up(self, action: a.Load, up: e.WorkerUp, took: int) -> None:
        self._loading.add(action.worker)

        def loaded() -> None:
            if action.worker in self._loading:
                self._loading.remove(action.worker)
                self._feed(up)

        # What is there when the run begins was loaded before it.
        self._at(self._now + (took if self._now else 0), _ACK, loaded)

    def _talker(self, action: a.Load, service: SimService, generates: Generates) -> e.WorkerUp:
        """An instance of a language model; what it says when it is ready."""
        device, tally = self._devices[action.device], self.outcome.services[action.service].tokens
        assert tally is not None
        size = pool_bytes(self._scenario, service, device)
        talker = self._talkers[action.worker] = Talker(action.worker, generates, size, tally)
        return e.WorkerUp(
            action.worker,
            action.service,
            action.version,
            action.device,
            tuple(
                (units, rows, first_turns(generates, units, rows))
                for units in sizes(device.spec)
                for rows in (1, service.spec.batch.max)
            ),
            turns=True,
            room=talker.room,
            pool=talker.pool,
            block=talker.block,
            load_ns=service.load,
        )

    def _unload(self, action: a.Unload) -> None:
        self._talkers.pop(action.worker, None)
        self._memory.occupies(action.worker, 0)
        if action.worker in self._loading:
            self._loading.remove(action.worker)
            self._acknowledge_now(e.LoadFailed(action.worker, "unloaded"))
        else:
            self._acknowledge_now(e.WorkerDown(action.worker, "unloaded"))

    def _start(self, action: a.Start) -> None:
        """A job starts: what there is when the run begins was started before it."""
        job = self._jobs[action.job]
        took = job.cost.move if job.started else 0
        job.started = True

        def ready() -> None:
            self._feed(e.JobReady(action.job))
            self._memory.started(job)

        self._at(self._now + took, _ACK, ready)

    def _stop(self, action: a.Stop) -> None:
        """A job ends once it is off all that it holds."""
        job, held = self._jobs[action.job], list(self._jobs[action.job].held)
        took = max((self._draws.time(self._places[p].cost.revoke) for p in held), default=0)

        def done() -> None:
            for name in list(job.held):
                self._leave(action.job, self._places[name])
            self._memory.ended(action.job)
            self._feed(e.JobExited(action.job))
            if action.again:
                self._feed(e.job_queued(job.spec))

        self._at(self._now + took, _ACK, done)

    def _acknowledge_now(self, event: e.Event) -> None:
        self._at(self._now, _ACK, lambda: self._feed(event))

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
            tally, talk = self.outcome.services[found.service], self._talks.pop(request, None)
            if talk is None:
                tally.answer(latency)
            else:
                del self._sources[found.service].answers[request]
                latency = talk.first - found.arrived
                tally.answer(latency, talk.in_time)
                tally.talked(found.prompt, talk.said, talk.first, talk.last)
            if self._diary is not None:
                self._diary.answered(found.service, latency)

    def _reject(self, action: a.Reject) -> None:
        found = self._open.pop(action.request)
        if self._talks.pop(action.request, None) is not None:
            self._sources[found.service].answers.pop(action.request)
        self.outcome.services[found.service].refuse(action.refusal.name)

    def _wake_at(self, action: a.WakeAt) -> None:
        self._wake_token += 1
        self._at(max(action.at, self._now), _WAKE, self._wake_token)

    def _resize(self, action: a.Resize) -> None:
        talker = self._talkers.get(action.holder)
        if talker is None:
            self._memory.order(action.holder, action.size)
            return
        for held in talker.resize(action.size):
            self._memory.pool(held)
            self._acknowledge_now(held)

    def _recall(self, action: a.Recall) -> None:
        talker = self._talkers.get(action.worker)
        if talker is not None:
            talker.recall(action.batch)

    def _execute(self, action: a.Dispatch) -> None:
        place, draws = self._places[action.partition], self._draws
        cost = place.cost
        if action.after:
            spread = cost.at_hand
        elif cost.follow is not None and self._ended.get(place.id) == self._now:
            spread = cost.follow
        else:
            spread = cost.start
        start = draws.time(spread)
        if action.preempting:
            start += draws.time(cost.preempt)
        talker = self._talkers.get(action.worker)
        if talker is not None:
            answers = self._sources[action.batch.service].answers
            begun = {r: (self._open[r], answers[r]) for r in action.batch.requests}
            talker.lease(action, begun, self._now + start)
        self._begin(action, place, start)

    def _begin(self, action: a.Dispatch, place: Place, start: int) -> None:
        """An execution, or the next turn of a lease, begins after ``start`` ns."""
        batch, units, rows = action.batch, place.compute, action.batch.rows
        service, talker = self._services[batch.service], self._talkers.get(action.worker)
        slowed = 1 + self._contention(place)
        if service.generates is not None:
            assert talker is not None
            took = talker.turn(units, self._draws.factor(service.generates.turn.cv) * slowed)
        else:
            model = service.costs[place.kind]
            key = batch.service, place.kind, units, rows
            mean = self._means.get(key)
            if mean is None:
                mean = self._means[key] = model.mean(units, rows)
            mean = round(mean * self._variant(service, action).relative)
            took = round(mean * self._draws.factor(model.cv) * slowed)
        self._running[place.id] = units
        self._served[place.device] += units
        self._served[""] += units
        self._load_changed = True
        begun = Execution(action, place, self._now, start, took)
        self._at(self._now + start + took, _DONE, begun)

    def _variant(self, service: SimService, action: a.Dispatch) -> Variant:
        """What executes a batch."""
        worker = self._dispatcher.state.workers[action.worker]
        return service.variant(self._devices[worker.device].spec.kind, worker.variant)

    def _executed(self, execution: Execution) -> None:
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
        talker = self._talkers.get(action.worker)
        if talker is not None:
            self._turn_over(execution, talker)
            return
        if self._services[batch.service].others:
            name = self._variant(self._services[batch.service], action).name
            variants = self.outcome.services[batch.service].variants
            variants[name] = variants.get(name, 0) + len(batch.requests)
        at_hand = self._at_hand.pop(batch.id, None)
        if at_hand is not None:
            self._execute(at_hand)
        self._feed(e.BatchDone(batch.id, execution.took, execution.start))

    def _turn_over(self, execution: Execution, talker: Talker) -> None:
        """A turn of a language model ended; its lease may go on at once."""
        news, done = talker.ended(self._now, execution.start)
        if done.more:
            self._begin(execution.action, execution.place, 0)
        for request, tokens in done.said:
            self._talks[request].spoke(self._now, tokens)
        for held in news:
            self._memory.pool(held)
            self._feed(held)
        self._feed(done)

    def _record(self, who: str, place: Place, began: int) -> None:
        if self._recorded is None:
            return
        start, end = max(began, self._recorded[0]), min(self._now, self._recorded[1])
        if start < end:
            self.outcome.spans.append(Span(who, place.rows, start, end))

    def _contention(self, place: Place) -> float:
        """By how much an execution is slowed down by what else is busy: on its device, and, where
        all devices share a memory, in the box."""
        contention, shared = place.cost.contention, self._scenario.shared_bandwidth
        slowed = 0.0
        if contention:
            slowed += contention * self._busy(place.device, place)
        if shared:
            slowed += shared * self._busy("", place)
        return slowed

    def _busy(self, device: str, but: Place) -> float:
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
            self._memory.granted(job)

        self._acknowledge(place.id, self._draws.time(place.cost.grant), done)

    def _revoke(self, action: a.Revoke) -> None:
        job, place = action.job, self._places[action.partition]
        took = self._draws.time(place.cost.revoke)

        def done() -> None:
            self._leave(job, place)
            self._feed(e.Revoked(job, place.id, took))

        self._acknowledge(place.id, took, done)

    def _leave(self, job: str, place: Place) -> None:
        self._jobs[job].revoke(self._now, place.id)
        began = self._granted.pop((job, place.id), None)
        if began is not None:
            self._record(job, place, began)

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
                self._places[partition.id] = Place(partition, device, self._rows[name])
            self._feed(e.Repartitioned(name, action.version))

        self._at(self._now + took, _ACK, done)


def _tally(service: SimService) -> ServiceTally:
    tokens = TokenTally() if service.generates is not None else None
    return ServiceTally(service.spec.slo.latency, tokens=tokens)


def _rows(devices: tuple[DeviceSpec, ...]) -> dict[str, int]:
    """Where each device's units begin if all are numbered through."""
    rows, at = {}, 0
    for device in devices:
        rows[device.id] = at
        at += len(device.units)
    return rows
