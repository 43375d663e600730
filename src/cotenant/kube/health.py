"""How the devices do that claims hold, for the kubelet, which shows it in the status of pods."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from cotenant.kube.checkpoint import Entry
from cotenant.kube.kubelet_protos import HEALTHY, UNHEALTHY, UNKNOWN

_MESSAGE: Final = 1024
"""Characters of a message that the kubelet keeps."""
_WORSE: Final = {HEALTHY: 0, UNKNOWN: 1, UNHEALTHY: 2}


class DeviceHealth(NamedTuple):
    """``health`` is a number of ``kubelet_protos``; ``message`` says why it is not healthy."""

    pool: str
    device: str
    health: int
    message: str = ""


def judged(
    entries: Iterable[Entry],
    status: Mapping[str, Any] | None,
    problems: Mapping[str, str],
    away: str = "",
) -> tuple[DeviceHealth, ...]:
    """Of the devices that ``entries`` hold. ``status`` is the node's; None where it does not
    answer, and ``away`` says why. ``problems`` are those of claims, by uid."""
    devices = {str(d["id"]): d for d in status.get("devices") or []} if status else {}
    found: dict[tuple[str, str], DeviceHealth] = {}
    for entry in entries:
        for promise in entry.promises:
            device = devices.get(promise.reservation.device)
            health, message = HEALTHY, ""
            if status is None:
                health, message = UNKNOWN, away
            elif device is None:
                health, message = UNHEALTHY, "the node no longer has it"
            elif device.get("trouble"):
                health, message = UNHEALTHY, str(device["trouble"])
            elif entry.uid in problems:
                health, message = UNHEALTHY, problems[entry.uid]
            for result in promise.results:
                key = entry.pool, result.device
                before = found.get(key)
                if before is None or _WORSE[health] > _WORSE[before.health]:
                    found[key] = DeviceHealth(*key, health, message[:_MESSAGE])
    return tuple(found[key] for key in sorted(found))


class Board:
    """What was judged last, for those who wait for another judgement."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._version = 0
        self._devices: tuple[DeviceHealth, ...] = ()

    def show(self, devices: tuple[DeviceHealth, ...]) -> None:
        """Wakes those who wait, if it is another judgement."""
        with self._changed:
            if devices != self._devices:
                self._devices = devices
                self._version += 1
                self._changed.notify_all()

    def look(self, seen: int, patience_s: float) -> tuple[int, tuple[DeviceHealth, ...]]:
        """The newest version and its devices, once it is another than ``seen``, or after a time."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != seen, patience_s)
            return self._version, self._devices
