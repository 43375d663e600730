"""Which of several variants of a model serves on a kind of device.

The most accurate that holds the objective. While the load is more than any layout of the device
could carry, one service takes one step to a less accurate variant that is faster there, never below
its floor: the step that leaves the least load unanswered. It goes back up once the better variant
would hold at more than the present load, and that has been so for a while. Devices of one kind have
the same variant of a service.

Times of a variant that does not serve are those of the one that does, in the proportion in which
both were measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from cotenant.domain.device import DeviceSpec
from cotenant.domain.snapshot import ServiceFacts, Snapshot
from cotenant.domain.units import S
from cotenant.domain.workload import ORIGINAL, Variant
from cotenant.policy.demand import scaled
from cotenant.policy.judging import judge, memory_of
from cotenant.policy.layouts import even_layouts, unit_layouts
from cotenant.policy.planstate import PlannerState, Steps, Tuning
from cotenant.policy.views import Layout, View

SPARE: Final = 1.25
"""A better variant must hold at this much more than the present load."""


class _Outlook(NamedTuple):
    """``overload`` as in ``Verdict``, and for services that would miss their objective why."""

    overload: float
    misses: dict[str, str]


class Choosing:
    """What must be remembered is in the planner's state."""

    def __init__(self, tuning: Tuning, state: PlannerState) -> None:
        self._tuning = tuning
        self._state = state
        self._moving: set[str] = set()
        """Services of which another variant serves as yet than was chosen."""

    def see(
        self, snapshot: Snapshot, facts: Sequence[ServiceFacts]
    ) -> tuple[tuple[ServiceFacts, ...], list[str]]:
        """The services as they are, or will soon be, with the variants that were chosen; and what
        had to be chosen anew."""
        state = self._state
        before, state.variants = state.variants, {}
        self._moving.clear()
        reasons: list[str] = []
        found = []
        for service in facts:
            if not service.others:
                found.append(service)
                continue
            mine = state.variants[service.name] = {}
            for kind in dict.fromkeys(d.kind for d in snapshot.devices):
                old = before.get(service.name, {}).get(kind, ORIGINAL)
                able = ladder(service, kind, snapshot.devices)
                names = [v.name for v in able]
                mine[kind] = old if old in names else names[0]
                if mine[kind] != old:
                    reasons.append(f"{service.name}: {old} cannot serve on {kind}, {names[0]} can")
            found.append(self._chosen_of(service, snapshot))
        state.steps = {name: s for name, s in state.steps.items() if name in state.variants}
        return tuple(found), reasons

    def _chosen_of(self, service: ServiceFacts, snapshot: Snapshot) -> ServiceFacts:
        """A service with what was chosen for it on each kind of device."""
        kinds = dict.fromkeys(d.kind for d in snapshot.devices)
        if not service.variants:
            original = {kind: Variant() for kind in kinds}
            service = msgspec.structs.replace(service, variants=original)
        for kind, name in self._state.variants[service.name].items():
            if kind in service.exec_ns and service.serving.get(kind, ORIGINAL) != name:
                self._moving.add(service.name)
            service = as_variant(service, kind, name)
        return service

    def chosen(self) -> dict[str, dict[str, str]]:
        """What is not the original, by service and kind of device."""
        found = {
            name: {kind: variant for kind, variant in kinds.items() if variant != ORIGINAL}
            for name, kinds in self._state.variants.items()
        }
        return {name: kinds for name, kinds in found.items() if kinds}

    def ready(self, views: Sequence[View]) -> dict[str, dict[str, str]]:
        """What is to be loaded beside what serves: the next step down, since a box that has more to
        do than it can has no time for loading. Where instances are bound to partitions, or it would
        fill the memory, none is."""
        found: dict[str, dict[str, str]] = {}
        for view in views if self._tuning.vary else ():
            kind = view.device.kind
            if view.device.pins_workers or not _has_room(view):
                continue
            for service in view.services:
                if service.others.get(kind) and service.turns is None:
                    _, lesser, _ = self._around([view], service)
                    if lesser is not None:
                        found.setdefault(service.name, {})[kind] = lesser.name
        return found

    # --- steps ------------------------------------------------------------------------------

    def step(self, views: Sequence[View]) -> list[str]:
        """Take the steps that are due, one on each kind of device, and say what is to stand by;
        why."""
        reasons = []
        for kind in dict.fromkeys(v.device.kind for v in views):
            there = [v for v in views if v.device.kind == kind]
            several = {s.name: s for v in there for s in v.services if s.others.get(kind)}
            if several and self._tuning.vary and self._moving.isdisjoint(several):
                reasons += self._step(there, several)
        ready = self.ready(views)
        if ready != self._state.ready:
            told = (f"{n}: {v} stands by" for n, kinds in ready.items() for v in kinds.values())
            reasons.append("; ".join(told) or "no variant stands by any more")
            self._state.ready = ready
        return reasons

    def _step(self, views: list[View], several: Mapping[str, ServiceFacts]) -> list[str]:
        kind, now = views[0].device.kind, self._outlook(views)
        if now.misses:
            self._wish_up(kind, several, "")
            return self._step_down(views, now, several)
        self._wish_down(kind, several, "")
        return self._step_up(views, several)

    def _step_down(
        self, views: list[View], now: _Outlook, several: Mapping[str, ServiceFacts]
    ) -> list[str]:
        """Of the services that could take a step the one whose step helps most does, once it is
        wished for long enough."""
        kind, at = views[0].device.kind, views[0].now
        best: tuple[float, float, str, Variant, Variant] | None = None
        for name, service in several.items():
            have, lesser, _ = self._around(views, service)
            if lesser is not None:
                there = self._outlook([with_variant(v, name, lesser.name) for v in views])
                found = (there.overload, have.accuracy - lesser.accuracy, name)
                if found[0] < now.overload and (best is None or found < best[:3]):
                    best = (*found, have, lesser)
        since = self._wish_down(kind, several, best[2] if best else "", at)
        if best is None:
            return []
        # What is missed until a variant serves that will do contradicts no prediction.
        self._state.foreseen |= {n: why for n, why in now.misses.items() if n in several}
        if at - since < self._tuning.grow_after:
            return []
        name, why = min(now.misses.items())
        return [self._take(kind, best[2], best[3], best[4], f"{name}: {why}")]

    def _step_up(self, views: list[View], several: Mapping[str, ServiceFacts]) -> list[str]:
        """Of the services that could do better the one that gains the most accuracy does, once all
        would hold with that, with something to spare, for long enough."""
        kind, at = views[0].device.kind, views[0].now
        spare = [
            msgspec.structs.replace(v, services=tuple(scaled(s, SPARE) for s in v.services))
            for v in views
        ]
        best: tuple[float, str, Variant, Variant] | None = None
        for name, service in several.items():
            have, _, better = self._around(views, service)
            if better is None:
                continue
            gain = better.accuracy - have.accuracy
            holds = not self._outlook([with_variant(v, name, better.name) for v in spare]).misses
            if holds and (best is None or (gain, name) > best[:2]):
                best = (gain, name, have, better)
        since = self._wish_up(kind, several, best[1] if best else "", at)
        if best is None or at - since < self._tuning.shrink_after:
            return []
        held = self._tuning.shrink_after / S
        return [self._take(kind, best[1], best[2], best[3], f"it would hold (for {held:.0f}s)")]

    def _wish_down(self, kind: str, several: Iterable[str], chosen: str, at: int = 0) -> int:
        """Remember since when (ns) a service is to take a step down, which is returned; of the
        others, that they are not to."""
        for name in several:
            steps = self._steps(name, kind)
            steps.down_since = (steps.down_since or at) if name == chosen else 0
        return self._steps(chosen, kind).down_since if chosen else 0

    def _wish_up(self, kind: str, several: Iterable[str], chosen: str, at: int = 0) -> int:
        """The same of a step up."""
        for name in several:
            steps = self._steps(name, kind)
            steps.up_since = (steps.up_since or at) if name == chosen else 0
        return self._steps(chosen, kind).up_since if chosen else 0

    def _take(self, kind: str, name: str, old: Variant, new: Variant, why: str) -> str:
        self._state.steps[name][kind] = Steps()
        self._state.variants[name][kind] = new.name
        return f"{name} on {kind}: {old.name} -> {new.name}: {why}"

    def _around(
        self, views: Sequence[View], service: ServiceFacts
    ) -> tuple[Variant, Variant | None, Variant | None]:
        """What serves on a kind of device, the next less accurate that is faster, and the next
        better."""
        kind = views[0].device.kind
        able = ladder(service, kind, [v.device for v in views])
        names = [v.name for v in able]
        chosen = self._state.variants[service.name][kind]
        at = names.index(chosen) if chosen in names else 0
        return (
            able[at],
            able[at + 1] if at + 1 < len(able) else None,
            able[at - 1] if at else None,
        )

    def _steps(self, name: str, kind: str) -> Steps:
        return self._state.steps.setdefault(name, {}).setdefault(kind, Steps())

    def _outlook(self, views: Sequence[View]) -> _Outlook:
        """How services would do on devices of a kind, each in the layout that is best for them."""
        horizon_s = self._tuning.horizon / S
        overload = 0.0
        misses: dict[str, str] = {}
        for view in views:
            verdicts = [judge(view, layout, horizon_s) for layout in self._layouts(view)]
            best = min(verdicts, key=lambda v: (round(v.overload, 4), len(v.misses)))
            overload += round(best.overload, 4)
            misses |= best.misses
        return _Outlook(overload, misses)

    def _layouts(self, view: View) -> list[Layout]:
        """The layouts that give services most of a device; where instances are made one by one,
        the one that it has."""
        device, memory = view.device, self._state.devices[view.device.id]
        if not device.trains:
            return even_layouts(device)
        fixed = self._tuning.split is not None or device.mig
        if fixed and memory.layout is not None:
            return [memory.layout]
        return unit_layouts(device, device.compute)


