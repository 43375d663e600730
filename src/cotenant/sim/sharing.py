"""What a box does with nobody scheduling it: rivals that are properties of the device.

* ``shared``: everything runs at once, as under MPS without limits. Contexts that want more
  compute than there is get it in proportion to what they want, and slow each other down by the
  device's contention (its memory system is shared).
* ``orion``: services have what they want first; jobs run beside them in what is left, so that
  contention is all that they cost.
* ``tgs``: as ``shared``, but jobs run at a rate that is halved when a batch took longer than
  ``tolerance`` allows over what it takes alone, and raised by steps while none does.
* ``sliced``: one context at a time has the whole device, in turn, for a quantum (GPU time
  slicing; round robin), idle contexts skipped.

Each service instance and each job is a context. A free instance takes what is queued, up to
the largest batch; nothing is refused but what finds the queue full. A batch or job at a speed
below one finishes later in proportion (processor sharing). Only the device that trains is used:
nobody is there to divide work among several. A GPU that could form MIG instances is whole here,
and charges what a whole one does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec
import numpy as np

from cotenant.domain.units import US, S
from cotenant.policy.utility import speed_up
from cotenant.sim.costs import DEVICES, ExecCost
from cotenant.sim.outcome import JobTally, Outcome, ServiceTally
from cotenant.sim.physics import Draws
from cotenant.sim.scenario import Scenario, SimJob, SimService

SWITCH = 100 * US
"""A context switch on a GPU (the multitasking paper, arXiv 2508.08448)."""
RATE_STEP = 0.05
"""By how much ``tgs`` raises the rate of jobs at a time, and the least it is."""
_NEVER = 1 << 62


class Unscheduled(msgspec.Struct, frozen=True):
    """``quantum`` ns of a slice; 0 = everything at once. ``beside``: services first. ``tolerance``
    (if not 0): the slow-down at which jobs' rate is cut."""

    quantum: int = 0
    beside: bool = False
    tolerance: float = 0.0


class _Context(msgspec.Struct):
    """``left``: ns of work at full speed (a job never ends)."""

    demand: int
    service: SimService | None = None
    job: SimJob | None = None
    arrived: list[int] = []
    began: int = 0
    alone: float = 0.0
    """Ns that the batch under way takes alone."""
    left: float = 0.0
    speed: float = 0.0
    units: float = 0.0

    @property
    def runs(self) -> bool:
        """Whether it has something to do."""
        return self.job is not None or bool(self.arrived)


