"""Stand-ins for tests of the driver: a node behind its control socket, and an API server in memory
(``fake_apiserver`` is one over HTTP)."""

from __future__ import annotations

import copy
import itertools
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec

from cotenant.domain import mig
from cotenant.domain.errors import EnvironmentProblem, InvalidRequest, NotFound
from cotenant.domain.reservation import (
    MOST_ID,
    Adopted,
    Answer,
    Reservation,
    ReservationStatus,
)
from cotenant.domain.units import MS
from cotenant.kube.names import API, DRIVER, PARAMETERS
from cotenant.kube.ports import ClusterAway, Conflict, Object
from cotenant.policy.lending import DEBT_WINDOW

GIB = 2**30


def cpu(cores: int = 4, id: str = "cpu", memory: int = 16 * GIB) -> Object:
    return _device(id, "cpu", list(range(cores)), cores, memory)


def gpu_subsets(units: int = 8, id: str = "gpu0") -> Object:
    return _device(id, "cuda", list(range(units)), units, 80 * GIB, hardware="GPU-5b", trains=False)


def gpu_mig(model: str = "H100-SXM5-80GB", id: str = "gpu1") -> Object:
    table = mig.table(model)
    units, compute = list(range(table.memory_slices)), table.compute_slices
    return _device(id, "cuda", units, compute, 80 * GIB, mig=mig.word(table), hardware="GPU-6c")


def npu(id: str = "npu") -> Object:
    return _device(id, "npu", [0], 1, 4 * GIB, trains=False)


def _device(id: str, kind: str, units: list[int], compute: int, memory: int, **more: Any) -> Object:
    usual = {"mig": "", "hardware": "", "level": "PAUSE", "trains": True, "trouble": ""}
    return {"id": id, "kind": kind, "units": units, "compute": compute, "memory": memory} | {
        **usual,
        **more,
    }


class FakeNode:
    """Keeps the contract of ``ControlClient``: what does not fit is refused by value, what can
    never be raises, and the same again changes nothing. ``away``: it does not answer."""

    def __init__(self, *devices: Object) -> None:
        self.devices = list(devices)
        self.away = False
        self.kept: dict[str, Reservation] = {}
        self.asked = 0
        self.shortest = MS
        """An objective (ns) that no layout holds is one below this; for shares of time, one below
        ``DEBT_WINDOW``."""

    def status(self) -> Object:
        self._answer()
        return {"devices": copy.deepcopy(self.devices)}

    def reserve(self, reservation: Reservation, dry_run: bool = False) -> Answer:
        self._answer()
        self.asked += 1
        known = self.kept.get(reservation.id)
        if known is not None:
            if msgspec.structs.replace(known, name="") != msgspec.structs.replace(
                reservation, name=""
            ):
                raise InvalidRequest(f"there is another reservation of the id {reservation.id}")
            return Answer(True, made=True)
        device = next((d for d in self.devices if d["id"] == reservation.device), None)
        if device is None:
            raise InvalidRequest(f"there is no device {reservation.device}")
        if bool(reservation.share) == bool(reservation.units):
            raise InvalidRequest("a share or units")
        if max(len(reservation.id), len(reservation.name)) > MOST_ID:
            raise InvalidRequest("too long")
        if not device["trains"] and reservation.units < device["compute"]:
            return Answer(False, f"{device['id']} only serves")
        if 0 < reservation.within < (DEBT_WINDOW if reservation.share else self.shortest):
            return Answer(False, "no layout holds this objective")
        if self.load(device, reservation) > 1 + 1e-9:
            return Answer(False, f"{device['id']} has no room for this")
        if not dry_run:
            self.kept[reservation.id] = reservation
        return Answer(True, made=not dry_run)

    def load(self, device: Object, *more: Reservation) -> float:
        """The part of a device that is promised."""
        held = [r for r in [*self.kept.values(), *more] if r.device == device["id"]]
        return sum(r.share + r.units / device["compute"] for r in held)

    def release(self, id: str) -> None:
        self._answer()
        self.kept.pop(id, None)

    def adopt(self, id: str, pid: int) -> None:
        self._answer()
        if id not in self.kept:
            raise NotFound(f"there is no reservation {id}")

    def reservations(self) -> list[ReservationStatus]:
        self._answer()
        return [
            ReservationStatus(r, f"job-{index}", "ready", adopted=(Adopted(1, 1),)[:0])
            for index, r in enumerate(self.kept.values())
        ]

    def _answer(self) -> None:
        if self.away:
            raise EnvironmentProblem("no node is running")


