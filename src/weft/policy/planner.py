"""The planner: decides in space. ``plan(snapshot)`` returns the bounds for the dispatcher.

Laws (docs/design.md says why):

1. Feasible first: partitions are shapes the device can form and no two overlap.
2. Services get the fewest cores on which every objective is predicted to hold at the recent
   peak rate; the rest goes to jobs by utility, and idle service partitions are lent. Before the
   load is known, services start with all that their instances can use, if it can be lent.
3. A layout changes only when the wish for it has held for a while, one step at a time, and
   when what is gained over the horizon exceeds the cost of changing. A service or job that
   comes or goes is placed at once.
4. Every change has a reason.
"""

from __future__ import annotations

import msgspec

from weft.domain.plan import Plan
from weft.domain.snapshot import Snapshot
from weft.domain.units import MS, S
from weft.policy.layouts import (
    RHO_MAX,
    Layout,
    Verdict,
    candidates,
    judge,
    make_partition,
    partition_cores,
    utilization,
)
from weft.policy.sharing import divide


class Tuning(msgspec.Struct, frozen=True):
    """How patient the planner is. Times in ns."""

    grow_after: int = 2 * S
    shrink_after: int = 10 * S
    horizon: int = 10 * S
    memory: int = 60 * S
    """Cores are taken from services only if the rest would do at the recent peak rate, which
    fades with this time constant. 0: only the present rate counts."""
    lend: bool = True
    split: tuple[int, int] | None = None
    """(cores, partition size) for services, never changed: a static split."""
    slice_min: int = 2 * MS
    slice_max: int = 200 * MS
    linger_max: int = 20 * MS


class PlannerState(msgspec.Struct):
    """What the planner remembers between snapshots."""

    layout: Layout | None = None
    wish: Layout | None = None
    wished_since: int = 0
    members: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    version: int = 0
    crowded_since: int = 0
    peaks: dict[str, float] = {}
    """Recent peak rate of each service, per second, as of ``peaks_at``."""
    peaks_at: int = 0


