"""The API server over HTTP. ``lightkube`` finds it and its credentials, renewed ones too.

Objects stay JSON as the server wrote them. Its own models would drop, on the way back, what a newer
server knows and they do not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
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
                with self._watching(response.extensions["network_stream"]):
                    for line in response.iter_lines():
                        yield _event(line)
        except (httpx.HTTPError, LightkubeError) as error:
            raise _away(error) from None

    @contextlib.contextmanager
    def _watching(self, stream: Any) -> Iterator[None]:
        connection = stream.get_extra_info("socket")
        with self._lock:
            if self._ended:
                raise ClusterAway("this driver is ending")
            self._watches.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._watches.discard(connection)

    def claim(self, namespace: str, name: str) -> Object | None:
        return self._maybe("GET", f"{GROUP}/namespaces/{namespace}/resourceclaims/{name}")

    def update_claim_status(self, claim: Object) -> Object:
        meta = claim["metadata"]
        path = f"{GROUP}/namespaces/{meta['namespace']}/resourceclaims/{meta['name']}/status"
        return self._object("PUT", path, claim)

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
            response = self._client.request(method, path, json=body, params=params)
        except (httpx.HTTPError, LightkubeError) as error:
            raise _away(error) from None
        if not response.is_success:
            _raise(response.status_code, _message(response))
        try:
            found: Object = response.json()
        except ValueError:
            raise ClusterAway("what answers is not an API server: no JSON") from None
        return found


class _Missing(Conflict):
    """There is no such object (any more)."""


def _event(line: str) -> tuple[str, Object]:
    try:
        event = json.loads(line)
        kind, found = event["type"], event["object"]
    except (ValueError, KeyError, TypeError):
        raise ClusterAway("a watch was cut off in the middle of an event") from None
    if kind == "ERROR":
        _raise(int(found.get("code") or 0), str(found.get("message")))
    return kind, found


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
