"""The warm instances of one service: loading, checking, swapping versions, restarting.

A version serves when all its instances are loaded, profiled and checked; only then is it made
current and the version it replaces retired, each old instance ending after its last batch. A
version that fails any step is refused and the old one stays. An instance that dies is started
again with exponential back-off.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from pathlib import Path
from typing import Protocol

import msgspec

from cotenant.domain import events as e
from cotenant.domain.config import ModelSettings
from cotenant.domain.device import Launch, Tenant, TenantKind
from cotenant.domain.errors import DeviceError, EnvironmentProblem, ModelError
from cotenant.domain.units import S, format_duration
from cotenant.domain.workload import Joining, ServiceSpec
from cotenant.engines.accuracy import Accuracy
from cotenant.engines.base import EngineMeta
from cotenant.runtime.arena import Arena
from cotenant.runtime.messages import (
    Done,
    Failed,
    Forget,
    FromWorker,
    Open,
    Opened,
    OpenFailed,
    Run,
)
from cotenant.runtime.process import WorkerProcess
from cotenant.runtime.repository import ModelFiles, Stamp, stamp

log = logging.getLogger("cotenant.models")

LOAD_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0
BACKOFF_FIRST_S = 0.2
BACKOFF_MOST_S = 30.0
HEALTHY_AFTER_S = 60.0
"""An instance that lived this long starts over with the shortest back-off."""
NO_STAMP = Stamp(())
"""Of a version that is refused for now, whatever its files."""
UNJOINED = "requests run one by one: {} (docs: batch.joining)"


class Shell(Protocol):
    """What the instances of a service need of the node."""

    def now(self) -> int:
        """The node's clock, ns."""

    def feed(self, event: e.Event) -> None:
        """Hand an event to the dispatcher."""

    async def launch_worker(self, device: str, tenant: Tenant) -> Launch:
        """What the device wants of a process before there is one. Raises DeviceError."""

    async def attach_worker(self, device: str, tenant: Tenant, pid: int) -> None:
        """Put a new process under the device's control. Raises DeviceError."""

    def detach_worker(self, device: str, worker: str) -> None:
        """Tell the device that a process is gone, attached or not."""

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


class _Instance:
    """One worker process and what it is doing."""

    def __init__(self, process: WorkerProcess, tenant: Tenant, version: str, born: float) -> None:
        self.process = process
        self.tenant = tenant
        self.version = version
        self.born = born
        self.opened: asyncio.Future[Opened] = asyncio.get_running_loop().create_future()
        self.announced = False
        self.retiring = False
        self.gone = asyncio.Event()
        self.batches: dict[int, int] = {}
        """Batches under way or at hand: id to when it was dispatched or, if that is later, when
        the one before it was done (the node's clock, ns)."""
        self.resident: set[int] = set()
        """Requests that have had a turn here, or are having one, and are not finished."""


