"""All services of a node: which models are loaded, new versions found, loads and unloads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from cotenant.domain import events as e
from cotenant.domain.config import ModelSettings
from cotenant.domain.errors import CotenantError, InvalidRequest, ModelError, NotFound, NotReady
from cotenant.domain.port import IndexEntry, Language, ModelMeta
from cotenant.domain.profile import ModelProfile
from cotenant.domain.workload import DEFAULT_SLO, BatchSpec, ServiceSpec
from cotenant.engines.registry import open_language
from cotenant.runtime.arena import Arena
from cotenant.runtime.instances import Instances, Loaded, Shell
from cotenant.runtime.pins import Pins
from cotenant.runtime.repository import ModelFiles, Repository

log = logging.getLogger("cotenant.models")
DRAIN_S = 10.0
"""Accepted requests of a model being unloaded are waited for no longer than this."""


class Models:
    """Services by name."""

    def __init__(
        self,
        repository: Repository,
        declared: tuple[ServiceSpec, ...],
        arena_bytes: int,
        logs: Path,
        shell: Shell,
    ) -> None:
        self.repository = repository
        self.services: dict[str, Instances] = {}
        self._declared = {spec.name: spec for spec in declared}
        self._arena_bytes = arena_bytes
        self._logs = logs
        self._shell = shell
        self._locks: dict[str, asyncio.Lock] = {}
        self._seen: dict[str, tuple[ModelFiles | None, tuple[str, ...]]] = {}
        """What the last look at the disk found to be brought up, and to be gone."""
        self._complaints: dict[str, str] = {}
        self._languages: dict[ModelFiles, asyncio.Future[Language]] = {}
        """Of the versions that were asked for theirs."""
        self.pins = Pins()
        """Services that were rolled back; the node's outlive it."""
        self.leaving: set[str] = set()
        """Services that are being unloaded: they admit nothing."""
        self._starting = set(self._declared)
        """Declared services that were not looked for yet."""
        self._absent: dict[str, str] = {}
        """Declared services whose files were not there (or not right) yet, and why."""

    @property
    def declared(self) -> tuple[str, ...]:
        """Names of the services that the configuration declares."""
        return tuple(self._declared)

    # --- loading ----------------------------------------------------------------------------

    async def load(self, name: str) -> None:
        """Load the version of a model that is to serve (the newest, or what it was rolled back to)
        if it is not served as it is; raises ModelError or NotFound."""
        try:
            files = next(self._there(name))
        except CotenantError as error:
            if name in self._declared and name not in self.services:
                self._absent[name] = str(error)
            raise
        finally:
            self._starting.discard(name)
        await self._load(name, files)

    async def load_newest(self, name: str) -> None:
        """Undo a rollback; raises as ``load``, and then it is as before."""
        before = self.pins.version(name)
        self.pins.put(name, "")
        try:
            await self.load(name)
        except BaseException:
            self.pins.put(name, before)
            raise

    async def rollback(self, name: str) -> str:
        """Serve the version before the one that serves, and follow no newer one; returns which.
        Raises NotFound, NotReady, ModelError, and InvalidRequest if there is none before."""
        serving = self.version(name, "").files.version
        older = [v for v in self.repository.versions(self._model(name)) if int(v) < int(serving)]
        if not older:
            raise InvalidRequest(
                f"model {name!r} serves version {serving}, and there is none before it on the disk"
            )
        files = self.repository.files(self._model(name), older[-1])
        before = self.pins.version(name)
        self.pins.put(name, files.version)
        try:
            await self._load(name, files)
        except BaseException:
            self.pins.put(name, before)
            raise
        return files.version

    def _there(self, name: str) -> Iterator[ModelFiles]:
        """The versions that may serve, the one that is wanted most first: only the one that was
        rolled back to, as long as that is there. Raises as ``Repository.there``."""
        model, pinned = self._model(name), self.pins.version(name)
        if pinned:
            with contextlib.suppress(NotFound, ModelError):
                files = self.repository.files(model, pinned)
                yield files
                return
        yield from self.repository.there(model)

    async def _load(self, name: str, files: ModelFiles) -> None:
        async with self._locks.setdefault(name, asyncio.Lock()):
            settings = self.repository.settings(files.name)
            instances = self.services.get(name)
            current = instances.current if instances is not None else None
            if current is not None and (current.files, current.settings) == (files, settings):
                return
            self._absent.pop(name, None)
            if instances is None:
                instances = self.services[name] = self._make(name, settings)
            try:
                variants = await asyncio.to_thread(self.repository.variants, files)
                profiles = await asyncio.to_thread(self._profiles, files, settings)
                await instances.offer(files, settings, variants, profiles).outcome
            except BaseException:
                if instances.current is None and name not in self._declared:
                    await self._end(name, instances)
                raise

    def _profiles(self, files: ModelFiles, settings: ModelSettings) -> tuple[ModelProfile, ...]:
        """What ``cotenant profile`` measured of a version on such devices as are here, by the
        engine that is to open it."""
        here = {(spec.kind, spec.model) for spec in self._shell.specs()}
        return tuple(
            profile
            for profile in self.repository.profiles(files)
            if (profile.kind, profile.device) in here and profile.holds(settings.engine)
        )

    def _model(self, name: str) -> str:
        """The directory of a service's model."""
        spec = self._declared.get(name)
        return spec.model if spec is not None else name

    def _make(self, name: str, settings: ModelSettings) -> Instances:
        spec = self._declared.get(name) or ServiceSpec(
            name=name,
            model=name,
            slo=settings.slo or DEFAULT_SLO,
            batch=settings.batch or BatchSpec(),
        )
        return Instances(spec, Arena(name, self._arena_bytes), self._logs, self._shell)

    async def _end(self, name: str, instances: Instances) -> None:
        self._shell.feed(e.ServiceRemoved(name))
        del self.services[name]
        await instances.close()

    async def unload(self, name: str, pending: asyncio.Event | None) -> None:
        """Stop admitting, wait for what was accepted (``pending`` is set when none is left),
        end the instances. Raises NotFound."""
        async with self._locks.setdefault(name, asyncio.Lock()):
            instances = self.find(name)
            self.leaving.add(name)
            try:
                if pending is not None:
                    try:
                        await asyncio.wait_for(pending.wait(), DRAIN_S)
                    except TimeoutError:
                        log.warning("unloading with requests open", extra={"service": name})
                await self._end(name, instances)
            finally:
                self.leaving.discard(name)

    async def poll(self) -> None:
        """Follow the disk: bring up newer versions (or a replaced file) that have appeared and
        stand still, declared models that were not there before, and the newest version that is
        there in place of one that is gone."""
        for name in [*self.services, *self._absent]:
            try:
                await self._follow(name)
            except CotenantError as error:
                why = str(error)
                if self._complaints.get(name) != why:  # once, not at every poll
                    self._complaints[name] = why
                    log.warning("version refused", extra={"service": name, "why": why})

    async def _follow(self, name: str) -> None:
        instances = self.services.get(name)
        if instances is None:
            if name in self._absent and self._stands_still(name, self._wanted(name, None), ()):
                await self.load(name)
            return
        if instances.loading or name in self.leaving:
            return
        for loaded in list(instances.loaded.values()):
            found = await asyncio.to_thread(self.repository.variants, loaded.files)
            instances.variants.follow(loaded.files.version, found)
        try:
            there = self.repository.versions(instances.spec.model)
        except CotenantError:
            return  # unreadable is not gone
        for version in [v for v in instances.refused if v not in there]:
            del instances.refused[version]
        wanted = self._wanted(name, instances)
        gone = tuple(v for v in instances.loaded if v not in there)
        if (wanted is None and not gone) or not self._stands_still(name, wanted, gone):
            return
        if wanted is not None:
            await self._load(name, wanted)
            self._complaints.pop(name, None)
        self._drop(instances, gone)
        if not there:
            await self._give_up(name)

    def _wanted(self, name: str, instances: Instances | None) -> ModelFiles | None:
        """The version to bring up, None if what serves is right: the newest that was not refused
        as it is."""
        current = instances.current if instances is not None else None
        try:
            for files in self._there(name):
                if current is not None and files == current.files:
                    return None
                refused = instances.refused.get(files.version) if instances is not None else None
                if refused is None or refused[0] != files.stamp:
                    return files
                if current is not None and files.version == current.files.version:
                    return None  # what took its place is no good: it serves from memory
        except CotenantError:
            pass  # an empty or half-made directory is no version yet
        return None

    def _stands_still(self, name: str, wanted: ModelFiles | None, gone: tuple[str, ...]) -> bool:
        """Whether the last look found the same: what is still being written has changed."""
        now = (wanted, gone)
        before, self._seen[name] = self._seen.get(name), now
        return now == before and now != (None, ())

    def _drop(self, instances: Instances, gone: tuple[str, ...]) -> None:
        """Serve no versions that are gone; the current one only if another has taken over."""
        for version in gone:
            current = instances.current
            if version in instances.loaded and current and current.files.version != version:
                instances.drop(version)

    async def _give_up(self, name: str) -> None:
        """No version is there at all: end the service. A declared one is waited for."""
        log.warning("model is gone from the disk, unloading it", extra={"service": name})
        await self._shell.unload(name)
        if name in self._declared:
            self._absent[name] = "its directory holds no versions any more"

    async def close(self) -> None:
        """End all instances."""
        await asyncio.gather(*(i.close() for i in self.services.values()))
        self.services.clear()

    # --- asking -----------------------------------------------------------------------------

    def find(self, name: str) -> Instances:
        """A loaded (or loading) service; raises NotFound with what would be right."""
        found = self.services.get(name)
        if found is not None:
            return found
        if name in self._starting:
            raise NotReady(f"model {name!r} is being loaded; try again later")
        if name in self._absent:
            raise NotFound(f"model {name!r} is not served: {self._absent[name]}")
        if name in self.repository.listing():
            raise NotFound(
                f"model {name!r} is not loaded; load it first: cotenant models load {name}"
            )
        known = ", ".join(sorted(self.services)) or "none"
        raise NotFound(f"no model named {name!r}; loaded models: {known}")

    def version(self, name: str, version: str) -> Loaded:
        """A version that serves ("" = the current one); raises NotFound."""
        instances = self.find(name)
        if not version:
            if instances.current is None:
                if instances.loading or not instances.refused:
                    raise NotReady(f"model {name!r} is being loaded; try again later")
                _, why = next(iter(instances.refused.values()))
                raise NotFound(f"model {name!r} serves no version yet: {why}")
            return instances.current
        if version not in instances.loaded:
            if instances.loading is not None and version == instances.loading.files.version:
                raise NotReady(f"version {version} of {name!r} is being loaded; try again later")
            have = ", ".join(instances.loaded) or "none"
            raise NotFound(f"model {name!r} serves no version {version!r}; serving: {have}")
        return instances.loaded[version]

    def metadata(self, name: str, version: str) -> ModelMeta:
        """What clients may know; raises NotFound."""
        meta = self.version(name, version).meta
        versions = tuple(self.services[name].loaded)
        return ModelMeta(
            name, versions, meta.platform, meta.inputs, meta.outputs, meta.turns, meta.context
        )

    async def language(self, name: str, version: str) -> Language:
        """How to write prompts for a version; read once, when it is first asked for. Raises
        NotFound, InvalidRequest, ModelError."""
        loaded = self.version(name, version)
        if not loaded.meta.context:
            raise InvalidRequest(
                f"model {name!r} is no language model; ask it at /v2/models/{name}/infer"
            )
        self._languages = {f: task for f, task in self._languages.items() if self._serves(f)}
        reading = self._languages.get(loaded.files)
        if reading is None or (reading.done() and reading.exception()):
            reading = asyncio.ensure_future(asyncio.to_thread(open_language, loaded.files.path))
            self._languages[loaded.files] = reading
        return await asyncio.shield(reading)

    def _serves(self, files: ModelFiles) -> bool:
        return any(
            loaded.files == files for i in self.services.values() for loaded in i.loaded.values()
        )

    def index(self) -> list[IndexEntry]:
        """Every model on disk or loaded, with the state of each version."""
        entries: list[IndexEntry] = []
        models = {i.spec.model for i in self.services.values()}
        for name, instances in self.services.items():
            entries += self._service_entries(name, instances)
        entries += [IndexEntry(n, "", "UNAVAILABLE", why) for n, why in self._absent.items()]
        entries += [
            IndexEntry(name, version, "UNAVAILABLE", "not loaded")
            for name, version in self.repository.listing().items()
            if name not in self.services and name not in models and name not in self._absent
        ]
        return sorted(entries, key=lambda e: (e.name, e.version))

    def _kept(self, name: str, version: str) -> str:
        if self.pins.version(name) != version:
            return ""
        return f"rolled back to it; the newest is served again by: cotenant models load {name}"

    def _service_entries(self, name: str, instances: Instances) -> list[IndexEntry]:
        state = "UNLOADING" if name in self.leaving else "READY"
        entries = [IndexEntry(name, v, state, self._kept(name, v)) for v in instances.loaded]
        if instances.loading is not None:
            entries.append(IndexEntry(name, instances.loading.files.version, "LOADING", ""))
        entries += [
            IndexEntry(name, v, "UNAVAILABLE", why)
            for v, (_, why) in instances.refused.items()
            if v not in instances.loaded
        ]
        return entries or [IndexEntry(name, "", "UNAVAILABLE", "not loaded yet")]
