"""Asks the planner before a pod is bound, and says in the claim what it answered.

A claim that is allocated on this node is reserved at the node: all of it, or nothing. Then its
devices are ``planned``, and the scheduler binds the pod; or they are ``refused`` with the node's
reason, and it gives them back. Conditions are written for each share by its id. All devices of a
claim say the same, since schedulers up to 1.37 read only the first share of a device in a claim.

Reservations live as long as the allocation, and as long as they are ``kept``: until the kubelet has
had the claim unprepared. Before one is released the claim is read afresh: while the API server
cannot be read, nothing is released.
"""

from __future__ import annotations

import datetime
import logging
import threading
from collections.abc import Callable, Mapping

from cotenant.domain.errors import CotenantError, EnvironmentProblem, InvalidRequest
from cotenant.domain.reservation import MOST_ID, Reservation, ReservationStatus
from cotenant.kube import claims
from cotenant.kube.claimwatch import ClaimWatch
from cotenant.kube.inventory import Part, inventory
from cotenant.kube.names import DRIVER, PLANNED, REFUSED, RESERVED
from cotenant.kube.ports import Cluster, ClusterAway, ClusterRefused, Conflict, NodeClient, Object
from cotenant.kube.waiting import Backoff

log = logging.getLogger(__name__)

_TRIES = 5
"""Writes of one status that may conflict before other claims have their turn."""
_MESSAGE = 1024
"""Characters of a condition's message."""


def utc() -> str:
    """Now, as conditions have it. Nothing is decided by it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Binding:
    """A pass when claims change, and each ``period`` seconds, in a thread of its own."""

    def __init__(
        self,
        node: NodeClient,
        cluster: Cluster,
        name: str,
        watch: ClaimWatch,
        period: float = 30.0,
        now: Callable[[], str] = utc,
    ) -> None:
        self._node = node
        self._cluster = cluster
        self._name = name
        self._watch = watch
        self._period = period
        self._now = now
        self.kept: Callable[[], frozenset[str]] = frozenset
        """Ids of reservations that are not to be released, whatever becomes of their claims."""
        self._heard = watch.listen()
        self._turned_down: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="binding", daemon=True)
        self._backoff = Backoff(longest=10.0)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """What is reserved stays."""
        self._stop.set()
        self._heard.set()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._heard.clear()
            try:
                self.settle()
                self._backoff.reset()
                self._heard.wait(self._period)
                continue
            except CotenantError as error:
                log.warning("claims cannot be settled; trying again", extra={"reason": str(error)})
            except Exception:
                log.exception("settling claims failed")
            self._backoff.wait(self._stop)

    def settle(self) -> None:
        """One pass over all claims. Raises what kept one from being settled, after the others."""
        found = self._watch.claims()
        if found is None:
            return
        there = self._node.reservations()
        held = {status.reservation.id for status in there}
        parts = inventory(self._node.status()["devices"]).parts
        trouble: CotenantError | None = None
        for claim in found:
            try:
                self._settle(claim, held, parts)
            except (ClusterAway, ClusterRefused, Conflict) as error:
                trouble = error
            except EnvironmentProblem:
                raise
            except Exception:  # A claim is what somebody wrote; it must not hold up the others.
                log.exception("a claim cannot be settled", extra=_of(claim))
        self._sweep(found, there)
        if trouble is not None:
            raise trouble

    def _settle(self, claim: Object, held: set[str], parts: Mapping[str, Part]) -> None:
        if self._is_refused(claim):
            return
        was_planned = said(claim, self._name, PLANNED)
        try:
            wanted = claims.reservations(claim, self._name, parts)
            refusal = self._reserve(wanted, held)
        except InvalidRequest as error:
            wanted, refusal = [], str(error)
        if not refusal:
            if not was_planned:
                self._write(claim, PLANNED, "there is room; it is reserved")
        elif was_planned:
            # Its pod may run: what is left of it is kept, and the rest asked for again.
            log.error("a planned claim lost its place", extra={**_of(claim), "reason": refusal})
        else:
            self._write(claim, REFUSED, refusal)
            self._turned_down.update(claims.reservation_ids(claim, self._name))
            for reservation in wanted:
                if reservation.id in held:
                    self._node.release(reservation.id)

    def _reserve(self, wanted: list[Reservation], held: set[str]) -> str:
        """Reserve what is not held yet; why that cannot be, or ""."""
        for reservation in wanted:
            if reservation.id in held:
                continue
            try:
                answer = self._node.reserve(reservation)
            except EnvironmentProblem:
                raise
            except CotenantError as error:
                return str(error)
            if not answer.made:
                return answer.reason or "the planner finds no room"
            held.add(reservation.id)
        return ""

    def _is_refused(self, claim: Object) -> bool:
        ids = claims.reservation_ids(claim, self._name)
        return said(claim, self._name, REFUSED) or not self._turned_down.isdisjoint(ids)

    def _write(self, claim: Object, condition: str, message: str) -> None:
        """Say it in the claim, if that is still allocated as it was."""
        meta, ids = claim["metadata"], claims.reservation_ids(claim, self._name)
        for _ in range(_TRIES):
            fresh = self._cluster.claim(meta["namespace"], meta["name"])
            if fresh is None or claims.reservation_ids(fresh, self._name) != ids:
                return
            if said(fresh, self._name, REFUSED) or said(fresh, self._name, condition):
                return
            say(fresh, self._name, condition, _printable(message), self._now())
            try:
                self._cluster.update_claim_status(fresh)
            except Conflict:
                continue
            log.info("claim settled", extra={**_of(claim), "said": condition, "reason": message})
            return
        raise Conflict(f"{meta['namespace']}/{meta['name']} changes all the time; trying again")

    def _sweep(self, found: list[Object], there: list[ReservationStatus]) -> None:
        """Release what no claim has any more. What this pass refused is released already."""
        wanted: set[str] = set()
        for claim in found:
            if not self._is_refused(claim):
                wanted.update(claims.reservation_ids(claim, self._name))
        known = {id for claim in found for id in claims.reservation_ids(claim, self._name)}
        self._turned_down &= known
        wanted |= self.kept()  # after what it is compared with was read
        for status in there:
            reservation = status.reservation
            if reservation.id.startswith(RESERVED) and reservation.id not in wanted:
                self._release(reservation)

    def _release(self, reservation: Reservation) -> None:
        if "/" not in reservation.name:
            return  # Not made here, whatever its id begins with.
        try:
            fresh = self._fresh(reservation)
        except ClusterAway:
            log.warning(
                "a reservation is kept until its claim can be read", extra=_named(reservation)
            )
            return
        if (
            fresh is not None
            and reservation.id in claims.reservation_ids(fresh, self._name)
            and not self._is_refused(fresh)
        ):
            return
        self._node.release(reservation.id)
        log.info("released", extra=_named(reservation))

    def _fresh(self, reservation: Reservation) -> Object | None:
        """The claim that it was made for, as it is now."""
        namespace, _, name = reservation.name.partition("/")
        if len(reservation.name) < MOST_ID:
            return self._cluster.claim(namespace, name)
        found, _ = self._cluster.claims()  # The name was cut off.
        ids = claims.reservation_ids
        return next((c for c in found if reservation.id in ids(c, self._name)), None)


def said(claim: Object, node: str, condition: str) -> bool:
    """Whether a claim says ``condition`` of all devices, by share, that are allocated to it."""
    known = {_key(item): item for item in _said_of(claim)}
    keys = [_key(item) for item in _ours(claim, node)]
    return bool(keys) and all(_holds(known.get(key) or {}, condition) for key in keys)


def say(claim: Object, node: str, condition: str, message: str, now: str) -> None:
    """Have a claim's status say ``condition`` of all devices that are allocated to it, in place of
    the other one; what others say of them, and of other drivers' devices, stays."""
    status = claim["status"]
    known = {_key(item): item for item in _said_of(claim)}
    allocated = {_key(item): item for item in _ours(claim, node)}
    kept = [
        item
        for key, item in known.items()
        if key not in allocated and (item.get("driver"), item.get("pool")) != (DRIVER, node)
    ]
    status["devices"] = kept + [
        _with(known.get(key) or _entry(item), condition, message, now)
        for key, item in allocated.items()
    ]


