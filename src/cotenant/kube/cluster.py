"""The API server over HTTP. ``lightkube`` finds it and its credentials, renewed ones too.

Objects stay JSON as the server wrote them. Its own models would drop, on the way back, what a newer
server knows and they do not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx2 as httpx
from lightkube.config.client_adapter import Client, ConnectionParams
from lightkube.config.kubeconfig import KubeConfig
from lightkube.core.exceptions import ConfigError as LightkubeError
from yaml import YAMLError

from cotenant.domain.errors import ConfigError
from cotenant.kube.names import DRIVER
from cotenant.kube.ports import ClusterAway, ClusterRefused, Conflict, Expired, Object

GROUP: Final = "apis/resource.k8s.io/v1"
TIMEOUT_S: Final = 10.0
WATCH_S: Final = 240
"""How long a watch lasts before it is asked for again. One that says nothing for longer is dead."""
_PAGE: Final = 500
_DEEP: Final = 100
"""Levels of JSON that are read; the API's own objects have a fraction of that."""
_DIGITS: Final = 400
_TOKEN: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)

for _noisy in ("httpx2", "httpcore2"):
    logging.getLogger(_noisy).setLevel(logging.WARNING)


def connected(kubeconfig: Path | None = None) -> httpx.Client:
    """By a kubeconfig; without one by KUBECONFIG, or as a pod's service account. Raises
    ConfigError."""
    try:
        if kubeconfig is not None:
            config = KubeConfig.from_file(kubeconfig)
        elif "KUBECONFIG" in os.environ:
            config = KubeConfig.from_env()
        else:
            config = KubeConfig.from_service_account()
        single = config.get()
        if single is None:
            raise ConfigError("the kubeconfig has no current context; choose one in it")
        return Client(single, ConnectionParams(timeout=httpx.Timeout(TIMEOUT_S)))
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from None
    except (LightkubeError, YAMLError, ValueError, LookupError, TypeError, AttributeError) as e:
        # Without its text, which may quote what is secret.
        raise ConfigError(
            f"{kubeconfig or 'what says how to reach the cluster'} is no kubeconfig"
            f" ({type(e).__name__}); check it with: kubectl config view"
        ) from None


class HttpCluster:
    """A Cluster. Safe to use from several threads."""

    def __init__(self, client: httpx.Client, watch_s: int = WATCH_S) -> None:
        self._client = client
        self._watch_s = watch_s
        self._lock = threading.Lock()
        self._watches: set[socket.socket] = set()
        self._ended = False

    @classmethod
    def connect(cls, kubeconfig: Path | None = None, watch_s: int = WATCH_S) -> HttpCluster:
        """By what ``connected`` finds. Raises ConfigError."""
        return cls(connected(kubeconfig), watch_s)

    def close(self) -> None:
        """End connections, those of watches too."""
        self.end_watches()
        self._client.close()

    def end_watches(self) -> None:
        with self._lock:
            self._ended = True
            for connection in self._watches:
                with contextlib.suppress(OSError):
                    # Not the method of a TLS socket, which would take its state from the reader.
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def claims(self) -> tuple[list[Object], str]:
        return self._list(f"{GROUP}/resourceclaims", {})

    def watch_claims(self, version: str) -> Iterator[tuple[str, Object]]:
        params = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(self._watch_s),
        }
        patience = httpx.Timeout(TIMEOUT_S, read=self._watch_s + TIMEOUT_S)
        url = f"{GROUP}/resourceclaims"
        try:
            with self._client.stream("GET", url, params=params, timeout=patience) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    _raise(response.status_code, _message(response))
                with self._watching(response.extensions.get("network_stream")):
                    for line in response.iter_lines():
                        yield _event(line)
        except (httpx.HTTPError, LightkubeError) as error:
            raise _away(error) from None

    @contextlib.contextmanager
    def _watching(self, stream: Any) -> Iterator[None]:
        connection = stream.get_extra_info("socket") if stream is not None else None
        with self._lock:
            if self._ended:
                raise ClusterAway("this driver is ending")
            if connection is not None:
                self._watches.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._watches.discard(connection)

    def claim(self, namespace: str, name: str) -> Object | None:
        return self._maybe("GET", f"{GROUP}/namespaces/{namespace}/resourceclaims/{name}")

    def update_claim_status(self, claim: Object) -> Object:
        # A patch: the rest of a status has parameters of all drivers, which may not change by a
        # byte, and we would write their numbers and letters in our way.
        meta = claim["metadata"]
        path = f"{GROUP}/namespaces/{meta['namespace']}/resourceclaims/{meta['name']}/status"
        version = {"uid": meta["uid"], "resourceVersion": meta["resourceVersion"]}
        patch = {"metadata": version, "status": {"devices": claim["status"].get("devices") or []}}
        return self._object("PATCH", path, patch)

    def slices(self, pool: str) -> list[Object]:
        # Pools are named after their node, and only a node's own slices may be read by its driver.
        selector = {"fieldSelector": f"spec.driver={DRIVER},spec.nodeName={pool}"}
        found, _ = self._list(f"{GROUP}/resourceslices", selector)
        return [item for item in found if item["spec"]["pool"]["name"] == pool]

    def create_slice(self, item: Object) -> Object:
        return self._object("POST", f"{GROUP}/resourceslices", item)

    def update_slice(self, item: Object) -> Object:
        return self._object("PUT", f"{GROUP}/resourceslices/{item['metadata']['name']}", item)

    def delete_slice(self, name: str) -> None:
        self._maybe("DELETE", f"{GROUP}/resourceslices/{name}")

    def node(self, name: str) -> Object | None:
        return self._maybe("GET", f"api/v1/nodes/{name}")

    def _list(self, path: str, params: dict[str, str]) -> tuple[list[Object], str]:
        items: list[Object] = []
        more = {**params, "limit": str(_PAGE)}
        while True:
            page = self._object("GET", path, params=more)
            items += page.get("items") or []
            meta = page["metadata"]
            if not meta.get("continue"):
                return items, str(meta["resourceVersion"])
            more["continue"] = meta["continue"]

    def _maybe(self, method: str, path: str) -> Object | None:
        try:
            return self._object(method, path)
        except _Missing:
            return None

    def _object(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        params: dict[str, str] | None = None,
    ) -> Object:
        try:
            response = self._client.request(
                method,
                path,
                content=None if body is None else json.dumps(body).encode(),
                headers=None if body is None else {"Content-Type": _written_as(method)},
                params=params,
            )
        except (httpx.HTTPError, LightkubeError) as error:
            raise _away(error) from None
        if not response.is_success:
            _raise(response.status_code, _message(response))
        try:
            found = _decoded(response.content)
        except ValueError:
            raise ClusterAway("what answers is not an API server: no JSON") from None
        return found


