"""The planner: decides in space. ``plan(snapshot)`` returns the bounds for the dispatcher.

Laws (docs/design.md says why):

1. Feasible first: partitions are shapes the device can form, no two overlap, and a model goes
   only where it fits by memory, operators and accuracy.
2. Devices that only serve carry what fits there; the rest goes to those that also train.
3. Services get the least space on which every objective is predicted to hold at the recent peak
   rate; where jobs cannot move, the layout that leaves them most. The rest goes to jobs by
   utility, and idle service partitions are lent. Before the load is known, services start with
   all that their instances can use, if it can be lent.
4. A prediction that measurement contradicts is corrected: while a service misses its objective
   more often than allowed, its load counts for more than its rate says.
5. A layout changes only when the wish for it has held for a while, one step at a time, and
   when what is gained over the horizon exceeds the cost of changing. A service or job that
   comes or goes is placed at once.
6. Every change has a reason.
"""

from __future__ import annotations

import math

import msgspec

from weft.domain.device import DeviceSpec, Partition
from weft.domain.plan import Plan
from weft.domain.snapshot import JobFacts, ServiceFacts, Snapshot
from weft.domain.units import MS, S
from weft.policy.judging import RHO_MAX, Verdict, View, judge, utilization
from weft.policy.layouts import (
    Layout,
    mig_fixed,
    mig_layouts,
    unit_layout,
    unit_layouts,
    whole_device,
    without_services,
)
from weft.policy.leftover import pauses_of, share_out, worth
from weft.policy.placing import Parts, Placing, place
from weft.policy.pressure import Pressure, note_pressure
from weft.policy.sharing import divide
from weft.policy.utility import EXPLORE, Curve

CALM = 0.6
"""Space is taken from services only where what is left would be used no more than this."""
LEARN_EVERY = 10 * S
RATE_WINDOW = 60 * S
"""Over which the rate of a job in a snapshot is taken."""
PROBE_FOR = 90 * S
"""How long a job is tried out: progress is known over a minute."""
SPARE = 1.25
"""Such a layout must hold at this much more than the recent peak."""
GAIN = 1.05
"""Where jobs cannot move, a layout must be worth this much more to them to be changed for."""
GAIN_OWN = 1.02
"""Jobs are given space of their own only if it is worth this much more than borrowing it."""
LOSE_NOTHING = 0.99
"""And give it back if borrowing is worth this much of owning it."""
TRY_EVERY = 3600 * S
"""How often, at most, jobs are given space of their own to learn what borrowing costs them."""


_Members = tuple[tuple[str, ...], tuple[str, ...]]


class Tuning(msgspec.Struct, frozen=True):
    """How patient the planner is. Times in ns."""

    grow_after: int = 2 * S
    shrink_after: int = 10 * S
    horizon: int = 10 * S
    """How far ahead loads are predicted."""
    payback: int = 300 * S
    """In what time a change must have paid for itself."""
    memory: int = 300 * S
    """Space is taken from services only if the rest would do at the recent peak rate, which
    fades with this time constant. 0: only the present rate counts."""
    settle: int = 60 * S
    """How long the load is watched before services are given less than they started with."""
    lend: bool = True
    split: tuple[int, int] | None = None
    """(units, partition size) for services, never changed: a static split."""
    instances: tuple[str, ...] | None = None
    """The same for MIG: the profiles of services' instances."""
    feedback: bool = True
    """Whether measured misses correct what is predicted."""
    trend: bool = True
    """Whether the trend of a rate counts, or its present level alone."""
    season: bool = True
    """Whether what usually comes next counts, where that is more."""
    learn: bool = True
    """Whether jobs' speed-ups are learned, or every unit is taken to be worth as much."""
    offload: bool = True
    """Whether devices that only serve are used."""
    slice_min: int = 2 * MS
    slice_max: int = 200 * MS
    linger_max: int = 20 * MS


