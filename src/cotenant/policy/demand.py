"""What services ask for and what jobs make of space, as far as measurement has shown.

Demand is what a snapshot says, corrected: by the season, by measured misses, by the recent peak.
What jobs make of space is learned from their progress, and tried out where it cannot be.
"""

from __future__ import annotations

from typing import Final

import msgspec

from cotenant.domain.snapshot import ServiceFacts, Snapshot
from cotenant.domain.units import S
from cotenant.policy.planstate import PlannerState, Tuning
from cotenant.policy.pressure import WINDOW, Pressure, note_pressure
from cotenant.policy.reserved import own_units
from cotenant.policy.sharing import divide
from cotenant.policy.utility import Curve
from cotenant.policy.views import Layout, Verdict, View

LEARN_EVERY: Final = 10 * S
RISES_OVER, FALLS_OVER = 10 * S, 30 * S
"""Time constants of the rate that is usual: bursts of a few seconds hardly change it."""
PARTS: Final = 256
"""Of a device, in which it is reckoned what a job is to hold in all; or whole units."""


class Demand:
    """Learns from snapshots; what it learned is in the planner's state."""

    def __init__(self, tuning: Tuning, state: PlannerState) -> None:
        self._tuning = tuning
        self._state = state

    def see(self, snapshot: Snapshot) -> tuple[ServiceFacts, ...]:
        """Learn from a snapshot; the services with their rates as the planner is to see them."""
        facts = self._corrected(snapshot)
        self._note_usual(snapshot)
        self._note_peaks(snapshot.now, facts)
        self._learn(snapshot)
        return facts

    def _corrected(self, snapshot: Snapshot) -> tuple[ServiceFacts, ...]:
        """The services with their rates as the tuning lets the planner see them: without trend
        if it is to ignore it, and higher where more usually comes soon or where measurement
        contradicts prediction."""
        state, tuning = self._state, self._tuning
        facts = snapshot.services
        if not tuning.trend:
            facts = tuple(msgspec.structs.replace(s, rate_trend=0.0) for s in facts)
        if tuning.season:
            facts = tuple(scaled(s, max(1.0, s.rate_season)) for s in facts)
        if not tuning.feedback:
            return facts
        known = {s.name for s in facts}
        state.pressure = {name: p for name, p in state.pressure.items() if name in known}
        found = []
        for service in facts:
            pressure = state.pressure.setdefault(service.name, Pressure())
            foreseen = service.name in state.foreseen
            boost = note_pressure(
                pressure, service, snapshot.now, tuning.grow_after, tuning.memory, foreseen
            )
            found.append(scaled(service, boost))
        state.foreseen.clear()
        return tuple(found)

    def foresee(self, view: View, verdict: Verdict) -> None:
        """Remember who is predicted to miss its objective as things are. More space is on its way
        to them; what they miss until then is no reason for still more. Only where answers take
        turns, which need several steps from the least there is: elsewhere boosts raised meanwhile
        are what was weighed."""
        turning = {s.name for s in view.services if s.turns is not None}
        self._state.foreseen |= {n: why for n, why in verdict.misses.items() if n in turning}

    def _note_usual(self, snapshot: Snapshot) -> None:
        state = self._state
        passed = max(0, snapshot.now - state.peaks_at)
        usual: dict[str, float] = {}
        for service in snapshot.services:
            rate = service.rate
            known = state.usual.get(service.name, rate)
            over = RISES_OVER if rate > known else FALLS_OVER
            usual[service.name] = rate + (known - rate) * over / (over + passed)
        state.usual = usual

    def _note_peaks(self, now: int, facts: tuple[ServiceFacts, ...]) -> None:
        state, memory = self._state, self._tuning.memory
        passed = max(0, now - state.peaks_at)
        fade = memory / (memory + passed) if memory else 0.0
        state.peaks = {s.name: max(s.rate, state.peaks.get(s.name, 0.0) * fade) for s in facts}
        state.peaks_at = now

    def at_peak(self, view: View, times: float = 1.0) -> View:
        """The view with each service's rate at its recent peak, or at some times that."""
        state = self._state
        services = tuple(
            msgspec.structs.replace(
                s, rate=times * state.peaks[s.name] * state.parts[s.name][view.device.id]
            )
            for s in view.services
        )
        return msgspec.structs.replace(view, services=services)

    def pressing(self, view: View) -> tuple[View, int]:
        """The view as growth is judged by, and how long a wish to grow must hold. Services that
        missed their objective of late count at their recent peak rate, for their bursts are over
        before the rate of the moment says so; and what was measured need not hold again. No more
        need what was predicted and measured."""
        state, tuning = self._state, self._tuning
        late = {
            name
            for name, pressure in state.pressure.items()
            if pressure.raised_at and view.now - pressure.raised_at <= tuning.memory
        }
        if not any(s.name in late for s in view.services):
            recent = [n for n, p in state.pressure.items() if p.foreseen_at]
            recent = [n for n in recent if view.now - state.pressure[n].foreseen_at <= WINDOW]
            measured = any(s.name in recent for s in view.services)
            return view, 0 if measured else tuning.grow_after
        peak = {s.name: s for s in self.at_peak(view).services}
        services = tuple(peak[s.name] if s.name in late else s for s in view.services)
        return msgspec.structs.replace(view, services=services), 0

    def _learn(self, snapshot: Snapshot) -> None:
        """Learn from the progress of jobs what they make of space."""
        state = self._state
        known = {j.id for j in snapshot.jobs}
        state.curves = {j: c for j, c in state.curves.items() if j in known}
        if state.trials.job not in known:
            state.trials.job = ""
        if not self._tuning.learn or snapshot.now - state.learned_at < LEARN_EVERY:
            return
        state.learned_at = snapshot.now
        most = max((d.compute for d in snapshot.devices if d.trains), default=0)
        for job in snapshot.jobs:
            held = sum(job.units.values()) - job.units.get(0, 0.0)
            if job.rate > 0 and held > 0.2:
                curve = state.curves.get(job.id)
                if curve is None or curve.units != most:
                    curve = state.curves[job.id] = Curve(most)
                curve.observe(job.units, job.rate, job.grants)

    def unknown_pauses(self, job: str) -> bool:
        """Whether what pauses cost a job that makes progress cannot be told from its speed."""
        curve = self._state.curves.get(job)
        return curve is not None and not curve.knows_pauses()

    def try_out(self, views: list[View]) -> list[str]:
        """Begin or end trying out what a job would make of more units; why, if so."""
        state = self._state
        shared = [v for v in views if v.device.trains and not v.device.pins_jobs]
        if not self._tuning.learn or len(shared) != 1 or len(shared[0].jobs) < 2:
            return []
        layout = state.devices[shared[0].device.id].layout
        shares = self.divide(shared[0], layout) if layout is not None else {}
        reserved = {j.id for j in shared[0].jobs if j.own}
        shares = {job: units for job, units in shares.items() if job not in reserved}
        return state.trials.more(shared[0].now, shares, state.curves)

    def divide(self, view: View, layout: Layout) -> dict[str, int]:
        """Whole units of what is left: for each reservation its own, and of the others for each job
        some; none for these if they are more than that."""
        own = own_units(view, layout)
        units = len(layout.free) - sum(own.values())
        others = [j for j in view.jobs if j.id not in own]
        if not others or len(others) > units:
            return own
        shares = divide(units, others, view.device.compute, view.speed_ups)
        return own | self._state.trials.applied(shares, view)

    def with_targets(self, view: View) -> View:
        """The view with what jobs are to hold in all: as if all units were divided among them. A
        single job has no target, nor have any while what one makes of space is not known, or where
        none can be lent any."""
        if not view.device.trains or view.device.pins_jobs:
            return view
        if len(view.jobs) < 2 or not all(job.id in view.speed_ups for job in view.jobs):
            return view
        compute = view.device.compute
        parts = max(1, PARTS // compute)
        found = divide(compute, view.jobs, compute, view.speed_ups, parts)
        targets = {job: max(1, held) / parts for job, held in found.items()}
        return msgspec.structs.replace(view, targets=targets)


def scaled(service: ServiceFacts, factor: float) -> ServiceFacts:
    """The service with some times its rate."""
    if factor == 1.0:
        return service
    return msgspec.structs.replace(
        service, rate=service.rate * factor, rate_trend=service.rate_trend * factor
    )
