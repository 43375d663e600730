"""Relayout: from the layout in force to that of a new plan, once every partition that changes is
idle. Partitions that stay as they are serve on meanwhile."""

from __future__ import annotations

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.plan import Plan
from cotenant.policy import lending
from cotenant.policy.desk import Desk
from cotenant.policy.estimate import Costs
from cotenant.policy.holds import Holds
from cotenant.policy.state import Hold, PartitionState
from cotenant.policy.turns import Turns


class Relayout:
    """See the module's text."""

    def __init__(self, desk: Desk, holds: Holds, turns: Turns) -> None:
        self._desk = desk
        self._holds = holds
        self._turns = turns
        self._state = desk.state

    def planned(self, event: e.Planned) -> None:
        """Begin to make room for a new layout; a plan that comes in the middle waits."""
        state, plan = self._state, event.plan
        if state.moving:
            state.successor = plan
            return
        new = {p.id: p.units for p in plan.partitions}
        state.pending = plan
        for partition in state.partitions.values():
            spared, partition.retiring = (
                partition.retiring,
                new.get(partition.id) != partition.units,
            )
            if partition.retiring:
                self._holds.revoke(partition)
            elif spared:
                self._turns.run(partition)
        self.settle()

    def settle(self) -> None:
        """Once every partition that changes is idle, order (or make) the new layout."""
        state = self._state
        if state.pending is None or state.moving:
            return
        retiring = [p for p in state.partitions.values() if p.retiring]
        if any(p.batch or p.hold != Hold.NONE for p in retiring):
            return
        known = {p.id for p in state.partitions.values() if not p.retiring}
        if retiring or any(p.id not in known for p in state.pending.partitions):
            state.moving = True
            self._desk.out.append(a.Repartition(self._desk.cause, state.pending))
        else:
            self._adopt(state.pending)

    def repartitioned(self, event: e.Repartitioned) -> None:
        """The device has the new layout."""
        state = self._state
        if not state.moving or state.pending is None or state.pending.version != event.version:
            return
        state.moving = False
        self._adopt(state.pending)
        self._next_plan()

    def abandon(self) -> None:
        """The device refused: the old layout stays."""
        state = self._state
        state.pending, state.moving = None, False
        for partition in state.partitions.values():
            partition.retiring = False
            self._turns.run(partition)
        self._next_plan()

    def _next_plan(self) -> None:
        successor, self._state.successor = self._state.successor, None
        if successor is not None:
            self.planned(e.Planned(successor))

    def _adopt(self, plan: Plan) -> None:
        state = self._state
        state.pending, state.plan = None, plan
        lending.aim(state)
        old, state.partitions = state.partitions, {}
        for spec in plan.partitions:
            kept = old.get(spec.id)
            if kept is None or kept.retiring:
                kept = PartitionState(
                    id=spec.id,
                    device=spec.device,
                    kind=self._desk.specs[spec.device].kind,
                    units=spec.units,
                    compute=spec.compute,
                    slice_ns=plan.slice_min,
                    idle_since=state.now,
                )
            kept.slice_ns = min(kept.slice_ns, plan.slice_max)
            state.partitions[spec.id] = kept
        self.link()
        for partition in state.partitions.values():
            if (partition.owners and partition.job and partition.job not in partition.owners) or (
                partition.services and not partition.lendable
            ):
                self._holds.revoke(partition)
            self._turns.run(partition)

    def link(self) -> None:
        """Connect services and jobs with the partitions that the plan gives them."""
        state, plan = self._state, self._state.plan
        for partition in state.partitions.values():
            partition.services = [
                s for s, ps in plan.services.items() if partition.id in ps and s in state.services
            ]
            partition.owners = [j for j, ps in plan.jobs.items() if partition.id in ps]
            partition.lendable = partition.id in plan.lendable
            partition.waiting = {s: None for s in partition.services if state.services[s].queued}
        for service in state.services.values():
            mine = plan.services.get(service.name, ())
            service.partitions = [p for p in mine if p in state.partitions]
            kinds = [state.partitions[p].kind for p in service.partitions]
            service.home = kinds[0] if kinds else service.home
            for kind in kinds:
                service.exec.setdefault(kind, Costs())