class DeviceMemory(msgspec.Struct):
    """What the planner remembers of one device."""

    layout: Layout | None = None
    since: int = 0
    """When services were first given space (ns)."""
    wish: Layout | None = None
    wished_since: int = 0
    trial: Layout | None = None
    """A layout that would be tried to learn something."""
    crowded_since: int = 0


class PlannerState(msgspec.Struct):
    """What the planner remembers between snapshots."""

    devices: dict[str, DeviceMemory] = {}
    members: _Members = ((), ())
    version: int = 0
    parts: Parts = {}
    """Where services are."""
    elsewhere_since: int = 0
    """Since when they should be somewhere else (ns)."""
    bound: dict[str, str] = {}
    """The partition of each job that cannot move."""
    settled: dict[str, int] = {}
    """From when on (ns) what is seen of such a job is of its present partition alone."""
    peaks: dict[str, float] = {}
    """Recent peak rate of each service, per second, as of ``peaks_at``."""
    peaks_at: int = 0
    pressure: dict[str, Pressure] = {}
    tried_own: int = -TRY_EVERY
    """When jobs last had space of their own to learn what borrowing costs them (ns)."""
    curves: dict[str, Curve] = {}
    """What was learned of each job's speed."""
    learned_at: int = 0
    shares: dict[str, int] = {}
    """Units of jobs that can move."""
    probe: str = ""
    """The job that is being tried out."""
    probed_at: int = 0


