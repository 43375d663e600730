"""The planner's bounds: which partitions exist, who may use them, and how finely."""

from __future__ import annotations

import msgspec

from cotenant.domain.device import Partition
from cotenant.domain.units import MS


class Plan(msgspec.Struct, frozen=True):
    """Bounds within which the dispatcher chooses.

    ``services`` maps a service to the partitions it may execute on (several services may
    share one). ``jobs`` maps a job to partitions that are its own (several jobs may rotate on
    one). A service partition in ``lendable`` is lent to jobs while its services are idle.
    ``targets``: jobs take turns at what is lent so that what they hold in all comes to be in these
    proportions; those that are not named count by their weight. ``slice_min``/``slice_max`` bound
    a grant (ns). ``unplaced``: services that no device can carry, and why. ``variants``: which
    serves, by service and kind of device; the original where none is named; ``ready``: those that
    are loaded too, to take over at once. ``reasons`` says why, a line a change.
    """

    version: int
    partitions: tuple[Partition, ...]
    services: dict[str, tuple[str, ...]]
    jobs: dict[str, tuple[str, ...]]
    lendable: tuple[str, ...]
    targets: dict[str, float] = {}
    slice_min: int = 1 * MS
    slice_max: int = 200 * MS
    unplaced: dict[str, str] = {}
    variants: dict[str, dict[str, str]] = {}
    ready: dict[str, dict[str, str]] = {}
    reasons: tuple[str, ...] = ()


EMPTY_PLAN = Plan(version=0, partitions=(), services={}, jobs={}, lendable=())


def adopted(old: Plan, new: Plan, device: str) -> Plan:
    """The plan in force once one device has the layout of ``new``, the others still that of
    ``old``. What concerns the whole box is as ``new`` has it."""
    of = {p.id: p.device for p in (*old.partitions, *new.partitions)}
    order = {d: i for i, d in enumerate(dict.fromkeys(p.device for p in new.partitions))}
    come = {p.id for p in new.partitions if p.device == device}
    kept = {p.id for p in old.partitions if p.device != device}

    def rank(partition: str) -> int:
        return order.get(of[partition], len(order))

    def both(before: tuple[str, ...], after: tuple[str, ...]) -> tuple[str, ...]:
        names = [*(p for p in after if p in come), *(p for p in before if p in kept)]
        return tuple(sorted(names, key=rank))

    def owners(
        before: dict[str, tuple[str, ...]], after: dict[str, tuple[str, ...]]
    ) -> dict[str, tuple[str, ...]]:
        found = {name: both(before.get(name, ()), ps) for name, ps in after.items()}
        left = {name: both(ps, ()) for name, ps in before.items() if name not in after}
        return found | {name: ps for name, ps in left.items() if ps}

    by_id = {p.id: p for p in old.partitions if p.id in kept}
    by_id |= {p.id: p for p in new.partitions if p.id in come}
    return msgspec.structs.replace(
        new,
        partitions=tuple(
            by_id[name]
            for name in both(
                tuple(p.id for p in old.partitions), tuple(p.id for p in new.partitions)
            )
        ),
        services=owners(old.services, new.services),
        jobs=owners(old.jobs, new.jobs),
        lendable=both(old.lendable, new.lendable),
    )
