"""Residency: which version of which model is loaded on which device.

A plan says which devices carry a service. On each of them so many instances as the service has are
kept of every version that serves, and of the one that is offered; who dies is replaced, later and
later the sooner it died. A version that was offered serves once all its instances are up on every
device that can load it, and takes the place of the oldest; where none can, it is declined. What a
service leaves is unloaded when it is up where it goes.

Where a device binds instances to a partition, all that is said here of devices is so of the
service's partitions on it, its *sites*, with one instance at each: a partition executes one batch
at a time. An instance is loaded once its partition is there; where the partition goes, so does the
instance, when it has finished what it has begun.

Of a version one variant serves on a device at a time (``cotenant.policy.builds``). Another takes
its place once all its instances are up there.

An instance is loaded once there is memory for it. One that idles may have to give that to others:
then the service is asleep there, until a request comes or is expected to.
"""

from __future__ import annotations

from typing import Final

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.plan import Plan
from cotenant.domain.request import Request
from cotenant.domain.units import MS, S
from cotenant.domain.workload import ORIGINAL
from cotenant.policy import builds, returning
from cotenant.policy.desk import Desk
from cotenant.policy.memory.budgets import Budgets
from cotenant.policy.roster import Roster
from cotenant.policy.state import PartitionState, ServiceState, WorkerState, unfit

RETRY_FIRST, RETRY_MOST = 200 * MS, 30 * S
"""Wait (ns) before an instance that failed is loaded again: doubled each time, up to a most."""
GIVEN_WITHIN: Final = 30 * S
"""So long (ns) what was offered waits for memory that others were asked for, beyond what giving it
takes them."""
HEALTHY_AFTER: Final = 60 * S
"""An instance that was up for so long (ns) did not die of what it is."""


