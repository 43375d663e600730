"""Layouts: how a device's space can be divided between services and jobs, and how to step from
one layout to the next.

Three geometries. *Units*: any units together (cores, multiprocessors); a layout is ``n`` units
for services in partitions of equal size, the others are single-unit partitions for jobs. Larger
partitions make one execution faster, more partitions run more of them at once. *MIG*: instances
where the GPU's placement tables allow them (``cotenant.domain.mig``); services have some, jobs the
rest of a layout to which nothing can be added. *Even*: a device that jobs cannot use is divided
into parts as equal as can be, all of them for services; one part where it forms no others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from itertools import combinations, pairwise
from typing import Final

from cotenant.domain.device import DeviceSpec, Partition
from cotenant.domain.mig import Placement, Placements, Table, table
from cotenant.policy.views import Layout

MIB: Final = 2**20


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
        return _mig_layout(device, (), _largest(device.mig))
    if not device.trains:
        return Layout((_whole(device),))
    return unit_layout(device, 0, 1)


def job_layouts(device: DeviceSpec) -> list[Layout]:
    """Layouts of a device without services to which no instance can be added."""
    if not device.mig:
        return [without_services(device)]
    return [_mig_layout(device, (), placed) for placed in _full(table(device.mig))]


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


# --- even -----------------------------------------------------------------------------------


def even_layouts(device: DeviceSpec) -> list[Layout]:
    """All of a device that jobs cannot use for services, fewest partitions first: in one, in two,
    and so on, whose sizes differ by one unit at most, as far as it can form these sizes."""
    found = [Layout((_whole(device),))]
    for count in range(2, len(device.units) + 1):
        ends = [len(device.units) * part // count for part in range(count + 1)]
        mine = [device.units[start:end] for start, end in pairwise(ends)]
        if all(len(units) in device.shapes for units in mine):
            found.append(Layout(tuple(make_partition(device, units) for units in mine)))
    return found


# --- MIG ------------------------------------------------------------------------------------

Profiles = tuple[str, ...]
"""Names of profiles, sorted."""


def mig_layouts(device: DeviceSpec, current: Layout | None) -> list[Layout]:
    """Layouts one step from ``current`` (one instance of services more, less, of another profile,
    or two in the place of one or one in that of two), itself included; all there are if it is
    None. For each choice of services' and jobs' instances the placement that keeps most of what is
    there."""
    combos = _combinations(device.mig)
    if current is None or not current.mine:
        kept: frozenset[Placement] = frozenset()
        steps: Iterable[Profiles] = combos
    else:
        kept = frozenset(_placement(p) for p in (*current.mine, *current.free))
        steps = _steps(device.mig, tuple(sorted(_placement(p).profile for p in current.mine)))
    found = []
    for mine in steps:
        for alike in combos[mine].values():
            best = max(alike, key=lambda placed: _keeps(placed, kept))
            found.append(_mig_layout(device, *best))
    return found


def mig_fixed(device: DeviceSpec, profiles: Profiles) -> list[Layout]:
    """Layouts in which services have exactly these instances; empty if there is none."""
    by_rest = _combinations(device.mig).get(tuple(sorted(profiles)), {})
    return [_mig_layout(device, *placed) for alike in by_rest.values() for placed in alike]


def service_profiles(gpu: str) -> list[Profiles]:
    """Every choice of instances that services can have on this GPU."""
    return list(_combinations(gpu))


def _mig_layout(device: DeviceSpec, mine: Placements, free: Placements) -> Layout:
    return Layout(
        tuple(_instance(device.id, device.mig, p) for p in mine),
        tuple(_instance(device.id, device.mig, p) for p in free),
    )


@lru_cache(maxsize=2**14)
def _instance(device: str, gpu: str, placement: Placement) -> Partition:
    profile = table(gpu).profile(placement.profile)
    return Partition(
        id=f"{device}:{profile.name}@{placement.start}",
        device=device,
        units=tuple(range(placement.start, placement.start + profile.size)),
        memory=(profile.memory_mib or 0) * MIB,
        slices=profile.compute,
    )


def _placement(partition: Partition) -> Placement:
    profile, _, start = partition.id.rpartition(":")[2].partition("@")
    return Placement(int(start), profile)


def _keeps(placed: tuple[Placements, Placements], kept: frozenset[Placement]) -> int:
    """How many instances stay where they are, less those that have to be made."""
    there = len(kept.intersection(placed[0])) + len(kept.intersection(placed[1]))
    return 2 * there - len(placed[0]) - len(placed[1])


@cache
def _steps(gpu: str, present: Profiles) -> list[Profiles]:
    slices = {profile.name: profile.compute for profile in table(gpu).profiles}
    return [mine for mine in _combinations(gpu) if _one_step(slices, present, mine)]


def _one_step(slices: Mapping[str, int], present: Profiles, other: Profiles) -> bool:
    """Whether at most one instance comes, goes or is another, or one is split in two, or two are
    joined, without more than the ``slices`` of the one."""
    gone, come = Counter(present), Counter(other)
    one, two = sorted((gone - come, come - gone), key=Counter.total)
    if two.total() <= 1:
        return True
    if (one.total(), two.total()) != (1, 2):
        return False
    return sum(slices[n] for n in two.elements()) <= sum(slices[n] for n in one)


@cache
def _combinations(gpu: str) -> dict[Profiles, dict[Profiles, list[tuple[Placements, Placements]]]]:
    """For every choice of services' instances, and every choice of the jobs' beside them: where
    they can be."""
    found: dict[Profiles, dict[Profiles, list[tuple[Placements, Placements]]]] = {}
    for layout in _full(table(gpu)):
        for count in range(1, len(layout) + 1):
            for mine in combinations(layout, count):
                rest = tuple(p for p in layout if p not in mine)
                here, there = (tuple(sorted(p.profile for p in ps)) for ps in (mine, rest))
                found.setdefault(here, {}).setdefault(there, []).append((mine, rest))
    return found


@cache
def _largest(gpu: str) -> Placements:
    """The fewest instances to which none can be added, and of such those with most compute."""
    known = table(gpu)

    def rank(layout: Placements) -> tuple[int, int]:
        return len(layout), -sum(known.profile(p.profile).compute for p in layout)

    return min(_full(known), key=rank)


def _full(gpu: Table) -> list[Placements]:
    """Layouts to which no instance can be added."""
    everything = set(gpu.layouts())
    larger = {tuple(p for p in layout if p is not left) for layout in everything for left in layout}
    return sorted(layout for layout in everything if layout and layout not in larger)
