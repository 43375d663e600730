"""Claims are prepared and unprepared here; ``plugin`` has the kubelet's protocol around it.

The laws:

* What is to be reserved is on the disk before the node is asked for it.
* A claim is ``prepared`` only once the node has it ready and its CDI spec is on the disk.
* One call at a time works on a claim. Calls for different claims do not wait for each other, and
  none waits for what is published to the cluster.
* Every step may be done again. Whoever dies between two leaves a file that says what to take back.
* What a claim holds is given up by ``unprepare``, or because its preparing failed, or because it
  is ``forgotten``. Nothing else, such as that it is gone from the API server, is a reason.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple, ParamSpec, TypeVar

import msgspec

from cotenant.domain.errors import (
    CotenantError,
    EnvironmentProblem,
    InvalidRequest,
    NotFound,
    NotReady,
)
from cotenant.domain.reservation import ReservationStatus
from cotenant.kube import booking, cdi, claims
from cotenant.kube.cdi import Specs
from cotenant.kube.checkpoint import PREPARED, Allocated, Checkpoint, Edits, Entry, Promise
from cotenant.kube.forgotten import Forgotten
from cotenant.kube.inventory import inventory
from cotenant.kube.names import RESERVED
from cotenant.kube.ports import Cluster, NodeClient, Object
from cotenant.kube.turns import Turn, Turns

log = logging.getLogger("cotenant.kube")

_PAUSE_S: Final = 0.02
_LONG_PAUSE_S: Final = 0.25
_UID = re.compile(r"[A-Za-z0-9-]{1,63}")
_P = ParamSpec("_P")
_T = TypeVar("_T")


class NodeAway(EnvironmentProblem):
    """The node does not answer: what it was asked may or may not be done."""


class ClaimRef(NamedTuple):
    """A claim as the kubelet names it."""

    uid: str
    namespace: str
    name: str


class Prepared(NamedTuple):
    """A device for the kubelet: ``cdi`` are names to give the container runtime."""

    request: str
    device: str
    share_id: str
    cdi: tuple[str, ...]


class Site(NamedTuple):
    """Where this is: the ``pool`` is the node's name in the cluster, ``hook`` the command that the
    container runtime is to run, ``boot`` the id of this boot."""

    pool: str
    hook: tuple[str, ...]
    boot: str


class Preparer:
    """Does the work, for several calls at a time."""

    def __init__(
        self,
        node: NodeClient,
        cluster: Cluster,
        checkpoint: Checkpoint,
        specs: Specs,
        site: Site,
    ) -> None:
        self._node = node
        self._cluster = cluster
        self._checkpoint = checkpoint
        self._specs = specs
        self._pool, self._hook, self._boot = site
        self._turns = Turns()
        self._booking = threading.Lock()
        self._forgotten = Forgotten(cluster)
        self._leaving = threading.Event()
        self.problems: dict[str, str] = {}
        """Of prepared claims: why they do not have what they were promised, by uid."""

    def entries(self) -> list[Entry]:
        """The claims that hold something, or are about to."""
        return self._checkpoint.entries()

    def kept(self) -> frozenset[str]:
        """Ids of the reservations that these have, and that claims with a damaged record may have.
        Raises EnvironmentProblem."""
        known = {id for entry in self.entries() for id in entry.ids}
        return frozenset(known.union(*map(self._reserved, sorted(self._checkpoint.lost))))

    def leave(self) -> None:
        """Whoever waits for a claim's readiness gives up: the driver stops."""
        self._leaving.set()

    # -- for the kubelet

    def prepare(self, ref: ClaimRef, deadline: float) -> list[Prepared]:
        """Reserve what a claim was allocated, and wait until it can be used, at most until
        ``deadline`` (monotonic seconds).

        Raises InvalidRequest for what cannot be had, NotFound if the claim is gone, NotReady if it
        takes longer (what is reserved stays, for the next call), EnvironmentProblem.
        """
        _check(ref)
        with self._turns.of(ref.uid, deadline) as turn:
            entry = self._entered(ref)
            try:
                self._reserve(entry)
                edits = _edits(entry, self._ready(entry, turn, deadline))
                entry = self._finish(entry, edits)
            except (NotReady, NodeAway):
                raise
            except CotenantError:
                if not entry.prepared:
                    self._undo(entry)
                raise
            self.problems.pop(ref.uid, None)
            return _answer(entry)

    def unprepare(self, ref: ClaimRef, deadline: float) -> None:
        """Give up all that a claim holds. No effect if it holds nothing. Raises NotReady if another
        call works on it until ``deadline``, EnvironmentProblem."""
        _check(ref)
        with self._turns.of(ref.uid, deadline, leaving=True):
            entry = self._checkpoint.get(ref.uid)
            if ref.uid in self._checkpoint.lost:
                self._release(self._reserved(ref.uid))
            if entry is not None:
                self._take_back(entry)
            else:
                self._specs.remove(ref.uid)
                self._checkpoint.drop(ref.uid)

    # -- at start, and from time to time

    def recover(self) -> None:
        """What is owed to the claims of former runs, without the node: CDI specs of what is
        prepared (a boot has removed them), none of anything else. Raises EnvironmentProblem."""
        known = {entry.uid for entry in self._checkpoint.entries()}
        for uid in known | self._specs.claims():
            with self._free(uid) as free:
                entry = self._checkpoint.get(uid)
                if not free or (entry is None and uid in self._checkpoint.lost):
                    continue  # its spec may be all that a running pod's containers have
                if entry is None or not entry.prepared:
                    self._specs.remove(uid)
                elif self._write_spec(uid, entry.edits):
                    why = "it was lost" if entry.boot == self._boot else "the machine was booted"
                    shown = f"{entry.namespace}/{entry.name}"
                    log.info("wrote the CDI spec of claim %s anew: %s", shown, why)

    def reconcile(self) -> None:
        """Bring node and disk in step with what was promised: reserve again what the node has
        lost, describe anew what has changed, take back what was never finished and is no longer
        wanted. Raises EnvironmentProblem; the next call goes on."""
        there = {s.reservation.id: s for s in _asked(self._node.reservations)}
        unfinished = []
        for each in self._checkpoint.entries():
            with self._free(each.uid) as free:
                entry = self._checkpoint.get(each.uid)
                if free and entry is not None and entry.prepared:
                    self._keep(entry, there)
                elif free and entry is not None:
                    unfinished.append(entry.uid)
        for uid in unfinished:
            with self._free(uid) as free:
                entry = self._checkpoint.get(uid)
                if free and entry is not None and not entry.prepared and not self._wanted(entry):
                    self._take_back(entry)

    @contextlib.contextmanager
    def _free(self, uid: str) -> Iterator[bool]:
        """The claim's turn, if no other call has it; whether that is so."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._turns.of(uid, 0.0))
            except NotReady:
                yield False
            else:
                yield True

    def _keep(self, entry: Entry, there: dict[str, ReservationStatus]) -> None:
        """Raises NodeAway; anything else is a problem of this claim alone."""
        statuses = [there[id] for id in entry.ids if id in there]
        used = len(statuses) < len(entry.promises) or any(s.adopted for s in statuses)
        try:
            if self._forgotten.look(entry, used, time.monotonic()):
                log.warning("claim %s/%s is gone and unused", entry.namespace, entry.name)
                self._take_back(entry)
            elif len(statuses) < len(entry.promises):
                self._reserve(entry)
            elif all(status.state == "ready" for status in statuses):
                self._finish(entry, _edits(entry, statuses))
                self.problems.pop(entry.uid, None)
        except NodeAway:
            raise
        except CotenantError as exc:
            if self.problems.get(entry.uid) != str(exc):
                log.error("claim %s/%s: %s", entry.namespace, entry.name, exc)
            self.problems[entry.uid] = str(exc)

    def _wanted(self, entry: Entry) -> bool:
        """Whether the claim is allocated as it was when its preparing began. The kubelet then asks
        again, or has it unprepared."""
        claim = self._cluster.claim(entry.namespace, entry.name)
        return (
            claim is not None
            and claim["metadata"].get("uid") == entry.uid
            and set(claims.reservation_ids(claim, self._pool)) == set(entry.ids)
        )

    # -- steps

    def _entered(self, ref: ClaimRef) -> Entry:
        """The claim's entry, in the checkpoint."""
        held = self._checkpoint.get(ref.uid)
        try:
            claim = self._allocated(ref)
        except EnvironmentProblem:
            if held is None or not held.prepared:
                raise
            return held
        if held is not None and set(held.ids) == set(claims.reservation_ids(claim, self._pool)):
            return held
        entry = self._planned(ref, claim)
        if held is not None:
            self._take_back(held)
        with self._booking:
            booking.check(entry, self._checkpoint.entries())
            self._checkpoint.save(entry)
        return entry

    def _allocated(self, ref: ClaimRef) -> Object:
        claim = self._cluster.claim(ref.namespace, ref.name)
        shown = f"claim {ref.namespace}/{ref.name}"
        if claim is None:
            raise NotFound(f"{shown} is gone from the API server; delete the pod")
        if claim["metadata"].get("uid") != ref.uid:
            raise InvalidRequest(f"{shown} was replaced by another of its name; delete the pod")
        if not (claim.get("status") or {}).get("reservedFor"):
            raise InvalidRequest(f"{shown} is reserved for no pod")
        if not claims.results(claim, self._pool):
            raise InvalidRequest(f"{shown} has no device of this driver in pool {self._pool}")
        return claim

    def _planned(self, ref: ClaimRef, claim: Object) -> Entry:
        parts = inventory(_asked(self._node.status).get("devices") or []).parts
        grouped = claims.grouped(claim, self._pool)
        promises = tuple(
            Promise(
                reservation,
                tuple(
                    Allocated(result.request.partition("/")[0], result.device, result.share_id)
                    for result in grouped[reservation.id]
                ),
            )
            for reservation in claims.reservations(claim, self._pool, parts)
        )
        return Entry(ref.uid, ref.namespace, ref.name, self._pool, promises)

    def _reserve(self, entry: Entry) -> None:
        for promise in entry.promises:
            reservation = promise.reservation
            answer = _asked(self._node.reserve, reservation)
            if not answer.holds:
                device = promise.results[0].device
                raise InvalidRequest(f"the node has no room on {device}: {answer.reason}")

    def _ready(self, entry: Entry, turn: Turn, deadline: float) -> list[ReservationStatus]:
        pause = _PAUSE_S
        while True:
            there = {s.reservation.id: s for s in _asked(self._node.reservations)}
            statuses = [there[id] for id in entry.ids if id in there]
            late = [s for s in statuses if s.state != "ready"]
            if not late and len(statuses) == len(entry.ids):
                return statuses
            reason = late[0].reason or late[0].state if late else "the node has lost it"
            if turn.leaving:
                raise NotReady("the claim is being unprepared")
            if self._leaving.is_set():
                raise NotReady("the driver is stopping; the kubelet asks again")
            if time.monotonic() + pause > deadline:
                raise NotReady(f"its space is not there yet: {reason}; the kubelet asks again")
            time.sleep(pause)
            pause = min(2 * pause, _LONG_PAUSE_S)
            if not late:
                self._reserve(entry)

    def _finish(self, entry: Entry, edits: dict[str, Edits]) -> Entry:
        """Everything on the disk, in this order: the spec, then that it is there."""
        self._write_spec(entry.uid, edits)
        done = msgspec.structs.replace(entry, state=PREPARED, edits=edits, boot=self._boot)
        if done != entry:
            self._checkpoint.save(done)
        return done

    def _write_spec(self, uid: str, edits: dict[str, Edits]) -> bool:
        return self._specs.write(uid, cdi.spec(uid, edits, self._hook))

    def _undo(self, entry: Entry) -> None:
        """Take back what was begun, now or, where that fails, later."""
        try:
            self._take_back(entry)
        except CotenantError as exc:
            log.warning("claim %s/%s is taken back later: %s", entry.namespace, entry.name, exc)

    def _take_back(self, entry: Entry) -> None:
        """Where the node is away, all stays as it was: a spec with what is prepared, and with
        nothing else."""
        if not entry.prepared:
            self._specs.remove(entry.uid)
        self._release(entry.ids)
        self._specs.remove(entry.uid)
        self._checkpoint.drop(entry.uid)
        self._forgotten.drop(entry.uid)
        self.problems.pop(entry.uid, None)

    def _release(self, ids: Iterable[str]) -> None:
        for id in ids:
            _asked(self._node.release, id)

    def _reserved(self, uid: str) -> list[str]:
        prefix = f"{RESERVED}{uid}/"
        found = _asked(self._node.reservations)
        return [s.reservation.id for s in found if s.reservation.id.startswith(prefix)]


