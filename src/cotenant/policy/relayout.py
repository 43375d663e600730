"""Relayout: from a device's layout in force to that of a new plan.

Each device changes by itself, once every partition that changes there is idle and what leaves the
device is loaded where it goes; a slow one holds back no other. Partitions that stay as they are
serve on meanwhile. ``DispatcherState.plan`` is always what is in force: of each device what it has,
of the box what was planned last.
"""

from __future__ import annotations

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import Partition
from cotenant.domain.plan import Plan, adopted
from cotenant.policy import lending
from cotenant.policy.desk import Desk
from cotenant.policy.holds import Holds
from cotenant.policy.residency import Residency
from cotenant.policy.roster import Roster
from cotenant.policy.state import Change, Hold, PartitionState
from cotenant.policy.tenancy import Tenancy
from cotenant.policy.turns import Turns


class Relayout:
    """See the module's text."""

    def __init__(
        self,
        desk: Desk,
        holds: Holds,
        tenancy: Tenancy,
        turns: Turns,
        roster: Roster,
        residency: Residency,
    ) -> None:
        self._desk = desk
        self._holds = holds
        self._tenancy = tenancy
        self._turns = turns
        self._roster = roster
        self._residency = residency
        self._state = desk.state

    def planned(self, event: e.Planned) -> None:
        """Begin to make room for a new layout on each device; where one is being changed, the plan
        waits for that."""
        for device in self._desk.devices:
            self._begin(device.id, event.plan)
        self.settle()

    def _begin(self, device: str, plan: Plan) -> None:
        change = self._state.changes.get(device)
        if change is not None and change.moving:
            change.successor = plan
            return
        change = self._state.changes[device] = Change(plan)
        vacated = [p for p in self._on(device) if p.retiring]
        for partition in vacated:
            partition.retiring = False
        self._vacate(device, change)
        for partition in vacated:
            self._turns.run(partition)

    def _vacate(self, device: str, change: Change) -> None:
        """Make room on a device, unless what leaves it is not loaded yet where it goes: until then
        it serves here."""
        if self._residency.arriving(device, change.plan):
            return
        change.begun = True
        self._tenancy.move(device, change.plan)
        new = {p.id: p.units for p in _layout(change.plan, device)}
        for partition in self._on(device):
            partition.retiring = new.get(partition.id) != partition.units
            if partition.retiring:
                self._turns.end_lease(partition)
                self._holds.revoke(partition)
        self._residency.vacate(device)

    def settle(self) -> None:
        """Where every partition that changes is idle, order (or make) the new layout."""
        for device, change in list(self._state.changes.items()):
            if not change.moving:
                self._settle(device, change)

    def _settle(self, device: str, change: Change) -> None:
        if not change.begun:
            self._vacate(device, change)
        if not change.begun:
            return
        there = self._on(device)
        retiring = [p for p in there if p.retiring]
        if any(p.batch or p.hold != Hold.NONE or self._tenancy.bound(p) for p in retiring):
            return
        if any(self._residency.bound(p) for p in retiring):
            return
        known = {p.id for p in there if not p.retiring}
        layout = _layout(change.plan, device)
        if retiring or any(p.id not in known for p in layout):
            change.moving = True
            version = change.plan.version
            self._desk.out.append(a.Repartition(self._desk.cause, device, version, layout))
        else:
            self._adopt(device, change.plan)

    def repartitioned(self, event: e.Repartitioned) -> None:
        """A device has its new layout."""
        change = self._state.changes.get(event.device)
        if change is None or not change.moving or change.plan.version != event.version:
            return
        self._adopt(event.device, change.plan)
        self._follow(event.device, change)

    def refused(self, device: str) -> None:
        """A device could not be changed: its old layout stays."""
        change = self._state.changes.pop(device, None)
        if change is None:
            return
        for partition in self._on(device):
            partition.retiring = False
            self._turns.run(partition)
        if change.successor is None:
            self._residency.kept(device)
        self._follow(device, change)

    def _follow(self, device: str, change: Change) -> None:
        if change.successor is not None:
            self._begin(device, change.successor)
            self.settle()

    def _on(self, device: str) -> list[PartitionState]:
        return [p for p in self._state.partitions.values() if p.device == device]

    def _adopt(self, device: str, plan: Plan) -> None:
        state = self._state
        state.changes.pop(device, None)
        state.plan = adopted(state.plan, plan, device)
        lending.aim(state)
        old, state.partitions = state.partitions, {}
        for spec in state.plan.partitions:
            kept = old.get(spec.id)
            if kept is None or (kept.retiring and spec.device == device):
                kept = PartitionState(
                    id=spec.id,
                    device=spec.device,
                    kind=self._desk.specs[spec.device].kind,
                    units=spec.units,
                    compute=spec.compute,
                    slice_ns=plan.slice_min,
                    binds=self._desk.specs[spec.device].pins_workers,
                )
            kept.slice_ns = min(kept.slice_ns, plan.slice_max)
            state.partitions[spec.id] = kept
        self._roster.link()
        self._residency.adopted(device)
        self._tenancy.part()
        self._tenancy.settle()
        for partition in state.partitions.values():
            if partition.device == device and (
                (partition.owners and partition.job and partition.job not in partition.owners)
                or (partition.services and not partition.lendable)
            ):
                self._holds.revoke(partition)
            self._turns.run(partition)  # others too: an instance that now leaves serves until then


def _layout(plan: Plan, device: str) -> tuple[Partition, ...]:
    return tuple(p for p in plan.partitions if p.device == device)