class Residency:
    """See the module's text."""

    def __init__(self, desk: Desk, roster: Roster, budgets: Budgets) -> None:
        self._desk = desk
        self._roster = roster
        self._budgets = budgets
        self._state = desk.state

    # --- what happens -----------------------------------------------------------------------

    def planned(self, plan: Plan) -> None:
        """Services are to be on other devices from now on, perhaps."""
        device_of = {p.id: p.device for p in plan.partitions}
        for service in self._state.services.values():
            there = plan.services.get(service.name, ())
            service.wanted = list(dict.fromkeys(device_of[p] for p in there))
            service.chosen = dict(plan.variants.get(service.name, {}))
            service.ready = dict(plan.ready.get(service.name, {}))
            service.places = {
                device: [p for p in there if device_of[p] == device]
                for device in service.wanted
                if self._desk.specs[device].pins_workers
            }
            sites = {place or device for device, place in self._sites(service)}
            for asleep in service.asleep.values():
                for site in [s for s in asleep if s not in sites]:
                    del asleep[site]
            if service.name in plan.unplaced and service.offer:
                whys = dict.fromkeys([*unfit(service).values(), plan.unplaced[service.name]])
                self._decline(service, "; ".join(whys))
            self.settle(service.name)

    @staticmethod
    def _sites(service: ServiceState) -> list[tuple[str, str]]:
        """Where a service is to be: devices and, on those that bind instances, partitions."""
        return [(d, p) for d in service.wanted for p in service.places.get(d, ("",))]

    def _is_there(self, place: str) -> bool:
        """Whether an instance can be loaded in a partition, or needs none."""
        partition = self._state.partitions.get(place)
        return not place or (partition is not None and not partition.retiring)

    def offered(self, event: e.VersionOffered) -> None:
        """A version is to be brought up."""
        service = self._state.services.get(event.service)
        if service is None:
            return
        if service.offer:
            self._decline(service, "another was offered since")
        service.offer, service.offer_revision = event.version, event.revision
        for known in event.foretold:
            builds.foretell(service, known)
        service.failures = service.retry_at = 0
        self.settle(service.name)

    def variants(self, event: e.VariantsKnown) -> None:
        """A version has other variants than before. What could not be loaded may be mended."""
        service = self._state.services.get(event.service)
        if service is None:
            return
        service.variants[event.version] = event.variants
        revisions = (service.versions.get(event.version), service.offer_revision)
        for revision in [r for r in service.spoilt if r in revisions]:
            del service.spoilt[revision]
        self.settle(service.name)

    def gone(self, event: e.VersionGone) -> None:
        """A version serves no longer."""
        service = self._state.services.get(event.service)
        if service is None:
            return
        if service.offer == event.version:
            self._decline(service, "its files are gone")
        service.variants.pop(event.version, None)
        revision = service.versions.pop(event.version, None)
        if revision is not None:
            service.version = next(reversed(service.versions), "")
            self._drop(service, event.version, revision)
            self._roster.version_changed(service)

    def removed(self, event: e.ServiceRemoved) -> None:
        """A service is no more: all its instances go."""
        service = self._state.services.get(event.service)
        if service is None:
            return
        if service.offer:
            self._decline(service, "the service was removed")
        service.version = ""
        service.versions.clear()
        service.wanted.clear()
        service.places.clear()
        service.asleep.clear()
        for worker in self._of(service):
            self._retire(worker)

    def load_failed(self, event: e.LoadFailed) -> None:
        """An instance could not be made ready."""
        worker = self._state.workers.get(event.worker)
        if worker is None or worker.up:
            return
        self._forget(worker)
        self._state.leaving.pop(worker.id, None)
        service = self._state.services[worker.service]
        if worker.retiring:
            self._roster.forget_if_empty(service)
            return
        offered = (worker.version, worker.revision) == (service.offer, service.offer_revision)
        if self._has_another(service, worker, offered or event.final):
            kind = self._desk.specs[worker.device].kind
            builds.spoil(service, worker.revision, kind, worker.variant, event.reason)
            for other in self._of(service, worker.version, worker.revision):
                if other.variant == worker.variant and not other.up:
                    self._retire(other)
        elif offered or event.final:
            service.unfit.setdefault(worker.revision, {})[worker.site] = event.reason
            for other in self._of(service, worker.version, worker.revision):
                if other.site == worker.site and (offered or not other.up):
                    self._retire(other)
        else:
            self._wait(service, lived=0)
        if not service.workers:
            self._roster.refuse_orphans(service)
        failed = service.unfit.get(worker.revision, {})
        everywhere = all((place or device) in failed for device, place in self._sites(service))
        # Another device may take it: the next plan says which, or that none does.
        if offered and everywhere and set(service.wanted) >= set(self._desk.specs):
            self._decline(service, event.reason)
        self.settle(service.name)

    def _has_another(self, service: ServiceState, worker: WorkerState, lasting: bool) -> bool:
        """Whether another variant can take the place of one that could not be loaded. The original
        gives way only where its failure is ``lasting``."""
        if worker.variant == ORIGINAL and not lasting:
            return False
        kind = self._desk.specs[worker.device].kind
        spoilt = service.spoilt.get(worker.revision, {}).get(kind, {})
        others = [v.name for v in service.variants.get(worker.version, {}).get(kind, ())]
        return any(n != worker.variant and n not in spoilt for n in (ORIGINAL, *others))

    def lost(self, worker: WorkerState) -> None:
        """An instance that was up is gone."""
        self._state.leaving.pop(worker.id, None)
        service = self._state.services.get(worker.service)
        if service is None or worker.retiring:
            return
        self._wait(service, self._state.now - worker.since)
        self.settle(service.name)

    def _wait(self, service: ServiceState, lived: int) -> None:
        """An instance failed that had been up for so long (ns): set the time of the next try."""
        service.failures = 0 if lived > HEALTHY_AFTER else service.failures + 1
        delay = RETRY_FIRST << min(service.failures - 1, 20) if service.failures else 0
        service.retry_at = self._state.now + min(RETRY_MOST, delay)
        self._desk.watch(service.retry_at, "service", service.name)

    # --- what follows -----------------------------------------------------------------------

    def settle(self, name: str) -> None:
        """Load what is missing, serve what is complete, and let go of the rest."""
        service = self._state.services.get(name)
        if service is None:
            return
        if service.asleep and self._is_due(service):
            service.asleep.clear()
        for version, revision in list(service.versions.items()):
            self._keep_up(service, version, revision)
        if service.offer:
            version, revision = service.offer, service.offer_revision
            if self._keep_up(service, version, revision):
                self._serve(service, version, revision)
        self._predict(service)
        if service.queued and service.unloads:
            self._roster.refuse_orphans(service)

    def _predict(self, service: ServiceState) -> None:
        """Predict by the variants that serve."""
        for worker in self._of(service, service.version, service.versions.get(service.version, 0)):
            kind = self._desk.specs[worker.device].kind
            serves = worker.up and not worker.standby
            if serves and worker.variant == self._variant(service, worker):
                builds.serve(service, kind, worker.variant)

    def _variant(self, service: ServiceState, worker: WorkerState) -> str:
        """The variant that is to serve where an instance is."""
        kind = self._desk.specs[worker.device].kind
        return builds.wanted(service, worker.version, worker.revision, kind)

    def _keep_up(self, service: ServiceState, version: str, revision: int) -> bool:
        """See to the instances of a version; whether all that are wanted are up."""
        mine = self._of(service, version, revision)
        complete, able = True, False
        offered = (service.offer, service.offer_revision)
        failed = service.unfit.get(revision, {})
        sites = self._sites(service)
        for device, place in sites:
            site = place or device
            kind = self._desk.specs[device].kind
            variant = builds.wanted(service, version, revision, kind)
            here = [w for w in mine if w.site == site]
            there = [w for w in here if w.variant == variant]
            if site in failed:
                continue
            able = True
            if site in service.asleep.get(revision, {}):
                continue
            if not self._is_there(place):
                complete = False
                continue
            for _ in range((1 if place else service.instances) - len(there)):
                complete = False
                if service.retry_at > self._state.now:
                    break
                why = self._load(service, version, revision, (device, place), variant)
                if why and (version, revision) == offered:
                    self._decline(service, why)
                    return False
            is_up = len(there) >= (1 if place else service.instances) and all(w.up for w in there)
            complete = complete and is_up
            self._hand_over(service, here, variant, is_up)
            if is_up and not place and (version, revision) != offered:
                self._make_ready(service, here, device)
        known = {place or device for device, place in sites}
        for worker in mine:
            if worker.site not in known and ((complete and able) or not worker.up):
                self._retire(worker)
        return complete and able

    def _hand_over(
        self, service: ServiceState, here: list[WorkerState], variant: str, is_up: bool
    ) -> None:
        """Have the instances of a variant at a site serve, once all are up, and others no more."""
        called = [w for w in here if is_up and w.variant == variant and w.standby]
        for worker in called:
            self._roster.call(worker)
        for worker in here:
            kept = worker.variant == self._ready(service, worker)
            if worker.variant == variant or (kept and worker.standby):
                continue
            if is_up and kept and worker.up and not service.turns:
                self._roster.stand_by(worker)
            elif is_up or not worker.up:
                self._retire(worker)
        if called:
            self._roster.version_changed(service)

    def _ready(self, service: ServiceState, worker: WorkerState) -> str:
        """The variant that is to stand by where an instance is; "" if none."""
        kind = self._desk.specs[worker.device].kind
        ready = service.ready.get(kind, "")
        others = [v.name for v in service.variants.get(worker.version, {}).get(kind, ())]
        spoilt = service.spoilt.get(worker.revision, {}).get(kind, {})
        known = ready == ORIGINAL or ready in others  # a starred tuple is not compiled
        return ready if known and ready not in spoilt else ""

    def _make_ready(self, service: ServiceState, here: list[WorkerState], device: str) -> None:
        """Load what is to stand by at a site, if there is memory for it now."""
        first = here[0]
        variant = self._ready(service, first)
        there = sum(w.variant == variant for w in here)
        if not variant or service.turns or service.retry_at > self._state.now:
            return
        where = (device, "")
        for _ in range(service.instances - there):
            self._load(service, first.version, first.revision, where, variant, standby=True)

    def _load(
        self,
        service: ServiceState,
        version: str,
        revision: int,
        where: tuple[str, str],
        variant: str,
        standby: bool = False,
    ) -> str:
        """Load an instance, as soon as there is memory for it; why that is not to be expected. One
        that is to stand by waits for none."""
        state, (device, place) = self._state, where
        name = f"{service.name}#{state.next_worker}"
        state.next_worker += 1
        memory = self._budgets.need(service.name, device)
        worker = state.workers[name] = WorkerState(
            id=name,
            service=service.name,
            version=version,
            device=device,
            revision=revision,
            variant=variant,
            standby=standby,
            memory=memory,
            place=place,
            pending=True,
            since=state.now,
        )
        if self._budgets.load(worker):
            self.begin(worker)
            return ""
        if standby:
            self._forget(worker)
            return ""
        return self._budgets.hopeless(worker)

    def give_up(self, device: str) -> None:
        """Decline what was offered and waits for memory that others were to give long ago."""
        for worker in list(self._state.workers.values()):
            service = self._state.services[worker.service]
            offered = (worker.version, worker.revision) == (service.offer, service.offer_revision)
            long = self._state.now - worker.since > GIVEN_WITHIN + worker.waits_ns
            if worker.pending and worker.coming and worker.device == device and offered and long:
                self._decline(service, "others do not give the memory that they were asked for")

    def begin(self, worker: WorkerState) -> None:
        """There is memory for an instance: load it."""
        worker.pending, worker.since = False, self._state.now
        load = a.Load(
            self._desk.cause,
            worker.id,
            worker.service,
            worker.version,
            worker.revision,
            worker.device,
            worker.place,
            worker.variant,
        )
        self._desk.out.append(load)

    def _forget(self, worker: WorkerState) -> None:
        """An instance is not, and has nothing."""
        del self._state.workers[worker.id]
        self._budgets.down(worker)

    def _serve(self, service: ServiceState, version: str, revision: int) -> None:
        """A version that was offered takes over."""
        replaced = service.versions.pop(version, None)
        service.offer, service.failures = "", 0
        service.versions[version] = revision
        service.version = version
        if replaced is not None:
            self._drop(service, version, replaced)
        self._desk.out.append(a.Serve(self._desk.cause, service.name, version, revision))
        while len(service.versions) > service.keep:
            self._end(service, next(iter(service.versions)))
        kept = set(service.versions.values())
        service.unfit = {r: devices for r, devices in service.unfit.items() if r in kept}
        service.spoilt = {r: kinds for r, kinds in service.spoilt.items() if r in kept}
        service.variants = {v: k for v, k in service.variants.items() if v in service.versions}
        self._roster.version_changed(service)

    def _decline(self, service: ServiceState, reason: str) -> None:
        version, revision = service.offer, service.offer_revision
        service.offer = ""
        self._drop(service, version, revision)
        service.unfit.pop(revision, None)
        service.spoilt.pop(revision, None)
        decline = a.Decline(self._desk.cause, service.name, version, revision, reason)
        self._desk.out.append(decline)

    def _end(self, service: ServiceState, version: str) -> None:
        self._drop(service, version, service.versions.pop(version))

    def _drop(self, service: ServiceState, version: str, revision: int) -> None:
        service.asleep.pop(revision, None)
        for worker in self._of(service, version, revision):
            self._retire(worker)

    def _of(self, service: ServiceState, version: str = "", revision: int = 0) -> list[WorkerState]:
        """A service's instances that are not about to go, of one version or of all."""
        return [
            w
            for w in self._state.workers.values()
            if w.service == service.name
            and not w.retiring
            and (not version or (w.version, w.revision) == (version, revision))
        ]

    def _retire(self, worker: WorkerState) -> None:
        """An instance takes nothing new, and goes once it has nothing to do."""
        if worker.pending:
            self._forget(worker)
            return
        self._roster.retire(worker)
        self._state.leaving[worker.id] = None

    # --- memory that others need ------------------------------------------------------------

    def put_to_sleep(self, worker: WorkerState) -> None:
        """An idle instance gives its memory to others: its service is there again when it is
        wanted."""
        service, site = self._state.services[worker.service], worker.site
        if worker.standby:
            self._retire(worker)
            return
        service.asleep.setdefault(worker.revision, {})[site] = None
        for other in self._of(service, worker.version, worker.revision):
            if other.site == site:
                self._retire(other)
        back = returning.expected(service, self._state.now)
        if back:
            self._desk.watch(self._soon(service, back), "service", service.name)

    def wake(self, request: Request) -> None:
        """Somebody asks for a version that may be asleep."""
        service = self._state.services.get(request.service)
        if service is None or not service.asleep:
            return
        version = request.version or service.version or service.offer
        offered = service.offer_revision if version == service.offer else 0
        service.asleep.pop(service.versions.get(version, offered), None)
        self.settle(service.name)  # and refuse it, if nothing is loaded for it

    def _is_due(self, service: ServiceState) -> bool:
        back = returning.expected(service, self._state.now)
        return bool(back) and self._soon(service, back) <= self._state.now

    @staticmethod
    def _soon(service: ServiceState, back: int) -> int:
        """When (ns) to load what is expected to be wanted again at a time."""
        return back - returning.LOAD_WITHIN * service.load_ns

    # --- the end ----------------------------------------------------------------------------

    def let_go(self) -> None:
        """Unload the instances that are to go and have nothing to do any more."""
        state = self._state
        for name in list(state.leaving):
            worker = state.workers[name]
            if not worker.batch and all(r.worker != name for r in state.residents.values()):
                del state.leaving[name]
                self._desk.out.append(a.Unload(self._desk.cause, name))

    def arriving(self, device: str, plan: Plan) -> bool:
        """Whether a service that a plan takes off a device is not up yet where it goes: until then
        it stays."""
        of = {p.id: p.device for p in (*plan.partitions, *self._state.plan.partitions)}
        for service in self._state.services.values():
            now = {of[p] for p in self._state.plan.services.get(service.name, ())}
            goes = [(of[p], p) for p in plan.services.get(service.name, ())]
            if device not in now - {d for d, _ in goes} or not self._is_on(service, device):
                continue
            if any(self._is_awaited(service, d, goes) for d, _ in goes):
                return True
        return False

    def _is_on(self, service: ServiceState, device: str) -> bool:
        """Whether an instance serves on a device."""
        workers = self._state.workers.values()
        mine = (w for w in workers if w.service == service.name and w.device == device)
        return any(w.up and not w.rests for w in mine)

    def _is_awaited(self, service: ServiceState, device: str, goes: list[tuple[str, str]]) -> bool:
        """Whether a service will be up on a device and is not yet. Partitions that are yet to be
        made are not waited for: they may wait for this one's device."""
        failed = unfit(service)
        sites = [device]
        if self._desk.specs[device].pins_workers:
            sites = [p for d, p in goes if d == device and self._is_there(p)]
        return not self._is_on(service, device) and any(s not in failed for s in sites)

    # --- partitions that bind ---------------------------------------------------------------

    def vacate(self, device: str) -> None:
        """Instances that are bound to partitions of a device which go take nothing new."""
        parts = self._state.partitions
        for worker in list(self._state.workers.values()):
            here = worker.place and worker.device == device and not worker.retiring
            if here and parts[worker.place].retiring:
                self._retire(worker)

    def bound(self, partition: PartitionState) -> bool:
        """Whether some instance is bound to a partition, up or not."""
        return any(w.place == partition.id for w in self._state.workers.values())

    def adopted(self, device: str) -> None:
        """Partitions of a device are there, to which instances are bound."""
        if self._desk.specs[device].pins_workers:
            for name in list(self._state.services):
                self.settle(name)

    def kept(self, device: str) -> None:
        """Its old partitions stay: they are what services are to be on."""
        if not self._desk.specs[device].pins_workers:
            return
        plan = self._state.plan
        here = {p.id for p in plan.partitions if p.device == device}
        for service in list(self._state.services.values()):
            mine = [p for p in plan.services.get(service.name, ()) if p in here]
            others = [d for d in service.wanted if d != device]
            service.wanted = [*others, device] if mine else others
            service.places.pop(device, None)
            if mine:
                service.places[device] = mine
            self.settle(service.name)
