"""Claims that nobody will have unprepared: gone from the API server, and no process uses them.

A kubelet that lost its own records never asks. Waiting for it would keep the space for ever.
"""

from __future__ import annotations

from cotenant.domain.errors import CotenantError
from cotenant.kube.checkpoint import Entry
from cotenant.kube.ports import Cluster

FORGET_S = 600.0


class Forgotten:
    """Says which they are. The API server is asked only for claims without processes, and ten times
    in ``forget_s``, for which a claim must have been gone."""

    def __init__(self, cluster: Cluster, forget_s: float = FORGET_S) -> None:
        self._cluster = cluster
        self._forget_s = forget_s
        self._since: dict[str, float] = {}
        self._next: dict[str, float] = {}

    def look(self, entry: Entry, used: bool, now: float) -> bool:
        """Whether the claim is forgotten. ``used``: a process has something of it; ``now`` in
        seconds of any clock that does not jump."""
        if used:
            self.drop(entry.uid)
            return False
        if now < self._next.get(entry.uid, now):
            return False
        self._next[entry.uid] = now + self._forget_s / 10
        try:
            claim = self._cluster.claim(entry.namespace, entry.name)
        except CotenantError:
            self._since.pop(entry.uid, None)
            return False
        if claim is not None and claim["metadata"].get("uid") == entry.uid:
            self._since.pop(entry.uid, None)
            return False
        return now - self._since.setdefault(entry.uid, now) >= self._forget_s

    def drop(self, uid: str) -> None:
        """Start over with a claim."""
        self._since.pop(uid, None)
        self._next.pop(uid, None)
