"""What ``cotenant plan`` shows: the plan in force and, as a dry run, the one that would be made now
and what that would take. Nothing changes by it: the planner that is asked is a copy."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from cotenant.domain.device import DeviceSpec, LayoutStep, Partition
from cotenant.domain.errors import DeviceError
from cotenant.domain.plan import Plan
from cotenant.domain.units import S
from cotenant.policy.state import DispatcherState

if TYPE_CHECKING:
    from cotenant.runtime.node import Node


def plan_view(node: Node, dry_run: bool) -> dict[str, Any]:
    """JSON-ready. ``next`` is None where the plan in force stays."""
    state = node.core.dispatcher.state
    found: dict[str, Any] = {
        "plan": {**_plan(state.plan), "age_s": time.monotonic() - node.planned_at},
        "changing": sorted(state.changes),
    }
    if dry_run:
        then = node.planner.preview(node.snapshot())
        found["next"] = None if then is None else _plan(then)
        found["devices"] = [_device(node, spec, then) for spec in node.specs]
    return found


def _plan(plan: Plan) -> dict[str, Any]:
    return {
        "version": plan.version,
        "reasons": list(plan.reasons),
        "unplaced": dict(plan.unplaced),
        "partitions": [_partition(plan, partition) for partition in plan.partitions],
    }


def _partition(plan: Plan, partition: Partition) -> dict[str, Any]:
    return {
        "id": partition.id,
        "device": partition.device,
        "units": list(partition.units),
        "compute": partition.compute,
        "memory": partition.memory,
        "services": [name for name, there in plan.services.items() if partition.id in there],
        "jobs": [job for job, there in plan.jobs.items() if partition.id in there],
        "lent": partition.id in plan.lendable,
    }


def _device(node: Node, spec: DeviceSpec, then: Plan | None) -> dict[str, Any]:
    """From what a device has to what it is to have: by the plan that would be made, else by the one
    that it is on its way to."""
    state, device = node.core.dispatcher.state, spec.id
    change = state.changes.get(device)
    wanted = then or (change.plan if change is not None else state.plan)
    before, after = (
        {p.id: p for p in plan.partitions if p.device == device} for plan in (state.plan, wanted)
    )
    ahead: tuple[LayoutStep, ...] = ()
    problem = ""
    try:
        ahead = node.fleet.preview(device, tuple(after.values()))
        if spec.pins_workers:
            ahead += loads(state, device, wanted)
    except DeviceError as error:
        problem = str(error)
    steps = [{"what": s.what, "seconds": s.ns / S, "measured": s.measured} for s in ahead]
    return {
        "id": device,
        "goes": [name for name in before if after.get(name) != before[name]],
        "comes": [name for name in after if before.get(name) != after[name]],
        "steps": steps,
        "seconds": sum(step["seconds"] for step in steps),
        "problem": problem,
    }


def loads(state: DispatcherState, device: str, then: Plan) -> tuple[LayoutStep, ...]:
    """Of a device that binds models: loading those that come to other partitions, beside each
    other, as long as the slowest took last."""
    here = {p.id for p in then.partitions if p.device == device}
    before, services = state.plan.services, state.services
    comes = [n for n in services if here & {*then.services.get(n, ())} - {*before.get(n, ())}]
    if not comes:
        return ()
    took = [services[name].load_ns for name in comes]
    return (LayoutStep(f"load {', '.join(sorted(comes))}", max(took), min(took) > 0),)
