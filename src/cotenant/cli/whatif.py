"""The last minutes of a journal told again, under the node's policy and under another.

Arrivals are those of the record, costs are fitted to it (``cotenant.sim.recorded``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from cotenant.domain.errors import JournalError
from cotenant.domain.events import JobReady
from cotenant.domain.snapshot import RATE_WINDOW
from cotenant.domain.units import MS, S
from cotenant.serving.web.studies import Comparison, Figures, Told
from cotenant.sim.outcome import Outcome
from cotenant.sim.policies import Scheduled, Setting, better, choose, simulate
from cotenant.sim.recorded import Recording
from cotenant.sim.scenario import Scenario
from cotenant.telemetry.records import Entry, Header, PlanRecord, Record, read, segments

MOST_BYTES = 96 * 2**20
"""Of the journal, at most so much is read."""
LEAST_S = 5
_LEAST_PROGRESS = 5 * S


def compare(directory: Path, policy: str, seconds: int, patience_s: float) -> Comparison:
    """The last ``seconds`` of the journal under ``policy``, whose settings are tried for about
    ``patience_s``, and under the node's own.

    Raises JournalError where nothing can be told, ConfigError for a policy that there is not.
    """
    began = time.monotonic()
    (other,) = choose([policy])
    last = _LastMinutes(directory, seconds)
    recording, notes = last.recording()
    scenario = recording.scenario()
    settings = other.settings(scenario)
    if not settings:
        raise JournalError(f"{policy} is not modelled for these devices and models")
    told = [_measured(recording), _told("this node's policy, simulated", scenario, last.own())]
    best, tried = "", 0
    outcome: Outcome | None = None
    for name, setting in settings.items():
        if outcome is not None and time.monotonic() - began > patience_s:
            break
        found = simulate(scenario, setting, 0)
        tried += 1
        if outcome is None or better(found.figures(), outcome.figures()):
            best, outcome = name, found
    assert outcome is not None
    if len(settings) > 1:
        notes.append(f"{tried} of {len(settings)} settings of {policy} were tried; {best} did best")
    told.append(_figures(f"{policy} {best}".strip() + ", simulated", scenario, outcome))
    return Comparison(policy, scenario.duration / S, told, notes)


class _LastMinutes:
    """Those segments of a journal's last run that the last ``seconds`` are in."""

    def __init__(self, directory: Path, seconds: int) -> None:
        found = segments(directory) if directory.is_dir() else []
        if not found:
            raise JournalError("there is no journal yet")
        marks = list(read(found[-1], kinds=(Header, PlanRecord)))
        self.headers = [entry for entry in marks if isinstance(entry, Header)]
        if not self.headers:
            raise JournalError("the journal has only begun; try again in a moment")
        self.until = max(e.now for e in marks if isinstance(e, Header | PlanRecord))
        self.since = self.until - seconds * S
        self.paths: list[Path] = []
        size = 0
        for path in reversed(found):
            first = next((e for e in read(path, kinds=(Header,)) if isinstance(e, Header)), None)
            size += path.stat().st_size
            if first is None or first.run != self.headers[0].run or size > MOST_BYTES:
                break
            self.paths.insert(0, path)
            if first.now <= self.since:
                break
        if self.paths:
            first = next(e for e in read(self.paths[0], kinds=(Header,)) if isinstance(e, Header))
            self.since = max(self.since, first.now)
        if not self.paths or self.until - self.since < LEAST_S * S:
            raise JournalError(
                f"the journal of this run holds less than {LEAST_S} s; try again in a moment"
            )
        self._rates: list[tuple[int, str, float]] = []
        self._ready: dict[str, int] = {}

    def own(self) -> Setting:
        """The policy that the node runs."""
        return Scheduled(self.headers[-1].tuning)

    def recording(self) -> tuple[Recording, list[str]]:
        """What was asked, and what was left out of it."""
        recording = Recording(self._entries(), [(self.since, self.until)])
        for now, job, rate in self._rates:
            since = max(self.since, self._ready.get(job, 0), now - RATE_WINDOW)
            if rate > 0 and now - since >= _LEAST_PROGRESS:
                recording.note_progress(job, since, now, rate)
        left_out = recording.leave_out()
        if not recording.services:
            raise JournalError("no service was asked anything that can be told again")
        return recording, [f"left out: {name}; {why}" for name, why in left_out.items()]

    def _entries(self) -> Iterator[Entry]:
        for path in self.paths:
            for entry in read(path):
                if isinstance(entry, PlanRecord) and self.since <= entry.now <= self.until:
                    self._rates += [(entry.now, job.id, job.rate) for job in entry.snapshot.jobs]
                elif isinstance(entry, Record) and isinstance(entry.event, JobReady):
                    self._ready[entry.event.job] = entry.now
                yield entry


def _measured(recording: Recording) -> Told:
    services = {}
    for name, spec in recording.services.items():
        taken = sorted(recording.latencies.get(name, ()))
        count = len(recording.arrivals.get(name, ()))
        in_time = sum(ns <= spec.slo.latency for ns in taken)
        p95 = taken[min(len(taken) - 1, int(0.95 * len(taken)))] / MS if taken else None
        services[name] = Figures(count, in_time / count if count else 1.0, p95)
    jobs = {job: recording.job_rate(job) for job in recording.jobs}
    return Told("as it was, measured", services, jobs)


def _told(what: str, scenario: Scenario, setting: Setting) -> Told:
    return _figures(what, scenario, simulate(scenario, setting, 0))


def _figures(what: str, scenario: Scenario, outcome: Outcome) -> Told:
    services = {
        name: Figures(
            s.offered,
            s.attained / s.offered if s.offered else 1.0,
            s.quantile_ns(0.95) / MS if s.answered else None,
        )
        for name, s in outcome.services.items()
    }
    seconds = scenario.duration / S
    return Told(what, services, {job: t.steps / seconds for job, t in outcome.jobs.items()})
