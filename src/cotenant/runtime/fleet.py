"""The devices of a box by id. Every call to one goes through here, and what becomes of it is told
exactly once (``cotenant.runtime.caller`` holds the laws).

``tag`` is whatever tells the caller which call was answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from cotenant.devices.base import Device
from cotenant.domain.device import (
    DeviceSpec,
    Launch,
    LayoutStep,
    Partition,
    PreemptLevel,
    Tenant,
)
from cotenant.domain.errors import DeviceError, EnvironmentProblem
from cotenant.domain.reservation import Adopted
from cotenant.runtime.caller import TIMEOUT_S, Caller, fulfil, refuse
from cotenant.runtime.rlimits import lower

log = logging.getLogger("cotenant.devices")
T = TypeVar("T")
Failed = Callable[[T, str], None]


class Fleet:
    """All methods are called on the loop; ``done`` and ``failed`` come on it, for a device that is
    not blocking before the method returns."""

    def __init__(
        self, devices: Sequence[Device], timeouts_s: Mapping[str, float] = TIMEOUT_S
    ) -> None:
        self._devices = devices
        self._timeouts_s = timeouts_s
        self._callers: dict[str, Caller] = {}
        self.astray: Callable[[str, str, str], None] = lambda *_: None
        """Called with a job, a partition and why, where the job came to be on the partition after
        the grant had failed, and could not be taken off it."""
        self.changed: Callable[[str, str, PreemptLevel], None] = lambda *_: None
        """Called with a tenant, a device and the level at which the tenant can be made to yield
        there from now on, where a look found another than before."""
        self.respecified: Callable[[DeviceSpec], None] = lambda _: None
        """Called with what a device says of itself, where that is another than before."""
        self.specs: tuple[DeviceSpec, ...] = ()
        """The devices, in the order given; once they are open, and as they are now."""

    # --- life -------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open the devices in order. Raises EnvironmentProblem; then none is left open."""
        for device in self._devices:
            caller = Caller(device, self._timeouts_s, self._stray, self._change)
            try:
                spec = await caller.open()
            except DeviceError as error:
                await self.close()
                raise EnvironmentProblem(str(error)) from error
            same = next((s for s in self.specs if s.hardware and s.hardware == spec.hardware), None)
            self._callers[spec.id] = caller
            self.specs = (*self.specs, spec)
            if same is not None:
                await self.close()
                raise EnvironmentProblem(
                    f"devices {same.id} and {spec.id} are one and the same: {spec.hardware}; give "
                    "each one of its own, or leave one of them out"
                )

    def _stray(self, tenant: str, partition: str, why: str) -> None:
        """To whoever listens by then."""
        self.astray(tenant, partition, why)

    def _change(self, tenant: str, device: str, level: PreemptLevel) -> None:
        """Likewise."""
        self.changed(tenant, device, level)

    async def close(self) -> None:
        """Wait for the calls under way, for a bounded time, and close the devices."""
        for caller in reversed(self._callers.values()):
            await caller.close()
        self._callers.clear()

    # --- looking ----------------------------------------------------------------------------

    def look(self) -> None:
        """Have every device look again at its tenants (``refresh``, ``facts``), off the loop; and
        look what taking memory was seen to cost."""
        for caller in self._callers.values():
            caller.look()
            known = caller.spec
            if known is None or not known.evicts:
                continue
            if caller.device.spec.eviction != known.eviction:
                self._look_at(caller)

    def memory(self, device: str) -> dict[str, int]:
        """Resident memory there in bytes by tenant, as of the last look."""
        return {name: facts.memory for name, facts in self._callers[device].facts.items()}

    def evictable(self, device: str) -> dict[str, int]:
        """Of each tenant's memory there, as of the last look, what the device could take back."""
        caller = self._callers[device]
        if caller.spec is None or not caller.spec.evicts:
            return {}
        return {
            name: facts.memory if facts.evictable is None else min(facts.evictable, facts.memory)
            for name, facts in caller.facts.items()
        }

    def away(self, device: str) -> dict[str, int]:
        """Of each tenant's memory, what the device has taken and not brought back."""
        return {name: facts.away for name, facts in self._callers[device].facts.items()}

    def trouble(self, device: str) -> str:
        """Why it could not look at its tenants last; "" if it could."""
        return self._callers[device].trouble

    def evict(self, device: str, job: str, size: int) -> None:
        """See ``Device.evict``: off the loop. What came of it the next look shows."""
        self._callers[device].evict(job, size)

    def levels(self, device: str) -> dict[str, PreemptLevel]:
        """The level at which each tenant that is attached there can be made to yield."""
        return self._callers[device].levels

    # --- tenants ----------------------------------------------------------------------------

    async def launch(
        self, devices: Sequence[str], tenant: Tenant, partition: Partition | None = None
    ) -> Launch:
        """What all these devices together want of a process of the tenant. Raises DeviceError."""
        wanted = [
            await self._callers[device].ask("launch", (tenant, partition), (tenant.id, ""))
            for device in devices
        ]
        return _merged(wanted)

    def attach(
        self,
        devices: Sequence[str],
        tenant: Tenant,
        pid: int,
        tag: T,
        done: Callable[[T, dict[str, PreemptLevel]], None],
        failed: Failed[T],
    ) -> None:
        """Attach a tenant to all these devices: its level on each once all have it, or the first
        failure. In the end the caller detaches it from all, also after a failure."""
        levels: dict[str, PreemptLevel] = {}
        over = False
        if not devices:  # of a reservation that keeps services off, and nothing else
            done(tag, levels)

        def attached(device: str, level: PreemptLevel) -> None:
            self._callers[device].levels[tenant.id] = levels[device] = level
            if len(levels) == len(devices):
                done(tag, levels)

        def refused(_: str, why: str) -> None:
            nonlocal over
            if not over:
                over = True
                failed(tag, why)

        for device in devices:
            reply = (device, attached, refused)
            self._callers[device].call("attach", (tenant, pid), (tenant.id, ""), reply)

    async def attached(
        self, devices: Sequence[str], tenant: Tenant, pid: int
    ) -> dict[str, PreemptLevel]:
        """``attach`` for who can wait; raises DeviceError."""
        future: asyncio.Future[dict[str, PreemptLevel]]
        future = asyncio.get_running_loop().create_future()
        self.attach(devices, tenant, pid, future, fulfil, refuse)
        return await future

    def adopt(
        self,
        devices: Sequence[str],
        job: str,
        process: Adopted,
        tag: T,
        failed: Failed[T],
    ) -> None:
        """See ``Device.adopt``: on all these devices."""
        for device in devices:
            reply = (tag, lambda *_: None, failed)
            self._callers[device].call("adopt", (job, process), (job, ""), reply)

    def detach(self, devices: Sequence[str], tenant: str) -> None:
        """Have these devices forget a tenant, once all that was ordered for it is over."""
        for device in devices:
            caller = self._callers.get(device)
            if caller is None:
                continue  # it was closed, and has forgotten everybody
            reply = (tenant, partial(_detached, caller), partial(_not_detached, caller))
            caller.call("detach", (tenant,), (tenant, ""), reply)

    # --- partitions -------------------------------------------------------------------------

    def grant(
        self,
        job: str,
        partition: Partition,
        tag: T,
        done: Callable[[T, None], None],
        failed: Failed[T],
    ) -> None:
        """See ``Device.grant``."""
        caller, subject = self._callers[partition.device], (job, partition.id)
        caller.call("grant", (job, partition), subject, (tag, done, failed))

    def revoke(
        self,
        job: str,
        partition: Partition,
        tag: T,
        done: Callable[[T, int], None],
        failed: Failed[T],
    ) -> None:
        """See ``Device.revoke``."""
        caller, subject = self._callers[partition.device], (job, partition.id)
        caller.call("revoke", (job, partition), subject, (tag, done, failed))

    def bind(
        self,
        worker: str,
        partition: Partition,
        tag: T,
        done: Callable[[T, None], None],
        failed: Failed[T],
    ) -> None:
        """See ``Device.bind``."""
        caller, subject = self._callers[partition.device], (worker, partition.id)
        caller.call("bind", (worker, partition), subject, (tag, done, failed))

    def repartition(
        self,
        device: str,
        partitions: tuple[Partition, ...],
        tag: T,
        done: Callable[[T, None], None],
        failed: Failed[T],
    ) -> None:
        """See ``Device.repartition``."""
        caller = self._callers[device]

        def changed(tag: T, _: None) -> None:
            caller.layout = partitions
            self._look_at(caller)
            done(tag, None)

        def refused(tag: T, why: str) -> None:
            self._look_at(caller)
            failed(tag, why)

        caller.call("repartition", (partitions,), ("", ""), (tag, changed, refused))

    def _look_at(self, caller: Caller) -> None:
        """What a device says of itself may be something else now."""
        spec = caller.device.spec
        if spec != caller.spec:
            caller.spec = spec
            self.specs = tuple(spec if known.id == spec.id else known for known in self.specs)
            self.respecified(spec)

    def preview(self, device: str, partitions: tuple[Partition, ...]) -> tuple[LayoutStep, ...]:
        """See ``Device.preview``; raises DeviceError."""
        return self._callers[device].device.preview(partitions)

    def partition(self, name: str) -> Partition | None:
        """The partition of this id, of those that devices were given last."""
        layouts = (caller.layout for caller in self._callers.values())
        return next((p for layout in layouts for p in layout if p.id == name), None)


def _detached(caller: Caller, tenant: str, _: None) -> None:
    caller.levels.pop(tenant, None)


def _not_detached(caller: Caller, tenant: str, why: str) -> None:
    caller.levels.pop(tenant, None)
    log.warning("not detached", extra={"device": caller.name, "tenant": tenant, "why": why})


def _merged(launches: Sequence[Launch]) -> Launch:
    """All environments together (where two set a variable, or a cgroup, the later wins), the
    lower limits."""
    env: dict[str, str] = {}
    fixed: dict[str, str] = {}
    prepend: dict[str, str] = {}
    limits: dict[int, tuple[int, int]] = {}
    cgroup = ""
    for launch in launches:
        env |= launch.env
        fixed |= launch.fixed
        prepend |= launch.prepend
        cgroup = launch.cgroup or cgroup
        for number, (soft, hard) in launch.limits.items():
            first, second = limits.get(number, (soft, hard))
            limits[number] = (lower(soft, first), lower(hard, second))
    own_memory = bool(launches) and all(launch.own_memory for launch in launches)
    mounts = tuple(dict.fromkeys(path for launch in launches for path in launch.mounts))
    return Launch(env, limits, cgroup, fixed, prepend, own_memory, mounts)
