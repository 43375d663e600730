"""A language model in a scenario: lengths of prompts and answers, what turns cost, its memory.

A turn takes what ``cotenant.policy.iterations`` says, on one compute unit; on more of them it is
faster by Amdahl's law, as other executions are (``cotenant.sim.costs``).
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from cotenant.domain import reading
from cotenant.domain.errors import ConfigError
from cotenant.policy.iterations import IterationCosts, Load, load
from cotenant.policy.utility import speed_up

LONGEST = 1_000_000
"""Tokens of a prompt or an answer."""
MAX_UNITS = 1024


class Fixed(msgspec.Struct, frozen=True, tag="fixed"):
    """Always so many tokens."""

    tokens: int

    @property
    def mean(self) -> int:
        return self.tokens

    @property
    def longest(self) -> int:
        return self.tokens

    def draw(self, _: np.random.Generator) -> int:
        """Tokens of one."""
        return self.tokens


class Uniform(msgspec.Struct, frozen=True, tag="uniform"):
    """Each number of tokens from ``least`` to ``most`` alike."""

    least: int
    most: int

    @property
    def mean(self) -> int:
        return (self.least + self.most) // 2

    @property
    def longest(self) -> int:
        return self.most

    def draw(self, rng: np.random.Generator) -> int:
        """Tokens of one."""
        return int(rng.integers(self.least, self.most + 1))


class Lognormal(msgspec.Struct, frozen=True, tag="lognormal"):
    """Log-normal with this mean and coefficient of variation; longer ones are cut to ``most``."""

    mean: int
    cv: float
    most: int

    @property
    def longest(self) -> int:
        return self.most

    def draw(self, rng: np.random.Generator) -> int:
        """Tokens of one."""
        variance = math.log1p(self.cv * self.cv)
        found = self.mean * math.exp(rng.normal(-variance / 2, math.sqrt(variance)))
        return max(1, min(self.most, round(found)))


Length = Fixed | Uniform | Lognormal


class TurnCost(msgspec.Struct, frozen=True):
    """What an iteration costs on one unit: ns ``fixed``, a ``token``, a ``pair`` of tokens, and a
    ``step`` where there is more than one token. ``cv``: coefficient of variation (log-normal)."""

    fixed: int
    token: int
    pair: int = 0
    step: int = 0
    parallel: float = 0.9
    saturates: int = 0
    cv: float = 0.05

    def mean(self, units: int, work: Load) -> int:
        """Mean ns of one iteration."""
        one = IterationCosts(self.fixed, self.token, self.pair, self.step).predict(work)
        return round(one / speed_up(self.parallel, self.saturates, units))


class Generates(msgspec.Struct, frozen=True):
    """What makes a service a language model. ``most``: tokens that an answer may have; those of
    ``answer`` that are longer are cut there. Of a block: its ``block`` bytes, its ``tokens``, and
    ns to copy it to the host and back. ``host``: bytes there."""

    prompt: Length
    answer: Length
    most: int
    turn: TurnCost
    block: int
    tokens: int = 16
    host: int = 0
    offload: int = 0
    restore: int = 0

    @property
    def longest(self) -> int:
        """Blocks that the longest prompt and answer fill."""
        return -(-(self.prompt.longest + self.most) // self.tokens)

    def first_token(self, units: int) -> int:
        """Mean ns of reading a prompt of mean length alone, in one piece."""
        return self.turn.mean(units, load(0, self.prompt.mean))

    def next_token(self, units: int) -> int:
        """Mean ns of a token behind it, alone."""
        return self.turn.mean(units, load(self.prompt.mean, 1))


def read_generates(section: reading.Section) -> Generates:
    """Of a service. Raises ConfigError."""
    found = Generates(
        prompt=_length(section, "prompt"),
        answer=_length(section, "answer"),
        most=section.take("most", reading.integer(1, LONGEST)),
        turn=_turn(section.section("turn", required=True)),
        block=section.take("block", _bytes),
        tokens=section.take("tokens", reading.integer(1, 4096), 16),
        host=section.take("host", reading.size, 0),
        offload=section.take("offload", reading.duration_or_zero, 0),
        restore=section.take("restore", reading.duration_or_zero, 0),
    )
    section.done()
    return found


def _length(parent: reading.Section, key: str) -> Length:
    section = parent.section(key, required=True)
    tokens = reading.integer(1, LONGEST)
    kind = section.take("kind", reading.one_of(("fixed", "uniform", "lognormal")))
    found: Length
    if kind == "fixed":
        found = Fixed(section.take("tokens", tokens))
    elif kind == "uniform":
        found = Uniform(section.take("least", tokens), section.take("most", tokens))
        if found.least > found.most:
            raise ConfigError(f"must not be above most, {found.most}", section.at("least"))
    else:
        found = Lognormal(
            section.take("mean", tokens),
            section.take("cv", reading.positive),
            section.take("most", tokens),
        )
        if found.mean > found.most:
            raise ConfigError(f"must not be above most, {found.most}", section.at("mean"))
    section.done()
    return found


def _turn(section: reading.Section) -> TurnCost:
    found = TurnCost(
        fixed=section.take("fixed", reading.duration),
        token=section.take("token", reading.duration_or_zero),
        pair=section.take("pair", reading.duration_or_zero, 0),
        step=section.take("step", reading.duration_or_zero, 0),
        parallel=section.take("parallel", reading.share, 0.9),
        saturates=section.take("saturates", reading.integer(1, MAX_UNITS), 0),
        cv=section.take("cv", _not_negative, 0.05),
    )
    section.done()
    return found


def _bytes(value: object) -> int:
    found = reading.size(value)
    if found < 1:
        raise ValueError("must be at least 1 byte")
    return found


def _not_negative(value: object) -> float:
    found = reading.number(value)
    if found < 0:
        raise ValueError(f"must not be negative, got {found:g}")
    return found