class SharedWorld:
    """One run of a scenario on an unscheduled device; see the module's docstring."""

    def __init__(self, scenario: Scenario, how: Unscheduled, seed: tuple[int, int]) -> None:
        self._scenario, self._how, self._seed = scenario, how, seed
        self._device = scenario.device
        self._units = self._device.spec.compute
        self._charges = DEVICES["sm"] if self._device.spec.mig else self._device.cost
        self._draws = Draws(np.random.default_rng((*seed, 0)))
        self._contexts = [
            _Context(demand=self._demand(self._cost(service).saturates), service=service)
            for service in scenario.services
            if self._device.spec.kind in service.costs
            for _ in range(service.spec.instances)
        ]
        self._contexts += [
            _Context(demand=self._demand(job.cost.saturates), job=job) for job in scenario.jobs
        ]
        self._queues: dict[str, deque[int]] = {s.spec.name: deque() for s in scenario.services}
        self._now = 0
        self._turn = -1
        self._turn_ends = _NEVER
        self._rate = 1.0 if not how.tolerance else RATE_STEP
        self.outcome = Outcome(
            duration=scenario.duration,
            units=scenario.compute,
            services={s.spec.name: ServiceTally(s.spec.slo.latency) for s in scenario.services},
            jobs={j.spec.id: JobTally() for j in scenario.jobs},
        )

    def _cost(self, service: SimService) -> ExecCost:
        return service.costs[self._device.spec.kind]

    def _demand(self, saturates: int) -> int:
        return min(self._units, saturates or self._units)

    def run(self) -> Outcome:
        """Run to the end of the scenario."""
        arrivals = self._arrivals()
        at, name = next(arrivals, (_NEVER, ""))
        end = self._scenario.duration
        self._set_speeds()
        while True:
            done_at, done = self._next_done()
            soonest = min(at, done_at, self._turn_ends)
            self._advance(min(soonest, end))
            if soonest >= end:
                break
            if done is not None and done_at == soonest:
                self._finish(done)
            elif soonest == at:
                self._arrive(name)
                at, name = next(arrivals, (_NEVER, ""))
            else:
                self._next_turn()
            self._start_idle()
            self._set_speeds()
        self.outcome.open = sum(map(len, self._queues.values())) + sum(
            len(c.arrived) for c in self._contexts
        )
        return self.outcome

    def _arrivals(self) -> Iterator[tuple[int, str]]:
        """(ns, service) of all services, merged."""
        streams = [
            (s.spec.name, s.arrivals.times(np.random.default_rng((*self._seed, 1 + i))))
            for i, s in enumerate(self._scenario.services)
        ]
        heads = [(next(times, _NEVER), name, times) for name, times in streams]
        while heads:
            heads.sort(key=lambda head: head[0])
            at, name, times = heads[0]
            if at == _NEVER:
                return
            yield at, name
            heads[0] = next(times, _NEVER), name, times

    def _arrive(self, name: str) -> None:
        tally, queue = self.outcome.services[name], self._queues[name]
        tally.offered += 1
        service = next(s for s in self._scenario.services if s.spec.name == name)
        if self._device.spec.kind not in service.costs:
            tally.refuse("UNAVAILABLE")
        elif len(queue) >= service.spec.max_queue:
            tally.refuse("QUEUE_FULL")
        else:
            queue.append(self._now)

    def _start_idle(self) -> None:
        for context in self._contexts:
            service = context.service
            if service is None or context.arrived:
                continue
            queue = self._queues[service.spec.name]
            if not queue:
                continue
            rows = min(len(queue), service.spec.batch.max)
            context.arrived = [queue.popleft() for _ in range(rows)]
            cost = self._cost(service)
            mean = cost.mean(self._units, rows) * self._draws.factor(cost.cv)
            context.left = mean + self._draws.time(self._charges.start)
            context.began, context.alone = self._now, context.left

    def _finish(self, context: _Context) -> None:
        assert context.service is not None
        tally = self.outcome.services[context.service.spec.name]
        for arrived in context.arrived:
            tally.answer(self._now - arrived)
        if self._how.tolerance:
            slow = (self._now - context.began) / max(1.0, context.alone) - 1
            if slow > self._how.tolerance:
                self._rate = max(RATE_STEP, self._rate / 2)
            else:
                self._rate = min(1.0, self._rate + RATE_STEP)
        context.arrived, context.left = [], 0.0
        if self._how.quantum:
            self._next_turn()

    # --- who runs how fast ------------------------------------------------------------------

    def _next_turn(self) -> None:
        count = len(self._contexts)
        for step in range(1, count + 1):
            index = (self._turn + step) % count
            if self._contexts[index].runs:
                switch = SWITCH if index != self._turn else 0
                if self._contexts[index].arrived:
                    self._contexts[index].left += switch
                self._turn = index
                self._turn_ends = self._now + switch + self._how.quantum
                return
        self._turn, self._turn_ends = -1, _NEVER

    def _set_speeds(self) -> None:
        if self._how.quantum:
            if self._turn < 0:
                self._next_turn()
            for index, context in enumerate(self._contexts):
                mine = index == self._turn
                context.speed = float(mine)
                context.units = float(context.demand) if mine else 0.0
            return
        for context in self._contexts:
            context.speed = context.units = 0.0
        running = [c for c in self._contexts if c.runs]
        if self._how.beside:
            serving = [c for c in running if c.service is not None]
            left = self._divide(serving, self._units)
            self._divide([c for c in running if c.job is not None], left)
        else:
            self._divide(running, self._units)
        contention = self._charges.contention + self._scenario.shared_bandwidth
        used = sum(c.units for c in running)
        for context in running:
            elsewhere = (used - context.units) / self._units
            slower = 1 + contention * min(1.0, elsewhere)
            context.speed = self._relative(context) / slower if context.units else 0.0

    def _divide(self, contexts: list[_Context], units: float) -> float:
        """Give contexts what they want, or their part of it; returns what is left."""
        wanted = {id(c): c.demand * (self._rate if c.job is not None else 1.0) for c in contexts}
        total = sum(wanted.values())
        scale = min(1.0, units / total) if total else 1.0
        for context in contexts:
            context.units = wanted[id(context)] * scale
        return max(0.0, units - total)

    def _relative(self, context: _Context) -> float:
        """Speed with the units it has, relative to having all it wants."""
        if context.service is not None:
            parallel = self._cost(context.service).parallel
        else:
            assert context.job is not None
            parallel = context.job.cost.parallel
        units = context.units
        if units < 1:
            return units / speed_up(parallel, 0, context.demand)
        serial = 1 - parallel
        return (serial + parallel / context.demand) / (serial + parallel / units)

    # --- time -------------------------------------------------------------------------------

    def _next_done(self) -> tuple[int, _Context | None]:
        best: tuple[int, _Context | None] = (_NEVER, None)
        for context in self._contexts:
            if context.service is not None and context.arrived and context.speed > 0:
                at = self._now + max(1, round(context.left / context.speed))
                if at < best[0]:
                    best = at, context
        return best

    def _advance(self, to: int) -> None:
        took = to - self._now
        if took <= 0:
            return
        for context in self._contexts:
            if not context.speed or not context.runs:
                continue
            if context.job is not None:
                tally = self.outcome.jobs[context.job.spec.id]
                full = context.job.cost.speed(context.demand)
                tally.steps += full * context.speed * self._useful(took) / S
                tally.held_ns += round(context.units * took)
            else:
                context.left -= context.speed * took
                self.outcome.served_ns += round(context.units * took)
        self._now = to

    def _useful(self, took: int) -> float:
        """Ns of ``took`` that are not spent switching."""
        if not self._how.quantum:
            return took
        return took * self._how.quantum / (self._how.quantum + SWITCH)
