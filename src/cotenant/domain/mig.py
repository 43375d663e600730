"""MIG: which GPU instances a device can form, and where.

A GPU instance occupies ``size`` consecutive memory slices from one of its profile's ``starts``.
A set of instances is legal when no two overlap, no profile has more than ``max_instances``, and
their compute slices fit the device. The tables are data (``data/mig_profiles.json``), each with
the evidence it rests on; ``None`` in them means not known, to be read from the device.

A device says which table it has by a word (``word``): the model's name, or the table itself where
none of those carried is the same, as on a GPU of which others have a part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from importlib import resources

import msgspec

from cotenant.domain.errors import ConfigError


class Profile(msgspec.Struct, frozen=True):
    """One kind of GPU instance. ``size`` and ``starts`` are memory slices, ``memory_mib`` MiB.
    ``media_extensions``: it is a variant of another profile, which is as large."""

    name: str
    id: int
    max_instances: int
    size: int
    starts: tuple[int, ...]
    sms: int | None
    memory_mib: int | None
    media_extensions: bool

    @property
    def compute(self) -> int:
        """Compute slices: the number before the ``g`` of the name."""
        return int(self.name.partition("g")[0])


class Placement(msgspec.Struct, frozen=True, order=True):
    """An instance of ``profile`` from memory slice ``start`` on."""

    start: int
    profile: str


Placements = tuple[Placement, ...]


class Table(msgspec.Struct, frozen=True):
    """The profiles of one GPU model, and how they were obtained."""

    gpu: str
    memory_slices: int
    compute_slices: int
    evidence: str
    profiles: tuple[Profile, ...]

    def profile(self, name: str) -> Profile:
        """Raises ConfigError, with the names there are, if there is none of this name."""
        for found in self.profiles:
            if found.name == name:
                return found
        known = ", ".join(p.name for p in self.profiles)
        raise ConfigError(f"{self.gpu} has no MIG profile {name!r}; it has {known}")

    def why_not(self, placements: Iterable[Placement]) -> str | None:
        """What makes a set of placements impossible, in words; None if it is legal."""
        taken: dict[int, Placement] = {}
        count: dict[str, int] = {}
        compute = 0
        for placement in placements:
            profile = self.profile(placement.profile)
            if placement.start not in profile.starts:
                starts = ", ".join(map(str, profile.starts))
                return f"{profile.name} cannot start at {placement.start}, only at {starts}"
            for memory_slice in range(placement.start, placement.start + profile.size):
                other = taken.get(memory_slice)
                if other is not None:
                    return (
                        f"{profile.name} at {placement.start} overlaps {other.profile} "
                        f"at {other.start}"
                    )
                taken[memory_slice] = placement
            count[profile.name] = count.get(profile.name, 0) + 1
            if count[profile.name] > profile.max_instances:
                return f"at most {profile.max_instances} of {profile.name}"
            compute += profile.compute
        if compute > self.compute_slices:
            return f"{compute} compute slices asked for, {self.compute_slices} there are"
        return None

    def units(self, placement: Placement) -> tuple[int, ...]:
        """The memory slices of an instance."""
        return tuple(range(placement.start, placement.start + self.profile(placement.profile).size))

    def without(self, others: Iterable[Placement]) -> Table:
        """What instances that are there already leave."""
        there = tuple(others)
        taken = {unit for placement in there for unit in self.units(placement)}
        count = Counter(placement.profile for placement in there)
        profiles = tuple(
            msgspec.structs.replace(
                p,
                starts=tuple(s for s in p.starts if taken.isdisjoint(range(s, s + p.size))),
                max_instances=p.max_instances - count[p.name],
            )
            for p in self.profiles
        )
        used = sum(self.profile(placement.profile).compute for placement in there)
        return msgspec.structs.replace(
            self, compute_slices=self.compute_slices - used, profiles=profiles
        )

    def layouts(self, media: bool = False) -> Iterator[Placements]:
        """Every legal layout, partial and empty ones included, by ascending start.

        ``media``: also profiles with media extensions (they cost no more space, but only one
        instance may have them).
        """
        profiles = [p for p in self.profiles if media or not p.media_extensions]
        yield from self._from(0, (), {}, 0, profiles)

    def _from(
        self,
        start: int,
        chosen: Placements,
        count: dict[str, int],
        compute: int,
        profiles: list[Profile],
    ) -> Iterator[Placements]:
        if start >= self.memory_slices:
            yield chosen
            return
        yield from self._from(start + 1, chosen, count, compute, profiles)
        for profile in profiles:
            used = count.get(profile.name, 0)
            more = compute + profile.compute
            if start in profile.starts and used < profile.max_instances:
                if start + profile.size > self.memory_slices or more > self.compute_slices:
                    continue
                yield from self._from(
                    start + profile.size,
                    (*chosen, Placement(start, profile.name)),
                    {**count, profile.name: used + 1},
                    more,
                    profiles,
                )


@cache
def tables() -> dict[str, Table]:
    """The tables carried, by GPU model."""
    text = resources.files("cotenant.domain").joinpath("data", "mig_profiles.json").read_bytes()
    found = msgspec.json.decode(text)
    return {
        gpu: msgspec.convert({"gpu": gpu, **table}, Table)
        for gpu, table in found.items()
        if not gpu.startswith("_")
    }


def table(word: str) -> Table:
    """The table that a device means by a word; raises ConfigError, with the models there are, for
    one that it cannot mean."""
    if word.startswith("{"):
        return _read(word)
    if word not in tables():
        raise ConfigError(f"no MIG table for {word!r}; there are {', '.join(sorted(tables()))}")
    return tables()[word]


@lru_cache(maxsize=64)
def _read(word: str) -> Table:
    return msgspec.json.decode(word, type=Table)


def word(found: Table) -> str:
    """What ``table`` makes this table of, or one that differs in nothing but its evidence."""
    shapes = _shapes(found)
    for gpu, known in tables().items():
        if _shapes(known) == shapes:
            return gpu
    return msgspec.json.encode(found).decode()


def _shapes(found: Table) -> tuple[int, int, list[Profile]]:
    profiles = sorted(found.profiles, key=lambda p: (p.id, p.name))
    return found.memory_slices, found.compute_slices, profiles
