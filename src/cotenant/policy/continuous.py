"""What to expect of a partition whose turns many answers share (continuous batching).

A turn says a token of each answer under way, and reads of the prompts that came meanwhile. With
``n`` answers under way it takes on average ::

    t(n) = (fixed + n * each) / (1 - rate * read - others)

``others``: the part of the time that other services use. An answer of ``a`` tokens takes ``a``
turns, so of ``n`` one ends every ``a * t(n) / n``. At most ``together`` are under way; who comes
then waits until one ends. With Poisson arrivals the number under way is a birth-death process. Its
distribution depends on how long answers are by their mean alone (generalized processor sharing:
Cohen, "The multiple phase service network with generalized processor sharing", Acta Informatica
1979), and its mean is where ``n = rate * a * t(n)`` (Little 1961). Who waits for a place waits for
an exponential time, as in M/M/c (Erlang 1917). Prompts are read one after the other, in the time
that answers under way leave of a turn (``cotenant.policy.generation.wait_and_own``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

from cotenant.domain.snapshot import ServiceFacts, TurnFacts
from cotenant.policy.generation import CHUNK, LEAST_SHARE
from cotenant.policy.iterations import IterationCosts
from cotenant.policy.queueing import HEADROOM, deviations, wait_quantile

_NOTHING: Final = 1e-12
_HUGE: Final = 1e100
_STEPS: Final = 12
"""Of a bisection."""


class Expected(NamedTuple):
    """Ns at the percentile until the first token and for each further one, and the share of time
    (0..1) in which something is under way."""

    first: float
    further: float
    busy: float


class _UnderWay(NamedTuple):
    """Answers under way at the percentile; ns until there is a place, at the percentile; the share
    of time (0..1) in which there are any."""

    answers: int
    wait: float
    busy: float


@dataclass(frozen=True)
class Turning:
    """A service on a partition. Times in ns."""

    objective: float
    """When the first token is due,"""
    pace: float
    """and how much later each further one."""
    budget: float
    """What turns are cut to, by that pace or for other services; infinite if they are not."""
    percentile: float
    together: int
    answer: float
    fixed: float
    step: float
    """What a turn takes besides if it is for more than one token."""
    each: float
    """A token of an answer."""
    read: float
    """A prompt, the fixed part aside,"""
    long: float
    """and one that is as long as few are (at the percentile)."""
    chunk: float
    """As much of one as is read in a turn where time does not bound it."""

    def turn(self, count: int) -> float:
        """Of so many answers, with nothing to read and nobody else."""
        return max(1.0, self.fixed + (self.step if count > 1 else 0.0) + count * self.each)

    def longest(self, within: float) -> float:
        """A turn of as many as there can be, if it is cut to ``within``."""
        return max(self.turn(1), min(within, self.turn(self.together)))

    @property
    def alone(self) -> Expected:
        """Of a request that has the partition to itself."""
        return Expected(self.fixed + self.step + self.long, self.turn(1), 1.0)

    @property
    def demand(self) -> float:
        """The time that a request takes of a partition that has as many as it can have, or as keep
        their pace."""
        tokens = self.read + self.answer * self.each
        fixed = self.turn(self.together) - self.together * self.each
        full = tokens + self.answer * fixed / self.together
        left = 1.0 - fixed / (HEADROOM * self.pace)
        return max(full, tokens / left) if left > 0.0 else full

    def expect(self, rate: float, others: float) -> Expected:
        """At so many requests a second; infinite times over saturation."""
        rate /= 1e9
        found = self._under_way(rate, others)
        if found is None:
            return Expected(math.inf, math.inf, 1.0)
        seen = min(self.together, found.answers + 1)
        further = self.turn(seen) / (1.0 - rate * self.read - others)
        slower = self._slower(found.answers) / (1.0 - others)
        each, own = slower * self.read, slower * self.long
        wait = found.wait + wait_quantile(each, rate * each, self.percentile)
        under_way = further if found.answers else 0.0
        first = under_way + wait + own + self.fixed + self.step
        return Expected(first, further, found.busy)

    def _slower(self, count: int) -> float:
        """How many times as long a prompt is read beside so many answers as it is alone."""
        beside = self.turn(count) if count else 0.0
        if not math.isinf(self.budget):
            return self.budget / max(self.budget / LEAST_SHARE, self.budget - beside)
        return 1.0 + beside / self.chunk if self.chunk else 1.0

    def _under_way(self, rate: float, others: float) -> _UnderWay | None:
        """None over saturation. See the module's text."""
        free = 1.0 - rate * self.read - others
        if free <= 0.0:
            return None
        weights, total, ends = [1.0], 1.0, math.inf
        for count in range(1, self.together + 1):
            ends = count * free / (self.answer * self.turn(count))
            weights.append(weights[-1] * rate / ends)
            total += weights[-1]
            if rate < ends and weights[-1] < _NOTHING * total:
                break
            if total > _HUGE:
                weights, total = [each / _HUGE for each in weights], total / _HUGE
        if rate >= ends:
            return None
        full = weights[-1] / (1.0 - rate / ends) if len(weights) > self.together else 0.0
        total += full - weights[-1] if full else 0.0
        tail = 1.0 - min(self.percentile, 99.99) / 100.0
        wait = math.log(full / total / tail) / (ends - rate) if full > tail * total else 0.0
        most, above = len(weights) - 1, total - weights[0]
        answers = 0
        while above > tail * total and answers < most:
            answers += 1
            above -= weights[answers]
        return _UnderWay(answers, wait, 1.0 - weights[0] / total)

    def holds(self, rate: float, others: float) -> bool:
        """Whether both parts of the objective hold."""
        return self.stress(self.expect(rate, others)) <= HEADROOM

    def stress(self, expected: Expected) -> float:
        """The greater part that it takes of an objective."""
        return max(expected.first / self.objective, expected.further / self.pace)

    def overload(self, rate: float, others: float) -> float:
        """The part of its requests (0..1) without which objectives would hold; over 1 where not
        even one alone holds them."""
        alone = self.stress(self.alone) / HEADROOM
        if alone >= 1.0:
            return 2.0 - 1.0 / alone
        low, high = 0.0, 1.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            if self.holds(rate * middle, others):
                low = middle
            else:
                high = middle
        return 1.0 - low


