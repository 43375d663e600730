"""What ``cotenant demo`` counts while scheduling is on and while it is off. Pure; times are seconds
of one clock."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

SERVED = 200
REFUSED = (429, 503)
RECENT_S = 5.0
MOMENTS = 60
"""Looks that the picture shows."""


class Answer(NamedTuple):
    """``due``: when it should have been sent; ``status`` of HTTP; ``ms`` from then on."""

    due: float
    status: int
    ms: float


class Figures(NamedTuple):
    """Of some answers. nan: there were none."""

    answered: int
    refused: int
    p50_ms: float
    p99_ms: float
    in_time: float
    """Share of all that came back, refused ones too."""


class Moment(NamedTuple):
    """One look. ``lent``: of each core the share of time that training had; None: nobody lends."""

    at: float
    on: bool
    figures: Figures
    steps_per_s: float
    lent: tuple[float, ...] | None


class Tally:
    """Answers and steps of one way to share the box."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0
        self._all: list[Answer] = []
        self._recent: deque[tuple[float, Answer]] = deque()

    def add(self, answers: list[Answer], now: float) -> None:
        """Answers that came by ``now``."""
        self._all += answers
        self._recent.extend((now, answer) for answer in answers)
        while self._recent and self._recent[0][0] < now - RECENT_S:
            self._recent.popleft()

    def forget_recent(self) -> None:
        """What comes next is another stretch."""
        self._recent.clear()

    def recent(self, objective_ms: float) -> Figures:
        """Of the last seconds."""
        return figures([answer for _, answer in self._recent], objective_ms)

    def whole(self, objective_ms: float) -> Figures:
        """Of all answers."""
        return figures(self._all, objective_ms)

    @property
    def steps_per_s(self) -> float:
        """Of all the time that it had; nan without any."""
        return self.steps / self.seconds if self.seconds else math.nan


def figures(answers: list[Answer], objective_ms: float) -> Figures:
    """Percentiles are of those served, by nearest rank."""
    times = sorted(answer.ms for answer in answers if answer.status == SERVED)
    refused = sum(answer.status in REFUSED for answer in answers)
    in_time = sum(ms <= objective_ms for ms in times) / len(answers) if answers else math.nan
    return Figures(len(times), refused, _rank(times, 0.5), _rank(times, 0.99), in_time)


def _rank(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan


def lent(partitions: list[dict[str, object]]) -> tuple[float, ...]:
    """The share of the last second that training had of each core, from the node's status."""
    found: dict[int, float] = {}
    for partition in partitions:
        busy, units = partition.get("busy"), partition.get("units")
        if isinstance(busy, dict) and isinstance(units, list):
            share = sum(value for who, value in busy.items() if str(who).startswith("job:"))
            found |= {int(unit): min(1.0, float(share)) for unit in units}
    return tuple(found[core] for core in sorted(found))


def spark(values: list[float], most: float) -> str:
    """A line of blocks, up to ``most``; a point where nothing is known."""
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(
        "·"
        if math.isnan(value)
        else blocks[max(0, min(7, round(7 * value / most)))]
        if most > 0
        else blocks[0]
        for value in values
    )
