"""Layouts: how a device's space can be divided between services and jobs, and how to step from
one layout to the next.

Three geometries. *Units*: any units together (cores, multiprocessors); a layout is ``n`` units
for services in partitions of equal size, the others are single-unit partitions for jobs. Larger
partitions make one execution faster, more partitions run more of them at once. *MIG*: instances
where the GPU's placement tables allow them (``weft.domain.mig``); services have some, jobs the
rest of a layout to which nothing can be added. *Whole*: a device that jobs cannot use is one
partition.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import combinations

import msgspec

from weft.domain.device import DeviceSpec, Partition
from weft.domain.mig import Placement, Placements, Table, table

MIB = 2**20


class Layout(msgspec.Struct, frozen=True):
    """``mine``: the partitions for services. ``free``: what is left, for jobs."""

    mine: tuple[Partition, ...] = ()
    free: tuple[Partition, ...] = ()

    @property
    def compute(self) -> int:
        """Compute units of the services' partitions."""
        return sum(p.compute for p in self.mine)


def make_partition(device: DeviceSpec, units: tuple[int, ...]) -> Partition:
    """The partition of these units; its id says which they are."""
    first, last = units[0], units[-1]
    span = f"{first}" if first == last else f"{first}-{last}"
    if units != tuple(range(first, last + 1)):
        span = "+".join(map(str, units))
    return Partition(f"{device.id}:{span}", device.id, units)


def without_services(device: DeviceSpec) -> Layout:
    """All of it for jobs."""
    if device.mig:
        whole = max(table(device.mig).profiles, key=lambda p: p.compute).name
        return _mig_layout(device, (), (Placement(0, whole),))
    if not device.trains:
        return Layout((_whole(device),))
    return unit_layout(device, 0, 1)


def whole_device(device: DeviceSpec) -> Layout:
    """The only layout of a device that jobs cannot use."""
    return Layout((_whole(device),))


def _whole(device: DeviceSpec) -> Partition:
    return Partition(f"{device.id}:all", device.id, device.units, device.memory, device.slices)


# --- units ----------------------------------------------------------------------------------


def unit_layout(device: DeviceSpec, units: int, size: int) -> Layout:
    """The first ``units`` units for services, in partitions of ``size``."""
    mine = [device.units[i : i + size] for i in range(0, units, size)]
    return Layout(
        tuple(make_partition(device, tuple(us)) for us in mine),
        tuple(make_partition(device, (unit,)) for unit in device.units[units:]),
    )


def unit_layouts(device: DeviceSpec, units: int) -> list[Layout]:
    """Layouts that give ``units`` units to services, smallest partitions first."""
    sizes = [s for s in sorted(device.shapes) if s <= units and units % s == 0]
    return [unit_layout(device, units, size) for size in sizes]


# --- MIG ------------------------------------------------------------------------------------

Profiles = tuple[str, ...]
"""Names of profiles, sorted."""


def mig_layouts(device: DeviceSpec, current: Layout | None) -> list[Layout]:
    """Layouts one step from ``current`` (one instance of services more, less or of another
    profile), itself included; all there are if it is None. For each choice of services' and
    jobs' instances the placement that keeps most of what is there."""
    combos = _combinations(device.mig)
    if current is None or not current.mine:
        kept: frozenset[Placement] = frozenset()
        steps: Iterable[Profiles] = combos
    else:
        kept = frozenset(_placement(p) for p in (*current.mine, *current.free))
        present = tuple(sorted(_placement(p).profile for p in current.mine))
        steps = [mine for mine in combos if _one_step(present, mine)]
    found = []
    for mine in steps:
        by_rest: dict[Profiles, tuple[Placements, Placements]] = {}
        for placed in combos[mine]:
            rest = tuple(sorted(p.profile for p in placed[1]))
            best = by_rest.get(rest)
            if best is None or _moved(placed, kept) < _moved(best, kept):
                by_rest[rest] = placed
        found += [_mig_layout(device, *placed) for placed in by_rest.values()]
    return found


def mig_fixed(device: DeviceSpec, profiles: Profiles) -> list[Layout]:
    """Layouts in which services have exactly these instances; empty if there is none."""
    placed = _combinations(device.mig).get(tuple(sorted(profiles)), [])
    return [_mig_layout(device, *p) for p in placed]


def service_profiles(gpu: str) -> list[Profiles]:
    """Every choice of instances that services can have on this GPU."""
    return list(_combinations(gpu))


def _mig_layout(device: DeviceSpec, mine: Placements, free: Placements) -> Layout:
    return Layout(
        tuple(_instance(device, p) for p in mine), tuple(_instance(device, p) for p in free)
    )


def _instance(device: DeviceSpec, placement: Placement) -> Partition:
    profile = table(device.mig).profile(placement.profile)
    return Partition(
        id=f"{device.id}:{profile.name}@{placement.start}",
        device=device.id,
        units=tuple(range(placement.start, placement.start + profile.size)),
        memory=(profile.memory_mib or 0) * MIB,
        slices=profile.compute,
    )


def _placement(partition: Partition) -> Placement:
    profile, _, start = partition.id.rpartition(":")[2].partition("@")
    return Placement(int(start), profile)


def _moved(placed: tuple[Placements, Placements], kept: frozenset[Placement]) -> int:
    return sum(p not in kept for p in (*placed[0], *placed[1]))


def _one_step(present: Profiles, other: Profiles) -> bool:
    """Whether at most one instance comes, goes or is another."""
    rest = list(other)
    gone = 0
    for name in present:
        if name in rest:
            rest.remove(name)
        else:
            gone += 1
    return gone <= 1 and len(rest) <= 1


@cache
def _combinations(gpu: str) -> dict[Profiles, list[tuple[Placements, Placements]]]:
    """For every choice of services' instances: where they and the jobs' can be."""
    found: dict[Profiles, list[tuple[Placements, Placements]]] = {}
    for layout in _full(table(gpu)):
        for count in range(1, len(layout) + 1):
            for mine in combinations(layout, count):
                rest = tuple(p for p in layout if p not in mine)
                key = tuple(sorted(p.profile for p in mine))
                found.setdefault(key, []).append((mine, rest))
    return found


def _full(gpu: Table) -> list[Placements]:
    """Layouts to which no instance can be added."""
    everything = set(gpu.layouts())
    larger = {tuple(p for p in layout if p is not left) for layout in everything for left in layout}
    return sorted(layout for layout in everything if layout and layout not in larger)
