"""All services of a node: which models are loaded, new versions found, loads and unloads."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from cotenant.domain import events as e
from cotenant.domain.errors import CotenantError, ModelError, NotFound
from cotenant.domain.port import IndexEntry, ModelMeta
from cotenant.domain.workload import DEFAULT_SLO, BatchSpec, ServiceSpec
from cotenant.runtime.arena import Arena
from cotenant.runtime.instances import Instances, Loaded, Shell
from cotenant.runtime.repository import ModelFiles, Repository, Stamp

log = logging.getLogger("cotenant.models")
DRAIN_S = 10.0
"""Accepted requests of a model being unloaded are waited for no longer than this."""


class Models:
    """Services by name. ``units``: unit counts that partitions may have."""

    def __init__(
        self,
        repository: Repository,
        declared: tuple[ServiceSpec, ...],
        units: tuple[int, ...],
        arena_bytes: int,
        logs: Path,
        shell: Shell,
    ) -> None:
        self.repository = repository
        self.services: dict[str, Instances] = {}
        self._declared = {spec.name: spec for spec in declared}
        self._units = units
        self._arena_bytes = arena_bytes
        self._logs = logs
        self._shell = shell
        self._locks: dict[str, asyncio.Lock] = {}
        self._seen: dict[str, Stamp] = {}
        self._complaints: dict[str, str] = {}
        self.leaving: set[str] = set()
        """Services that are being unloaded: they admit nothing."""
        self._absent: dict[str, str] = {}
        """Declared services whose files were not there (or not right) yet, and why."""

    @property
    def declared(self) -> tuple[str, ...]:
        """Names of the services that the configuration declares."""
        return tuple(self._declared)

    # --- loading ----------------------------------------------------------------------------

    async def load(self, name: str) -> None:
        """Load the newest version of a model; raises ModelError or NotFound."""
        async with self._locks.setdefault(name, asyncio.Lock()):
            spec = self._declared.get(name)
            model = spec.model if spec is not None else name
            try:
                files = self.repository.newest(model)
                settings = self.repository.settings(model)
            except CotenantError as error:
                if spec is not None and name not in self.services:
                    self._absent[name] = str(error)
                raise
            self._absent.pop(name, None)
            if spec is None:
                spec = ServiceSpec(
                    name=name,
                    model=model,
                    slo=settings.slo or DEFAULT_SLO,
                    batch=settings.batch or BatchSpec(),
                )
            instances = self.services.get(name)
            if instances is None:
                arena = Arena(name, self._arena_bytes)
                units = tuple(u for u in self._units if u <= (spec.threads or u)) or (1,)
                instances = Instances(spec, units, arena, self._logs, self._shell)
                self.services[name] = instances
            try:
                await instances.bring_up(files, settings)
            except BaseException:
                if instances.current is None and name not in self._declared:
                    del self.services[name]
                    await instances.close()
                raise

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
                self._shell.feed(e.ServiceRemoved(name))
                del self.services[name]
                await instances.close()
            finally:
                self.leaving.discard(name)

    async def poll(self) -> None:
        """Bring up newer versions (or a replaced file) that have appeared and stand still, and
        declared models that were not there before."""
        for name in [*self.services, *self._absent]:
            if not self._has_news(name):
                continue
            try:
                await self.load(name)
            except (ModelError, NotFound) as error:
                why = str(error)
                if self._complaints.get(name) != why:  # once, not at every poll
                    self._complaints[name] = why
                    log.warning("version refused", extra={"service": name, "why": why})
            else:
                self._complaints.pop(name, None)

    def _has_news(self, name: str) -> bool:
        instances = self.services.get(name)
        if instances is None and name not in self._absent:
            return False  # unloaded meanwhile
        spec = self._declared[name] if instances is None else instances.spec
        try:
            files = self.repository.newest(spec.model)
        except CotenantError:
            return False  # an empty or half-made directory is no version yet
        if instances is not None:
            current = instances.current
            if instances.loading or name in self.leaving:
                return False
            if current is not None and not _is_newer(files, current):
                return False
            if instances.refused.get(files.version, (None,))[0] == files.stamp:
                return False
        if self._seen.get(name) != files.stamp:
            self._seen[name] = files.stamp  # still being written, perhaps: look again
            return False
        return True

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
        if name in self._absent:
            raise NotFound(f"model {name!r} is not served: {self._absent[name]}")
        if name in self.repository.names():
            raise NotFound(f"model {name!r} is not loaded; load it first")
        known = ", ".join(sorted(self.services)) or "none"
        raise NotFound(f"no model named {name!r}; loaded models: {known}")

    def version(self, name: str, version: str) -> Loaded:
        """A version that serves ("" = the current one); raises NotFound."""
        instances = self.find(name)
        if not version:
            if instances.current is None:
                why = next((why for _, why in instances.refused.values()), "it is being loaded")
                raise NotFound(f"model {name!r} serves no version yet: {why}")
            return instances.current
        if version not in instances.loaded:
            have = ", ".join(instances.loaded) or "none"
            raise NotFound(f"model {name!r} serves no version {version!r}; serving: {have}")
        return instances.loaded[version]

    def metadata(self, name: str, version: str) -> ModelMeta:
        """What clients may know; raises NotFound."""
        meta = self.version(name, version).meta
        versions = tuple(self.services[name].loaded)
        return ModelMeta(name, versions, meta.platform, meta.inputs, meta.outputs)

    def index(self) -> list[IndexEntry]:
        """Every model on disk or loaded, with the state of each version."""
        entries: list[IndexEntry] = []
        models = {i.spec.model for i in self.services.values()}
        for name, instances in self.services.items():
            entries += self._service_entries(name, instances)
        entries += [IndexEntry(n, "", "UNAVAILABLE", why) for n, why in self._absent.items()]
        entries += [
            IndexEntry(name, version, "UNAVAILABLE", "not loaded")
            for name in self.repository.names()
            if name not in self.services and name not in models and name not in self._absent
            for version in self.repository.versions(name)[-1:] or [""]
        ]
        return sorted(entries, key=lambda e: (e.name, e.version))

    def _service_entries(self, name: str, instances: Instances) -> list[IndexEntry]:
        state = "UNLOADING" if name in self.leaving else "READY"
        entries = [IndexEntry(name, v, state, "") for v in instances.loaded]
        if instances.loading:
            entries.append(IndexEntry(name, instances.loading, "LOADING", ""))
        entries += [
            IndexEntry(name, v, "UNAVAILABLE", why)
            for v, (_, why) in instances.refused.items()
            if v not in instances.loaded
        ]
        return entries or [IndexEntry(name, "", "UNAVAILABLE", "not loaded yet")]


def _is_newer(files: ModelFiles, current: Loaded) -> bool:
    if int(files.version) > int(current.files.version):
        return True
    return files.version == current.files.version and files.stamp != current.files.stamp
