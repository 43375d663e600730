"""What a node has, as devices that a cluster can allocate.

Of each device of the node there is a counter set, and everything that can be had of the silicon
consumes from it: so whole units, instances of MIG and shares of time exclude each other.

* **space**: a unit (core, group of multiprocessors). A claim takes several. Where it could not take
  all, since it has at most 32 devices, there are blocks of units too. What only serves (an NPU, a
  GPU in subsets) is reserved as a whole, or not: it is one device.
* **mig**: a profile at a place. It consumes its memory slices, its compute slices, and one of the
  instances that its profile may have.
* **time**: one device, allocated many times, by whole per cents. It consumes all there is, once, as
  soon as the first share is taken.

Every device has every attribute: a selector that asks for a missing one would abort the claim.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from cotenant.domain import mig

SPACE: Final = "space"
MIG: Final = "mig"
TIME: Final = "time"

MOST_RESULTS: Final = 32
"""Devices that one claim can be allocated (``AllocationResultsMaxSize`` of the API)."""
BLOCK: Final = 8
"""Units of a block."""
_STRING: Final = 64
"""Characters that an attribute may have."""
_LABEL: Final = 40
"""Characters of a device name for the node's device; the rest says which part of it."""
_MIB: Final = 2**20


class Part(msgspec.Struct, frozen=True):
    """Something of a node's ``device`` that can be allocated, under a name of the pool's.

    ``units`` are compute units, ``memory`` the bytes there are, of which ``own`` go with it.
    ``consumes``: of which counters of the device's set, and how much.
    """

    name: str
    device: str
    mode: str
    units: int
    memory: int
    consumes: dict[str, int]
    attributes: dict[str, str | int | bool]
    own: int = 0
    trouble: bool = False


class Inventory(msgspec.Struct, frozen=True):
    """Parts by name; and by the name of a counter set, how much there is of each counter."""

    parts: dict[str, Part]
    counters: dict[str, dict[str, int]]


def inventory(devices: Iterable[Mapping[str, Any]]) -> Inventory:
    """Of ``status()["devices"]`` of a node."""
    parts: dict[str, Part] = {}
    counters: dict[str, dict[str, int]] = {}
    for device in devices:
        found = _Device(device)
        counters[label(found.id)] = found.counters
        parts.update((part.name, part) for part in found.parts())
    return Inventory(parts, counters)


def label(id: str) -> str:
    """A DNS label for a device of the node; the same for the same id, and for no other."""
    plain = re.sub(r"[^a-z0-9]+", "-", id.lower()).strip("-")
    if plain == id and len(plain) <= _LABEL:
        return plain
    digest = hashlib.sha256(id.encode()).hexdigest()[:8]
    return f"{plain[: _LABEL - 9]}-{digest}".strip("-")


def together(name: str) -> str | None:
    """What units of one device have in common in their names; None for what is not a unit. Needs no
    inventory: a device that has vanished still has its name in claims."""
    match = re.fullmatch(r"(.+)-(?:unit|block)-[0-9]+", name)
    return match[1] if match else None


class _Device:
    """A device of the node, read from its status."""

    def __init__(self, status: Mapping[str, Any]) -> None:
        self.id = str(status["id"])
        self.table = mig.table(status["mig"]) if status.get("mig") else None
        self.units: list[int] = list(status["units"])
        self.compute = int(status["compute"])
        self.memory = int(status.get("memory") or 0)
        self._status = status
        self._trains = bool(status.get("trains"))
        self._trouble = bool(status.get("trouble"))
        self.counters = self._counters()

    def _counters(self) -> dict[str, int]:
        if self.table is None:
            return {"units": len(self.units)}
        return {
            **{f"slice-{unit}": 1 for unit in self.units},
            "compute": self.compute,
            **{_counter(p): p.max_instances for p in self.table.profiles if self._places(p)},
        }

    def _places(self, profile: mig.Profile) -> list[int]:
        """Where an instance of the profile can start here."""
        if profile.media_extensions or profile.max_instances < 1 or profile.compute > self.compute:
            return []
        units = set(self.units)
        return [s for s in profile.starts if units.issuperset(range(s, s + profile.size))]

    def parts(self) -> Iterable[Part]:
        if not self._trains:
            yield self._part("whole", SPACE, self.compute, self.counters, self.memory)
            return
        if self.table is None:
            yield from self._spaces()
        else:
            yield from self._instances(self.table)
        yield self._part("time", TIME, self.compute, self.counters, self.memory)

    def _spaces(self) -> Iterable[Part]:
        count = len(self.units)
        for index in range(count):
            yield self._part(f"unit-{index}", SPACE, 1, {"units": 1}, self.memory)
        for index in range(count // BLOCK if count > MOST_RESULTS else 0):
            yield self._part(f"block-{index}", SPACE, BLOCK, {"units": BLOCK}, self.memory)

    def _instances(self, table: mig.Table) -> Iterable[Part]:
        for profile in table.profiles:
            for start in self._places(profile):
                taken = {f"slice-{u}": 1 for u in range(start, start + profile.size)}
                consumes = {**taken, "compute": profile.compute, _counter(profile): 1}
                own = (profile.memory_mib or 0) * _MIB
                memory = own or self.memory * profile.size // table.memory_slices
                name = f"mig-{_plain(profile.name)}-{start}"
                part = self._part(name, MIG, profile.compute, consumes, memory, profile.name)
                yield msgspec.structs.replace(part, own=own)

    def _part(
        self,
        name: str,
        mode: str,
        units: int,
        consumes: dict[str, int],
        memory: int,
        profile: str = "",
    ) -> Part:
        text = {
            "device": self.id,
            "kind": str(self._status["kind"]),
            "mode": mode,
            "hardware": str(self._status.get("hardware") or ""),
            "product": self.table.gpu if self.table is not None else "",
            "level": str(self._status.get("level") or ""),
            "profile": profile,
        }
        return Part(
            name=f"{label(self.id)}-{name}",
            device=self.id,
            mode=mode,
            units=units,
            memory=memory,
            consumes=consumes,
            attributes={
                **{key: value[:_STRING] for key, value in text.items()},
                "units": units,
                "memory": memory,
                "trains": self._trains,
            },
            trouble=self._trouble,
        )


def _plain(profile: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", profile.lower()).strip("-")


def _counter(profile: mig.Profile) -> str:
    return f"of-{_plain(profile.name)}"
