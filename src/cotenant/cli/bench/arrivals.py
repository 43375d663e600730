"""Arrival times for a load: Poisson, and the burstiness of a real trace."""

from __future__ import annotations

import random
from importlib import resources

TRACE = "azure_llm_2023_code_arrivals_ms.txt"
PATTERNS = ("poisson", "trace")


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Arrival offsets (s) of a Poisson process of ``rate`` per second."""
    source = random.Random(seed)
    times: list[float] = []
    now = source.expovariate(rate)
    while now < seconds:
        times.append(now)
        now += source.expovariate(rate)
    return times


def trace(rate: float, seconds: float, seed: int) -> list[float]:
    """Arrival offsets (s) with the gaps of a stretch of the carried trace, scaled so that
    their mean rate over the stretch is ``rate``. The bursts are the trace's own."""
    recorded = _recorded()
    count = max(2, round(rate * seconds))
    start = random.Random(seed).randrange(len(recorded) - count)
    stretch = recorded[start : start + count]
    first, span = stretch[0], stretch[-1] - stretch[0]
    spread = random.Random(seed + 1)
    # Several requests share a millisecond in the record; one real millisecond is spread again.
    times = ((t - first + spread.random()) / (span + 1) * seconds for t in stretch)
    return sorted(times)


def _recorded() -> list[int]:
    text = resources.files("cotenant.cli").joinpath("data", TRACE).read_text()
    return [int(line) for line in text.splitlines() if not line.startswith("#")]


def make(pattern: str, rate: float, seconds: float, seed: int) -> list[float]:
    """Arrival offsets of one of ``PATTERNS``."""
    return {"poisson": poisson, "trace": trace}[pattern](rate, seconds, seed)