class _Missing(Conflict):
    """There is no such object (any more)."""


def _event(line: str) -> tuple[str, Object]:
    try:
        event = _decoded(line.encode())
        kind, found = event["type"], event["object"]
    except (ValueError, KeyError, TypeError):
        raise ClusterAway("a watch was cut off in the middle of an event") from None
    if kind == "ERROR":
        _raise(int(found.get("code") or 0), str(found.get("message")))
    return kind, found


def _written_as(method: str) -> str:
    return "application/merge-patch+json" if method == "PATCH" else "application/json"


def _decoded(data: bytes) -> Object:
    """JSON as anybody may have it stored: parameters of a claim are whatever its maker likes. What
    is too deep becomes null, and a number of thousands of digits a float. Raises ValueError."""
    try:
        found: Object = json.loads(data, parse_int=_int)
    except RecursionError:
        found = json.loads(_shallow(data), parse_int=_int)
    return found


def _int(digits: str) -> int | float:
    return int(digits) if len(digits) < _DIGITS else float(digits)


def _shallow(data: bytes) -> bytes:
    """JSON with null for what is deeper than ``_DEEP``."""
    kept, depth, start = bytearray(), 0, 0
    for token in _TOKEN.finditer(data):
        bracket = token[0]
        if bracket in b"[{":
            depth += 1
            if depth == _DEEP + 1:
                kept += data[start : token.start()] + b"null"
        elif bracket in b"]}":
            if depth == _DEEP + 1:
                start = token.end()
            depth -= 1
    return bytes(kept + data[start:])


def _raise(code: int, message: str) -> None:
    """Raise what a status of HTTP means."""
    text = f"the API server says {code}: {message[:400]}"
    if code == httpx.codes.NOT_FOUND:
        raise _Missing(text)
    if code == httpx.codes.CONFLICT:
        raise Conflict(text)
    if code == httpx.codes.GONE:
        raise Expired(text)
    if 400 <= code < 500 and code not in (
        httpx.codes.UNAUTHORIZED,
        httpx.codes.REQUEST_TIMEOUT,
        httpx.codes.TOO_MANY_REQUESTS,
    ):
        raise ClusterRefused(text)
    raise ClusterAway(text)


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json().get("message", ""))
    except (ValueError, AttributeError):
        return response.reason_phrase


def _away(error: Exception) -> ClusterAway:
    return ClusterAway(f"the API server cannot be reached ({type(error).__name__}: {error})")