class FakeCluster:
    """Keeps the contract of ``Cluster``. ``away``: it cannot be reached. ``between``: called before
    each write, to be somebody else who writes first."""

    def __init__(self, node: str = "n1") -> None:
        self.name = node
        self.away = False
        self.objects: dict[str, Object] = {}
        self.written: dict[str, Object] = {}
        self.writes = 0
        self.between: Iterator[Object] = iter(())
        self._versions = itertools.count(1)

    def put(self, claim: Object) -> Object:
        """Somebody else makes or changes a claim."""
        stored = copy.deepcopy(claim)
        stored["metadata"]["resourceVersion"] = str(next(self._versions))
        self.objects[_key(stored)] = stored
        return copy.deepcopy(stored)

    def drop(self, claim: Object) -> None:
        del self.objects[_key(claim)]

    def claims(self) -> tuple[list[Object], str]:
        self._answer()
        return copy.deepcopy(list(self.objects.values())), str(next(self._versions))

    def watch_claims(self, version: str) -> Iterator[tuple[str, Object]]:
        self._answer()
        yield from ()

    def end_watches(self) -> None:
        pass

    def claim(self, namespace: str, name: str) -> Object | None:
        self._answer()
        return copy.deepcopy(self.objects.get(f"{namespace}/{name}"))

    def update_claim_status(self, claim: Object) -> Object:
        self._answer()
        for other in self.between:
            self.put(other)
            break
        stored = self.objects.get(_key(claim))
        if stored is None or stored["metadata"] != claim["metadata"]:
            raise Conflict("changed since it was read")
        self.writes += 1
        return self.put({**stored, "status": {**stored["status"], **_devices(claim)}})

    def slices(self, pool: str) -> list[Object]:
        self._answer()
        return copy.deepcopy(list(self.written.values()))

    def create_slice(self, item: Object) -> Object:
        self._answer()
        if item["metadata"]["name"] in self.written:
            raise Conflict("there is one of this name")
        return self._write(item)

    def update_slice(self, item: Object) -> Object:
        self._answer()
        known = self.written[item["metadata"]["name"]]
        if known["metadata"]["resourceVersion"] != item["metadata"].get("resourceVersion"):
            raise Conflict("changed since it was read")
        return self._write(item)

    def delete_slice(self, name: str) -> None:
        self._answer()
        self.written.pop(name, None)

    def node(self, name: str) -> Object | None:
        self._answer()
        return {"metadata": {"name": name, "uid": "node-uid"}}

    def _write(self, item: Object) -> Object:
        self.writes += 1
        stored = copy.deepcopy(item)
        stored["metadata"]["resourceVersion"] = str(next(self._versions))
        for device in stored["spec"].get("devices", []):
            for taint in device.get("taints", []):
                taint.setdefault("timeAdded", f"2026-01-01T00:00:{next(self._versions) % 60:02d}Z")
        self.written[item["metadata"]["name"]] = stored
        return copy.deepcopy(stored)

    def _answer(self) -> None:
        if self.away:
            raise ClusterAway("connection refused")


def _devices(claim: Object) -> Object:
    return {"devices": claim["status"]["devices"]}


def _key(claim: Object) -> str:
    return f"{claim['metadata']['namespace']}/{claim['metadata']['name']}"


def claim(name: str = "c", allocation: Object | None = None, uid: str = "") -> Object:
    """A claim as the API has it, with this allocation."""
    found: Object = {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaim",
        "metadata": {"name": name, "namespace": "ns", "uid": uid or str(uuid.uuid4())},
        "spec": {"devices": {"requests": []}},
        "status": {},
    }
    if allocation is not None:
        found["status"]["allocation"] = allocation
    return found


def says(source: str = "FromClaim", requests: tuple[str, ...] = (), **parameters: Any) -> Object:
    """An entry of an allocation's configuration."""
    written = {"apiVersion": API, "kind": PARAMETERS, **parameters}
    return {
        "source": source,
        "requests": list(requests),
        "opaque": {"driver": DRIVER, "parameters": written},
    }


def ask(name: str, class_name: str, count: int = 1, share: str = "", selector: str = "") -> Object:
    """A request of a claim."""
    exactly: Object = {"deviceClassName": class_name, "count": count}
    if share:
        exactly["capacity"] = {"requests": {"share": share}}
    if selector:
        exactly["selectors"] = [{"cel": {"expression": selector}}]
    return {"name": name, "exactly": exactly}
