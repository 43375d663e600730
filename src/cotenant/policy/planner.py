"""The planner: decides in space. ``plan(snapshot)`` returns the bounds for the dispatcher.

Laws (docs/design.md says why):

1. Feasible first: partitions are shapes the device can form, no two overlap, and a model goes
   only where it fits by memory, operators and accuracy.
2. Devices that only serve carry what fits there; the rest goes to those that also train.
3. Services start with all that their instances can use, if it can be lent, and always keep what
   their objectives are predicted to need at the recent peak rate. They give up the rest where
   jobs gain by having it for themselves; where jobs cannot move, the layout is taken that leaves
   them most. What nobody serves on is divided among jobs by utility, and idle service
   partitions are lent, unless pauses were seen to cost jobs more than that is worth.
4. A prediction that measurement contradicts is corrected: while a service misses its objective
   more often than allowed, its load counts for more than its rate says.
5. A layout changes only when the wish for it has held for a while, one step at a time, and
   when what is gained over the horizon exceeds the cost of changing. A service or job that
   comes or goes is placed at once.
6. Of several variants of a model the most accurate serves that holds the objective. While none of
   the layouts of a device would do, a service takes one step down, within its floor, and up again
   once the better one would hold with something to spare.
7. Every change has a reason.
"""

from __future__ import annotations

import copy
from collections import Counter

import msgspec

from cotenant.domain.device import DeviceSpec, Partition
from cotenant.domain.plan import Plan
from cotenant.domain.snapshot import JobFacts, ServiceFacts, Snapshot
from cotenant.domain.units import S
from cotenant.policy.choosing import Choosing
from cotenant.policy.demand import Demand, scaled
from cotenant.policy.judging import judge
from cotenant.policy.leftover import share_out
from cotenant.policy.placing import place
from cotenant.policy.planstate import DeviceMemory, Members, PlannerState, Tuning
from cotenant.policy.saturation import loads
from cotenant.policy.views import Layout, Placing, Verdict, View
from cotenant.policy.wishes import Wishes