def _with(entry: Object, condition: str, message: str, now: str) -> Object:
    before = {c["type"]: c for c in entry.get("conditions") or []}
    for kind in (PLANNED, REFUSED):
        state = "True" if kind == condition else "False"
        old = before.get(kind) or {}
        changed = old.get("status") != state
        before[kind] = {
            "type": kind,
            "status": state,
            "reason": "Planned" if condition == PLANNED else "Refused",
            "message": message,
            "lastTransitionTime": now if changed else old["lastTransitionTime"],
        }
    return {**entry, "conditions": list(before.values())}


def _entry(result: Object) -> Object:
    names = ("driver", "pool", "device", "shareID")
    return {name: result[name] for name in names if result.get(name)}


def _key(item: Object) -> tuple[str, str, str, str]:
    return item["driver"], item["pool"], item["device"], item.get("shareID") or ""


def _said_of(claim: Object) -> list[Object]:
    return (claim.get("status") or {}).get("devices") or []


def _ours(claim: Object, node: str) -> list[Object]:
    allocation = (claim.get("status") or {}).get("allocation") or {}
    results = (allocation.get("devices") or {}).get("results") or []
    return [r for r in results if (r.get("driver"), r.get("pool")) == (DRIVER, node)]


def _holds(entry: Object, condition: str) -> bool:
    return any(
        c.get("type") == condition and c.get("status") == "True"
        for c in entry.get("conditions") or []
    )


def _printable(message: str) -> str:
    return message.encode("utf-8", "replace").decode()[:_MESSAGE]


def _of(claim: Object) -> dict[str, str]:
    meta = claim["metadata"]
    return {"claim": f"{meta['namespace']}/{meta['name']}", "uid": meta["uid"]}


def _named(reservation: Reservation) -> dict[str, str]:
    return {"claim": reservation.name, "reservation": reservation.id}
