"""How long a variant takes on this box, in turns with its original.

An execution during which this process was stopped is made again: as a job it is stopped whenever a
request needs its cores. What else disturbs disturbs all that take turns, and medians pass over it.
What threads waited for a core is not taken off, as a node does, which looks at one engine: how much
of it held an execution up differs between engines, which are compared here.
"""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Final

import msgspec

from cotenant.domain.device import CPU
from cotenant.domain.units import S
from cotenant.domain.variant import Timing
from cotenant.engines.base import Array, Engine

LEAST_ROUNDS: Final = 7
MOST_ROUNDS: Final = 200
SETTLE_S: Final = 0.002
"""Until threads of the engine before have gone to sleep."""
_TRIES: Final = 20
"""After so many stops one after another an execution counts as it is."""


class Stops:
    """Counts how often this process was stopped and went on: SIGCONT says so."""

    def __init__(self) -> None:
        self.count = 0

    def _went_on(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.count += 1

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While it is entered; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGCONT, self._went_on)
        try:
            yield
        finally:
            signal.signal(signal.SIGCONT, before)


class Setting(msgspec.Struct, frozen=True):
    """What is executed: so many rows on so many units."""

    units: int
    rows: int


class Raced(msgspec.Struct):
    """A variant's times beside the best that its original does here with any engine.

    ``ratio``: of its time to the original's, the geometric mean over all settings, its median over
    all rounds; ``surely``: what that median is at most, with 95% confidence."""

    profile: tuple[Timing, ...]
    originals: tuple[Timing, ...]
    ratio: float
    surely: float


def race(
    engine: tuple[str, Engine],
    originals: Mapping[str, Engine],
    inputs: Mapping[int, dict[str, Array]],
    units: Sequence[int],
    seconds: float,
) -> Raced:
    """Execute in turns for about so many seconds. ``inputs``: by rows. Raises ModelError if one of
    them refuses them."""
    name, variant = engine
    runners = {"": variant, **originals}
    settings = [Setting(u, r) for u in units for r in inputs]
    times: dict[tuple[str, Setting], list[int]] = {(k, s): [] for k in runners for s in settings}
    stops, began, number = Stops(), time.monotonic_ns(), 0
    with stops.watched():
        while number < MOST_ROUNDS:
            if number >= LEAST_ROUNDS and time.monotonic_ns() - began > seconds * S:
                break
            order = list(runners) if number % 2 else list(runners)[::-1]
            for setting in settings:
                for key in order:
                    given = inputs[setting.rows]
                    time.sleep(SETTLE_S)
                    runners[key].run(setting.units, given)  # caches hold another's
                    times[key, setting].append(_timed(runners[key], setting.units, given, stops))
            number += 1
    return _raced(name, list(originals), settings, times)


def _raced(
    name: str,
    originals: Sequence[str],
    settings: Sequence[Setting],
    times: Mapping[tuple[str, Setting], list[int]],
) -> Raced:
    best = {s: min(originals, key=lambda key: statistics.median(times[key, s])) for s in settings}
    rounds = len(times["", settings[0]])
    ratios = sorted(
        math.exp(
            statistics.fmean(math.log(times["", s][i] / times[best[s], s][i]) for s in settings)
        )
        for i in range(rounds)
    )
    medians = {key: round(statistics.median(found)) for key, found in times.items()}
    return Raced(
        tuple(
            Timing(CPU, name, s.units, s.rows, medians["", s], medians[best[s], s])
            for s in settings
        ),
        tuple(
            Timing(CPU, key, s.units, s.rows, medians[key, s], medians[best[s], s])
            for key in originals
            for s in settings
        ),
        statistics.median(ratios),
        ratios[_rank(rounds) - 1],
    )


def _rank(rounds: int, confidence: float = 0.95) -> int:
    """Which of so many sorted values their true median does not exceed, with that confidence: by
    signs, so whatever the disturbances are (W. J. Conover, "Practical Nonparametric Statistics",
    1999, section 3.2)."""
    below = 0.0
    for rank in range(1, rounds + 1):
        below += math.comb(rounds, rank - 1) / 2**rounds
        if below >= confidence:
            return rank
    return rounds


def _timed(engine: Engine, units: int, inputs: dict[str, Array], stops: Stops) -> int:
    """Ns of one execution in which this process was not stopped."""
    took = 1
    for _ in range(_TRIES):
        stopped = stops.count
        began = time.monotonic_ns()
        engine.run(units, inputs)
        took = time.monotonic_ns() - began
        if stops.count == stopped:
            break
    return took
