"""Shares of compute as owners write them: of the one kind of device that a workload runs on, or by
kind. Units of different kinds are never added up, so a share says of which kind it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from cotenant.domain.workload import JobSpec, ServiceSpec, Share, share_on

Workload = ServiceSpec | JobSpec


NONE_CLOSED: Final[Mapping[str, str]] = {}


def problem(workload: Workload, box: Sequence[str], closed: Mapping[str, str] = NONE_CLOSED) -> str:
    """What is wrong with a workload's kinds and shares on a box with devices of these kinds, and
    what would be right; empty if nothing is. ``closed``: further kinds, and why not those."""
    for kind in workload.kinds:
        if kind in closed:
            return f"it cannot run on {kind}: {closed[kind]}"
        if kind not in box:
            return f"no device here is of the kind {kind!r}; there are {', '.join(box)}"
    able = [kind for kind in box if not workload.kinds or kind in workload.kinds]
    if not able and closed:
        return "; ".join(f"it cannot run on {kind}: {why}" for kind, why in closed.items())
    for name, share, usual in (
        ("guaranteed", workload.guaranteed, 0.0),
        ("limit", workload.limit, 1.0),
    ):
        why = _problem(name, share, usual, able)
        if why:
            return why
    for kind in able:
        guaranteed, limit = share_on(workload.guaranteed, kind), share_on(workload.limit, kind)
        if guaranteed > limit:
            return f"guaranteed is {guaranteed:g} of {kind}, more than its limit of {limit:g}"
    return ""


def _problem(name: str, share: Share, usual: float, able: Sequence[str]) -> str:
    if isinstance(share, dict):
        for kind in share:
            if kind not in able:
                return f"{name}: it cannot run on {kind!r}; it can on {', '.join(able)}"
        return ""
    if share != usual and len(able) > 1:
        example = ", ".join(f"{kind}: {share:g}" for kind in able)
        return (
            f"{name}: it can run on {' or '.join(able)}; say how much of which, such as "
            f"{{{example}}}, or name one of them in kinds"
        )
    return ""


def promised(workloads: Iterable[Workload], kind: str) -> float:
    """The sum of what workloads are guaranteed of a kind of device."""
    return sum(share_on(w.guaranteed, kind) for w in workloads if not w.kinds or kind in w.kinds)
