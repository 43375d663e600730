"""Who holds what, by the checkpoint: the last line of defence against one device for two pods.

A pod that was deleted by force may still run while the scheduler gives its devices to another.
Until the kubelet has its claim unprepared, what it holds stays its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from cotenant.domain.errors import InvalidRequest
from cotenant.kube.checkpoint import Entry, Promise

_WHOLE: Final = 1.0 + 1e-9
"""Of a device's time; shares are hundredths, whose sum may be off by an ulp or so."""


def check(entry: Entry, others: Iterable[Entry]) -> None:
    """Raises InvalidRequest, which names the holder, if one of ``others`` has what ``entry`` is to
    get: a device that was allocated whole, time beside units of the same silicon, or more than
    all of a device's time."""
    others = [other for other in others if other.uid != entry.uid]
    for mine in entry.promises:
        sharing: list[Entry] = []
        total = mine.reservation.share
        for other in others:
            for theirs in other.promises:
                if device := _both(mine, theirs):
                    raise InvalidRequest(_taken(device, entry.pool, [other]))
                if _time(mine) and _time(theirs) and _same(mine, theirs):
                    sharing.append(other)
                    total += theirs.reservation.share
        if total > _WHOLE and sharing:
            raise InvalidRequest(_taken(mine.results[0].device, entry.pool, sharing))


def _both(mine: Promise, theirs: Promise) -> str:
    """A device that cannot be had by both; "" if there is none."""
    if _same(mine, theirs) and _time(mine) != _time(theirs):
        return mine.results[0].device
    whole = {result.device for result in theirs.results if not result.share_id}
    others = {result.device for result in theirs.results}
    for result in mine.results:
        if result.device in whole or (not result.share_id and result.device in others):
            return result.device
    return ""


def _same(mine: Promise, theirs: Promise) -> bool:
    return mine.reservation.device == theirs.reservation.device


def _time(promise: Promise) -> bool:
    return promise.reservation.share > 0


def _taken(device: str, pool: str, holders: list[Entry]) -> str:
    names = ", ".join(f"{h.namespace}/{h.name} ({h.uid})" for h in holders)
    return (
        f"device {device} of pool {pool} is still prepared for claim {names}; it is free once the"
        " kubelet has that unprepared, which is when its pod has ended on this node"
    )