class Planner:
    """Owns a ``PlannerState``; pure like the dispatcher."""

    def __init__(self, tuning: Tuning | None = None, state: PlannerState | None = None) -> None:
        self.tuning = tuning or Tuning()
        self.state = state or PlannerState()

    def plan(self, snapshot: Snapshot) -> Plan | None:
        """A new plan, or None to keep the present one."""
        state = self.state
        self._note_peaks(snapshot)
        if 0 < snapshot.plan.version < state.version:
            # The device refused the last plan: what is in force is all that counts.
            state.layout = state.wish = None
        members = _members(snapshot)
        layout, reasons = self._next_layout(snapshot)
        if layout == state.layout and members == state.members:
            reasons = self._rebalance(snapshot, layout)
            if not reasons:
                return None
        if members != state.members:
            reasons = [*_membership(state.members, members), *reasons]
        state.layout, state.members = layout, members
        state.version += 1
        return self._make(snapshot, layout, tuple(reasons))

    def _note_peaks(self, snapshot: Snapshot) -> None:
        state, memory = self.state, self.tuning.memory
        passed = max(0, snapshot.now - state.peaks_at)
        fade = memory / (memory + passed) if memory else 0.0
        state.peaks = {
            s.name: max(s.rate, state.peaks.get(s.name, 0.0) * fade) for s in snapshot.services
        }
        state.peaks_at = snapshot.now

    def _at_peak(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with each service's rate at its recent peak."""
        services = tuple(
            msgspec.structs.replace(s, rate=self.state.peaks[s.name]) for s in snapshot.services
        )
        return msgspec.structs.replace(snapshot, services=services)

    def _next_layout(self, snapshot: Snapshot) -> tuple[Layout, list[str]]:
        state, tuning = self.state, self.tuning
        if tuning.split is not None:
            return Layout(*tuning.split), ["the split is fixed by configuration"]
        now, current = snapshot.now, state.layout
        least = self._least_cores(snapshot)
        if current is None or (current.cores == 0) != (least == 0):
            layout = self._fit(snapshot, self._first_cores(snapshot, least))
            return layout, [f"first layout: {_describe(layout)}"]
        wish, reason = self._wish(snapshot, current, least)
        if wish == current:
            state.wish = None
            return current, []
        if wish != state.wish:
            state.wish, state.wished_since = wish, now
        held = now - state.wished_since
        patience = tuning.grow_after if wish.cores >= current.cores else tuning.shrink_after
        if held < patience or not self._pays(snapshot, current, wish):
            return current, []
        state.wish = None
        return wish, [f"{_describe(current)} -> {_describe(wish)}: {reason} (for {held / S:.0f}s)"]

    def _rebalance(self, snapshot: Snapshot, layout: Layout) -> list[str]:
        """Why services should change places within the layout; empty if they should not."""
        state, horizon_s = self.state, self.tuning.horizon / S
        if not layout.cores:
            return []
        now_rho = utilization(snapshot, layout.size, horizon_s)
        best_rho = max(judge(snapshot, layout, horizon_s).rho)
        if now_rho <= RHO_MAX or best_rho > now_rho - 0.1:
            state.crowded_since = 0
            return []
        state.crowded_since = state.crowded_since or snapshot.now
        if snapshot.now - state.crowded_since < self.tuning.grow_after:
            return []
        state.crowded_since = 0
        return [f"services spread anew: busiest partition {now_rho:.2f} -> {best_rho:.2f}"]

    def _least_cores(self, snapshot: Snapshot) -> int:
        if not snapshot.services:
            return 0
        units = len(snapshot.device.units)
        owed = sum(s.guaranteed for s in snapshot.services) * units
        return min(units, max(1, round(owed + 0.499)))

    def _first_cores(self, snapshot: Snapshot, least: int) -> int:
        """Nothing is known of the load yet. Cores that can be lent cost little, so services start
        with all that their instances can use; otherwise with the least."""
        if not snapshot.services:
            return 0
        usable = sum(s.instances for s in snapshot.services) if self.tuning.lend else 1
        return max(1, least, min(len(snapshot.device.units), usable))

    def _fit(self, snapshot: Snapshot, cores: int) -> Layout:
        """The best layout with this many cores: fewest misses, then smallest partitions."""
        if cores == 0:
            return Layout(0, 1)
        verdicts = [judge(snapshot, c, 0.0) for c in candidates(snapshot.device, cores)]
        return min(verdicts, key=lambda v: (v.overload, v.layout.size)).layout

    def _wish(self, snapshot: Snapshot, current: Layout, least: int) -> tuple[Layout, str]:
        """One step up if an objective is (or will be) missed, one down if it would still hold."""
        units = len(snapshot.device.units)
        horizon_s = self.tuning.horizon / S
        here = judge(snapshot, current, horizon_s)
        if here.misses or current.cores < least:
            options = [
                judge(snapshot, layout, horizon_s)
                for cores in (current.cores, min(units, current.cores + 1))
                for layout in candidates(snapshot.device, cores)
            ]
            best = min(options, key=lambda v: (round(v.overload, 3), v.layout.cores, v.layout.size))
            if best.overload < here.overload - 0.01:
                return best.layout, _first(here)
            return current, ""
        if current.cores > max(1, least):
            peak = self._at_peak(snapshot)
            down = self._fit(peak, current.cores - 1)
            verdict = judge(peak, down, horizon_s)
            if not verdict.misses and max(verdict.rho) <= 0.6:
                return down, f"objectives hold at utilization {max(verdict.rho):.2f}"
        return current, ""

    def _pays(self, snapshot: Snapshot, current: Layout, wish: Layout) -> bool:
        """Whether unit-time gained (by services or by jobs) exceeds the cost of the change."""
        gained = max(1, abs(wish.cores - current.cores)) * self.tuning.horizon
        cost = snapshot.device.repartition_ns + snapshot.device.revoke_ns
        return gained > cost * len(snapshot.device.units)

    def _make(self, snapshot: Snapshot, layout: Layout, reasons: tuple[str, ...]) -> Plan:
        device, tuning = snapshot.device, self.tuning
        verdict = judge(snapshot, layout, 0.0) if layout.cores else Verdict(layout, {}, [], {})
        service_cores = partition_cores(device, layout)
        mine = [make_partition(device, cores) for cores in service_cores]
        free = [make_partition(device, (core,)) for core in device.units[layout.cores :]]
        shares = divide(len(free), snapshot.jobs, len(device.units))
        jobs: dict[str, tuple[str, ...]] = {}
        if len(snapshot.jobs) <= len(free):
            rest = [p.id for p in free]
            for job, units in shares.items():
                jobs[job], rest = tuple(rest[:units]), rest[units:]
        infeasible = [f"{name}: {why}" for name, why in sorted(verdict.misses.items())]
        return Plan(
            version=self.state.version,
            partitions=(*mine, *free),
            services={s: tuple(mine[i].id for i in where) for s, where in verdict.services.items()},
            jobs=jobs,
            lendable=tuple(p.id for p in mine) if tuning.lend else (),
            slice_min=tuning.slice_min,
            slice_max=tuning.slice_max,
            linger_max=tuning.linger_max,
            reasons=(*reasons, *infeasible),
        )


def _members(snapshot: Snapshot) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (
        tuple(sorted(f"{s.name} x{s.instances}" for s in snapshot.services)),
        tuple(sorted(j.id for j in snapshot.jobs)),
    )


def _membership(
    old: tuple[tuple[str, ...], tuple[str, ...]], new: tuple[tuple[str, ...], tuple[str, ...]]
) -> list[str]:
    reasons: list[str] = []
    for kind, before, after in zip(("service", "job"), old, new, strict=True):
        reasons += [f"{kind} {name} came" for name in after if name not in before]
        reasons += [f"{kind} {name} went" for name in before if name not in after]
    return reasons


def _describe(layout: Layout) -> str:
    if layout.cores == 0:
        return "no cores for services"
    count = layout.cores // layout.size
    return f"{count} service partition{'s' * (count > 1)} of {layout.size} core" + "s" * (
        layout.size > 1
    )


def _first(verdict: Verdict) -> str:
    for name, why in sorted(verdict.misses.items()):
        return f"{name}: {why}"
    return "a guaranteed share asks for more"
