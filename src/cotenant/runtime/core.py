"""The loop between world and policy: events in, actions carried out, both journaled.

``feed`` runs the dispatcher and its actions at once, in the same turn of the event loop. What
carrying out an action brings about (a revocation that is done when the call returns) is fed
back in order, never from within. Where a device may block, the answer comes in a later turn; a
batch is sent to its worker only once that is bound to its partition.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import DeviceSpec, Partition
from cotenant.domain.units import MS, S
from cotenant.policy.dispatcher import Dispatcher
from cotenant.runtime.fleet import Fleet
from cotenant.telemetry.journal import Journal
from cotenant.telemetry.monitor import Monitor

log = logging.getLogger("cotenant.node")
Clock = Callable[[], int]


def steady(clock: Clock) -> Clock:
    """The clock, going on from where it was if it ever jumps back: deadlines are made from it
    and compared with the dispatcher's time, which never goes back either."""
    last = lead = 0

    def now() -> int:
        nonlocal last, lead
        at = clock() + lead
        if at < last:
            lead += last - at
            at = last
        last = at
        return at

    return now


class Hands(Protocol):
    """The node's part of carrying actions out."""

    def on_dispatch(self, action: a.Dispatch, partition: Partition) -> None:
        """Send a batch to its worker, which is bound to the partition."""

    def on_recall(self, action: a.Recall) -> None:
        """Tell a worker that a lease is over."""

    def on_emit(self, action: a.Emit) -> None:
        """Send what unfinished requests emitted."""

    def on_complete(self, action: a.Complete) -> None:
        """Answer requests with their results."""

    def on_reject(self, action: a.Reject) -> None:
        """Answer a request with a refusal."""

    def on_load(self, action: a.Load) -> None:
        """Make an instance ready."""

    def on_unload(self, action: a.Unload) -> None:
        """End an instance."""

    def on_resize(self, action: a.Resize) -> None:
        """Tell a worker how large its pool may be."""

    def on_serve(self, action: a.Serve) -> None:
        """Note which version is the current one."""

    def on_decline(self, action: a.Decline) -> None:
        """Note that a version is not to serve."""

    def on_start(self, action: a.Start) -> None:
        """Start a job, or let it go on."""

    def on_stop(self, action: a.Stop) -> None:
        """Stop a job."""


class Core:
    """Dispatcher, devices, monitor and journal joined."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        fleet: Fleet,
        monitor: Monitor,
        journal: Journal | None,
        hands: Hands,
        clock: Clock,
    ) -> None:
        self.dispatcher = dispatcher
        self.fleet = fleet
        fleet.astray = self._strayed
        fleet.respecified = self._respecified
        self.monitor = monitor
        self.journal = journal
        self.clock = clock
        self._hands = hands
        self._partitions: dict[str, Partition] = {}
        self._inbox: deque[e.Event] = deque()
        self._feeding = False
        self._timer: asyncio.TimerHandle | None = None
        self._carry_out: dict[type, Callable[[Any], None]] = {
            a.Dispatch: self._dispatch,
            a.Recall: hands.on_recall,
            a.Emit: hands.on_emit,
            a.Complete: hands.on_complete,
            a.Reject: hands.on_reject,
            a.Grant: self._grant,
            a.Revoke: self._revoke,
            a.Load: hands.on_load,
            a.Unload: hands.on_unload,
            a.Resize: hands.on_resize,
            a.Serve: hands.on_serve,
            a.Decline: hands.on_decline,
            a.Start: hands.on_start,
            a.Stop: hands.on_stop,
            a.Repartition: self._repartition,
            a.WakeAt: self._wake_at,
        }

    def feed(self, event: e.Event) -> None:
        """Hand an event to the dispatcher and carry out what it decides."""
        self._inbox.append(event)
        if self._feeding:
            return
        self._feeding = True
        try:
            while self._inbox:
                self._step(self._inbox.popleft())
        finally:
            self._feeding = False

    def _step(self, event: e.Event) -> None:
        now = self.clock()
        actions = self.dispatcher.handle(now, event)
        if self.journal is not None:
            self.journal.append(now, event, actions)
        self.monitor.observe(now, event, actions)
        for action in actions:
            self._carry_out[type(action)](action)

    def close(self) -> None:
        """No further wake-ups."""
        if self._timer is not None:
            self._timer.cancel()

    # --- carrying out -----------------------------------------------------------------------

    def _dispatch(self, action: a.Dispatch) -> None:
        partition = self._partitions[action.partition]
        self.fleet.bind(action.worker, partition, action, self._bound, self._unbound)

    def _bound(self, action: a.Dispatch, _: None) -> None:
        if action.batch.id in self.dispatcher.state.running:  # else it was given up meanwhile
            self._hands.on_dispatch(action, self._partitions[action.partition])

    def _unbound(self, action: a.Dispatch, why: str) -> None:
        self._failed("Dispatch", str(action.batch.id), "", why)

    def _grant(self, action: a.Grant) -> None:
        partition = self._partitions[action.partition]
        self.fleet.grant(action.job, partition, action, self._granted, self._not_granted)

    def _granted(self, action: a.Grant, _: None) -> None:
        self.feed(e.Granted(action.job, action.partition))

    def _not_granted(self, action: a.Grant, why: str) -> None:
        self._failed("Grant", action.partition, action.job, why)

    def _revoke(self, action: a.Revoke) -> None:
        partition = self._partitions[action.partition]
        self.fleet.revoke(action.job, partition, action, self._revoked, self._not_revoked)

    def _revoked(self, action: a.Revoke, took_ns: int) -> None:
        self.feed(e.Revoked(action.job, action.partition, took_ns))

    def _not_revoked(self, action: a.Revoke, why: str) -> None:
        self._failed("Revoke", action.partition, action.job, why)

    def _strayed(self, job: str, partition: str, why: str) -> None:
        self._failed("Revoke", partition, job, why)

    def _respecified(self, spec: DeviceSpec) -> None:
        self.feed(e.DeviceChanged(spec))

    def _repartition(self, action: a.Repartition) -> None:
        self.fleet.repartition(
            action.device, action.partitions, action, self._repartitioned, self._not_repartitioned
        )

    def _repartitioned(self, action: a.Repartition, _: None) -> None:
        others = {n: p for n, p in self._partitions.items() if p.device != action.device}
        self._partitions = others | {p.id: p for p in action.partitions}
        self.feed(e.Repartitioned(action.device, action.version))

    def _not_repartitioned(self, action: a.Repartition, why: str) -> None:
        self._failed("Repartition", action.device, "", why)

    def _failed(self, action: str, target: str, job: str, why: str) -> None:
        log.warning("device refused", extra={"action": action, "target": target, "why": why})
        self.feed(e.ActionFailed(action, target, job, why))

    def _wake_at(self, action: a.WakeAt) -> None:
        if self._timer is not None:
            self._timer.cancel()
        # Loop timers may be as coarse as a millisecond; early would only mean again.
        wait_ms = max(0, -(-(action.at - self.clock()) // MS))
        self._timer = asyncio.get_running_loop().call_later(wait_ms * MS / S, self._woke)

    def _woke(self) -> None:
        self._timer = None
        self.feed(e.Woke())
