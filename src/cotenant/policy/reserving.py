"""Whether there is room for a reservation: asked before anything is promised to anybody.

There is where, with it, the planner finds a layout under which each service that holds its
objective at its recent peak still does, and guarantees together are no more than there is. Who is
to be kept from the device for less than ``lending.DEBT_WINDOW`` needs units of its own: a
guaranteed share of time is paid within that, and not sooner.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from cotenant.domain.device import DeviceSpec
from cotenant.domain.reservation import Reservation
from cotenant.domain.snapshot import JobFacts, Snapshot
from cotenant.domain.units import S
from cotenant.domain.workload import share_on
from cotenant.policy.lending import DEBT_WINDOW
from cotenant.policy.planner import Planner
from cotenant.policy.reserved import leaves
from cotenant.policy.views import Verdict, View


class Room(msgspec.Struct, frozen=True):
    """``refusal`` says why there is none ("" if there is), ``would`` what the planner would do."""

    refusal: str = ""
    would: tuple[str, ...] = ()


def find_room(planner: Planner, snapshot: Snapshot, wanted: Reservation) -> Room:
    """Whether there is room for a reservation on a device of the snapshot. Nothing is remembered
    of it. Memory is not looked at: the ledgers know of that."""
    device = next(d for d in snapshot.devices if d.id == wanted.device)
    if why := _impossible(device, wanted) or _promised(device, snapshot, wanted):
        return Room(why)
    job = facts_of(wanted.id, wanted, device)
    settled = msgspec.structs.replace(snapshot, changing=())
    now, then = planner.copy(), planner.copy()
    now.plan(settled)
    after = msgspec.structs.replace(settled, jobs=(*snapshot.jobs, job))
    plan = then.plan(after)
    before, prospects = now.prospects(settled), then.prospects(after)
    why = _lost(before, prospects, then.state.nowhere) or _crowded(prospects, device)
    return Room(why) if why else Room(would=plan.reasons if plan is not None else ())


def facts_of(job: str, wanted: Reservation, device: DeviceSpec) -> JobFacts:
    """The job that stands for a reservation, before anything is seen of it."""
    return JobFacts(
        id=job,
        weight=1.0,
        guaranteed=share_of(wanted, device),
        limit=wanted.limit,
        rate=0.0,
        held_ns=0,
        kind=device.kind,
        memory=wanted.memory,
        device=device.id,
        own=wanted.units,
    )


def share_of(wanted: Reservation, device: DeviceSpec) -> float:
    """The part (0..1) of a device's compute that is guaranteed with a reservation."""
    return wanted.units / device.compute if wanted.units else wanted.share


def _impossible(device: DeviceSpec, wanted: Reservation) -> str:
    if wanted.units and not device.trains and wanted.units < device.compute:
        return (
            f"{device.id} only serves: it is reserved as a whole ({device.compute} units), or not"
        )
    if not wanted.units and not device.trains:
        return f"{device.id} only serves: its time cannot be shared out; reserve all its units"
    if not wanted.units and 0 < wanted.within < DEBT_WINDOW:
        return (
            f"a share of time is given within {DEBT_WINDOW / S:g} s, not within "
            f"{wanted.within / S:g} s; reserve units, which are there all the time"
        )
    return ""


def _promised(device: DeviceSpec, snapshot: Snapshot, wanted: Reservation) -> str:
    """Why guarantees together would be more than there is; "" if they would not."""
    if not device.trains:
        held = [j.id for j in snapshot.jobs if j.device == device.id]
        return f"{device.id} is reserved by {held[0]}" if held else ""
    services = sum(share_on(s.guaranteed, device.kind) for s in snapshot.services)
    mine = [j for j in snapshot.jobs if j.kind == device.kind and j.device in ("", device.id)]
    left = 1.0 - services - sum(max(j.guaranteed, j.own / device.compute) for j in mine)
    if share_of(wanted, device) > left + 1e-9:
        return (
            f"{share_of(wanted, device):.0%} of {device.id} is asked for, and {max(0.0, left):.0%} "
            "is not promised to others"
        )
    return ""


def _lost(
    before: list[tuple[View, Verdict]],
    after: list[tuple[View, Verdict]],
    nowhere: Mapping[str, str],
) -> str:
    """Which service would not be served as it is, and why; "" if all would."""
    carried = {s.name for view, _ in before for s in view.services}
    for name, why in sorted(nowhere.items()):
        if name in carried:
            return f"service {name} would have no place: {why}"
    missing = {name for _, verdict in before for name in verdict.misses}
    for view, verdict in after:
        if view.device.trains and not leaves(view, verdict.layout):
            return f"no layout of {view.device.id} leaves so much beside what is there"
        for name, why in sorted(verdict.misses.items()):
            if name not in missing:
                return f"service {name} would not hold its objective at its peak: {why}"
    return ""


def _crowded(after: list[tuple[View, Verdict]], device: DeviceSpec) -> str:
    """Why what is guaranteed would not be left at the services' peak; "" if it would."""
    for view, verdict in after:
        if view.device.id != device.id or not device.trains:
            continue
        mine = zip(verdict.busy, verdict.layout.mine, strict=True)
        busy = sum(min(1.0, part) * partition.compute for part, partition in mine)
        owed = sum(max(j.guaranteed * device.compute, float(j.own)) for j in view.jobs)
        if busy + owed > device.compute + 1e-9:
            return (
                f"services take {busy:.1f} of the {device.compute} units of {device.id} at their "
                f"peak, and {owed:.1f} would be guaranteed beside them"
            )
    return ""
