"""Arrival times, drawn in blocks so that memory does not grow with a run.

* ``poisson``: independent arrivals at a constant rate.
* ``bursts``: a Markov-modulated Poisson process with two states (Fischer and Meier-Hellstern,
  Performance Evaluation 1993).
* ``diurnal``: a Poisson process whose rate follows a sine; thinning after Lewis and Shedler
  (Naval Research Logistics 1979).
* ``steps``: a Poisson process whose rate jumps at given times.
* ``trace``: recorded times.

Any of these can be thinned: of each arrival a coin decides whether it stays.
"""

from __future__ import annotations

import contextlib
import csv
import math
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import compress, islice
from pathlib import Path

import msgspec
import numpy as np

from cotenant.domain.errors import ConfigError
from cotenant.domain.units import S

_BLOCK = 4096


class Poisson(msgspec.Struct, frozen=True, tag="poisson"):
    """``rate`` arrivals per second."""

    rate: float

    def times(self, rng: np.random.Generator) -> Iterator[int]:
        """Ns from the start, ascending, without end."""
        return _poisson(self.rate, rng)


class Bursts(msgspec.Struct, frozen=True, tag="bursts"):
    """Two rates (per second) and the mean time (s) spent at each before changing over."""

    rate: float
    burst_rate: float
    mean_quiet: float
    mean_burst: float

    def times(self, rng: np.random.Generator) -> Iterator[int]:
        """Ns from the start, ascending, without end."""
        now, bursting = 0.0, False
        while True:
            stay = rng.exponential(self.mean_burst if bursting else self.mean_quiet)
            rate = self.burst_rate if bursting else self.rate
            at = now
            while rate > 0:
                at += rng.exponential(1 / rate)
                if at >= now + stay:
                    break
                yield int(at * S)
            now, bursting = now + stay, not bursting


class Diurnal(msgspec.Struct, frozen=True, tag="diurnal"):
    """Mean ``rate`` per second, swinging by ``swing`` (0..1) over ``period`` s; starts at the
    mean, rising."""

    rate: float
    swing: float
    period: float

    def times(self, rng: np.random.Generator) -> Iterator[int]:
        """Ns from the start, ascending, without end."""
        return _thinned(
            self.rate * (1 + self.swing),
            lambda t: self.rate * (1 + self.swing * math.sin(2 * math.pi * t / self.period)),
            rng,
        )


class Steps(msgspec.Struct, frozen=True, tag="steps"):
    """``rates`` per second, each from its time (s) on: ``((0, 50), (60, 150))``."""

    rates: tuple[tuple[float, float], ...]

    def times(self, rng: np.random.Generator) -> Iterator[int]:
        """Ns from the start, ascending, without end."""
        return _thinned(max(rate for _, rate in self.rates), self._rate_at, rng)

    def _rate_at(self, second: float) -> float:
        now = 0.0
        for since, rate in self.rates:
            if second < since:
                break
            now = rate
        return now


class Trace(msgspec.Struct, frozen=True, tag="trace"):
    """Recorded arrivals (ns from the first), ended by the end of the record."""

    recorded: tuple[int, ...]

    def times(self, _: np.random.Generator) -> Iterator[int]:
        """Ns from the start, ascending."""
        return iter(self.recorded)


class Recorded(msgspec.Struct, frozen=True, tag="recorded"):
    """Recorded requests: when (ns from the start), rows, priority class, ns to the deadline."""

    at: tuple[int, ...]
    rows: tuple[int, ...]
    priorities: tuple[int, ...]
    budgets: tuple[int, ...]

    def times(self, _: np.random.Generator) -> Iterator[int]:
        """Ns from the start, ascending."""
        return iter(self.at)


class Every(msgspec.Struct, frozen=True, tag="every"):
    """Every ``count``-th of other arrivals, from the ``index``-th on: round robin."""

    of: Bursts | Trace
    index: int
    count: int

    def times(self, rng: np.random.Generator) -> Iterator[int]:
        """Ns from the start, ascending."""
        return islice(self.of.times(rng), self.index, None, self.count)


