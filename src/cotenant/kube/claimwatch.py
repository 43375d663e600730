"""The claims that have something of this node's pool, followed from the API server."""

from __future__ import annotations

import logging
import threading
from typing import Final

from cotenant.kube import claims
from cotenant.kube.ports import Cluster, ClusterAway, ClusterRefused, Expired, Object
from cotenant.kube.waiting import Backoff

PAUSE: Final = 0.2
"""Seconds between two watches: a server that ends each at once is not asked without a break."""

log = logging.getLogger(__name__)


class ClaimWatch:
    """Follows claims in a thread of its own, from ``start`` to ``stop``.

    What it knows may be old. Whoever would take something away for it reads the claim afresh.
    """

    def __init__(self, cluster: Cluster, node: str, backoff: Backoff | None = None) -> None:
        self._cluster = cluster
        self._node = node
        self._backoff = backoff or Backoff()
        self._lock = threading.Lock()
        self._claims: dict[str, Object] | None = None
        self._current = False
        self._listeners: list[threading.Event] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="claims", daemon=True)

    def listen(self) -> threading.Event:
        """An event that is set whenever a claim of this pool changes, or all were read."""
        heard = threading.Event()
        self._listeners.append(heard)
        return heard

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._cluster.end_watches()
        self._thread.join(timeout=2)

    def claims(self) -> list[Object] | None:
        """Claims with devices of this pool; None before they were read for the first time."""
        with self._lock:
            return None if self._claims is None else list(self._claims.values())

    @property
    def current(self) -> bool:
        """Whether claims are being followed now."""
        return self._current

    def allocated(self) -> set[str] | None:
        """Names of devices that claims have; None unless claims are being followed now."""
        with self._lock:
            if not self._current or self._claims is None:
                return None
            held = self._claims.values()
            return {r.device for claim in held for r in claims.results(claim, self._node)}

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._follow()
            except Expired:
                log.info("the watch of claims is too old; reading them again")
            except (ClusterAway, ClusterRefused) as error:
                log.warning("claims cannot be followed", extra={"reason": str(error)})
            except Exception:
                log.exception("following claims failed")
            self._current = False
            self._backoff.wait(self._stop)

    def _follow(self) -> None:
        found, version = self._cluster.claims()
        with self._lock:
            self._claims = {c["metadata"]["uid"]: c for c in found if self._concerns(c)}
            self._current = True
        self._tell()
        while not self._stop.is_set():
            for kind, claim in self._cluster.watch_claims(version):
                version = claim["metadata"]["resourceVersion"]
                self._backoff.reset()
                if kind != "BOOKMARK":
                    self._take(kind, claim)
                if self._stop.is_set():
                    return
            self._stop.wait(PAUSE)

    def _take(self, kind: str, claim: Object) -> None:
        uid = claim["metadata"]["uid"]
        with self._lock:
            assert self._claims is not None
            known = self._claims.pop(uid, None) is not None
            if kind != "DELETED" and self._concerns(claim):
                self._claims[uid] = claim
                known = True
        if known:
            self._tell()

    def _concerns(self, claim: Object) -> bool:
        return bool(claims.results(claim, self._node))

    def _tell(self) -> None:
        for heard in self._listeners:
            heard.set()
