"""An API server over HTTP on the loopback: as much of one as a driver for resources meets.

Versions of resources and their conflicts, the status subresource, field selectors, pages, watches
with bookmarks, 410 for what is too old, and the checks of ``kube_schema``. It can be taken away and
come back on the same port.
"""

from __future__ import annotations

import contextlib
import copy
import json
import queue
import socket
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate
import yaml

from tests import kube_schema
from tests.kube_oracle import Invalid

Object = dict[str, Any]
KINDS = {"resourceclaims": "ResourceClaim", "resourceslices": "ResourceSlice", "nodes": "Node"}
TOKEN = "token-of-the-driver"
PAGE = 2
"""Objects of a page, whatever limit was asked for: lists are of several pages."""


class Status(Exception):
    """What the server answers instead."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class ApiServer:
    """``failing``: codes that the next requests are answered with. ``before_write``: called with
    the path before each write is carried out."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.objects: dict[tuple[str, str], Object] = {}
        self.version = 100
        self.history: list[tuple[int, str, str, Object]] = []
        self.oldest = 0
        self.watches: list[tuple[str, queue.Queue[Object | None]]] = []
        self.failing: list[int] = []
        self.requests: list[tuple[str, str]] = []
        self.refused: list[str] = []
        self.before_write: Any = None
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self.port = 0

    # Here and away

    def start(self) -> None:
        self._server = _Server(("127.0.0.1", self.port), self)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Nothing listens any more, and what was connected is cut off."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._thread.join()
        with self.lock:
            for _, events in self.watches:
                events.put(None)
        self._server.cut_off()
        self._server.server_close()
        self._server = None

    def kubeconfig(self, folder: Path) -> Path:
        path = folder / "kubeconfig"
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "here",
                    "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
                    "clusters": [
                        {"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}
                    ],
                    "users": [{"name": "u", "user": {"token": TOKEN}}],
                }
            )
        )
        return path

    # What tests do to it

    def put(self, plural: str, item: Object) -> Object:
        """Store, by somebody who may do anything."""
        with self.lock:
            key = (plural, _name(item))
            item = copy.deepcopy(item)
            item["metadata"].setdefault("uid", str(uuid.uuid4()))
            return self._store(key, item, "MODIFIED" if key in self.objects else "ADDED")

    def get(self, plural: str, name: str) -> Object:
        with self.lock:
            return copy.deepcopy(self.objects[plural, name])

    def all(self, plural: str) -> list[Object]:
        with self.lock:
            return [copy.deepcopy(o) for (kind, _), o in self.objects.items() if kind == plural]

    def remove(self, plural: str, name: str) -> None:
        with self.lock:
            item = self.objects.pop((plural, name))
            self.version += 1
            item["metadata"]["resourceVersion"] = str(self.version)
            self._tell(plural, "DELETED", item)

    def forget_history(self) -> None:
        """Watches from before now are too old."""
        with self.lock:
            self.version += 1
            self.oldest = self.version
            self.history = []
            expired = {"type": "ERROR", "object": _status(410, "too old")}
            for _, events in self.watches:
                events.put(expired)
                events.put(None)

    def bookmark(self) -> None:
        with self.lock:
            self.version += 1
            mark = {
                "type": "BOOKMARK",
                "object": {"metadata": {"resourceVersion": str(self.version)}},
            }
            for _, events in self.watches:
                events.put(mark)

    # What clients do

    def handle(self, method: str, path: str, query: dict[str, str], body: Object | None) -> Object:
        plural, name, subresource = _parse(path)
        if self.before_write is not None and method != "GET":
            self.before_write(path)
        with self.lock:
            if method == "GET" and name is None:
                return self._list(plural, query)
            if method == "POST":
                return self._create(plural, body or {})
            if (plural, name or "") not in self.objects:
                raise Status(404, f"{plural} {name} not found")
            if method == "GET":
                return copy.deepcopy(self.objects[plural, name or ""])
            if method == "DELETE":
                self.remove(plural, name or "")
                return _status(200, "deleted")
            if method == "PATCH":
                body = _merged(self.objects[plural, name or ""], body or {})
            return self._replace(plural, name or "", subresource, body or {})

    def _list(self, plural: str, query: dict[str, str]) -> Object:
        found = [o for o in self.all(plural) if _selected(o, query.get("fieldSelector", ""))]
        found.sort(key=_name)
        at = int(query.get("continue") or 0)
        more = str(at + PAGE) if at + PAGE < len(found) else ""
        meta = {"resourceVersion": str(self.version), "continue": more}
        return {"kind": "List", "metadata": meta, "items": found[at : at + PAGE]}

    def _create(self, plural: str, item: Object) -> Object:
        if (plural, _name(item)) in self.objects:
            raise Status(409, f"{_name(item)} already exists")
        self._check(item)
        return self.put(plural, item)

    def _replace(self, plural: str, name: str, subresource: str, item: Object) -> Object:
        old = self.objects[plural, name]
        if any(item["metadata"].get(k) != old["metadata"][k] for k in ("resourceVersion", "uid")):
            raise Status(409, f"{name} was modified; read it again")
        if subresource == "status":
            item = {**old, "status": copy.deepcopy(item.get("status", {}))}
            _check_status(item["status"])
        elif plural == "resourceclaims":
            item = {**item, "status": old.get("status", {})}
        else:
            for field in ("driver", "nodeName"):
                if item["spec"].get(field) != old["spec"].get(field):
                    raise Status(422, f"{field} is immutable")
        self._check(item)
        return self._store((plural, name), copy.deepcopy(item), "MODIFIED")

    def _check(self, item: Object) -> None:
        try:
            kube_schema.check(item)
        except (kubernetes_validate.ValidationError, Invalid) as error:
            self.refused.append(str(error))
            raise Status(422, str(error)[:200]) from None

    def _store(self, key: tuple[str, str], item: Object, kind: str) -> Object:
        self.version += 1
        item["metadata"]["resourceVersion"] = str(self.version)
        for device in item.get("spec", {}).get("devices", []) if key[0] == "resourceslices" else []:
            for taint in device.get("taints", []):
                taint.setdefault("timeAdded", "2026-01-01T00:00:00Z")
        self.objects[key] = item
        self._tell(key[0], kind, item)
        return copy.deepcopy(item)

    def _tell(self, plural: str, kind: str, item: Object) -> None:
        self.history.append((self.version, plural, kind, copy.deepcopy(item)))
        for wanted, events in self.watches:
            if wanted == plural:
                events.put({"type": kind, "object": copy.deepcopy(item)})

    @contextlib.contextmanager
    def watching(self, plural: str, since: int) -> Iterator[queue.Queue[Object | None]]:
        events: queue.Queue[Object | None] = queue.Queue()
        with self.lock:
            if since < self.oldest:
                raise Status(410, "too old a resource version")
            for version, kind, what, item in self.history:
                if version > since and kind == plural:
                    events.put({"type": what, "object": copy.deepcopy(item)})
            entry = (plural, events)
            self.watches.append(entry)
        try:
            yield events
        finally:
            with self.lock:
                self.watches = [other for other in self.watches if other is not entry]