class Thinned(msgspec.Struct, frozen=True, tag="thinned"):
    """Each of other arrivals with probability ``kept``; those of a smaller ``kept`` are among
    those of a larger one."""

    of: Poisson | Bursts | Diurnal | Steps | Trace | Every
    kept: float

    def times(self, rng: np.random.Generator) -> Iterator[int]:
        """Ns from the start, ascending."""
        marks = rng.spawn(1)[0]
        return (at for at in self.of.times(rng) if marks.random() < self.kept)


Arrivals = Poisson | Bursts | Diurnal | Steps | Trace | Every | Recorded | Thinned


def share(arrivals: Arrivals, index: int, count: int) -> Arrivals:
    """What one of ``count`` boxes gets: a Poisson process is divided at random into Poisson
    processes, others in turn."""
    replace = msgspec.structs.replace
    match arrivals:
        case Poisson(rate=rate) | Diurnal(rate=rate):
            return replace(arrivals, rate=rate / count)
        case Steps(rates=rates):
            return Steps(tuple((at, rate / count) for at, rate in rates))
        case Bursts() | Trace():
            return Every(arrivals, index, count)
        case _:
            raise ValueError("these arrivals are those of one box")


def thin(arrivals: Arrivals, kept: float) -> Arrivals:
    """Each of the arrivals with probability ``kept``, independently."""
    match arrivals:
        case Thinned():
            return Thinned(arrivals.of, arrivals.kept * kept)
        case Recorded():
            stays = (np.random.default_rng(0).random(len(arrivals.at)) < kept).tolist()
            fields = msgspec.structs.astuple(arrivals)
            return Recorded(*(tuple(compress(column, stays)) for column in fields))
        case _:
            return Thinned(arrivals, kept)


def _poisson(rate: float, rng: np.random.Generator) -> Iterator[int]:
    now = 0.0
    while rate > 0:
        for at in (now + np.cumsum(rng.exponential(1 / rate, _BLOCK))).tolist():
            yield int(at * S)
            now = at


def _thinned(
    highest: float, rate_at: Callable[[float], float], rng: np.random.Generator
) -> Iterator[int]:
    now = 0.0
    while highest > 0:
        gaps = np.cumsum(rng.exponential(1 / highest, _BLOCK)).tolist()
        kept = (rng.random(_BLOCK) * highest).tolist()
        start = now
        for gap, mark in zip(gaps, kept, strict=True):
            now = start + gap
            if mark < rate_at(now):
                yield int(now * S)


def read_trace(
    path: Path, column: str, rate: float | None = None, duplicates: bool = False
) -> Trace:
    """The column of timestamps of a CSV file: seconds, or ISO dates and times.

    ``rate``: stretch time so that the mean is this many arrivals per second. ``duplicates``:
    whether several arrivals may bear the same time. Raises ConfigError naming file and line.
    """
    times: list[float] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if column not in (rows.fieldnames or ()):
                there = ", ".join(rows.fieldnames or ()) or "none"
                raise ConfigError(f"{path.name}: no column {column!r}; its columns: {there}")
            for row in rows:
                at = _seconds(path, rows.line_num, row[column])
                if times and at < times[-1]:
                    raise ConfigError(
                        f"{path.name}, line {rows.line_num}: earlier than the line before; sort it"
                    )
                if times and at == times[-1] and not duplicates:
                    raise ConfigError(
                        f"{path.name}, line {rows.line_num}: the same time as the line before; "
                        "remove one, or set duplicates: true if both are meant"
                    )
                times.append(at)
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"cannot read the trace {path}: not a CSV file in UTF-8: {error}"
        ) from None
    if len(times) < 2 or times[-1] == times[0]:
        raise ConfigError(f"{path.name}: a trace needs at least two different times")
    span = times[-1] - times[0]
    stretch = 1.0 if rate is None else (len(times) - 1) / span / rate
    return Trace(tuple(int((t - times[0]) * stretch * S) for t in times))


def _seconds(path: Path, line: int, value: str | None) -> float:
    with contextlib.suppress(ValueError):
        found = float(value or "")
        if math.isfinite(found):
            return found
    try:
        return datetime.fromisoformat((value or "")[:26]).timestamp()
    except ValueError:
        raise ConfigError(
            f"{path.name}, line {line}: {value!r} is neither seconds nor an ISO date and time"
        ) from None