class Planner:
    """Owns a ``PlannerState``; pure like the dispatcher."""

    def __init__(self, tuning: Tuning | None = None, state: PlannerState | None = None) -> None:
        self.tuning = tuning or Tuning()
        self.state = state or PlannerState()

    def plan(self, snapshot: Snapshot) -> Plan | None:
        """A new plan, or None to keep the present one."""
        state = self.state
        facts = self._corrected(snapshot)
        self._note_peaks(snapshot.now, facts)
        self._learn(snapshot)
        if 0 < snapshot.plan.version < state.version:
            # A device refused the last plan: what is in force is all that counts.
            for memory in state.devices.values():
                memory.layout = memory.wish = None
        members = _members(snapshot)
        placing, reasons = self._next_placing(snapshot, facts, members)
        before = {d: m.layout for d, m in state.devices.items()}
        views = self._views(snapshot, facts, placing)
        for view in views:
            memory = state.devices.setdefault(view.device.id, DeviceMemory())
            memory.layout, why = self._next_layout(view, memory)
            reasons += why
            if memory.layout == before.get(view.device.id) and members == state.members:
                reasons += self._rebalance(view, memory) or self._redivide(view, memory)
        if not reasons:
            reasons = self._try_out(views)
        if members != state.members:
            reasons = [*_membership(state.members, members), *reasons]
        if not reasons:
            return None
        state.members = members
        state.version += 1
        return self._make(views, reasons)

    # --- facts ------------------------------------------------------------------------------

    def _corrected(self, snapshot: Snapshot) -> tuple[ServiceFacts, ...]:
        """The services with their rates as the tuning lets the planner see them: without trend
        if it is to ignore it, and higher where more usually comes soon or where measurement
        contradicts prediction."""
        state, tuning = self.state, self.tuning
        facts = snapshot.services
        if not tuning.trend:
            facts = tuple(msgspec.structs.replace(s, rate_trend=0.0) for s in facts)
        if tuning.season:
            facts = tuple(_scaled(s, max(1.0, s.rate_season)) for s in facts)
        if not tuning.feedback:
            return facts
        known = {s.name for s in facts}
        state.pressure = {name: p for name, p in state.pressure.items() if name in known}
        found = []
        for service in facts:
            pressure = state.pressure.setdefault(service.name, Pressure())
            boost = note_pressure(pressure, service, snapshot.now, tuning.grow_after, tuning.memory)
            found.append(_scaled(service, boost))
        return tuple(found)

    def _note_peaks(self, now: int, facts: tuple[ServiceFacts, ...]) -> None:
        state, memory = self.state, self.tuning.memory
        passed = max(0, now - state.peaks_at)
        fade = memory / (memory + passed) if memory else 0.0
        state.peaks = {s.name: max(s.rate, state.peaks.get(s.name, 0.0) * fade) for s in facts}
        state.peaks_at = now

    def _at_peak(self, view: View, times: float = 1.0) -> View:
        """The view with each service's rate at its recent peak, or at some times that."""
        state = self.state
        services = tuple(
            msgspec.structs.replace(
                s, rate=times * state.peaks[s.name] * state.parts[s.name][view.device.id]
            )
            for s in view.services
        )
        return msgspec.structs.replace(view, services=services)

    def _learn(self, snapshot: Snapshot) -> None:
        """Learn from the progress of jobs what they make of space."""
        state = self.state
        known = {j.id for j in snapshot.jobs}
        state.curves = {j: c for j, c in state.curves.items() if j in known}
        state.settled = {j: at for j, at in state.settled.items() if j in known}
        if not self.tuning.learn or snapshot.now - state.learned_at < LEARN_EVERY:
            return
        state.learned_at = snapshot.now
        most = max((d.compute for d in snapshot.devices if d.trains), default=0)
        for job in snapshot.jobs:
            held = sum(job.units.values()) - job.units.get(0, 0.0)
            settled = snapshot.now >= state.settled.get(job.id, 0)
            if job.rate > 0 and held > 0.2 and settled:
                curve = state.curves.get(job.id)
                if curve is None or curve.units != most:
                    curve = state.curves[job.id] = Curve(most)
                curve.observe(job.units, job.rate, job.grants)

    def _try_out(self, views: list[View]) -> list[str]:
        """Begin or end trying out what a job would make of more units; why, if so."""
        state = self.state
        shared = [v for v in views if v.device.trains and not v.device.pins_jobs]
        if not self.tuning.learn or len(shared) != 1 or len(shared[0].jobs) < 2:
            return []
        now = shared[0].now
        if state.probe:
            if now - state.probed_at < PROBE_FOR:
                return []
            done, state.probe = state.probe, ""
            return [f"job {done} was tried out; its space is what it was"]
        layout = state.devices[shared[0].device.id].layout
        shares = self._divide(shared[0], layout) if layout is not None else {}
        moved, units = _moved(shares), sum(shares.values())
        if not moved or now - state.probed_at < PROBE_FOR * moved / (units * EXPLORE):
            return []
        state.probed_at = now
        for job, have in sorted(shares.items(), key=lambda item: (item[1], item[0])):
            curve = state.curves.get(job)
            if curve is not None and curve.unsure(min(have + moved, curve.units)):
                state.probe = job
                return [f"job {job} is tried out with {moved} more: what it gains is not known"]
        return []

    def _divide(self, view: View, layout: Layout) -> dict[str, int]:
        """Whole units of what is left for each job; none if there are more jobs than units."""
        units = len(layout.free)
        if len(view.jobs) > units:
            return {}
        shares = divide(units, view.jobs, view.device.compute, view.speed_ups)
        probe = self.state.probe
        if probe in shares and len(shares) > 1:
            richest = max((j for j in shares if j != probe), key=lambda j: (shares[j], j))
            moved = min(_moved(shares), shares[richest] - 1)
            shares[richest] -= moved
            shares[probe] += moved
        return shares

    def _pressing(self, view: View) -> tuple[View, int]:
        """The view as growth is judged by, and how long a wish to grow must hold. Services that
        missed their objective of late count at their recent peak rate, for their bursts are over
        before the rate of the moment says so; and what was measured need not hold again."""
        state, tuning = self.state, self.tuning
        late = {
            name
            for name, pressure in state.pressure.items()
            if pressure.raised_at and view.now - pressure.raised_at <= tuning.memory
        }
        if not any(s.name in late for s in view.services):
            return view, tuning.grow_after
        peak = {s.name: s for s in self._at_peak(view).services}
        services = tuple(peak[s.name] if s.name in late else s for s in view.services)
        return msgspec.structs.replace(view, services=services), 0

    # --- which devices ----------------------------------------------------------------------

    def _next_placing(
        self, snapshot: Snapshot, facts: tuple[ServiceFacts, ...], members: _Members
    ) -> tuple[Placing, list[str]]:
        """Where services are to be. They go elsewhere at once when members change, soon where
        serving devices have too much, late (and only if it would hold at peak rates) back to
        them."""
        state, tuning = self.state, self.tuning
        devices = self._devices(snapshot)
        horizon_s = tuning.horizon / S
        wish = place(facts, devices, state.parts, horizon_s)
        present = Placing(state.parts).homes()
        homes = wish.homes()
        if members[0] != state.members[0] or not state.version:
            reasons = list(wish.reasons)
        elif homes == present:
            state.elsewhere_since = 0
            state.parts = wish.parts
            return wish, []
        else:
            state.elsewhere_since = state.elsewhere_since or snapshot.now
            held = snapshot.now - state.elsewhere_since
            patience = tuning.grow_after
            trains = {d.id for d in devices if d.trains}
            if not any((now - present[name]) & trains for name, now in homes.items()):
                peaks = (msgspec.structs.replace(s, rate=state.peaks[s.name]) for s in facts)
                at_peak = place(tuple(peaks), devices, state.parts, horizon_s)
                patience = tuning.shrink_after
                if at_peak.homes() != homes:
                    return Placing(state.parts), []
            if held < patience:
                return Placing(state.parts), []
            moved = [n for n in homes if homes[n] != present[n]]
            reasons = [
                f"{name}: {_names(present[name])} -> {_names(homes[name])}" for name in moved
            ] + list(wish.reasons)
        state.elsewhere_since = 0
        state.parts = wish.parts
        return wish, reasons

    def _devices(self, snapshot: Snapshot) -> list[DeviceSpec]:
        """Those to be used, serving devices first."""
        found = [d for d in snapshot.devices if d.trains or self.tuning.offload]
        return sorted(found, key=lambda d: d.trains)

    def _views(
        self, snapshot: Snapshot, facts: tuple[ServiceFacts, ...], placing: Placing
    ) -> list[View]:
        devices = self._devices(snapshot)
        parts = placing.parts
        jobs = self._job_devices(snapshot, [d for d in devices if d.trains])
        curves = self.state.curves
        speed_ups = {job: curve.speed_ups() for job, curve in curves.items()}
        lost = {job: curve.lost() for job, curve in curves.items() if curve.knows_pauses()}
        return [
            View(
                snapshot.now,
                device,
                snapshot.plan,
                tuple(
                    _scaled(s, parts[s.name][device.id])
                    for s in facts
                    if device.id in parts.get(s.name, {})
                ),
                jobs.get(device.id, ()),
                speed_ups,
                lost,
            )
            for device in devices
        ]

    def _job_devices(
        self, snapshot: Snapshot, devices: list[DeviceSpec]
    ) -> dict[str, tuple[JobFacts, ...]]:
        """Which jobs can run on which device: all on all, unless one binds them; then each is
        where it was, or where the fewest are."""
        if not any(d.pins_jobs for d in devices):
            return {d.id: snapshot.jobs for d in devices}
        there: dict[str, list[JobFacts]] = {d.id: [] for d in devices}
        owner = {p.id: p.device for p in snapshot.plan.partitions}
        homeless: list[JobFacts] = []
        for job in snapshot.jobs:
            home = owner.get(self.state.bound.get(job.id, ""), "")
            there.get(home, homeless).append(job)
        for job in homeless:
            there[min(there, key=lambda d: (len(there[d]), d))].append(job)
        return {device: tuple(jobs) for device, jobs in there.items()}

    # --- layouts ----------------------------------------------------------------------------

    def _next_layout(self, view: View, memory: DeviceMemory) -> tuple[Layout, list[str]]:
        now, device, current = view.now, view.device, memory.layout
        least = _least(view)
        if current is None or bool(current.mine) != bool(view.services):
            layout = self._first(view, least)
            memory.since = now
            return layout, [f"first layout of {device.id}: {_describe(layout)}"]
        if not device.trains or self._is_fixed(device):
            return current, []
        if not view.services:
            return current, []
        find = self._wish_mig if device.mig else self._wish
        wish, reason, patience = find(view, current, least)
        if wish == current:
            memory.wish = None
            return current, []
        if wish != memory.wish:
            memory.wish, memory.wished_since = wish, now
        held = now - memory.wished_since
        if held < patience or not self._pays(view, current, wish):
            return current, []
        memory.wish = None
        if wish == memory.trial:
            self.state.tried_own = now
        return wish, [f"{_describe(current)} -> {_describe(wish)}: {reason} (for {held / S:.0f}s)"]

    def _is_fixed(self, device: DeviceSpec) -> bool:
        return (self.tuning.instances if device.mig else self.tuning.split) is not None

    def _first(self, view: View, least: int) -> Layout:
        """Nothing is known of the load yet. Space that can be lent costs little, so services
        start with all that their instances can use; otherwise with the least."""
        device, tuning = view.device, self.tuning
        if not device.trains:
            return whole_device(device)
        if not view.services:
            return without_services(device)
        if device.mig:
            if tuning.instances is not None:
                options = mig_fixed(device, tuning.instances)
            else:
                options = [x for x in mig_layouts(device, None) if x.compute >= least]
            verdicts = _judge_all(view, options, 0.0)
            return min(verdicts, key=lambda v: (v.overload, -self._worth(view, v))).layout
        if tuning.split is not None:
            return unit_layout(device, *tuning.split)
        usable = sum(s.instances for s in view.services) if tuning.lend else 1
        return self._fit(view, max(1, least, min(device.compute, usable)))

    def _fit(self, view: View, units: int) -> Layout:
        """The best layout with this many units: fewest misses, then smallest partitions."""
        verdicts = _judge_all(view, unit_layouts(view.device, units), 0.0)
        return min(verdicts, key=lambda v: v.overload).layout

    def _wish(self, view: View, current: Layout, least: int) -> tuple[Layout, str, int]:
        """One step up if an objective is (or will be) missed, one down if it would still hold;
        why, and how long the wish must hold."""
        tuning = self.tuning
        horizon_s = tuning.horizon / S
        pressing, patience = self._pressing(view)
        here = judge(pressing, current, horizon_s)
        if here.misses or current.compute < least:
            best = self._step_up(pressing, current, here.overload - 0.01)
            if best is None:
                return current, "", 0
            held = patience if best.compute > current.compute else tuning.grow_after
            return best, _first_miss(here), held
        watched = view.now - self.state.devices[view.device.id].since
        if watched < tuning.settle or not view.jobs:
            return current, "", 0
        return self._wish_for_jobs(view, current, least)

    def _wish_for_jobs(self, view: View, current: Layout, least: int) -> tuple[Layout, str, int]:
        """One step less for services if jobs gain by having for themselves, rather than
        borrowing, all that services can do without at their peak; one step more if they would
        lose nothing. Where it is not known what borrowing costs them, that is tried."""
        tuning, state = self.tuning, self.state
        horizon_s = tuning.horizon / S
        peak = self._at_peak(view, SPARE)
        here = judge(view, current, 0.0)
        low, high = max(1, least), current.compute - 1
        for less in _fewer(view, current, low, high):
            verdict = judge(peak, less, horizon_s)
            if verdict.misses or verdict.busiest > CALM:
                continue
            gained = self._ratio(view, here, verdict.layout)
            if gained > GAIN_OWN:
                step = judge(peak, self._fit(peak, high), horizon_s)
                if step.misses or step.busiest > CALM:
                    break
                why = f"jobs gain {gained - 1:.0%} and objectives hold"
                return step.layout, why, tuning.shrink_after
            unknown = [j.id for j in view.jobs if self._unknown_pauses(j.id)]
            if unknown and tuning.lend and view.now - state.tried_own > TRY_EVERY:
                state.devices[view.device.id].trial = verdict.layout
                why = f"what pauses cost {', '.join(unknown)} is not known; it is tried without"
                return verdict.layout, why, tuning.shrink_after
            break
        usable = min(view.device.compute, sum(s.instances for s in view.services))
        trying = view.now - state.tried_own < PROBE_FOR
        if not tuning.lend or current.compute >= usable or trying:
            return current, "", 0
        if self._ratio(view, here, self._fit(view, usable)) < LOSE_NOTHING:
            return current, "", 0
        more = self._fit(view, current.compute + 1)
        return more, "jobs lose nothing by borrowing it", tuning.shrink_after

    def _unknown_pauses(self, job: str) -> bool:
        curve = self.state.curves.get(job)
        return curve is not None and not curve.knows_pauses()

    def _ratio(self, view: View, here: Verdict, layout: Layout) -> float:
        """What another layout would be worth to jobs, 1 being what they have."""
        there = judge(view, layout, 0.0)
        if not self.tuning.lend:
            here, there = _unlent(here), _unlent(there)
        before, after = (
            worth(view, v, self._divide(view, v.layout), _measured(view, here))
            for v in (here, there)
        )
        return after / before if before else float(after > 0) + 1.0

    def _step_up(self, view: View, current: Layout, below: float) -> Layout | None:
        """The best layout with as many units, or with the fewest more that bring the overload
        below this; None if there is none."""
        horizon_s = self.tuning.horizon / S
        for units in range(current.compute, view.device.compute + 1):
            options = unit_layouts(view.device, units)
            if units == current.compute:
                options += unit_layouts(view.device, min(units + 1, view.device.compute))
            best = min(
                _judge_all(view, options, horizon_s),
                key=lambda v: (round(v.overload, 3), v.layout.compute),
            )
            if best.overload < below:
                return best.layout
        return None

    def _wish_mig(self, view: View, current: Layout, least: int) -> tuple[Layout, str, int]:
        """As ``_wish``, where jobs are bound to instances: among the layouts one step away that
        hold all objectives, with something to spare, the one that is worth most to the jobs.
        Instances take time to make and jobs to start again, so every wish must hold."""
        tuning, moving = self.tuning, view.device.move_ns
        horizon_s = tuning.horizon / S
        pressing, _ = self._pressing(view)
        here = judge(pressing, current, horizon_s)
        options = [x for x in mig_layouts(view.device, current) if x.compute >= least]
        if not options:
            return current, "", 0
        if here.misses:
            verdicts = _judge_all(pressing, options, horizon_s)
            best = min(verdicts, key=lambda v: (round(v.overload, 3), -self._worth(view, v)))
            if best.overload < here.overload - 0.01:
                # A rise that is only foreseen may not come, and jobs would start again for it.
                now = judge(pressing, current, 0.0).misses
                patience = tuning.grow_after if now else max(tuning.grow_after, moving)
                return best.layout, _first_miss(here), patience
            return current, "", 0
        peak = self._at_peak(view, SPARE)
        calm = [
            v
            for v in _judge_all(peak, options, horizon_s)
            if not v.misses and (v.busiest <= CALM or v.layout.compute >= current.compute)
        ]
        if not calm:
            return current, "", 0
        best = max(calm, key=lambda v: self._worth(view, v))
        before, after = self._worth(view, judge(peak, current, horizon_s)), self._worth(view, best)
        if after <= (GAIN + moving / tuning.payback) * before:
            return current, "", 0
        why = f"jobs gain {after / before - 1 if before else 1:.0%} and objectives hold"
        return best.layout, why, tuning.shrink_after

    def _worth(self, view: View, verdict: Verdict) -> float:
        """What a layout is worth to jobs that are bound to their partitions."""
        return share_out(view, verdict, self.tuning.lend, self.state.bound)[0]

    def _rebalance(self, view: View, memory: DeviceMemory) -> list[str]:
        """Why services should change places within the layout; empty if they should not."""
        tuning, layout = self.tuning, memory.layout
        horizon_s = tuning.horizon / S
        if layout is None or not layout.mine or not view.services:
            return []
        now_rho = utilization(view, layout, horizon_s)
        best_rho = judge(view, layout, horizon_s).busiest
        if now_rho <= RHO_MAX or best_rho > now_rho - 0.1:
            memory.crowded_since = 0
            return []
        memory.crowded_since = memory.crowded_since or view.now
        if view.now - memory.crowded_since < tuning.grow_after:
            return []
        memory.crowded_since = 0
        return [f"services spread anew: busiest partition {now_rho:.2f} -> {best_rho:.2f}"]

    def _redivide(self, view: View, memory: DeviceMemory) -> list[str]:
        """Why jobs should have other parts of what is left: what they make of it was learned."""
        state, layout = self.state, memory.layout
        if layout is None or view.device.pins_jobs or state.learned_at != view.now or state.probe:
            return []
        wish = self._divide(view, layout)
        if wish.keys() != state.shares.keys() or wish == state.shares:
            return []
        before, after = (
            sum(
                job.weight * math.log1p(view.speed_ups[job.id][shares[job.id]])
                for job in view.jobs
                if job.id in view.speed_ups
            )
            for shares in (state.shares, wish)
        )
        if after <= GAIN * before:
            return []
        parts = ", ".join(f"{job} {state.shares[job]} -> {wish[job]}" for job in sorted(wish))
        return [f"units of jobs: {parts}: what each makes of them was learned"]

    def _pays(self, view: View, current: Layout, wish: Layout) -> bool:
        """Whether unit-time gained (by services or by jobs) exceeds the cost of the change."""
        device, tuning = view.device, self.tuning
        gained = max(1, abs(wish.compute - current.compute)) * tuning.payback
        cost = (device.repartition_ns + device.revoke_ns) * device.compute
        if device.pins_jobs:
            staying = {p.id for p in (*wish.mine, *wish.free)}
            moving = sum(self.state.bound.get(j.id) not in staying for j in view.jobs)
            cost += moving * device.move_ns
        return gained > cost

    # --- the plan ---------------------------------------------------------------------------

    def _make(self, views: list[View], reasons: list[str]) -> Plan:
        tuning, state = self.tuning, self.state
        partitions: list[Partition] = []
        services: dict[str, tuple[str, ...]] = {}
        jobs: dict[str, tuple[str, ...]] = {}
        lendable: list[str] = []
        infeasible: list[str] = []
        bound: dict[str, str] = {}
        for view in views:
            layout = state.devices[view.device.id].layout
            assert layout is not None
            partitions += (*layout.mine, *layout.free)
            verdict = judge(view, layout, 0.0)
            for name, chosen in verdict.services.items():
                services[name] = services.get(name, ()) + tuple(layout.mine[i].id for i in chosen)
            where = f" on {view.device.id}" if len(views) > 1 else ""
            infeasible += [f"{n}{where}: {why}" for n, why in sorted(verdict.misses.items())]
            if not view.device.trains:
                continue
            if tuning.lend:
                lendable += [p.id for p in layout.mine]
            for job, mine in self._owned(view, layout, verdict, bound).items():
                jobs[job] = jobs.get(job, ()) + mine
        state.bound = bound
        return Plan(
            version=state.version,
            partitions=tuple(partitions),
            services=services,
            jobs=jobs,
            lendable=tuple(lendable),
            slice_min=tuning.slice_min,
            slice_max=tuning.slice_max,
            linger_max=tuning.linger_max,
            reasons=(*reasons, *infeasible),
        )

    def _owned(
        self, view: View, layout: Layout, verdict: Verdict, bound: dict[str, str]
    ) -> dict[str, tuple[str, ...]]:
        """The partitions of each job; those of jobs that cannot move are noted in ``bound``."""
        if view.device.pins_jobs:
            _, places = share_out(view, verdict, self.tuning.lend, self.state.bound)
            for job, where in places.items():
                if where != self.state.bound.get(job):
                    self.state.settled[job] = view.now + RATE_WINDOW + view.device.move_ns
            bound.update(places)
            return {job: (where,) for job, where in places.items()}
        rest = [p.id for p in layout.free]
        owned: dict[str, tuple[str, ...]] = {}
        self.state.shares = self._divide(view, layout)
        for job, units in self.state.shares.items():
            owned[job], rest = tuple(rest[:units]), rest[units:]
        return owned