def _merged(item: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    found = dict(item) if isinstance(item, dict) else {}
    for name, value in patch.items():
        if value is None:
            found.pop(name, None)
        else:
            found[name] = _merged(found.get(name), value)
    return found


def _parse(path: str) -> tuple[str, str | None, str]:
    parts = path.strip("/").split("/")
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    if parts[0] == "namespaces":
        namespace, plural, name, *rest = parts[1:]
        return plural, f"{namespace}/{name}", (rest or [""])[0]
    return parts[0], parts[1] if len(parts) > 1 else None, ""


def _name(item: Object) -> str:
    meta = item["metadata"]
    return f"{meta['namespace']}/{meta['name']}" if "namespace" in meta else meta["name"]


def _selected(item: Object, selector: str) -> bool:
    for part in filter(None, selector.split(",")):
        path, _, value = part.partition("=")
        found: Any = item
        for step in path.split("."):
            found = found.get(step, {})
        if found != value:
            return False
    return True


def _check_status(status: Object) -> None:
    """Devices are told apart by their keys, and only those that are allocated have a status."""
    results = status.get("allocation", {}).get("devices", {}).get("results", [])
    allocated = [_key(result) for result in results]
    keys = [_key(device) for device in status.get("devices", [])]
    if len(set(keys)) != len(keys) or not set(keys) <= set(allocated):
        raise Status(422, "status.devices: duplicate, or not allocated")


def _key(item: Object) -> tuple[str, ...]:
    return tuple(item.get(field, "") for field in ("driver", "pool", "device", "shareID"))


def _status(code: int, message: str) -> Object:
    kind = "Success" if code < 400 else "Failure"
    meta = {"apiVersion": "v1", "kind": "Status", "metadata": {}}
    return {**meta, "status": kind, "code": code, "message": message}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], api: ApiServer) -> None:
        self.api = api
        self._sockets: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._sockets.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._sockets.discard(request)
        super().shutdown_request(request)

    def cut_off(self) -> None:
        for connection in list(self._sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # Clients that are cut off.


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def _do(self) -> None:
        api, parts = self.server.api, urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        api.requests.append((self.command, parts.path))
        try:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Status(401, "who are you?")
            if api.failing:
                raise Status(api.failing.pop(0), "as the test wants it")
            if query.get("watch") == "true":
                self._watch(query)
                return
            answer, code = api.handle(self.command, parts.path, query, body), 200
        except Status as status:
            answer, code = _status(status.code, str(status)), status.code
        self._answer(code, answer)

    do_GET = do_PUT = do_POST = do_DELETE = do_PATCH = _do  # noqa: N815

    def _answer(self, code: int, answer: Object) -> None:
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _watch(self, query: dict[str, str]) -> None:
        plural, _, _ = _parse(urlsplit(self.path).path)
        with self.server.api.watching(plural, int(query["resourceVersion"])) as events:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while True:
                try:
                    event = events.get(timeout=float(query.get("timeoutSeconds", 60)))
                except queue.Empty:
                    break
                if event is None:
                    break
                data = json.dumps(event).encode() + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