def _check(ref: ClaimRef) -> None:
    if not _UID.fullmatch(ref.uid):
        raise InvalidRequest("a claim's uid is letters, digits and dashes, at most 63")


def _asked(call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Raises NodeAway in place of EnvironmentProblem."""
    try:
        return call(*args, **kwargs)
    except EnvironmentProblem as exc:
        raise NodeAway(str(exc)) from None


def _edits(entry: Entry, statuses: list[ReservationStatus]) -> dict[str, Edits]:
    """By request: what all of its reservations need."""
    by_request: dict[str, dict[str, Any]] = {}
    for promise in entry.promises:
        for result in promise.results:
            by_request.setdefault(result.request, {})[promise.reservation.id] = None
    there = {status.reservation.id: status for status in statuses}
    return {
        request: cdi.merged(request, [there[id] for id in ids])
        for request, ids in by_request.items()
    }


def _answer(entry: Entry) -> list[Prepared]:
    """A request's CDI device is named with the first of its devices: twice in a container it would
    have its hook run twice."""
    answer, seen = [], set()
    for promise in entry.promises:
        for result in promise.results:
            first = result.request not in seen
            seen.add(result.request)
            ids = (cdi.device_id(entry.uid, result.request),) if first else ()
            answer.append(Prepared(result.request, result.device, result.share_id, ids))
    return answer
