"""From the MIG instances that a GPU has to those that are wanted: the steps, and back. Pure.

Laws:

* What is not ours is never touched, and nothing is made where it stands.
* An instance of ours that stands where it is wanted stays.
* Compute instances go before their GPU instance, and come after it.
* Everything goes before anything comes.
* Every step has an opposite, so that what was half done can be undone.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

import msgspec

from cotenant.domain.errors import DeviceError
from cotenant.domain.mig import Placement, Placements, Table


class Seen(msgspec.Struct, frozen=True):
    """A GPU instance that there is. ``compute``: of each of its compute instances the profile;
    ``whole``: whether that is one, which has all of it."""

    placement: Placement
    id: int
    ours: bool
    compute: tuple[int, ...] = ()
    whole: bool = False


class Act(enum.Enum):
    """What a step does."""

    REMOVE_COMPUTE = "remove a compute instance of"
    REMOVE = "remove"
    MAKE = "make"
    MAKE_COMPUTE = "make a compute instance of"


_OPPOSITE = {
    Act.REMOVE_COMPUTE: Act.MAKE_COMPUTE,
    Act.MAKE_COMPUTE: Act.REMOVE_COMPUTE,
    Act.REMOVE: Act.MAKE,
    Act.MAKE: Act.REMOVE,
}


class Step(msgspec.Struct, frozen=True):
    """One call that changes the GPU. ``compute``: the compute instance's profile; None: the one
    that takes all of the GPU instance."""

    act: Act
    placement: Placement
    compute: int | None = None

    @property
    def opposite(self) -> Step:
        return Step(_OPPOSITE[self.act], self.placement, self.compute)

    def __str__(self) -> str:
        return f"{self.act.value} {self.placement.profile} at {self.placement.start}"


def steps(seen: Iterable[Seen], wanted: Placements, table: Table) -> tuple[Step, ...]:
    """How ours become those wanted, each with one compute instance that has all of it. Raises
    DeviceError where they cannot stand beside what is not ours."""
    found = sorted(seen, key=lambda s: s.placement)
    foreign = [s.placement for s in found if not s.ours]
    problem = table.why_not([*foreign, *wanted])
    if problem is not None:
        beside = f" beside {_names(foreign)}, which Cotenant did not make" if foreign else ""
        raise DeviceError(f"MIG layout {_names(wanted)} is impossible{beside}: {problem}")
    going: list[Step] = []
    coming: list[Step] = []
    standing = set()
    for instance in found:
        if not instance.ours:
            continue
        stays = instance.placement in wanted
        if stays:
            standing.add(instance.placement)
        if stays and instance.whole:
            continue
        compute = reversed(instance.compute)
        going += [Step(Act.REMOVE_COMPUTE, instance.placement, profile) for profile in compute]
        if stays:
            coming.append(Step(Act.MAKE_COMPUTE, instance.placement))
        else:
            going.append(Step(Act.REMOVE, instance.placement))
    for placement in sorted(set(wanted) - standing):
        coming += [Step(Act.MAKE, placement), Step(Act.MAKE_COMPUTE, placement)]
    return (*going, *coming)


def _names(placements: Iterable[Placement]) -> str:
    return ", ".join(f"{p.profile} at {p.start}" for p in placements) or "of nothing"
