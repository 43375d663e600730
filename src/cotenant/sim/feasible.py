"""Objectives that are not met, and the smallest changes that would do.

Queues, bursts, neighbours and the policy all have a part in whether an objective can be met, so
no formula is asked: the scenario is run again with one thing changed, by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from cotenant.domain.units import MS
from cotenant.sim.arrivals import Recorded, thin
from cotenant.sim.scenario import Scenario, SimService

_CLOSE = 1.05
"""A change is found to this factor ..."""
_FAR = 64.0
"""... and looked for up to this one."""

Attempt = Callable[[Scenario], float]
"""Runs a scenario; gives the share (0..1) of a service's requests that was answered in time."""


class Missed(msgspec.Struct, frozen=True):
    """A service that did not meet its objective: ``attained`` (0..1) of what it was asked was
    answered within ``objective`` (ns); ``percentile`` % are wanted. ``met_by``: other policies,
    which met it. If changes were ``searched``, either of ``latency`` (ns) and ``requests`` (share
    of those it is asked, 0..1) would do; None: none in reach would."""

    service: str
    objective: int
    percentile: float
    attained: float
    met_by: tuple[str, ...] = ()
    searched: bool = False
    latency: int | None = None
    requests: float | None = None

    def said(self, policy: str) -> str:
        """For people."""
        verdict = (
            f"which {', '.join(self.met_by)} met"
            if self.met_by
            else "infeasible for every policy here"
        )
        return (
            f"{self.service} misses its objective, {verdict}: {100 * self.attained:.4g} % of its "
            f"requests are answered within {self.objective / MS:g} ms under {policy}, "
            f"{self.percentile:g} % should be{self._remedy()}"
        )

    def _remedy(self) -> str:
        if not self.searched:
            return ""
        rarer = "" if self.requests is None else f"{100 * self.requests:.3g} % of its requests"
        if self.latency is not None:
            slower = f"latency: {self.latency / MS:g}ms"
            changes = f"{slower} or {rarer}" if rarer else slower
            return f"; the smallest change that would do is {changes}"
        if rarer:
            return f"; no latency up to {_FAR:g} times as long would do, but {rarer}"
        return f"; neither {_FAR:g} times the latency nor 1/{_FAR:g} of its requests would do"


def with_changes(scenario: Scenario, missed: Missed, attempt: Attempt) -> Missed:
    """``missed`` with the smallest changes of its service alone that would do. Each was run, and
    did; one at most 5 % smaller did not."""
    name, wanted = missed.service, missed.percentile / 100

    def does(service: SimService) -> bool:
        services = tuple(service if s.spec.name == name else s for s in scenario.services)
        return attempt(msgspec.structs.replace(scenario, services=services)) >= wanted

    (asked,) = (s for s in scenario.services if s.spec.name == name)
    slower = _nearest(2.0, lambda factor: does(_slower(asked, factor)))
    rarer = _nearest(0.5, lambda kept: does(_rarer(asked, kept)))
    latency = _slower(asked, slower).spec.slo.latency if slower else None
    return msgspec.structs.replace(missed, searched=True, latency=latency, requests=rarer)


def _nearest(step: float, does: Callable[[float], bool]) -> float | None:
    """The factor nearest to 1, on ``step``'s side of it, that does; None if none in reach."""
    bad, good = 1.0, step
    while not does(good):
        bad, good = good, good * step
        if not 1 / _FAR <= good <= _FAR:
            return None
    while max(good / bad, bad / good) > _CLOSE:
        between = _shown(math.sqrt(good * bad))
        if does(between):
            good = between
        else:
            bad = between
    return good


def _slower(service: SimService, factor: float) -> SimService:
    """With a longer objective, which recorded requests that had the old one have too."""
    replace, slo = msgspec.structs.replace, service.spec.slo
    latency, arrivals = round(_shown(slo.latency / MS * factor) * MS), service.arrivals
    if isinstance(arrivals, Recorded):
        budgets = tuple(latency if b == slo.latency else b for b in arrivals.budgets)
        arrivals = replace(arrivals, budgets=budgets)
    spec = replace(service.spec, slo=replace(slo, latency=latency))
    return replace(service, spec=spec, arrivals=arrivals)


def _rarer(service: SimService, kept: float) -> SimService:
    return msgspec.structs.replace(service, arrivals=thin(service.arrivals, kept))


def _shown(value: float) -> float:
    """As it will be printed: what is said to do was run with that very figure."""
    return float(f"{value:.3g}")
