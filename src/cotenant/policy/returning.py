"""When a service that is silent will be wanted again.

A silence is a time without arrivals that is long against what it takes to load the model. Its mean
length and mean deviation are smoothed as those of round trips are (Jacobson, SIGCOMM 1988).
"""

from __future__ import annotations

from typing import Final

from cotenant.policy.memory.account import UNLOAD_BEYOND
from cotenant.policy.state import DispatcherState, ServiceState, WorkerState

GAIN: Final = 4
"""A new silence counts 1/GAIN."""
LOAD_WITHIN: Final = 2
"""An instance is loaded again so many load times before it is expected to be wanted."""


def note_silence(service: ServiceState, now: int) -> None:
    """Requests come again."""
    length = now - service.last_arrival
    if not service.last_arrival or length <= UNLOAD_BEYOND * service.load_ns:
        return
    if not service.silence:
        service.silence, service.silence_dev = length, length // 2
        return
    error = length - service.silence
    service.silence += error // GAIN
    service.silence_dev += (abs(error) - service.silence_dev) // GAIN


def idles(state: DispatcherState, worker: WorkerState) -> bool:
    """Whether an instance that may be unloaded has had nothing to do for long against what it takes
    to load it. One that nobody has asked yet makes way at once, so that all are loaded once and
    seen to work; and so does one of another version than what its service waits for."""
    service = state.services[worker.service]
    if not service.unloads or worker.batch:
        return False
    if any(resident.worker == worker.id for resident in state.residents.values()):
        return False
    for lane in service.lanes.values():
        if lane.live and (lane.version or service.version) == worker.version:
            return False
    for other in state.workers.values():
        if other.service == service.name and other.pending and other.device == worker.device:
            return other.version != worker.version or other.revision != worker.revision
    last = service.last_arrival
    return not last or state.now - last > UNLOAD_BEYOND * service.load_ns


def loaded_in(state: DispatcherState, service: ServiceState, now: int) -> int:
    """In how many ns a service that was asleep has an instance again; below 0: nobody knows."""
    if not service.unloads or not service.load_ns:
        return -1
    soonest = service.load_ns if any(service.asleep.values()) else -1
    for worker in state.workers.values():
        if worker.pending and not worker.coming:
            continue
        if worker.service == service.name and not (worker.up or worker.rests):
            begun = now + worker.waits_ns if worker.pending else worker.since
            left = max(0, begun + service.load_ns - now)
            soonest = left if soonest < 0 else min(soonest, left)
    return soonest


def expected(service: ServiceState, now: int) -> int:
    """When (ns) requests are expected, rather too early; 0 if there is no telling, or if they were
    expected and did not come."""
    if not service.silence:
        return 0
    soonest = service.last_arrival + service.silence - service.silence_dev
    latest = service.last_arrival + service.silence + 2 * service.silence_dev
    return 0 if now > latest else max(now, soonest)
