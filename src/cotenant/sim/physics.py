"""What the parts of a simulated box do by themselves: jobs progress, executions take their time,
requests come. Nothing here decides."""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from cotenant.domain import actions as a
from cotenant.domain.device import Partition
from cotenant.domain.request import Request
from cotenant.domain.snapshot import RATE_WINDOW
from cotenant.domain.units import S
from cotenant.sim.arrivals import Recorded
from cotenant.sim.costs import Spread
from cotenant.sim.outcome import JobTally, ServiceTally
from cotenant.sim.scenario import SimDevice, SimJob, SimService


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


class Progress:
    """One job: what it holds and how far it came."""

    def __init__(self, job: SimJob, tally: JobTally) -> None:
        self.spec = job.spec
        self.cost = job.cost
        self.tally = tally
        self.started = False
        self._speeds: dict[int, float] = {}
        self.held: dict[str, int] = {}
        self._units = 0
        self.owed: dict[str, float] = {}
        """Steps that are done over on a partition before there is progress there."""
        self.since = 0
        self.slowed = 0.0
        self.resting = False
        """Whether it stands still though it is granted space: some of its memory is away."""
        self._made: deque[tuple[int, float]] = deque()

    def grant(self, now: int, partition: str, units: int) -> None:
        """It may use a partition from now on."""
        self.settle(now)
        lost = self.cost.resume
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

    def rest(self, now: int, resting: bool) -> None:
        """It stands still from now on, or does not any more."""
        self.settle(now)
        self.resting = resting

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
        if self.resting:
            self.tally.rested_ns += now - self.since
            self.since = now
            return
        made = self._speed(self._units) * (now - self.since) / S * (1 - self.slowed)
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


class Place:
    """A partition of the layout in force and what its device charges. ``first``: where the
    device's units begin if all are numbered through."""

    def __init__(self, partition: Partition, device: SimDevice, first: int) -> None:
        self.id = partition.id
        self.device = partition.device
        self.compute = partition.compute
        self.kind = device.spec.kind
        self.cost = device.cost
        self.rows = tuple(first + unit for unit in partition.units)


class Execution:
    """A batch under way: where, since when, and how long starting and executing it take (ns)."""

    def __init__(self, action: a.Dispatch, place: Place, began: int, start: int, took: int):
        self.action = action
        self.place = place
        self.began = began
        self.start = start
        self.took = took


class Talk:
    """An answer in pieces, as ``cotenant.telemetry.monitor`` judges it: with a pace it is in time
    if its first piece is, and its last one; without one each has as long as the first had."""

    def __init__(self, request: Request, pace: int) -> None:
        self._deadline = request.deadline
        self._each = request.deadline - request.arrived
        self._pace = pace
        self.first = self.last = 0
        self.said = 0
        self._in_time = True

    def spoke(self, now: int, tokens: int) -> None:
        """A piece came."""
        if not self.said:
            self.first = now
            self._in_time = now <= self._deadline
        elif not self._pace:
            self._in_time = self._in_time and now - self.last <= self._each
        self.last = now
        self.said += tokens

    @property
    def in_time(self) -> bool:
        """Whether it was, now that it is over."""
        return self._in_time and (
            not self._pace or self.last <= self._deadline + (self.said - 1) * self._pace
        )


class Source:
    """Where a service's requests come from."""

    def __init__(self, service: SimService, tally: ServiceTally, rng: np.random.Generator) -> None:
        self._service = service.spec.name
        self._objective = service.spec.slo.latency
        self._recorded = service.arrivals if isinstance(service.arrivals, Recorded) else None
        self._generates = service.generates
        if self._generates is not None:
            self._lengths = rng.spawn(1)[0]
        self.answers: dict[int, int] = {}
        """Tokens that answers under way will have; nobody but the model knows."""
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
        generates = self._generates
        if generates is not None:
            prompt = generates.prompt.draw(self._lengths)
            self.answers[number] = min(generates.most, generates.answer.draw(self._lengths))
            due, most = now + self._objective, generates.most
            return Request(number, self._service, now, due, prompt=prompt, most=most)
        if recorded is None:
            return Request(number, self._service, now, now + self._objective)
        deadline = now + recorded.budgets[nth]
        priority, rows = recorded.priorities[nth], recorded.rows[nth]
        return Request(number, self._service, now, deadline, priority, rows)
