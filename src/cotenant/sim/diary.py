"""What goes on over a run, for the chart."""

from __future__ import annotations

from typing import Final

from cotenant.domain.units import S
from cotenant.sim.moments import MOMENTS, Moment
from cotenant.sim.outcome import Outcome
from cotenant.sim.scenario import Scenario

SHORTEST: Final = 1 * S
"""Ns that a piece of the run is long at least."""


class Diary:
    """What goes on over a run, in at most ``MOMENTS`` pieces."""

    def __init__(self, scenario: Scenario) -> None:
        self._every = max(SHORTEST, scenario.duration // MOMENTS)
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
