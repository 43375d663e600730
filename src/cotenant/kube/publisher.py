"""Keeps the pool of this node published, as the node is now."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from cotenant.domain.errors import CotenantError, EnvironmentProblem
from cotenant.kube import slices
from cotenant.kube.inventory import Inventory, inventory
from cotenant.kube.ports import Cluster, Conflict, NodeClient, Object
from cotenant.kube.waiting import Backoff

log = logging.getLogger(__name__)


class Publisher:
    """A pass each ``period`` seconds, in a thread of its own from ``start`` to ``stop``.

    ``allocated``: names of devices that claims have, None if that is not known now. A node that
    does not answer for ``patience`` passes is published as away.
    """

    def __init__(
        self,
        node: NodeClient,
        cluster: Cluster,
        name: str,
        allocated: Callable[[], set[str] | None],
        period: float = 5.0,
        patience: int = 3,
    ) -> None:
        self._node = node
        self._cluster = cluster
        self._name = name
        self._allocated = allocated
        self._period = period
        self._patience = patience
        self._missed = 0
        self._owner: Object | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._backoff = Backoff()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """What is published stays: a driver that starts again finds its devices allocated."""
        self._stop.set()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.publish()
                self._backoff.reset()
                self._stop.wait(self._period)
                continue
            except Conflict:
                log.info("slices were changed by somebody else; reading them again")
            except CotenantError as error:
                log.warning("slices cannot be published", extra={"reason": str(error)})
            except Exception:
                log.exception("publishing slices failed")
            self._backoff.wait(self._stop)

    def publish(self) -> None:
        """One pass. Raises ClusterAway, ClusterRefused, Conflict: to be made again."""
        found = self._ask()
        if found is None and self._missed < self._patience:
            return
        there = self._cluster.slices(self._name)
        before = slices.published(there)
        if found is not None:
            pool = slices.wanted(found, before, self._allocated())
        elif before.devices:
            pool = slices.without_node(before)
        else:
            return
        if slices.in_order(there, self._name) and slices.same(pool, before):
            return
        self._write(pool, there)

    def _ask(self) -> Inventory | None:
        try:
            found = inventory(self._node.status()["devices"])
        except EnvironmentProblem as error:
            self._missed += 1
            if self._missed == self._patience:
                log.warning("the node does not answer", extra={"reason": str(error)})
            return None
        self._missed = 0
        return found

    def _write(self, pool: slices.Pool, there: list[Object]) -> None:
        generation = 1 + max((item["spec"]["pool"]["generation"] for item in there), default=0)
        known = {item["metadata"]["name"]: item for item in there}
        for item in slices.slices(pool, self._name, generation, self._node_object()):
            old = known.pop(item["metadata"]["name"], None)
            if old is None:
                self._cluster.create_slice(item)
            else:
                self._cluster.update_slice({**old, "spec": item["spec"]})
        for name in known:
            self._cluster.delete_slice(name)
        log.info(
            "published",
            extra={"pool": self._name, "generation": generation, "devices": len(pool.devices)},
        )

    def _node_object(self) -> Object | None:
        if self._owner is None:
            self._owner = self._cluster.node(self._name)
        return self._owner
