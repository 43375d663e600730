"""The variants of a service: which may serve, told to the dispatcher, and their files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from statistics import median

from cotenant.domain import events as e
from cotenant.domain.config import AUTO
from cotenant.domain.errors import ModelError
from cotenant.domain.variant import VariantRecord, VariantState
from cotenant.domain.workload import Variant
from cotenant.runtime.repository import VariantFiles

log = logging.getLogger("cotenant.models")


class Variants:
    """``kinds``: of the devices of the box; ``feed`` hands an event to the dispatcher."""

    def __init__(self, service: str, kinds: Sequence[str], feed: Callable[[e.Event], None]) -> None:
        self._service = service
        self._kinds = kinds
        self._feed = feed
        self._promoted: dict[str, dict[str, VariantFiles]] = {}
        """By version, as was told."""
        self._seen: dict[str, list[VariantFiles]] = {}
        """What the last look at the disk found."""

    def tell(self, version: str, found: list[VariantFiles]) -> None:
        """The variants of a version that are there. Those that are promoted may serve."""
        self._seen[version] = found
        promoted = {v.name: v for v in found if _serves(v)}
        if promoted == self._promoted.get(version, {}):
            return
        self._promoted[version] = promoted
        known = {kind: self._on(kind, promoted) for kind in self._kinds}
        variants = {kind: there for kind, there in known.items() if there}
        self._feed(e.VariantsKnown(self._service, version, variants))
        names = sorted(promoted)
        said = {"service": self._service, "version": version, "variants": names}
        log.info("variants may serve", extra=said)

    def follow(self, version: str, found: list[VariantFiles]) -> None:
        """As ``tell``, once what is found stands still: files that are being written change."""
        if self._seen.get(version, []) == found:
            self.tell(version, found)
        self._seen[version] = found

    def keep(self, versions: Sequence[str]) -> None:
        """Forget what is known of others than these versions."""
        for known in (self._promoted, self._seen):
            for version in [v for v in known if v not in versions]:
                del known[version]

    def files(self, version: str, name: str) -> VariantFiles:
        """The files of one that was told of; raises ModelError if it is there no more."""
        found = self._promoted.get(version, {}).get(name)
        if found is None:
            raise ModelError(f"variant {name} of version {version} is gone")
        return found

    @staticmethod
    def _on(kind: str, promoted: dict[str, VariantFiles]) -> tuple[Variant, ...]:
        """Those that may serve on a kind of device."""
        records = {name: v.record for name, v in promoted.items() if v.record is not None}
        there = {n: r for n, r in records.items() if not r.kinds or kind in r.kinds}
        return tuple(as_variant(name, record, kind) for name, record in there.items())


def _serves(variant: VariantFiles) -> bool:
    record = variant.record
    return not variant.problem and record is not None and record.state is VariantState.PROMOTED


def as_variant(name: str, record: VariantRecord, kind: str) -> Variant:
    """What the planner is to know of a variant on a kind of device. The original's accuracy counts
    as 1, and of that a variant has what it keeps at least: one that surely gains has more. Without
    times of both it is taken to be as fast."""
    times = [
        t.ns / t.original_ns
        for t in record.profile
        if t.kind == kind and t.original_ns and record.engine in (AUTO, t.engine)
    ]
    compared = record.accuracy
    return Variant(
        memory=record.memory,
        accuracy=1.0 - compared.bound if compared is not None else 1.0,
        name=name,
        relative=median(times) if times else 1.0,
    )
