"""The driver's life beside the kubelet: its lock, its files, its sockets, its keeper.

The kubelet watches the registry for sockets, asks there what is served where, and calls. When it
starts it finds the socket again, so nothing is to be done at its restart. Should something remove
a socket, the keeper makes it anew. The keeper also brings node and disk in step.
"""

from __future__ import annotations

import fcntl
import importlib.resources
import logging
import os
import threading
from typing import Final

from cotenant.domain.errors import CotenantError, EnvironmentProblem
from cotenant.kube import files
from cotenant.kube.cdi import Specs
from cotenant.kube.checkpoint import Checkpoint
from cotenant.kube.health import judged
from cotenant.kube.names import DRIVER
from cotenant.kube.paths import Paths
from cotenant.kube.ports import Cluster, NodeClient
from cotenant.kube.preparing import Preparer, Site
from cotenant.kube.services import Services
from cotenant.kube.sockets import Listener

log = logging.getLogger("cotenant.kube")

PERIOD_S: Final = 5.0
_CALLS: Final = 32
_GRACE_S: Final = 2.0


class Plugin:
    """Serves the kubelet from ``start`` to ``stop``. ``pool`` is the node's name in the cluster.
    ``period_s`` is how often node and disk are brought in step.

    One per host: ``start`` raises EnvironmentProblem while another runs.
    """

    def __init__(
        self,
        node: NodeClient,
        cluster: Cluster,
        paths: Paths,
        pool: str,
        period_s: float = PERIOD_S,
    ) -> None:
        self._node = node
        self._cluster = cluster
        self._paths = paths
        self._pool = pool
        self._period_s = period_s
        self._services = Services(paths.service_socket, pool, self._changed)
        self._preparer: Preparer | None = None
        self._keeper: threading.Thread | None = None
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._recovered = False
        self._lock = -1
        self._service = Listener(paths.service_socket, self._services.for_claims(), _CALLS)
        self._registration = Listener(
            paths.registration_socket, self._services.for_registration(), 2
        )

    # -- life

    def start(self) -> None:
        """Read what former runs left, then serve. Raises EnvironmentProblem for folders or sockets
        that cannot be used, and if another driver runs."""
        self._paths.check()
        files.make_folder(self._paths.plugin, 0o750)
        self._take_lock()
        try:
            self._open()
        except BaseException:
            self.stop()
            raise
        log.info("driver %s serves the kubelet; pool %s", DRIVER, self._pool)

    def _open(self) -> None:
        self._stopping.clear()
        source = importlib.resources.files("cotenant.kube").joinpath("hook.py").read_bytes()
        files.write(self._paths.hook, source, 0o644)
        checkpoint = Checkpoint(self._paths.checkpoint)
        checkpoint.open()
        specs = Specs(self._paths.cdi)
        try:
            specs.open()
        except EnvironmentProblem as exc:
            log.error("%s", exc)  # claims that need it say so too
        command = (str(self._paths.python), "-I", "-S", str(self._paths.hook))
        self._preparer = Preparer(
            self._node,
            self._cluster,
            checkpoint,
            specs,
            Site(self._pool, (*command, str(self._paths.control)), self._paths.boot()),
        )
        self._recover()
        self._services.open(self._preparer)
        self._service.open()
        self._registration.open()
        self._keeper = threading.Thread(target=self._keep, name="dra-keeper", daemon=True)
        self._keeper.start()

    def stop(self) -> None:
        """Stop serving. What is prepared stays prepared. No effect if it does not run."""
        self._stopping.set()
        self._wake.set()
        self._services.leave()
        if self._preparer is not None:
            self._preparer.leave()
        self._registration.close()
        self._service.close(_GRACE_S)
        if self._keeper is not None:
            self._keeper.join()
            self._keeper = None
        self._services.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @property
    def healthy(self) -> bool:
        """Whether the kubelet can reach it and, as far as it said, has taken it."""
        keeper = self._keeper
        listening = self._service.there and self._registration.there
        return listening and keeper is not None and keeper.is_alive() and not self._services.refused

    def problems(self) -> dict[str, str]:
        """Why prepared claims do not have what they were promised, by uid."""
        return dict(self._preparer.problems) if self._preparer else {}

    def kept(self) -> frozenset[str]:
        """Ids of the reservations of claims that the kubelet has not had unprepared. They are not
        to be released, whatever the API server says of the claims: pods may run on them. Raises
        EnvironmentProblem."""
        return self._preparer.kept() if self._preparer else frozenset()

    def _take_lock(self) -> None:
        try:
            fd = os.open(self._paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise files.problem(self._paths.lock, exc) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise EnvironmentProblem(
                f"another driver runs in {self._paths.plugin}; stop that one first"
            ) from None
        self._lock = fd

    # -- the keeper

    def _changed(self) -> None:
        """Claims came or went: there is something to tell."""
        self._wake.set()

    def _keep(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                self._round()
            except Exception:
                log.exception("a bug of the driver; it goes on")
            self._wake.wait(self._period_s)

    def _round(self) -> None:
        for listener in (self._service, self._registration):
            if not listener.there and not self._stopping.is_set():
                self._listen_again(listener)
        if not self._recovered:
            self._recover()
        try:
            self._ready().reconcile()
        except CotenantError as exc:
            log.debug("not in step yet: %s", exc)
        self._look()

    def _listen_again(self, listener: Listener) -> None:
        log.warning("%s is gone; making it anew", listener.path)
        listener.close()
        try:
            listener.open()
        except EnvironmentProblem as exc:
            log.error("%s", exc)

    def _recover(self) -> None:
        try:
            self._ready().recover()
            self._recovered = True
        except CotenantError as exc:
            self._recovered = False
            log.error("claims are not all described to the container runtime: %s", exc)

    def _look(self) -> None:
        preparer = self._ready()
        entries = preparer.entries()
        try:
            status = self._node.status() if entries else {}
        except CotenantError as exc:
            self._services.board.show(judged(entries, None, preparer.problems, str(exc)))
        else:
            self._services.board.show(judged(entries, status, preparer.problems))

    def _ready(self) -> Preparer:
        assert self._preparer is not None
        return self._preparer