def turning(
    kind: str, service: ServiceFacts, size: int, within: float = math.inf
) -> Turning | None:
    """A service on ``size`` units of a kind of device; None if nothing is known of its turns.
    ``within``: to how many ns turns are cut for other services there, be it that few answers have
    part in one."""
    facts = service.turns
    costs = None if facts is None else _costs(facts, kind, size)
    if facts is None or costs is None:
        return None
    answer = max(1.0, facts.answer)
    context = facts.prompt + answer / 2
    squares = facts.prompt**2 + facts.prompt_dev**2
    long = round(facts.prompt + deviations(service.percentile) * facts.prompt_dev)
    fixed, each = costs.fixed + costs.step_of(2), costs.token + costs.pair * context
    together = facts.together
    if together > 1 and fixed + together * each > within:
        together = max(1, int((within - fixed) / each)) if within > fixed else 1
    return Turning(
        objective=float(service.objective),
        pace=float(facts.pace or service.objective),
        budget=min(within, facts.pace or math.inf),
        percentile=service.percentile,
        together=together,
        answer=answer,
        fixed=costs.fixed,
        step=costs.step_of(2),
        each=each,
        read=costs.token * facts.prompt + costs.pair * squares / 2,
        long=costs.again(0, long),
        chunk=costs.again(0, min(long, CHUNK)),
    )


def _costs(facts: TurnFacts, kind: str, size: int) -> IterationCosts | None:
    """What was measured on so many units. Else what was on the nearest fewer, times what warm-ups
    say: without one more units are taken to be no faster, and fewer slower in proportion."""
    known = facts.costs.get(kind)
    if not known:
        return None
    near = max((units for units in known if units <= size), default=min(known))
    cost, warm = known[near], facts.warm.get(kind, {})
    times = max(1.0, near / size)
    if near != size and warm.get(size) and warm.get(near):
        times = warm[size] / warm[near]
    return IterationCosts(
        times * cost.fixed, times * cost.token, times * cost.pair, times * cost.step
    )
