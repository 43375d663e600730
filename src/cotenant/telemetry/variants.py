"""What is known of a service's variants, for the planner."""

from __future__ import annotations

from statistics import median

import msgspec

from cotenant.domain.workload import ORIGINAL, Variant
from cotenant.policy.estimate import Costs
from cotenant.policy.state import ServiceState


def others_of(service: ServiceState) -> dict[str, tuple[Variant, ...]]:
    """Those that may take the place of the original, by kind of device: of the version that serves,
    or is to. What could not be loaded is left out. Once both were warmed up here, their relative
    times are what that showed."""
    offered = not service.version
    version = service.offer if offered else service.version
    revision = service.offer_revision if offered else service.versions[version]
    found: dict[str, tuple[Variant, ...]] = {}
    for kind, variants in service.variants.get(version, {}).items():
        spoilt = service.spoilt.get(revision, {}).get(kind, {})
        original = _warm(service, kind, ORIGINAL)
        able = []
        for variant in variants:
            if variant.name not in spoilt:
                seen = _relative(_warm(service, kind, variant.name), original)
                able.append(msgspec.structs.replace(variant, relative=seen or variant.relative))
        if able:
            found[kind] = tuple(able)
    return found


def serving_on(service: ServiceState) -> dict[str, str]:
    """Which variant serves, by kind of device."""
    return {kind: service.serving.get(kind, ORIGINAL) for kind in service.exec}


def _warm(service: ServiceState, kind: str, variant: str) -> dict[int, int]:
    """What one row took in the last warm-up of a variant (ns), by units."""
    if service.serving.get(kind, ORIGINAL) == variant:
        return service.exec.get(kind, Costs()).warm()
    return service.aside.get(kind, {}).get(variant, Costs()).warm()


def _relative(variant: dict[int, int], original: dict[int, int]) -> float:
    """How many times as long as the original a variant takes; 0 if that was not seen."""
    both = variant.keys() & original.keys()
    return median(variant[units] / original[units] for units in both) if both else 0.0