def _judge_all(view: View, layouts: list[Layout], horizon_s: float) -> list[Verdict]:
    """A verdict on each; layouts whose partitions for services are equally large share one."""
    known: dict[tuple[tuple[int, int], ...], Verdict] = {}
    found = []
    for layout in layouts:
        key = tuple((p.compute, p.memory) for p in layout.mine)
        if key not in known:
            known[key] = judge(view, layout, horizon_s)
        found.append(msgspec.structs.replace(known[key], layout=layout))
    return found


def _fewer(view: View, current: Layout, low: int, high: int) -> list[Layout]:
    """Layouts of fewer units for services, fewest first: single ones, or as large as now."""
    if high < low:
        return []
    present = current.mine[0].compute
    return [
        unit_layout(view.device, units, size)
        for units in sorted({low, (low + high) // 2, high})
        for size in sorted({1, present})
        if units % size == 0
    ]


def _unlent(verdict: Verdict) -> Verdict:
    """As if services left nothing."""
    return msgspec.structs.replace(verdict, rho=[1.0] * len(verdict.rho))


def _measured(view: View, here: Verdict) -> float:
    """Pauses of jobs that there were, of those that there would be if each request that finds a
    partition idle took it back: lingering spares some, and so does other work."""
    held = sum(n * share for job in view.jobs for n, share in job.units.items())
    expected = pauses_of(here, held)
    seen = sum(job.grants for job in view.jobs)
    return min(1.0, seen / expected) if expected else 1.0


def _moved(shares: dict[str, int]) -> int:
    """Units that a job is given to try: a third of what the richest has."""
    return max(shares.values(), default=0) // 3


def _least(view: View) -> int:
    """Compute that services are owed on a device."""
    if not view.services:
        return 0
    owed = sum(s.guaranteed for s in view.services) * view.device.compute
    return min(view.device.compute, max(1, round(owed + 0.499)))


def _scaled(service: ServiceFacts, factor: float) -> ServiceFacts:
    if factor == 1.0:
        return service
    return msgspec.structs.replace(
        service, rate=service.rate * factor, rate_trend=service.rate_trend * factor
    )


def _members(snapshot: Snapshot) -> _Members:
    return (
        tuple(sorted(f"{s.name} x{s.instances}" for s in snapshot.services)),
        tuple(sorted(j.id for j in snapshot.jobs)),
    )


def _membership(old: _Members, new: _Members) -> list[str]:
    reasons: list[str] = []
    for kind, before, after in zip(("service", "job"), old, new, strict=True):
        reasons += [f"{kind} {name} came" for name in after if name not in before]
        reasons += [f"{kind} {name} went" for name in before if name not in after]
    return reasons


def _names(devices: frozenset[str]) -> str:
    return " and ".join(sorted(devices)) or "nowhere"


def _describe(layout: Layout) -> str:
    if not layout.mine:
        return "nothing for services"
    kinds: dict[str, int] = {}
    for partition in layout.mine:
        _, at, _ = partition.id.rpartition(":")[2].partition("@")
        profile = partition.id.rpartition(":")[2].partition("@")[0] if at else ""
        size = partition.compute
        what = profile or f"{size} unit" + "s" * (size > 1)
        kinds[what] = kinds.get(what, 0) + 1
    return "services on " + " + ".join(f"{count} x {what}" for what, count in kinds.items())


def _first_miss(verdict: Verdict) -> str:
    for name, why in sorted(verdict.misses.items()):
        return f"{name}: {why}"
    return "a guaranteed share asks for more"
