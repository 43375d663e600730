"""Memory of jobs: what they have is told the dispatcher, and what they are to give is asked for,
then taken.

A job that imports ``cotenant.on_memory`` is asked first: it knows what it can do without. What is
not there a while later the device takes, where it can.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from cotenant.domain import events as e
from cotenant.domain.costs import ASKED
from cotenant.domain.units import S
from cotenant.runtime.fleet import Fleet

ASKED_S: Final = ASKED / S
"""So long a job that can be asked has to give before it is taken from, and so long the device has
before it is told again."""
TELL: Final = 64
"""A job's memory, or what it can give, is told again once it has changed by 1/TELL, and by
``LEAST`` bytes."""
LEAST: Final = 2**20

log = logging.getLogger("cotenant.node")


class _Order:
    """A job is to have at most so many bytes."""

    def __init__(self, most: int, now: float) -> None:
        self.most = most
        self.take_at = now + ASKED_S
        self.said = False
        """Whether it was logged that it does not give."""


class JobGiving:
    """See the module's text. ``ask`` sends a job a message and says whether anybody there listens.
    All on the loop."""

    def __init__(
        self,
        fleet: Fleet,
        feed: Callable[[e.Event], None],
        ask: Callable[[str, int], bool],
    ) -> None:
        self._fleet = fleet
        self._feed = feed
        self._ask = ask
        self._orders: dict[str, _Order] = {}
        self._told: dict[str, tuple[int, int]] = {}
        """What each job has and can give, as told."""

    @property
    def _evicts(self) -> set[str]:
        """Devices that can take memory: what they say of it may change with their layout."""
        return {spec.id for spec in self._fleet.specs if spec.evicts}

    def order(self, job: str, most: int) -> None:
        """The job is to have at most so many bytes; below 0: as many as it may."""
        if most < 0:
            self._orders.pop(job, None)
            return
        order = self._orders.setdefault(job, _Order(most, time.monotonic()))
        order.most = most
        asked = self._ask(job, most)
        log.info("job is to give memory", extra={"job": job, "most": most, "asked": asked})

    def listens(self, job: str) -> None:
        """A program of the job can be asked from now on."""
        order = self._orders.get(job)
        if order is not None:
            self._ask(job, order.most)

    def gone(self, job: str) -> None:
        """The job's processes are gone, or are not to be looked at."""
        self._orders.pop(job, None)
        self._told.pop(job, None)

    def look(self, job: str, devices: Sequence[str], can_be_asked: bool) -> None:
        """Tell what a job has, as of the devices' last look, and see to what it is to give."""
        if any(job not in self._fleet.memory(device) for device in devices):
            return  # it was not looked at yet
        held = sum(self._fleet.memory(device)[job] for device in devices)
        takes = {device: self._fleet.evictable(device).get(job, 0) for device in devices}
        gives = sum(takes.values()) if self._evicts.issuperset(devices) else 0
        gives = held if can_be_asked else gives
        told, told_gives = self._told.get(job, (-2 * LEAST, 0))
        order = self._orders.get(job)
        done = order is not None and held <= order.most < told
        begins_or_ends = bool(gives) != bool(told_gives)
        if done or begins_or_ends or _differ(held, told) or _differ(gives, told_gives):
            self._told[job] = held, gives
            away = sum(self._fleet.away(device).get(job, 0) for device in devices)
            self._feed(e.Held(job, held, held + away, gives, 0))
        order = self._orders.get(job)
        if order is not None and held > order.most and time.monotonic() >= order.take_at:
            self._take(job, takes, held - order.most, order)

    def _take(self, job: str, takes: dict[str, int], size: int, order: _Order) -> None:
        """``takes``: what each of its devices could take back."""
        order.take_at = time.monotonic() + ASKED_S
        for device, most in takes.items():
            if most:
                self._fleet.evict(device, job, min(most, size // len(takes)))
        if not order.said and not all(takes.values()):
            order.said = True
            log.warning("job does not give what it was asked for", extra={"job": job})


def _differ(now: int, told: int) -> bool:
    return abs(now - told) > max(LEAST, told // TELL)
