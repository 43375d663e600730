"""The warm instances of one service: loaded, checked, ended, as the dispatcher orders.

Which version is loaded on which device, when a version takes over and when who died is loaded
again, is the dispatcher's to say (``cotenant.policy.residency``). Here an order becomes a process,
and what becomes of that an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import Any, Protocol

import msgspec

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.config import ModelSettings
from cotenant.domain.device import DeviceSpec, Launch, Tenant, TenantKind
from cotenant.domain.errors import DeviceError, EnvironmentProblem, ModelError
from cotenant.domain.profile import ModelProfile
from cotenant.domain.units import S, format_duration
from cotenant.domain.workload import ORIGINAL, Joining, ServiceSpec
from cotenant.engines.accuracy import Accuracy
from cotenant.engines.base import EngineMeta
from cotenant.engines.placement import told
from cotenant.runtime.arena import Arena
from cotenant.runtime.messages import (
    Done,
    Failed,
    Forget,
    FromWorker,
    Held,
    Open,
    Opened,
    OpenFailed,
    Recall,
    Resize,
    Run,
)
from cotenant.runtime.process import WorkerProcess
from cotenant.runtime.repository import ModelFiles, Stamp, VariantFiles, stamp
from cotenant.runtime.variants import Variants

log = logging.getLogger("cotenant.models")

LOAD_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0
NO_STAMP = Stamp(())
"""Of a version that is declined for now, whatever its files."""
Notes = tuple[str, ...]
UNJOINED = "requests run one by one: {} (docs: batch.joining)"


class Shell(Protocol):
    """What the instances of a service need of the node."""

    def now(self) -> int:
        """The node's clock, ns."""

    def feed(self, event: e.Event) -> None:
        """Hand an event to the dispatcher."""

    async def launch_worker(self, device: str, place: str, tenant: Tenant) -> Launch:
        """What the device wants of a process before there is one; ``place``: the partition that it
        is to be bound to, if to any. Raises DeviceError."""

    async def attach_worker(self, device: str, tenant: Tenant, pid: int) -> None:
        """Put a new process under the device's control. Raises DeviceError."""

    def detach_worker(self, device: str, worker: str) -> None:
        """Tell the device that a process is gone, attached or not."""

    def units_of(self, device: str, place: str) -> tuple[int, ...]:
        """The unit counts of partitions where an instance may run."""

    def partitions_of(self, device: str) -> tuple[tuple[int, ...], ...]:
        """The units of a device's partitions on which services may run now."""

    def specs(self) -> tuple[DeviceSpec, ...]:
        """The devices that the box has."""

    def kv_of(self, device: str) -> int:
        """Bytes that the pools of language models may have on a device together; 0: no bound."""

    def on_result(self, message: Done | Failed) -> None:
        """A batch came back."""

    async def unload(self, name: str) -> None:
        """Drain and unload a service; raises NotFound."""


class Loaded(msgspec.Struct, frozen=True):
    """A version that is being served."""

    files: ModelFiles
    settings: ModelSettings
    meta: EngineMeta
    accuracy: Accuracy | None
    notes: tuple[str, ...] = ()
    """What its owner should know."""


class Offer(msgspec.Struct):
    """A version that was offered to the dispatcher, as ``revision``, and what its instances told
    of it so far."""

    files: ModelFiles
    settings: ModelSettings
    revision: int
    profiles: tuple[ModelProfile, ...] = ()
    """What was measured of it before, by kind of device."""
    opened: Opened | None = None
    faulty: bool = False
    """Whether an instance failed by the file's fault: else it is tried again."""
    outcome: asyncio.Future[None] = msgspec.field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    """Done once it serves; a ModelError where it does not."""


class _Instance:
    """One worker process and what it is doing."""

    def __init__(self, order: a.Load, process: WorkerProcess, tenant: Tenant) -> None:
        self.order = order
        self.process = process
        self.tenant = tenant
        self.opened: asyncio.Future[Opened] = asyncio.get_running_loop().create_future()
        self.announced = False
        self.gone = asyncio.Event()
        self.batches: dict[int, int] = {}
        """Batches under way or at hand: id to when it was dispatched or, if that is later, when
        the one before it was done (the node's clock, ns)."""


