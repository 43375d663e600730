"""Calls to one device. Their laws:

1. A call is answered exactly once, on the loop: ``done(tag, result)``, or ``failed(tag, why)`` if
   the device raises anything at all or does not answer within the time for that kind of call.
2. A device that is quick (``blocking = False``) is called and has answered when ``call`` returns.
   Any other is called on a thread of its own, one call after the other; its ``revoke`` calls,
   which wait for work to drain, have threads beside that.
3. Calls that name the same tenant are carried out in the order they came, except ``revoke`` calls
   of different partitions. A call whose time is over before it began is not made any more.
4. What succeeds after its time is taken back, before any later call for the same: a ``grant`` by
   ``revoke``, a ``repartition`` by the layout before it. Of an ``attach`` that failed the caller
   disposes with ``detach``, which has no time limit.
5. A device that hangs holds up nothing but calls to itself, not even the end of the node.
6. Looks are made on a thread of their own, evictions on another, one after the other: neither waits
   for the other, nor any call for them.

``tag`` is whatever tells who asked which call was answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from cotenant.devices.base import Device
from cotenant.domain.device import DeviceSpec, Partition, PreemptLevel, TenantFacts
from cotenant.domain.errors import CotenantError, DeviceError
from cotenant.runtime.lanes import Lane

log = logging.getLogger("cotenant.devices")
Answer = Callable[[Any, Any], None]
Subject = tuple[str, str]
"""Tenant and partition that a call is about, each "" where it is about none."""
Reply = tuple[Any, Answer, Answer]
"""``tag``, ``done`` and ``failed``."""

TIMEOUT_S: Final[Mapping[str, float]] = {
    "open": 120.0,
    "close": 10.0,
    "repartition": 60.0,
    "launch": 10.0,
    "attach": 30.0,
    "adopt": 10.0,
    "grant": 5.0,
    "revoke": 10.0,
    "bind": 5.0,
}
"""For a call to a device that may block, from the order to the answer. ``bind`` and ``grant`` are
part of what requests wait for; ``open`` and ``attach`` may load a driver; a ``revoke`` waits for
what is in flight."""
DRAINS = 4
"""Threads for ``revoke`` calls of a device that may block."""
LATE_S = 10.0
"""After so long a look hangs, and that is said."""
LOOK_S = 5.0
"""How long the end waits for a look at a device, and an eviction, that are under way."""


class _Call:
    """One call to a device that may block."""

    def __init__(self, kind: str, args: tuple[Any, ...], subject: Subject, reply: Reply) -> None:
        self.kind = kind
        self.args = args
        self.tenant, self.partition = subject
        self.tag, self.done, self.failed = reply
        self.timer: asyncio.TimerHandle | None = None
        self.submitted = False
        self.begun = False
        self.dropped = False
        """Its time was over before a thread had begun it."""
        self.answered = False
        self.undoing = False
        self.lost = False
        """What takes it back hangs."""

    @property
    def awaited(self) -> bool:
        """Whether there is to be an answer yet."""
        return self.timer is not None and not self.answered

    def goes_before(self, other: _Call) -> bool:
        """Whether ``other``, which came later, must wait for it."""
        alike = not self.partition or not other.partition or self.partition == other.partition
        return self.tenant == other.tenant and alike

    def settle(self) -> None:
        """It is answered now."""
        self.answered = True
        if self.timer is not None:
            self.timer.cancel()


class Caller:
    """See the module's text. Made and used on the loop."""

    def __init__(
        self,
        device: Device,
        timeouts_s: Mapping[str, float] = TIMEOUT_S,
        astray: Callable[[str, str, str], None] = lambda *_: None,
        changed: Callable[[str, str, PreemptLevel], None] = lambda *_: None,
    ) -> None:
        """``astray``: called with a tenant, a partition and why, where what succeeded too late
        could not be taken back. ``changed``: with a tenant, the device and the tenant's level,
        where a look found another than before."""
        self.device = device
        self._astray = astray
        self._changed = changed
        self.spec: DeviceSpec | None = None
        self.levels: dict[str, PreemptLevel] = {}
        """Of the tenants that are attached."""
        self.facts: dict[str, TenantFacts] = {}
        """What was seen of them at the last look."""
        self.layout: tuple[Partition, ...] = ()
        self._timeouts_s = timeouts_s
        self._quick = not device.blocking
        self._line: list[_Call] = []
        """Calls that have not returned, in the order they came."""
        self._lock = threading.Lock()
        """Whether a call has begun or is dropped is decided under it."""
        self._looking = False
        self._looked_at = 0.0
        self.trouble = ""
        """Why the last look failed, or that it hangs."""
        self._evicting: set[str] = set()
        self._looks = Lane("cotenant-look")
        self._evictions = Lane("cotenant-evict")
        self._calls = None if self._quick else Lane("cotenant-device")
        self._drains = None if self._quick else Lane("cotenant-drain", DRAINS)
        self._loop = asyncio.get_running_loop()

    @property
    def name(self) -> str:
        """What the device is called in messages."""
        return self.spec.id if self.spec is not None else type(self.device).__name__

    async def open(self) -> DeviceSpec:
        """Open the device; raises DeviceError."""
        try:
            await self.ask("open", ())
        except DeviceError:
            self._end()
            raise
        self.spec = self.device.spec
        return self.spec

    async def close(self) -> None:
        """Wait for the calls under way, within the time for this one, and close the device."""
        end = self._loop.time() + self._timeouts_s["close"]
        while self._loop.time() < end and any(call.awaited for call in self._line):
            await asyncio.sleep(0.005)
        for call in [call for call in self._line if call.awaited]:
            self._expire(call)
        beside = (self._looks, self._evictions)
        for lane in beside:
            lane.close()
        await asyncio.gather(*(asyncio.to_thread(lane.join, LOOK_S) for lane in beside))
        try:
            await self.ask("close", ())
        except DeviceError as error:
            log.error("device not closed", extra={"why": str(error)})
        self._end()

    def _end(self) -> None:
        for lane in (self._looks, self._evictions, self._calls, self._drains):
            if lane is not None:
                lane.close()

    # --- calls ------------------------------------------------------------------------------

    async def ask(self, kind: str, args: tuple[Any, ...], subject: Subject = ("", "")) -> Any:
        """The result of a call; raises DeviceError."""
        future: asyncio.Future[Any] = self._loop.create_future()
        self.call(kind, args, subject, (future, fulfil, refuse))
        return await future

    def call(self, kind: str, args: tuple[Any, ...], subject: Subject, reply: Reply) -> None:
        """Call the device's method ``kind`` with ``args``."""
        if self._quick:
            tag, done, failed = reply
            try:
                result = getattr(self.device, kind)(*args)
            except Exception as error:
                failed(tag, self._said(kind, error))
                return
            done(tag, result)
            return
        call = _Call(kind, args, subject, reply)
        if kind in self._timeouts_s:
            call.timer = self._loop.call_later(self._timeouts_s[kind], self._expire, call)
        self._line.append(call)
        self._begin()

    def _begin(self) -> None:
        """Hand over every call that need not wait for one before it."""
        for index, call in enumerate(self._line):
            if call.submitted or any(before.goes_before(call) for before in self._line[:index]):
                continue
            call.submitted = True
            self._submit(call, call.kind, call.args)

    def _submit(self, call: _Call, kind: str, args: tuple[Any, ...]) -> None:
        lane = self._drains if kind == "revoke" else self._calls
        assert lane is not None
        lane.submit(partial(self._carry_out, call, kind, args))

    def _carry_out(self, call: _Call, kind: str, args: tuple[Any, ...]) -> None:
        """On a thread."""
        with self._lock:
            if call.dropped:
                return
            call.begun = True
        result, why = None, ""
        try:
            result = getattr(self.device, kind)(*args)
        except BaseException as error:
            why = self._said(kind, error)
        self._post(self._finish, call, result, why)

    def _finish(self, call: _Call, result: Any, why: str) -> None:
        if call.answered and not call.undoing and not why and self._undo(call):
            return
        if call.lost:
            return
        if call.undoing:
            call.settle()
            if why:
                self._not_undone(call, why)
        self._line.remove(call)
        self._begin()
        if call.answered:
            return
        call.settle()
        if why:
            call.failed(call.tag, why)
        else:
            call.done(call.tag, result)

    def _undo(self, call: _Call) -> bool:
        """Take back what succeeded too late, in its place in the line; whether there is need."""
        undo: dict[str, tuple[str, tuple[Any, ...]]] = {
            "grant": ("revoke", call.args),
            "repartition": ("repartition", (self.layout,)),
        }
        if call.kind not in undo:
            return False
        log.warning("late, taken back", extra={"call": call.kind, "tenant": call.tenant})
        call.undoing = True
        kind, args = undo[call.kind]
        if kind in self._timeouts_s:
            call.timer = self._loop.call_later(self._timeouts_s[kind], self._lose, call)
        self._submit(call, kind, args)
        return True

    def _lose(self, call: _Call) -> None:
        """What takes it back hangs: nothing is to wait for it."""
        call.lost = True
        self._line.remove(call)
        self._begin()
        self._not_undone(call, "no answer in time")

    def _not_undone(self, call: _Call, why: str) -> None:
        log.error("a late call was not taken back", extra={"call": call.kind, "why": why})
        if call.tenant:
            self._astray(call.tenant, call.partition, why)

    def _expire(self, call: _Call) -> None:
        """Its time is over."""
        with self._lock:
            call.dropped = not call.begun
        if call.dropped:
            self._line.remove(call)
            self._begin()
        call.settle()
        call.failed(call.tag, f"{self.name}: no answer to {call.kind} in time")

    # --- looks ------------------------------------------------------------------------------

    def look(self) -> None:
        """Have the device look again at its tenants (``refresh``, ``facts``), beside everything
        else; while it has not done with the last look it is left alone."""
        now = self._loop.time()
        if not self._looking:
            self._looking, self._looked_at = True, now
            self._looks.submit(self._look)
        elif now - self._looked_at > LATE_S and not self.trouble:
            self._in_trouble(f"it has not answered for {LATE_S:g} s")

    def _look(self) -> None:
        """On a thread."""
        facts, why = self.facts, ""
        try:
            self.device.refresh()
            facts = self.device.facts()
        except BaseException as error:  # on a thread, so it is the device's, whatever it is
            why = self._said("refresh", error)
        self._post(self._looked, facts, why)

    def _looked(self, facts: dict[str, TenantFacts], why: str) -> None:
        self._looking, self.facts = False, facts
        self._in_trouble(why)
        for tenant, seen in facts.items():
            level = seen.level
            if level is not None and self.levels.get(tenant, level) is not level:
                self.levels[tenant] = level
                self._changed(tenant, self.name, level)

    def _in_trouble(self, why: str) -> None:
        if why and why != self.trouble:
            log.warning("device does not answer", extra={"device": self.name, "why": why})
        self.trouble = why

    def evict(self, job: str, size: int) -> None:
        """Have the device take memory back from a job, beside everything else; not while it does
        so already, or is to. What came of it the next look shows."""
        if job not in self._evicting:
            self._evicting.add(job)
            self._evictions.submit(partial(self._evict, job, size))

    def _evict(self, job: str, size: int) -> None:
        """On a thread."""
        try:
            self.device.evict(job, size)
        except BaseException as error:
            log.warning("not evicted", extra={"job": job, "why": self._said("evict", error)})
        self._post(self._evicting.discard, job)

    # --- threads ----------------------------------------------------------------------------

    def _post(self, callback: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(callback, *args)

    def _said(self, kind: str, error: BaseException) -> str:
        """A failure in words; what no device should raise is logged with where it came from."""
        if isinstance(error, CotenantError):
            return str(error) or type(error).__name__
        log.error("device raised", extra={"device": self.name, "call": kind}, exc_info=error)
        return f"{self.name}: {type(error).__name__}: {error}"


def fulfil(future: asyncio.Future[Any], result: Any) -> None:
    """``done`` for who waits for a future."""
    if not future.done():
        future.set_result(result)


def refuse(future: asyncio.Future[Any], why: str) -> None:
    """``failed`` for who waits for a future: it raises DeviceError."""
    if not future.done():
        future.set_exception(DeviceError(why))