class Instances:
    """See the module's text. ``units``: unit counts that partitions of ``device`` may have."""

    def __init__(
        self,
        spec: ServiceSpec,
        device: str,
        units: tuple[int, ...],
        arena: Arena,
        logs: Path,
        shell: Shell,
    ) -> None:
        self.spec = spec
        self.device = device
        self.arena = arena
        self.loaded: dict[str, Loaded] = {}
        """Versions that serve, oldest first."""
        self.loading = ""
        self.refused: dict[str, tuple[Stamp, str]] = {}
        """Versions that were refused: which file, and why."""
        self._units = units
        self._log_path = logs / f"{spec.name}.log"
        self._shell = shell
        self._live: dict[str, _Instance] = {}
        self._counter = 0
        self._failures = 0
        self._restarts: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def current(self) -> Loaded | None:
        """The newest version that serves."""
        return next(reversed(self.loaded.values()), None)

    @property
    def live(self) -> int:
        """Instances of the current version that are up."""
        current = self.current
        if current is None:
            return 0
        return sum(i.announced and i.version == current.files.version for i in self._ups())

    def _ups(self) -> list[_Instance]:
        return [i for i in self._live.values() if not i.retiring]

    # --- versions ---------------------------------------------------------------------------

    async def bring_up(self, files: ModelFiles, settings: ModelSettings) -> None:
        """Load a version, swap it in, retire what it replaces. Raises ModelError; then nothing
        has changed."""
        self.loading = files.version
        started: list[_Instance] = []
        try:
            # One by one, so that those before one that fails are known and ended.
            for _ in range(self.spec.instances):
                started.append(await self._spawn(files, settings))  # noqa: PERF401
            opened = await asyncio.wait_for(
                asyncio.gather(*(i.opened for i in started)), LOAD_TIMEOUT_S
            )
            opened = _of_one_mind(opened)
            self._accept(files, settings, opened[0])
            for instance in started:
                await self._attach(instance)
        except BaseException as error:
            for instance in started:
                instance.retiring = True
                instance.process.kill()
            if isinstance(error, TimeoutError):
                error = ModelError(f"version {files.version} did not load in {LOAD_TIMEOUT_S:g} s")
            if isinstance(error, ModelError):
                self.refused[files.version] = files.stamp, str(error)
                raise error from None
            if isinstance(error, DeviceError):  # not the file's fault: it is tried again
                self.refused[files.version] = NO_STAMP, str(error)
            raise
        finally:
            self.loading = ""
        self.refused.pop(files.version, None)
        self._swap(files, settings, started, opened)

    def _accept(self, files: ModelFiles, settings: ModelSettings, opened: Opened) -> None:
        """Raise ModelError if a version that loaded must not serve."""
        if stamp(files.path) != files.stamp:
            raise ModelError(f"{files.path.name} was replaced while it was being loaded")
        floor = max(self.spec.accuracy_floor, settings.accuracy_floor)
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

    def _swap(
        self,
        files: ModelFiles,
        settings: ModelSettings,
        started: list[_Instance],
        opened: list[Opened],
    ) -> None:
        first = opened[0]
        notes = self._notes(files, settings, first)
        loaded = Loaded(files, settings, first.meta, first.accuracy, notes)
        self._shell.feed(self._service_added(loaded))
        self.loaded.pop(files.version, None)
        old = [i for i in self._ups() if i not in started and i.version == files.version]
        self.loaded[files.version] = loaded
        for instance, answer in zip(started, opened, strict=True):
            self._announce(instance, answer, files, settings)
        self._shell.feed(e.VersionCurrent(self.spec.name, files.version))
        for instance in old:
            self._retire(instance)
        while len(self.loaded) > settings.keep_versions:
            self.drop(next(iter(self.loaded)))
        self._tell(loaded)

    def drop(self, version: str) -> None:
        """Serve a version no longer."""
        del self.loaded[version]
        for instance in self._ups():
            if instance.version == version:
                self._retire(instance)

    def _tell(self, loaded: Loaded) -> None:
        """Log a version that serves, once, and what its owner should know."""
        found, said = loaded.accuracy, {"service": self.spec.name, "version": loaded.files.version}
        accuracy = {} if found is None else {"accuracy": found.value, "measured": found.how}
        log.info("version serves", extra={**said, **accuracy})
        for note in loaded.notes:
            log.warning("version serves, but", extra={**said, "note": note})

    def _notes(self, files: ModelFiles, settings: ModelSettings, opened: Opened) -> tuple[str, ...]:
        notes = []
        if opened.unjoined and self.spec.batch.joining is not Joining.NONE:
            notes.append(UNJOINED.format(opened.unjoined))
        times = [ns for _, rows, ns in opened.profile if rows == 1]
        if times and min(times) > self.spec.slo.latency:
            took, objective = format_duration(min(times)), format_duration(self.spec.slo.latency)
            notes.append(
                f"one execution takes {took}, longer than the objective of {objective}: every "
                "answer will be late"
            )
        if files.check is None and max(self.spec.accuracy_floor, settings.accuracy_floor):
            notes.append("accuracy_floor has no effect: the version has no check.npz")
        return tuple(notes)

    def _service_added(self, loaded: Loaded) -> e.ServiceAdded:
        spec, meta = self.spec, loaded.meta
        return e.ServiceAdded(
            service=spec.name,
            objective=spec.slo.latency,
            max_batch=spec.batch.max if meta.shared else 1,
            max_queue=spec.max_queue,
            preferred=spec.batch.preferred if meta.shared else (),
            max_queue_delay=spec.batch.max_queue_delay if meta.shared else 0,
            strict=spec.strict,
            notes=loaded.notes,
            percentile=spec.slo.percentile,
        )

    def _end_joining(self, version: str, why: str) -> None:
        """A worker found that rows of a version must not be joined."""
        old = self.loaded.get(version)
        if old is None or not old.meta.batchable:
            return
        meta = msgspec.structs.replace(old.meta, batchable=False)
        notes = (*old.notes, UNJOINED.format(why))
        loaded = self.loaded[version] = msgspec.structs.replace(old, meta=meta, notes=notes)
        self._shell.feed(self._service_added(loaded))
        self._tell(loaded)

    def _announce(
        self, instance: _Instance, opened: Opened, files: ModelFiles, settings: ModelSettings
    ) -> None:
        if instance.process.name not in self._live:  # it died between loading and now
            self._failures += 1
            self._later(self._restart(files, settings))
            return
        if opened.unjoined:
            self._end_joining(instance.version, opened.unjoined)
        instance.announced = True
        service, version = self.spec.name, instance.version
        name, device = instance.process.name, self.device
        self._shell.feed(e.WorkerUp(name, service, version, device, opened.profile, opened.size))

    # --- processes --------------------------------------------------------------------------

    async def _spawn(self, files: ModelFiles, settings: ModelSettings) -> _Instance:
        self._counter += 1
        name = f"{self.spec.name}#{self._counter}"
        tenant = Tenant(
            name,
            TenantKind.WORKER,
            threads=self.spec.threads,
            exec_timeout=self.spec.exec_timeout,
        )
        launch = await self._shell.launch_worker(self.device, tenant)
        joining = self.spec.batch.joining
        loaded = self.loaded.get(files.version)
        if loaded is not None and loaded.files == files:  # what was found out is not asked again
            joining = joining if loaded.meta.batchable else Joining.NONE
        process = WorkerProcess(
            name,
            self.arena,
            self._log_path,
            on_message=lambda message: self._on_message(instance, message),
            on_exit=lambda code: self._on_exit(instance, files, settings, code),
        )
        instance = _Instance(process, tenant, files.version, asyncio.get_running_loop().time())
        process.start(launch)
        self._live[name] = instance
        process.send(
            Open(
                path=str(files.path),
                units=self._units,
                max_batch=self.spec.batch.max,
                check=str(files.check) if files.check is not None else "",
                settings=settings,
                joining=joining,
            )
        )
        return instance

    async def _attach(self, instance: _Instance) -> None:
        """Raises DeviceError; one that died meanwhile is seen to elsewhere."""
        if instance.process.name in self._live:
            pid = instance.process.pid
            await self._shell.attach_worker(self.device, instance.tenant, pid)

    def _on_message(self, instance: _Instance, message: FromWorker) -> None:
        match message:
            case Opened():
                if not instance.opened.done():
                    instance.opened.set_result(message)
            case OpenFailed(reason=reason):
                if not instance.opened.done():
                    instance.opened.set_exception(ModelError(reason))
            case Done(batch=batch) | Failed(batch=batch):
                if isinstance(message, Done) and message.unjoined:
                    self._end_joining(instance.version, message.unjoined)
                instance.batches.pop(batch, None)
                if instance.batches:  # the one at hand begins now
                    instance.batches[next(iter(instance.batches))] = self._shell.now()
                self._shell.on_result(message)
                self._stop_if_idle(instance)

    def _on_exit(
        self, instance: _Instance, files: ModelFiles, settings: ModelSettings, code: int
    ) -> None:
        name = instance.process.name
        self._live.pop(name, None)
        instance.gone.set()
        if not instance.opened.done():
            instance.opened.set_exception(
                ModelError(f"the worker died while loading the model (exit code {code})")
            )
            instance.opened.exception()  # looked at, should nobody else
        self._shell.detach_worker(self.device, name)
        if instance.announced:
            self._shell.feed(e.WorkerDown(name, f"exit code {code}"))
        wanted = instance.announced and not instance.retiring and not self._closed
        if wanted and self._serves(files):
            log.warning("worker died", extra={"worker": name, "code": code})
            self._failures = 0 if self._lived_long(instance) else self._failures + 1
            self._later(self._restart(files, settings))

    def _serves(self, files: ModelFiles) -> bool:
        """Whether these very files are served; another file may have taken their place."""
        loaded = self.loaded.get(files.version)
        return loaded is not None and loaded.files == files

    @staticmethod
    def _lived_long(instance: _Instance) -> bool:
        return asyncio.get_running_loop().time() - instance.born > HEALTHY_AFTER_S

    async def _restart(self, files: ModelFiles, settings: ModelSettings) -> None:
        """Start one instance again, however often it takes, while its version serves."""
        while not self._closed and self._serves(files):
            delay = BACKOFF_FIRST_S * 2 ** min(self._failures, 20)
            await asyncio.sleep(min(BACKOFF_MOST_S, delay) if self._failures else 0)
            instance = None
            try:
                instance = await self._spawn(files, settings)
                opened = await asyncio.wait_for(asyncio.shield(instance.opened), LOAD_TIMEOUT_S)
                if stamp(files.path) != files.stamp:  # it was never checked: not by this way in
                    raise ModelError(f"{files.path.name} was replaced since it was loaded")
                await self._attach(instance)
            except (ModelError, DeviceError, EnvironmentProblem, TimeoutError) as error:
                log.warning("restart failed", extra={"service": self.spec.name, "why": str(error)})
                if instance is not None:
                    instance.process.kill()
                self._failures += 1
                continue
            if self._serves(files) and not self._closed:
                self._announce(instance, opened, files, settings)
            else:
                instance.retiring = True
                instance.process.close()
            return

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)

    def _retire(self, instance: _Instance) -> None:
        instance.retiring = True
        self._shell.feed(e.WorkerRetiring(instance.process.name))
        self._stop_if_idle(instance)

    def _stop_if_idle(self, instance: _Instance) -> None:
        if instance.retiring and not instance.batches and not instance.resident:
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

    def stay(self, worker: str, request: int) -> None:
        """A request has begun on a worker that is to keep it until it is finished."""
        instance = self._live.get(worker)
        if instance is not None:
            instance.resident.add(request)

    def leave(self, worker: str, request: int, forget: bool) -> None:
        """A request that stayed has ended; the worker is to ``forget`` it unless it knows."""
        instance = self._live.get(worker)
        if instance is not None:
            instance.resident.discard(request)
            if forget:
                instance.process.send(Forget((request,)))
            self._stop_if_idle(instance)

    def end_overdue(self, now: int) -> None:
        """Kill instances whose batch runs longer than ``exec_timeout``. ``now`` in ns."""
        for instance in self._live.values():
            oldest = min(instance.batches.values(), default=now)
            if now - oldest > self.spec.exec_timeout:
                log.warning(
                    "batch overdue, ending its worker",
                    extra={
                        "worker": instance.process.name,
                        "after_s": self.spec.exec_timeout / S,
                    },
                )
                instance.process.kill()

    def pids(self) -> list[int]:
        """Process ids of all live instances."""
        return [i.process.pid for i in self._live.values()]

    async def close(self) -> None:
        """Stop everything: politely, then not."""
        self._closed = True
        for task in list(self._restarts):
            task.cancel()
        ending = list(self._live.values())
        for instance in ending:
            instance.retiring = True
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


def _of_one_mind(opened: list[Opened]) -> list[Opened]:
    """What instances of a version found, rows being joined only if all found it right."""
    why = next((o.unjoined for o in opened if o.unjoined), "")
    if not why:
        return opened
    meta = msgspec.structs.replace(opened[0].meta, batchable=False)
    return [msgspec.structs.replace(o, meta=meta, unjoined=why) for o in opened]