class Planner:
    """Owns a ``PlannerState``; pure like the dispatcher."""

    def __init__(self, tuning: Tuning | None = None, state: PlannerState | None = None) -> None:
        self.tuning = tuning or Tuning()
        self.state = state or PlannerState()
        self.loads: dict[str, float] = {}
        """The load of each service at the last look (``cotenant.policy.saturation``)."""
        self._demand = Demand(self.tuning, self.state)
        self._wishes = self._make_wishes()
        self._choosing = Choosing(self.tuning, self.state)

    def plan(self, snapshot: Snapshot) -> Plan | None:
        """A new plan, or None to keep the present one."""
        state = self.state
        facts, reasons_of_variants = self._choosing.see(snapshot, self._demand.see(snapshot))
        boosts = {name: pressure.boost for name, pressure in state.pressure.items()}
        self.loads = loads(snapshot, state.parts, boosts)
        self._forget_refused(snapshot)
        members = _members(snapshot)
        if members != state.members:
            for memory in state.devices.values():
                memory.lends = True
                memory.lending_since = snapshot.now
        placing, reasons = self._next_placing(snapshot, facts, members)
        before = {d: m.layout for d, m in state.devices.items()}
        views = [self._demand.with_targets(v) for v in self._views(snapshot, facts, placing)]
        for view in views:
            new = DeviceMemory(lending_since=snapshot.now)
            memory = state.devices.setdefault(view.device.id, new)
            if view.device.id in snapshot.changing:
                continue  # one step at a time
            memory.layout, why = self._wishes.next_layout(view, memory)
            reasons += why
            if memory.layout == before.get(view.device.id) and members == state.members:
                reasons += self._wishes.rearrange(view, memory)
        reasons += reasons_of_variants + self._choosing.step(views)
        if not reasons:
            reasons = self._demand.try_out(views)
        if members != state.members:
            reasons = [*_membership(state.members, members), *reasons]
        if not reasons:
            return None
        state.members = members
        state.version += 1
        return self._make(views, reasons)

    def preview(self, snapshot: Snapshot) -> Plan | None:
        """What ``plan`` would return. Nothing is remembered of it."""
        return self.copy().plan(snapshot)

    def copy(self) -> Planner:
        """Another that remembers the same."""
        return Planner(self.tuning, copy.deepcopy(self.state))

    def prospects(self, snapshot: Snapshot) -> list[tuple[View, Verdict]]:
        """How services would do at their recent peaks on the layouts that were planned last."""
        found = []
        for view in self._views(snapshot, snapshot.services, Placing(self.state.parts)):
            memory = self.state.devices.get(view.device.id)
            if memory is not None and memory.layout is not None:
                peak = self._demand.at_peak(view)
                found.append((peak, judge(peak, memory.layout, 0.0)))
        return found

    def _forget_refused(self, snapshot: Snapshot) -> None:
        """Begin anew where a device has not the layout that it was to have."""
        for name, memory in self.state.devices.items():
            if memory.layout is None or name in snapshot.changing:
                continue
            there = {p for p in snapshot.plan.partitions if p.device == name}
            if there != {*memory.layout.mine, *memory.layout.free}:
                memory.layout = memory.wish = None

    def _make_wishes(self) -> Wishes:
        return Wishes(self.tuning, self.state, self._demand)

    # --- which devices ----------------------------------------------------------------------

    def _next_placing(
        self, snapshot: Snapshot, facts: tuple[ServiceFacts, ...], members: Members
    ) -> tuple[Placing, list[str]]:
        """Where services are to be. They go elsewhere at once when members change, soon where
        serving devices have too much or the others uneven loads, late (and only if it would hold
        at peak rates) back to serving devices. While some wait to go back, uneven loads wait."""
        state, tuning = self.state, self.tuning
        devices, closed = self._for_services(snapshot)
        horizon_s = tuning.horizon / S
        fit = {s.name: set(state.parts.get(s.name, ())) - set(s.unfit) for s in facts}
        asked = {
            s.name: (s.offer, tuple(sorted(s.unfit))) for s in facts if s.offer and not fit[s.name]
        }
        again = [name for name, offer in asked.items() if state.asked.get(name) != offer]
        state.asked = asked
        changed = members[0] != state.members[0] or closed != state.closed or not state.version
        state.closed = closed
        came = changed or bool(again)
        improve = came and tuning.move
        wish = place(facts, devices, state.parts, horizon_s, state.usual, improve)
        present = Placing(state.parts).homes()
        if came:
            reasons = list(wish.reasons)
            if not changed:
                reasons += [f"{name} is to be loaded" for name in again]
        else:
            if wish.homes() != present:
                if not self._patient(snapshot, facts, wish):
                    return Placing(state.parts), []
            elif self._uneven_long(snapshot.now, wish.uneven):
                wish = place(facts, devices, state.parts, horizon_s, state.usual)
            homes = wish.homes()
            moved = [n for n in homes if homes[n] != present[n]]
            reasons = [f"{n}: {_names(present[n])} -> {_names(homes[n])}" for n in moved]
            reasons += wish.reasons if moved else ()
        state.elsewhere_since = 0
        state.parts, state.nowhere = wish.parts, wish.nowhere
        return wish, reasons

    def _patient(self, snapshot: Snapshot, facts: tuple[ServiceFacts, ...], wish: Placing) -> bool:
        """Whether services have been to go elsewhere for long enough."""
        state, tuning = self.state, self.tuning
        devices, _ = self._for_services(snapshot)
        homes, present = wish.homes(), Placing(state.parts).homes()
        state.elsewhere_since = state.elsewhere_since or snapshot.now
        patience = tuning.grow_after
        trains = {d.id for d in devices if d.trains}
        if not any((now - present[name]) & trains for name, now in homes.items()):
            peaks = [msgspec.structs.replace(s, rate=state.peaks[s.name]) for s in facts]
            horizon_s = tuning.horizon / S
            at_peak = place(peaks, devices, state.parts, horizon_s, state.usual, improve=False)
            if at_peak.homes() != homes:
                return False
            patience = tuning.shrink_after
        return snapshot.now - state.elsewhere_since >= patience

    def _uneven_long(self, now: int, uneven: bool) -> bool:
        """Whether devices that train have had uneven loads for long enough, and when that was
        looked into before is long ago."""
        state, tuning = self.state, self.tuning
        if not (uneven and tuning.move):
            if state.uneven_since <= now:
                state.uneven_since = 0
            return False
        state.uneven_since = state.uneven_since or now
        if now - state.uneven_since < tuning.grow_after:
            return False
        state.uneven_since = now + tuning.shrink_after
        return True

    def _devices(self, snapshot: Snapshot) -> list[DeviceSpec]:
        """Those to be used, serving devices first, with the memory that jobs leave of them."""
        alike = Counter(d.kind for d in snapshot.devices if d.trains)
        found = []
        for device in snapshot.devices:
            if not (device.trains or self.tuning.offload):
                continue
            theirs = sum(
                j.memory if j.device else j.memory // max(1, alike[device.kind])
                for j in snapshot.jobs
                if j.kind == device.kind and j.device in ("", device.id)
            )
            if theirs and device.memory and not device.mig:
                left = max(1, device.memory - theirs)
                found.append(msgspec.structs.replace(device, memory=left))
            else:
                found.append(device)
        return sorted(found, key=lambda d: d.trains)

    def _for_services(self, snapshot: Snapshot) -> tuple[list[DeviceSpec], tuple[str, ...]]:
        """The devices that services may be placed on, and those that are closed to them: of a
        device that only serves a reservation has all, and nothing is lent there."""
        taken = {j.device for j in snapshot.jobs if j.own}
        closed = tuple(d.id for d in snapshot.devices if d.id in taken and not d.trains)
        return [d for d in self._devices(snapshot) if d.id not in closed], closed

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
                    scaled(s, parts[s.name][device.id])
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
            return {d.id: tuple(j for j in snapshot.jobs if _able(j, d)) for d in devices}
        there: dict[str, list[JobFacts]] = {d.id: [] for d in devices}
        owner = {p.id: p.device for p in snapshot.plan.partitions}
        homeless: list[JobFacts] = []
        for job in snapshot.jobs:
            home = owner.get(self.state.bound.get(job.id, ""), "")
            there.get(home, homeless).append(job)
        for job in homeless:
            able = [d.id for d in devices if _able(job, d)]
            if able:
                there[min(able, key=lambda d: (len(there[d]), d))].append(job)
        return {device: tuple(jobs) for device, jobs in there.items()}

    # --- the plan ---------------------------------------------------------------------------

    def _make(self, views: list[View], reasons: list[str]) -> Plan:
        tuning, state = self.tuning, self.state
        partitions: list[Partition] = []
        services: dict[str, tuple[str, ...]] = {}
        jobs: dict[str, tuple[str, ...]] = {}
        targets: dict[str, float] = {}
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
            if tuning.lend and state.devices[view.device.id].lends:
                lendable += [p.id for p in layout.mine]
            for job, mine in self._owned(view, layout, verdict, bound).items():
                jobs[job] = jobs.get(job, ()) + mine
            for job, units in state.devices[view.device.id].targets.items():
                targets[job] = targets.get(job, 0.0) + units
        state.bound = bound
        return Plan(
            version=state.version,
            partitions=tuple(partitions),
            services=services,
            jobs=jobs,
            lendable=tuple(lendable),
            targets=targets,
            slice_min=tuning.slice_min,
            slice_max=tuning.slice_max,
            unplaced=dict(state.nowhere),
            variants=self._choosing.chosen(),
            ready=self.state.ready,
            reasons=(*reasons, *infeasible),
        )

    def _owned(
        self, view: View, layout: Layout, verdict: Verdict, bound: dict[str, str]
    ) -> dict[str, tuple[str, ...]]:
        """The partitions of each job; those of jobs that cannot move are noted in ``bound``."""
        if view.device.pins_jobs:
            _, places = share_out(view, verdict, self.tuning.lend, self.state.bound)
            bound.update(places)
            return {job: (where,) for job, where in places.items()}
        rest = [p.id for p in layout.free]
        owned: dict[str, tuple[str, ...]] = {}
        shares = self._demand.divide(view, layout)
        memory = self.state.devices[view.device.id]
        memory.shares, memory.targets = shares, view.targets if shares else {}
        for job, units in shares.items():
            owned[job], rest = tuple(rest[:units]), rest[units:]
        return owned


def _able(job: JobFacts, device: DeviceSpec) -> bool:
    """Whether a job can be on a device."""
    return job.kind in ("", device.kind) and job.device in ("", device.id)


def _members(snapshot: Snapshot) -> Members:
    return (
        tuple(sorted(f"{s.name} x{s.instances}" for s in snapshot.services)),
        tuple(sorted(j.id for j in snapshot.jobs)),
    )


def _membership(old: Members, new: Members) -> list[str]:
    reasons: list[str] = []
    for kind, before, after in zip(("service", "job"), old, new, strict=True):
        reasons += [f"{kind} {name} came" for name in after if name not in before]
        reasons += [f"{kind} {name} went" for name in before if name not in after]
    return reasons


def _names(devices: frozenset[str]) -> str:
    return " and ".join(sorted(devices)) or "nowhere"
