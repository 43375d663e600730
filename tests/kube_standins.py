"""Stand-ins for what ``cotenant-dra`` talks to: a node, and an API server's claims.

The node can be asked directly, or through a real control socket (``NodeSocket``), as the hook and a
driver in another process do.
"""

from __future__ import annotations

import json
import socketserver
import threading
from pathlib import Path
from typing import Any

import msgspec

from cotenant.domain.errors import CotenantError, EnvironmentProblem, InvalidRequest, NotFound
from cotenant.domain.reservation import Adopted, Answer, Reservation, ReservationStatus
from cotenant.kube.ports import ClusterAway, Object

POOL = "box-1"


def device(id: str, units: int = 4, **more: Any) -> dict[str, Any]:
    """A device as a node's status tells it."""
    base = {"id": id, "kind": "cpu", "units": list(range(units)), "compute": units, "memory": 2**30}
    return {**base, "mig": "", "hardware": "", "level": "HARD", "trains": True, **more}


class StandinNode:
    """Keeps reservations as the node's contract says. ``refuse`` is said of every new one, where it
    is set. A reservation is ready once ``slow`` looks at all of them are over."""

    def __init__(self, *devices: dict[str, Any]) -> None:
        self.devices = list(devices) or [device("cpu0"), device("cpu1")]
        self.away = False
        self.refuse = ""
        self.slow = 0
        self.stuck = False
        self.pages = "/dev/shm/cotenant-gates-standin"
        self.library = "/usr/lib/libstandin.so"
        self.held: dict[str, Reservation] = {}
        self.adopted: dict[str, list[int]] = {}
        self.events: list[tuple[str, Any]] = []
        self._looks: dict[str, int] = {}
        self._lock = threading.RLock()

    def status(self) -> dict[str, Any]:
        self._answering()
        return {"devices": self.devices}

    def reserve(self, reservation: Reservation, dry_run: bool = False) -> Answer:
        with self._lock:
            self._answering()
            before = self.held.get(reservation.id)
            if before is not None:
                if before != reservation:
                    raise InvalidRequest("there is another reservation under this id")
                return Answer(True, made=True)
            if reservation.device not in [d["id"] for d in self.devices]:
                raise NotFound(f"there is no device {reservation.device}")
            if reason := self.refuse or self._no_room(reservation):
                return Answer(False, reason)
            if not dry_run:
                self.held[reservation.id] = reservation
                self._looks[reservation.id] = 0
                self.events.append(("reserve", reservation.id))
            return Answer(True, made=not dry_run)

    def release(self, id: str) -> None:
        with self._lock:
            self._answering()
            if self.held.pop(id, None) is not None:
                self.events.append(("release", id))

    def adopt(self, id: str, pid: int) -> None:
        with self._lock:
            self._answering()
            if id not in self.held:
                raise NotFound(f"there is no reservation {id}")
            self.adopted.setdefault(id, []).append(pid)
            self.events.append(("adopt", id))

    def reservations(self) -> list[ReservationStatus]:
        with self._lock:
            self._answering()
            return [self._status(reservation) for reservation in self.held.values()]

    def lose(self) -> None:
        """Forget everything, as a node whose state was wiped."""
        with self._lock:
            self.held.clear()

    def _answering(self) -> None:
        if self.away:
            raise EnvironmentProblem("no node is running")

    def _no_room(self, new: Reservation) -> str:
        there = [r for r in self.held.values() if r.device == new.device]
        units = next(len(d["units"]) for d in self.devices if d["id"] == new.device)
        taken = sum(r.units for r in there) + units * sum(r.share for r in there)
        if taken + new.units + units * new.share > units + 1e-9:
            return f"{new.device} has {units} units and they are promised"
        return ""

    def _status(self, reservation: Reservation) -> ReservationStatus:
        id = reservation.id
        self._looks[id] = looks = self._looks.get(id, 0) + 1
        if self.stuck or looks <= self.slow:
            return ReservationStatus(reservation, "job", "waiting", "its partition is in use")
        return ReservationStatus(
            reservation,
            "job",
            "ready",
            env={"COTENANT_STANDIN": reservation.device},
            prepend={"LD_PRELOAD": self.library},
            mounts=(self.pages, self.library),
            adopted=tuple(Adopted(pid, 1) for pid in self.adopted.get(id, [])),
        )


class NodeSocket:
    """A stand-in's control socket. Use it as a context manager."""

    def __init__(self, node: StandinNode, path: Path) -> None:
        self.path = path
        handler = type("Handler", (_Handler,), {"node": node})
        self._server = _Server(str(path), handler)

    def __enter__(self) -> NodeSocket:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.path.unlink(missing_ok=True)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


class _Handler(socketserver.StreamRequestHandler):
    node: StandinNode

    def handle(self) -> None:
        for line in self.rfile:
            fields = json.loads(line)
            try:
                result = self._run(fields.pop("op"), fields)
                answer = {"ok": True, "result": msgspec.to_builtins(result)}
            except CotenantError as exc:
                answer = {"ok": False, "kind": type(exc).__name__, "error": str(exc)}
            try:
                self.wfile.write(json.dumps(answer).encode() + b"\n")
            except OSError:
                return

    def _run(self, op: str, fields: dict[str, Any]) -> Any:
        if op == "reserve":
            dry_run = fields.pop("dry_run")
            return self.node.reserve(msgspec.convert(fields, Reservation), dry_run)
        return getattr(self.node, op)(**fields)


def claim(uid: str, *results: dict[str, Any], name: str = "", pool: str = POOL) -> Object:
    """A ResourceClaim that is allocated to a pod. ``results`` are of ``unit`` and ``share``."""
    found = [{"driver": "cotenant.dev", "pool": pool, **each} for each in results]
    return {
        "metadata": {"uid": uid, "namespace": "team", "name": name or f"claim-{uid}"},
        "status": {
            "allocation": {"devices": {"results": found}},
            "reservedFor": [{"resource": "pods", "name": "pod", "uid": "pod-uid"}],
        },
    }


def unit(index: int, device: str = "cpu0", request: str = "work") -> dict[str, Any]:
    """A unit of a device, allocated whole."""
    return {"request": request, "device": f"{device}-unit-{index}"}


def share(per_cent: int, id: str, device: str = "cpu0", request: str = "work") -> dict[str, Any]:
    """A share of a device's time."""
    consumed = {"share": str(per_cent)}
    base = {"request": request, "device": f"{device}-time", "shareID": id}
    return {**base, "consumedCapacity": consumed}


class StandinClaims:
    """An API server, as far as the kubelet's half asks it. Claims lie in ``folder``, so a driver in
    another process sees them too; without it they are kept here."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._claims: dict[str, Object] = {}
        self.away = False

    def put(self, claim: Object) -> None:
        self._claims[claim["metadata"]["name"]] = claim
        if self._folder is not None:
            self._folder.mkdir(exist_ok=True)
            part = self._folder / "part"
            part.write_text(json.dumps(claim))
            part.replace(self._folder / claim["metadata"]["name"])

    def drop(self, name: str) -> None:
        self._claims.pop(name, None)
        if self._folder is not None:
            (self._folder / name).unlink(missing_ok=True)

    def claim(self, namespace: str, name: str) -> Object | None:
        if self.away or (self._folder is not None and not self._folder.exists()):
            raise ClusterAway("the API server cannot be reached")
        if self._folder is not None:
            try:
                return json.loads((self._folder / name).read_text())
            except FileNotFoundError:
                return None
        return self._claims.get(name)