def _has_room(view: View) -> bool:
    """Whether each service could be there twice."""
    taken = sum(2 * s.instances * memory_of(s, view.device) for s in view.services)
    theirs = sum(j.memory for j in view.jobs)
    return not view.device.memory or taken + theirs <= view.device.memory


def ladder(service: ServiceFacts, kind: str, devices: Sequence[DeviceSpec]) -> list[Variant]:
    """The variants that may serve on a kind of device, most accurate first, each faster than the
    one before it; the original, if none may."""
    original = service.variants.get(kind, Variant())
    all_of = [original, *service.others.get(kind, ())]
    there = [d for d in devices if d.kind == kind]
    able = [v for v in all_of if _may(service, v, there)]
    able.sort(key=lambda v: (-v.accuracy, v.relative, v.name))
    found: list[Variant] = []
    for variant in able:
        if not found or variant.relative < found[-1].relative:
            found.append(variant)
    return found or [original]


def _may(service: ServiceFacts, variant: Variant, devices: Sequence[DeviceSpec]) -> bool:
    """Whether a variant is good enough, and some of these devices can execute it. Of an original
    whose accuracy nobody stated its instances find that out, from the check data."""
    if variant.accuracy < service.accuracy_floor:
        return False
    return any(
        (not d.memory or variant.memory <= d.memory)
        and all(op in d.operators for op in variant.operators if d.operators)
        for d in devices
    )


def as_variant(service: ServiceFacts, kind: str, name: str) -> ServiceFacts:
    """A service as it would be with another variant on a kind of device."""
    have = service.variants.get(kind)
    if have is None:
        return service
    known = {v.name: v for v in (have, *service.others.get(kind, ()))}
    new, old = known.get(name, have), known.get(service.serving.get(kind, ORIGINAL), have)
    if new.name == have.name and new.name == service.serving.get(kind, ORIGINAL):
        return service
    times = service.exec_ns.get(kind, {})
    ratio = new.relative / old.relative
    others = tuple(v for v in known.values() if v.name != new.name)
    return msgspec.structs.replace(
        service,
        variants=service.variants | {kind: new},
        others=service.others | {kind: others},
        serving=service.serving | {kind: new.name},
        exec_ns=service.exec_ns | {kind: {size: round(ns * ratio) for size, ns in times.items()}},
    )


def with_variant(view: View, name: str, variant: str) -> View:
    """A device as it would be if a service had another variant there."""
    kind = view.device.kind
    services = tuple(as_variant(s, kind, variant) if s.name == name else s for s in view.services)
    return msgspec.structs.replace(view, services=services)