class Instances:
    """See the module's text."""

    def __init__(self, spec: ServiceSpec, arena: Arena, logs: Path, shell: Shell) -> None:
        self.spec = spec
        self.arena = arena
        self.loaded: dict[str, Loaded] = {}
        """Versions that serve, oldest first."""
        self.offers: dict[int, Offer] = {}
        """What was offered, by revision, as long as instances of it may be ordered."""
        kinds = tuple(dict.fromkeys(device.kind for device in shell.specs()))
        self.variants = Variants(spec.name, kinds, shell.feed)
        self.refused: dict[str, tuple[Stamp, str]] = {}
        """Versions that were declined: which file, and why."""
        self._log_path = logs / f"{spec.name}.log"
        self._shell = shell
        self._revisions = 0
        self._live: dict[str, _Instance] = {}
        self._loads: dict[str, asyncio.Task[None]] = {}

    @property
    def current(self) -> Loaded | None:
        """The newest version that serves."""
        return next(reversed(self.loaded.values()), None)

    @property
    def loading(self) -> Offer | None:
        """The version that is being brought up."""
        return next((o for o in self.offers.values() if not o.outcome.done()), None)

    @property
    def live(self) -> int:
        """Instances of the current version that are up."""
        current = self.current
        if current is None:
            return 0
        version = current.files.version
        return sum(i.announced and i.order.version == version for i in self._live.values())

    # --- versions ---------------------------------------------------------------------------

    def offer(
        self,
        files: ModelFiles,
        settings: ModelSettings,
        variants: list[VariantFiles],
        profiles: tuple[ModelProfile, ...] = (),
    ) -> Offer:
        """Offer a version, which has these variants and of which so much was measured before, to
        the dispatcher, which answers with ``serve`` or ``decline``."""
        self._revisions += 1
        revision = self._revisions
        offer = self.offers[revision] = Offer(files, settings, revision, profiles)
        current = self.current
        joined = current is None or current.meta.shared
        self._announce_bounds(settings, joined, current.notes if current is not None else ())
        self.variants.tell(files.version, variants)
        foretold = tuple(map(_foretold, profiles))
        self._shell.feed(e.VersionOffered(self.spec.name, files.version, revision, foretold))
        return offer

    def serve(self, action: a.Serve) -> None:
        """A version takes over."""
        offer = self.offers[action.revision]
        opened = offer.opened
        assert opened is not None
        notes = self._notes(offer, opened)
        loaded = Loaded(offer.files, offer.settings, opened.meta, opened.accuracy, notes)
        self.loaded.pop(action.version, None)
        self.loaded[action.version] = loaded
        while len(self.loaded) > offer.settings.keep_versions:
            del self.loaded[next(iter(self.loaded))]
        self._forget_offers()
        self.refused.pop(action.version, None)
        self._announce_bounds(loaded.settings, loaded.meta.shared, notes)
        self._tell(loaded)
        if not offer.outcome.done():
            offer.outcome.set_result(None)

    def decline(self, action: a.Decline) -> None:
        """A version is not to serve."""
        offer = self.offers.pop(action.revision)
        refused = offer.files.stamp if offer.faulty else NO_STAMP
        self.refused[action.version] = refused, action.reason
        if not offer.outcome.done():
            offer.outcome.set_exception(ModelError(action.reason))
            offer.outcome.exception()

    def drop(self, version: str) -> None:
        """Serve a version no longer."""
        del self.loaded[version]
        self._shell.feed(e.VersionGone(self.spec.name, version))
        self._forget_offers()

    def _forget_offers(self) -> None:
        """Of what was offered keep what serves, and the last."""
        kept = [loaded.files for loaded in self.loaded.values()]
        last = max(self.offers, default=0)
        self.offers = {r: o for r, o in self.offers.items() if r == last or o.files in kept}
        self.variants.keep([o.files.version for o in self.offers.values()])

    def _check(self, offer: Offer, opened: Opened, variant: VariantFiles | None) -> None:
        """Raise ModelError if an instance that was loaded must not serve."""
        files = offer.files
        path, found_there = files.path, files.stamp
        if variant is not None and variant.path is not None:
            path, found_there = variant.path, variant.stamp
        if stamp(path) != found_there:
            raise ModelError(f"{path.name} was replaced while it was being loaded")
        loaded = self.loaded.get(files.version)
        if variant is not None and opened.unjoined and loaded and loaded.meta.batchable:
            raise ModelError(
                f"rows of requests can be joined in version {files.version}, and not in its "
                f"variant {variant.name}: {opened.unjoined}"
            )
        floor = max(self.spec.accuracy_floor, offer.settings.accuracy_floor)
        found = opened.accuracy
        if floor and found is not None and not found.value >= floor:
            raise ModelError(
                f"version {files.version} has an accuracy of {found.value:.4f} on its check "
                f"data ({found.how}), below the floor of {floor:g}"
            )
        current = self.current
        if current is None:
            return
        for kind in ("inputs", "outputs"):
            old = [(t.name, t.datatype) for t in getattr(current.meta, kind)]
            new = [(t.name, t.datatype) for t in getattr(opened.meta, kind)]
            if old != new:
                raise ModelError(
                    f"version {files.version} has other {kind} ({new}) than the version being "
                    f"served ({old}); unload the model first if that is meant"
                )

    def _tell(self, loaded: Loaded) -> None:
        """Log a version that serves, once, and what its owner should know."""
        found, said = loaded.accuracy, {"service": self.spec.name, "version": loaded.files.version}
        accuracy = {} if found is None else {"accuracy": found.value, "measured": found.how}
        log.info("version serves", extra={**said, **accuracy})
        for note in loaded.notes:
            log.warning("version serves, but", extra={**said, "note": note})

    def _notes(self, offer: Offer, opened: Opened) -> tuple[str, ...]:
        notes = list(opened.notes)
        if opened.unjoined and self.spec.batch.joining is not Joining.NONE:
            notes.append(UNJOINED.format(opened.unjoined))
        times = [ns for _, rows, ns in opened.profile if rows == 1]
        if times and min(times) > self.spec.slo.latency:
            took, objective = format_duration(min(times)), format_duration(self.spec.slo.latency)
            notes.append(
                f"one execution takes {took}, longer than the objective of {objective}: every "
                "answer will be late"
            )
        floor = max(self.spec.accuracy_floor, offer.settings.accuracy_floor)
        if offer.files.check is None and floor:
            notes.append("accuracy_floor has no effect: the version has no check.npz")
        return tuple(notes)

    def _announce_bounds(self, settings: ModelSettings, joined: bool, notes: Notes) -> None:
        """Tell the dispatcher what holds for the service from now on."""
        self._shell.feed(e.service_added(self.spec, joined, settings.keep_versions, notes))

    def _end_joining(self, version: str, why: str) -> None:
        """A worker found that rows of a version must not be joined."""
        old = self.loaded.get(version)
        if old is None or not old.meta.batchable:
            return
        meta = msgspec.structs.replace(old.meta, batchable=False)
        notes = (*old.notes, UNJOINED.format(why))
        loaded = self.loaded[version] = msgspec.structs.replace(old, meta=meta, notes=notes)
        self._announce_bounds(loaded.settings, meta.shared, notes)
        self._tell(loaded)

    # --- processes --------------------------------------------------------------------------

    def load(self, order: a.Load) -> None:
        """Make an instance ready; answered by ``WorkerUp`` or ``LoadFailed``."""
        task = self._loads[order.worker] = asyncio.create_task(self._load(order))

        def done(task: asyncio.Task[None]) -> None:
            del self._loads[order.worker]
            if task.cancelled():
                self._failed(order, "it was unloaded")
            elif (error := task.exception()) is not None:
                log.error("loading failed", extra={"worker": order.worker}, exc_info=error)
                self._failed(order, f"{type(error).__name__}: {error}")

        task.add_done_callback(done)

    async def _load(self, order: a.Load) -> None:
        offer = self.offers.get(order.revision)
        if offer is None:
            self._failed(order, "the version was taken back", final=True)
            return
        variant: VariantFiles | None = None
        try:
            if order.variant != ORIGINAL:
                variant = self.variants.files(order.version, order.variant)
            instance = await self._spawn(order, offer, variant)
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                opened = await instance.opened
            self._check(offer, opened, variant)
            pid = instance.process.pid
            await self._shell.attach_worker(order.device, instance.tenant, pid)
        except TimeoutError:
            offer.faulty = offer.faulty or variant is None
            why = f"version {order.version} did not load in {LOAD_TIMEOUT_S:g} s"
            self._failed(order, why)
        except ModelError as error:
            offer.faulty = offer.faulty or order.variant == ORIGINAL
            self._failed(order, str(error), final=_replaced(offer.files))
        except (DeviceError, EnvironmentProblem) as error:
            self._failed(order, str(error))
        else:
            self._announce(instance, offer, opened)

    def _failed(self, order: a.Load, why: str, final: bool = False) -> None:
        instance = self._live.get(order.worker)
        if instance is not None:
            instance.process.kill()
        extra = {"worker": order.worker, "version": order.version, "why": why}
        if order.variant != ORIGINAL:
            extra["variant"] = order.variant
        log.warning("instance not loaded", extra=extra)
        self._shell.feed(e.LoadFailed(order.worker, why, final))

    def _announce(self, instance: _Instance, offer: Offer, opened: Opened) -> None:
        order = instance.order
        if order.worker not in self._live:  # it died meanwhile
            self._failed(order, "its process died when it was loaded")
            return
        known = offer.opened
        if known is None or (opened.unjoined and not known.unjoined):
            offer.opened = opened  # rows are joined only if all instances find it right
        if opened.unjoined:
            self._end_joining(order.version, opened.unjoined)
        instance.announced = True
        self._shell.feed(
            e.WorkerUp(
                order.worker,
                order.service,
                order.version,
                order.device,
                opened.profile,
                opened.size,
                opened.memory,
                opened.meta.turns,
                opened.meta.room,
                opened.meta.pool,
                opened.meta.block,
            )
        )

    async def _spawn(self, order: a.Load, offer: Offer, variant: VariantFiles | None) -> _Instance:
        spec = self.spec
        path, settings = offer.files.path, offer.settings
        if variant is not None and variant.path is not None and variant.record is not None:
            path = variant.path
            settings = msgspec.structs.replace(settings, engine=variant.record.engine)
        tenant = Tenant(
            order.worker, TenantKind.WORKER, threads=spec.threads, exec_timeout=spec.exec_timeout
        )
        launch = await self._shell.launch_worker(order.device, order.partition, tenant)
        joining = spec.batch.joining
        loaded = self.loaded.get(order.version)
        if loaded is not None and loaded.files == offer.files:  # found out already
            joining = joining if loaded.meta.batchable else Joining.NONE
        process = WorkerProcess(
            order.worker,
            self.arena,
            self._log_path,
            on_message=lambda message: self._on_message(instance, message),
            on_exit=lambda code: self._on_exit(instance, code),
        )
        instance = _Instance(order, process, tenant)
        process.start(launch)
        self._live[order.worker] = instance
        units, limit = self._shell.units_of(order.device, order.partition), spec.kv.limit
        process.send(
            Open(
                path=str(path),
                units=tuple(u for u in units if u <= (spec.threads or u)) or (1,),
                max_batch=spec.batch.max,
                check=str(offer.files.check) if offer.files.check is not None else "",
                settings=settings,
                joining=joining,
                kv=min(limit, self._shell.kv_of(order.device) or limit),
                partitions=self._shell.partitions_of(order.device),
            )
        )
        return instance

    def _on_message(self, instance: _Instance, message: FromWorker) -> None:
        match message:
            case Opened():
                if not instance.opened.done():
                    instance.opened.set_result(message)
            case OpenFailed(reason=reason):
                if not instance.opened.done():
                    instance.opened.set_exception(ModelError(reason))
            case Held():
                worker = instance.order.worker
                self._shell.feed(e.Held(worker, *msgspec.structs.astuple(message)))
            case Done(batch=batch) | Failed(batch=batch):
                if isinstance(message, Done) and message.unjoined:
                    self._end_joining(instance.order.version, message.unjoined)
                if isinstance(message, Done) and message.more:
                    instance.batches[batch] = self._shell.now()
                    self._shell.on_result(message)
                    return
                instance.batches.pop(batch, None)
                if instance.batches:  # the one at hand begins now
                    instance.batches[next(iter(instance.batches))] = self._shell.now()
                self._shell.on_result(message)

    def _on_exit(self, instance: _Instance, code: int) -> None:
        worker = instance.order.worker
        self._live.pop(worker, None)
        instance.gone.set()
        if not instance.opened.done():
            instance.opened.set_exception(
                ModelError(f"the worker died while loading the model (exit code {code})")
            )
            instance.opened.exception()  # looked at, should nobody else
        self._shell.detach_worker(instance.order.device, worker)
        if instance.announced:
            self._shell.feed(e.WorkerDown(worker, f"exit code {code}"))

    def unload(self, worker: str) -> None:
        """End an instance that has nothing to do, or is not ready yet."""
        task, instance = self._loads.get(worker), self._live.get(worker)
        if task is not None and not task.done():
            task.cancel()
        elif instance is not None:
            instance.process.close()

    # --- batches ----------------------------------------------------------------------------

    def send(self, worker: str, run: Run) -> bool:
        """Hand a batch to a worker; False if it is gone (its ``WorkerDown`` is on its way)."""
        instance = self._live.get(worker)
        if instance is None:
            return False
        instance.batches[run.batch] = run.sent
        instance.process.send(run)
        return True

    def recall(self, worker: str, batch: int) -> None:
        """The lease of a batch is over."""
        instance = self._live.get(worker)
        if instance is not None and batch in instance.batches:
            instance.process.send(Recall(batch))

    def resize(self, worker: str, size: int) -> None:
        """The pool of an instance may have so many bytes."""
        instance = self._live.get(worker)
        if instance is not None:
            instance.process.send(Resize(size))

    def forget(self, worker: str, request: int) -> None:
        """A request that a worker keeps between turns has none any more."""
        instance = self._live.get(worker)
        if instance is not None:
            instance.process.send(Forget((request,)))

    def end_overdue(self, now: int) -> None:
        """Kill instances whose batch runs longer than ``exec_timeout``. ``now`` in ns."""
        for instance in self._live.values():
            oldest = min(instance.batches.values(), default=now)
            if now - oldest > self.spec.exec_timeout:
                log.warning(
                    "batch overdue, ending its worker",
                    extra={
                        "worker": instance.order.worker,
                        "after_s": self.spec.exec_timeout / S,
                    },
                )
                instance.process.kill()

    def engines(self) -> list[dict[str, Any]]:
        """What opened each instance that is up, what that says of the model's operators, the times
        (ns) that its warm-up measured, by units and rows, what was measured before on such a
        device, and which other engines there are for such files."""
        found: list[dict[str, Any]] = []
        kinds = {spec.id: spec.kind for spec in self._shell.specs()}
        for name, instance in self._live.items():
            if instance.announced:
                opened, order = instance.opened.result(), instance.order
                found.append(
                    {
                        "instance": name,
                        "device": order.device,
                        "variant": order.variant,
                        "engine": opened.engine,
                        "executed": told(opened.executed),
                        "measured": list(opened.profile),
                        "profile": self._profiled(order, kinds[order.device]),
                        "others": [
                            {"engine": other.name, "refusal": other.refusal}
                            for other in opened.candidates
                            if other.name != opened.engine
                        ],
                    }
                )
        return found

    def _profiled(self, order: a.Load, kind: str) -> dict[str, Any] | None:
        """What ``cotenant profile`` had found of the original on a kind of device when this version
        was offered."""
        offer = self.offers.get(order.revision)
        there = () if offer is None or order.variant != ORIGINAL else offer.profiles
        known = next((profile for profile in there if profile.kind == kind), None)
        if known is None:
            return None
        return {
            "kind": known.kind,
            "engine": known.engine,
            "device": known.device,
            "emulated": known.emulated,
            "date": known.date,
            "measured": list(known.table),
        }

    def pids(self) -> list[int]:
        """Process ids of all live instances."""
        return [i.process.pid for i in self._live.values()]

    async def close(self) -> None:
        """Stop everything: politely, then not."""
        loads = list(self._loads.values())
        for task in loads:
            task.cancel()
        await asyncio.gather(*loads, return_exceptions=True)
        ending = list(self._live.values())
        for instance in ending:
            if not instance.batches:
                instance.process.close()
        waiting = asyncio.gather(*(i.gone.wait() for i in ending))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting), STOP_TIMEOUT_S)
        for instance in ending:
            if not instance.gone.is_set():
                instance.process.kill()
        await waiting
        self.arena.close()


def _foretold(profile: ModelProfile) -> e.Foretold:
    times = tuple((f.size, f.units, f.rows, f.median_ns) for f in profile.figures)
    return e.Foretold(profile.kind, times, profile.memory_peak, profile.load_ns)


def _replaced(files: ModelFiles) -> bool:
    """Whether a version's files are not those that were found, or are gone."""
    try:
        return stamp(files.path) != files.stamp
    except ModelError:
        return True
