"""Which layout a device should have: the wish, its reason, and how long it must hold."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import msgspec

from cotenant.domain.device import DeviceSpec
from cotenant.domain.snapshot import RATE_WINDOW
from cotenant.domain.units import S
from cotenant.domain.workload import share_on
from cotenant.policy.demand import Demand
from cotenant.policy.judging import judge, utilization
from cotenant.policy.layouts import (
    even_layouts,
    job_layouts,
    mig_fixed,
    mig_layouts,
    unit_layout,
    unit_layouts,
    without_services,
)
from cotenant.policy.leftover import pauses_of, share_out, worth
from cotenant.policy.moving import unanswered
from cotenant.policy.planstate import DeviceMemory, PlannerState, Tuning
from cotenant.policy.prospects import RHO_MAX
from cotenant.policy.reserved import leaves, most_for_services
from cotenant.policy.views import Layout, Verdict, View

SPARE: Final = 1.25
"""Space is taken from services only where what is left would hold at this much more than the recent
peak."""
GAIN: Final = 1.05
"""Where jobs cannot move, a layout must be worth this much more to them to be changed for."""
GAIN_OWN: Final = 1.02
"""Jobs are given space of their own only if it is worth this much more than borrowing it."""
LOSE_NOTHING: Final = 0.99
"""And give it back if borrowing is worth this much of owning it."""
OUTAGE: Final = 30
"""A second in which services answer nothing costs as much as this many in which jobs rest."""


class Wish(NamedTuple):
    """A layout, why, and how long (ns) it must have been wished for. ``trial``: it is to show
    what borrowing costs jobs."""

    layout: Layout
    why: str = ""
    patience: int = 0
    trial: bool = False


class Wishes:
    """Looks at one device after the other; what must be remembered is in the planner's state."""

    def __init__(self, tuning: Tuning, state: PlannerState, demand: Demand) -> None:
        self.tuning = tuning
        self.state = state
        self._demand = demand

    def next_layout(self, view: View, memory: DeviceMemory) -> tuple[Layout, list[str]]:
        """The layout to have now, and why it is another than before, if it is."""
        now, device, current = view.now, view.device, memory.layout
        least = _least(view)
        came = not device.trains and _note_guests(view, memory)
        if current is None or (device.trains and bool(current.mine) != bool(view.services)):
            layout = self._first(view, least)
            return layout, [f"first layout of {device.id}: {_describe(layout)}"]
        if self._is_fixed(device):
            return current, []
        if device.trains and not leaves(view, current):
            layout = self._make_room(self._demand.at_peak(view), current, least)
            if layout != current:
                memory.wish = None
                step = f"{_describe(current)} -> {_describe(layout)}"
                return layout, [f"{step}: space there is reserved"]
        if not device.trains:
            wish = self._wish_even(view, current, came)
        elif not view.services:
            return current, []
        else:
            find = self._wish_mig if device.mig else self._wish
            wish = find(view, current, least)
        if wish.layout == current:
            memory.wish = None
            return current, []
        if wish.layout != memory.wish:
            memory.wish, memory.wished_since = wish.layout, now
        held = now - memory.wished_since
        if held < wish.patience:
            return current, []
        memory.wish = None
        if wish.trial:
            self.state.trials.own_at = now
        step = f"{_describe(current)} -> {_describe(wish.layout)}"
        return wish.layout, [f"{step}: {wish.why} (for {held / S:.0f}s)"]

    def _is_fixed(self, device: DeviceSpec) -> bool:
        if not device.trains:
            return len(device.shapes) == 1
        return (self.tuning.instances if device.mig else self.tuning.split) is not None

    def _first(self, view: View, least: int) -> Layout:
        """Nothing is known of the load yet. Space that can be lent costs little, so services
        start with all that their instances can use; otherwise with the least."""
        device, tuning = view.device, self.tuning
        if not device.trains:
            return _own(view, even_layouts(device))
        if not view.services:
            return without_services(device)
        if device.mig:
            if tuning.instances is not None:
                return self._best_mig(view, mig_fixed(device, tuning.instances))
            options = mig_layouts(device, None)
            return self._best_mig(view, [x for x in options if x.compute >= least])
        if tuning.split is not None:
            return unit_layout(device, *tuning.split)
        usable = sum(s.instances for s in view.services) if tuning.lend else 1
        most = max(1, most_for_services(view))
        return self._fit(view, max(1, least, min(most, usable)))

    def _best_mig(self, view: View, options: list[Layout]) -> Layout:
        """Of several layouts, the one by which services miss least, and then jobs gain most."""
        verdicts = _judge_all(view, _leaving(view, options) or options, 0.0)
        return min(verdicts, key=lambda v: (v.overload, -self._worth(view, v))).layout

    def _make_room(self, view: View, current: Layout, least: int) -> Layout:
        """The best layout that leaves reservations what is their own; the present one if none
        does."""
        device = view.device
        if not view.services:
            options = _leaving(view, job_layouts(device))
        elif device.mig:
            options = _leaving(view, mig_layouts(device, None))
            options = [x for x in options if x.compute >= least] or options
        else:
            most = min(current.compute, most_for_services(view))
            return self._fit(view, most) if most > 0 else current
        return self._best_mig(view, options) if options else current

    def _fit(self, view: View, units: int) -> Layout:
        """The best layout with this many units: fewest misses, then smallest partitions."""
        verdicts = _judge_all(view, unit_layouts(view.device, units), 0.0)
        return min(verdicts, key=lambda v: v.overload).layout

    def _wish(self, view: View, current: Layout, least: int) -> Wish:
        """One step up if an objective is (or will be) missed; otherwise what jobs gain by."""
        tuning = self.tuning
        horizon_s = tuning.horizon / S
        pressing, patience = self._demand.pressing(view)
        here = judge(pressing, current, horizon_s)
        self._demand.foresee(view, here)
        if here.misses or current.compute < least:
            best = self._step_up(pressing, current, here.overload)
            if best is None:
                return Wish(current)
            held = patience if best.compute > current.compute else tuning.grow_after
            return Wish(best, _first_miss(here), held)
        if not view.jobs:
            return Wish(current)
        return self._wish_for_jobs(view, pressing, current, least)

    def _wish_for_jobs(self, view: View, pressing: View, current: Layout, least: int) -> Wish:
        """One step less for services if jobs gain by having for themselves, rather than
        borrowing, all that services can do without at their peak; one step more if they would
        lose nothing. Where it is not known what borrowing costs them, that is tried."""
        tuning, trials = self.tuning, self.state.trials
        loads = (self._demand.at_peak(view, SPARE), pressing)
        here = judge(view, current, 0.0)
        fewest = self._fewest(loads, current, least)
        if fewest is not None:
            gained = self._ratio(view, here, fewest)
            unknown = [j.id for j in view.jobs if self._demand.unknown_pauses(j.id)]
            if gained > GAIN_OWN:
                step = self._fit(loads[0], current.compute - 1)
                if self._holds(loads, step):
                    why = f"jobs gain {gained - 1:.0%} and objectives hold"
                    return Wish(step, why, tuning.shrink_after)
            elif unknown and tuning.lend and trials.may_own(view.now):
                why = f"what pauses cost {', '.join(unknown)} is not known; it is tried without"
                return Wish(fewest, why, tuning.shrink_after, trial=True)
        usable = min(most_for_services(view), sum(s.instances for s in view.services))
        if not tuning.lend or current.compute >= usable or trials.owning(view.now):
            return Wish(current)
        if self._ratio(view, here, self._fit(view, usable)) < LOSE_NOTHING:
            return Wish(current)
        more = self._fit(view, current.compute + 1)
        if fewest is not None and self._ratio(view, judge(view, more, 0.0), fewest) > GAIN_OWN:
            return Wish(current)
        return Wish(more, "jobs lose nothing by borrowing it", tuning.shrink_after)

    def _fewest(self, loads: tuple[View, ...], current: Layout, least: int) -> Layout | None:
        """About the least that services can do with: single units, or as large as now."""
        low, high = max(1, least), current.compute - 1
        if high < low:
            return None
        for units in sorted({low, (low + high) // 2, high}):
            for size in sorted({1, current.mine[0].compute}):
                if units % size == 0:
                    layout = unit_layout(loads[0].device, units, size)
                    if self._holds(loads, layout):
                        return layout
        return None

    def _holds(self, loads: tuple[View, ...], layout: Layout) -> bool:
        """Whether objectives hold under each of these loads. The peak alone will not do: services
        are placed anew for each load, so what holds under more can miss under less, and the
        layout would be undone as soon as it stood."""
        horizon_s = self.tuning.horizon / S
        return not any(judge(load, layout, horizon_s).misses for load in loads)

    def _ratio(self, view: View, here: Verdict, layout: Layout) -> float:
        """What another layout would be worth to jobs, 1 being what they have."""
        there = judge(view, layout, 0.0)
        pauses = self._pauses(view, here)
        before, after = (max(self._lent_or_not(view, v, pauses)) for v in (here, there))
        return after / before if before else float(after > 0) + 1.0

    def _lent_or_not(self, view: View, verdict: Verdict, pauses: float) -> tuple[float, float]:
        """What a layout is worth to jobs that can move if it is lent (0 if nothing may be), and
        if it is not."""
        own = self._demand.divide(view, verdict.layout)
        kept = worth(view, _unlent(verdict), own, 0.0)
        return worth(view, verdict, own, pauses) if self.tuning.lend else 0.0, kept

    def _pauses(self, view: View, here: Verdict) -> float:
        """Pauses of jobs that there are where idle space is lent, of those that there would be if
        each request that finds a partition idle took it back: other work spares some. While nothing
        is lent, and until a minute after, as it was before."""
        memory = self.state.devices[view.device.id]
        if memory.lends and view.now - memory.lending_since >= RATE_WINDOW:
            held = sum(n * share for job in view.jobs for n, share in job.units.items())
            expected = pauses_of(here, held)
            seen = sum(job.grants for job in view.jobs)
            memory.paused = min(1.0, seen / expected) if expected else 1.0
        return memory.paused

    def _step_up(self, view: View, current: Layout, below: float) -> Layout | None:
        """The best layout with as many units, or with the fewest more that bring the overload
        below this; None if there is none."""
        horizon_s = self.tuning.horizon / S
        for units in range(current.compute, most_for_services(view) + 1):
            verdicts = _judge_all(view, unit_layouts(view.device, units), horizon_s)
            best = min(verdicts, key=lambda v: round(v.overload, 4))
            if best.overload < below:
                return best.layout
        return None

    def _wish_mig(self, view: View, current: Layout, least: int) -> Wish:
        """As ``_wish``, where jobs are bound to instances, among the layouts one step away.
        Instances take time to make, models to load and jobs to start again, so every wish must
        hold, and pay for that."""
        tuning, moving = self.tuning, view.device.move_ns + view.device.repartition_ns
        horizon_s = tuning.horizon / S
        pressing, _ = self._demand.pressing(view)
        here = judge(pressing, current, horizon_s)
        self._demand.foresee(view, here)
        options = _leaving(view, mig_layouts(view.device, current))
        options = [x for x in options if x.compute >= least]
        if not options:
            return Wish(current)
        if not here.misses:
            return self._wish_for_bound_jobs(view, pressing, here, options)
        verdicts = _judge_all(pressing, options, horizon_s)
        best = min(verdicts, key=lambda v: (self._lost(view, v), -self._worth(view, v)))
        if self._lost(view, best) < self._lost(view, here):
            now, lost = judge(pressing, current, 0.0).overload, unanswered(view, best)
            patience = max(tuning.grow_after, _worth_waiting(moving, lost, now))
            return Wish(best.layout, _first_miss(here), patience)
        return Wish(current)

    def _wish_for_bound_jobs(
        self, view: View, pressing: View, here: Verdict, options: list[Layout]
    ) -> Wish:
        """Of the layouts that hold all objectives, with something to spare, the one that is worth
        most to the jobs: so much more, at the peak and now, that what the change costs is paid
        back."""
        tuning, moving = self.tuning, view.device.move_ns + view.device.repartition_ns
        horizon_s = tuning.horizon / S
        peak = self._demand.at_peak(view, SPARE)
        before, usual = (
            self._worth(view, judge(peak, here.layout, horizon_s)),
            self._worth(view, here),
        )
        better = []
        for verdict in [v for v in _judge_all(peak, options, horizon_s) if not v.misses]:
            after = self._worth(view, verdict)
            left = 1 - (moving + OUTAGE * unanswered(view, verdict)) / tuning.payback
            if after * left > GAIN * before:
                better.append((after, left, verdict.layout))
        better.sort(key=lambda each: each[0], reverse=True)
        for after, left, layout in better:
            there = judge(pressing, layout, horizon_s)
            if not there.misses and self._worth(view, there) * left > GAIN * usual:
                gained = after / before - 1 if before else 1
                why = f"jobs gain {gained:.0%} and objectives hold"
                return Wish(layout, why, tuning.shrink_after)
        return Wish(here.layout)

    def _lost(self, view: View, verdict: Verdict) -> float:
        """What services lose by a layout and by the change to it, as a part of their load in the
        time in which a change must have paid for itself."""
        return round(verdict.overload + unanswered(view, verdict) / self.tuning.payback, 4)

    def _wish_even(self, view: View, current: Layout, came: bool) -> Wish:
        """Where jobs cannot be, nothing is spared for them: the layout by which services miss
        least, and a partition for each instance where all objectives hold with that. Services that
        ``came`` (or went) are placed at once; else what a change costs them must be worth it."""
        tuning, device = self.tuning, view.device
        horizon_s = tuning.horizon / S
        options = even_layouts(device)
        own = _own(view, options)
        pressing, _ = self._demand.pressing(view)
        here = judge(pressing, current, horizon_s)
        self._demand.foresee(view, here)
        if not here.misses:
            loads = (self._demand.at_peak(view, SPARE), pressing)
            if own == current or not self._holds(loads, own):
                return Wish(current)
            why = "objectives hold with a partition for each instance"
            return Wish(own, why, 0 if came else tuning.shrink_after)
        best = min(_judge_all(pressing, options, horizon_s), key=lambda v: round(v.overload, 4))
        if round(best.overload, 4) >= round(here.overload, 4):
            return Wish(current)
        now = judge(pressing, current, 0.0).overload
        held = max(tuning.grow_after, _worth_waiting(device.repartition_ns, 0, now))
        return Wish(best.layout, _first_miss(here), 0 if came else held)

    def _worth(self, view: View, verdict: Verdict) -> float:
        """What a layout is worth to jobs that are bound to their partitions."""
        return share_out(view, verdict, self.tuning.lend, self.state.bound)[0]

    def rearrange(self, view: View, memory: DeviceMemory) -> list[str]:
        """Why services or jobs should change places within the layout; empty if they should
        not."""
        if view.device.pins_jobs:
            return self._rebalance(view, memory) or self._rebind(view, memory)
        return self._rebalance(view, memory) or self._relend(view, memory)

    def _rebalance(self, view: View, memory: DeviceMemory) -> list[str]:
        """Why services should change places within the layout; empty if they should not."""
        tuning, layout = self.tuning, memory.layout
        horizon_s = tuning.horizon / S
        if layout is None or not layout.mine or not view.services:
            return []
        now_rho = utilization(view, layout, horizon_s)
        best_rho = judge(view, layout, horizon_s).busiest
        crowded = now_rho > RHO_MAX and best_rho <= now_rho - 0.1
        if not _has_held(memory, "services", crowded, view.now, tuning.grow_after):
            return []
        return [f"services spread anew: busiest partition {now_rho:.2f} -> {best_rho:.2f}"]

    def _relend(self, view: View, memory: DeviceMemory) -> list[str]:
        """Why lending should end, or begin again. It ends once pauses have seemed to cost jobs more
        than idle space is worth. What jobs make without it then shows whether that is so, and what
        pauses cost is forgotten in time, so that it does not end for ever."""
        layout, state, tuning = memory.layout, self.state, self.tuning
        if layout is None or state.learned_at != view.now:
            return []
        if not (tuning.lend and layout.mine and view.jobs):
            return []
        if not all(job.id in state.curves for job in view.jobs):
            return []
        if self._is_owed(view, memory):
            if memory.lends:
                return []
            self._set_lending(view, memory)
            return ["idle space is lent again: guaranteed shares ask for it"]
        here = judge(view, layout, 0.0)
        lent, kept = self._lent_or_not(view, here, self._pauses(view, here))
        before, after = (lent, kept) if memory.lends else (kept, lent)
        known = not memory.lends or view.now - memory.lending_since >= RATE_WINDOW
        gains = known and after > GAIN_OWN * before
        if not _has_held(memory, "lending", gains, view.now, tuning.shrink_after):
            return []
        self._set_lending(view, memory)
        return [self._verdict(view, memory.lends, lent, kept)]

    def _set_lending(self, view: View, memory: DeviceMemory) -> None:
        memory.lends, memory.lending_since = not memory.lends, view.now
        memory.restless.pop("lending", None)

    def _is_owed(self, view: View, memory: DeviceMemory) -> bool:
        """Whether a job has less of its own than it is guaranteed."""
        compute, own = view.device.compute, memory.shares
        return any(j.guaranteed * compute > own.get(j.id, 0) + 1e-9 for j in view.jobs)

    def _verdict(self, view: View, lends: bool, lent: float, kept: float) -> str:
        before, after = (kept, lent) if lends else (lent, kept)
        ended = "lent again" if lends else "not lent"
        gained = after / before - 1 if before else 1.0
        gain = f"jobs gain {gained:.0%}" if gained > 0 else "jobs lose nothing by it"
        costs = [f"{j.id} {view.lost[j.id] * 1000:.1f} ms" for j in view.jobs if j.id in view.lost]
        known = ", ".join(costs) or "what is not known"
        return f"idle space is {ended}: {gain}; a pause costs {known}"

    def _rebind(self, view: View, memory: DeviceMemory) -> list[str]:
        """Why jobs should start again on other instances."""
        layout, tuning = memory.layout, self.tuning
        if layout is None or not view.jobs:
            return []
        verdict = judge(view, layout, 0.0)
        before, _ = share_out(view, verdict, tuning.lend, self.state.bound, math.inf)
        after, places = share_out(view, verdict, tuning.lend, self.state.bound)
        pays = after > (GAIN + view.device.move_ns / tuning.payback) * before
        if not _has_held(memory, "jobs", pays, view.now, tuning.shrink_after):
            return []
        moved = sorted(j for j, where in places.items() if where != self.state.bound.get(j))
        gained = after / before - 1 if before else 1.0
        return [f"{', '.join(moved)} elsewhere: jobs gain {gained:.0%}"]


def _has_held(memory: DeviceMemory, who: str, wish: bool, now: int, patience: int) -> bool:
    """Whether the wish that they change places has held for long enough; it is then forgotten."""
    if not wish:
        memory.restless.pop(who, None)
        return False
    if now - memory.restless.setdefault(who, now) < patience:
        return False
    del memory.restless[who]
    return True


def _worth_waiting(moving: int, lost: int, overload: float) -> int:
    """How long (ns) a wish must hold for which jobs start again, which takes them ``moving`` ns,
    and services lose ``lost`` ns: until they have lost by waiting (``overload``, as a part of their
    load) what the change costs, as in ski rental, where under one constant loss no more is lost
    than twice what was best with hindsight (Karlin, Manasse, Rudolph and Sleator, Algorithmica
    1988). But no longer than both together; that is how long a rise that is only foreseen must
    last."""
    most = moving + lost
    return min(most, round((moving / OUTAGE + lost) / overload)) if overload else most


def _leaving(view: View, layouts: list[Layout]) -> list[Layout]:
    """Those of several layouts that leave reservations what is their own."""
    return [layout for layout in layouts if leaves(view, layout)]


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


def _note_guests(view: View, memory: DeviceMemory) -> bool:
    """Remember which services are there; whether some came or went since that was done last."""
    before = memory.guests
    memory.guests = tuple(f"{s.name} x{s.instances}" for s in view.services)
    return memory.guests != before


def _own(view: View, layouts: list[Layout]) -> Layout:
    """The layout with about a partition for each instance of services."""
    instances = sum(s.instances for s in view.services)
    return min(layouts, key=lambda layout: abs(len(layout.mine) - instances))


def _unlent(verdict: Verdict) -> Verdict:
    """As if services left nothing."""
    return msgspec.structs.replace(verdict, busy=[1.0] * len(verdict.busy))


def _least(view: View) -> int:
    """Compute that services are owed on a device."""
    if not view.services:
        return 0
    kind = view.device.kind
    owed = sum(share_on(s.guaranteed, kind) for s in view.services) * view.device.compute
    return min(max(1, most_for_services(view)), max(1, round(owed + 0.499)))


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
