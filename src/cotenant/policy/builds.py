"""Which variant of a version serves on a kind of device, and what its executions cost.

The plan chooses. Where what it chose cannot be loaded the original serves; where that cannot be
loaded either, any other.
"""

from __future__ import annotations

from cotenant.domain.events import Foretold
from cotenant.domain.workload import ORIGINAL
from cotenant.policy.estimate import Costs, size_class
from cotenant.policy.state import ServiceState


def wanted(service: ServiceState, version: str, revision: int, kind: str) -> str:
    """The variant of a version that is to serve on a kind of device; "" if none can."""
    spoilt = service.spoilt.get(revision, {}).get(kind, {})
    others = [v.name for v in service.variants.get(version, {}).get(kind, ())]
    chosen = service.chosen.get(kind, ORIGINAL)
    if chosen in others and chosen not in spoilt:
        return chosen
    return next((name for name in (ORIGINAL, *others) if name not in spoilt), "")


def spoil(service: ServiceState, revision: int, kind: str, variant: str, why: str) -> None:
    """A variant could not be loaded on a kind of device."""
    service.spoilt.setdefault(revision, {}).setdefault(kind, {})[variant] = why


def costs(service: ServiceState, kind: str, variant: str) -> Costs:
    """What executions of a variant cost on a kind of device, to be learned from."""
    if service.serving.get(kind, ORIGINAL) == variant:
        return service.exec.setdefault(kind, Costs())
    return service.aside.setdefault(kind, {}).setdefault(variant, Costs())


def foretell(service: ServiceState, known: Foretold) -> None:
    """Take what was measured elsewhere for true until an instance shows it, where nothing is known
    of the service yet."""
    if known.kind in service.exec and service.exec[known.kind].tables:
        return
    table = service.exec[known.kind] = Costs()
    for size, units, rows, ns in known.profile:
        table.profile(units, rows, ns, size_class(size))
    service.foretold[known.kind] = None
    service.occupies[known.kind] = max(known.memory, service.occupies.get(known.kind, 0))
    service.load_ns = service.load_ns or known.load_ns


def shown(service: ServiceState, kind: str) -> None:
    """An instance shows what is true there: what was foretold is forgotten."""
    if kind in service.foretold:
        del service.foretold[kind]
        service.exec[kind] = Costs()


def serve(service: ServiceState, kind: str, variant: str) -> None:
    """Predict by what this variant costs on a kind of device from now on."""
    before = service.serving.get(kind, ORIGINAL)
    if before == variant:
        return
    aside = service.aside.setdefault(kind, {})
    if kind in service.exec:
        aside[before] = service.exec[kind]
    service.exec[kind] = aside.pop(variant) if variant in aside else Costs()
    service.serving[kind] = variant
