"""The gates of the jobs on a GPU: a control page for each job, from its launch until it is gone.

The laws:

* A job's gate is closed from the start, so that it computes nothing before it is granted space.
* A job is *behind* its gate while every process of it that the driver shows on the GPU is attached
  to its page. Who is shown and not attached for ``SURE`` is not: between a process's first call and
  its seat, and between its end and the driver's notice of it, lies a moment.
* Pages lie under a name that the next node of the same state directory finds: of a job that
  outlived its node it takes over the page, closed.
* A page stays, its gate closed, as long as any process was started with it: a job that is held, and
  forgotten meanwhile, is where it was when it goes on.
* A job that is to give memory computes nothing while its memory goes, nor for ``AWAY`` after: who
  waits for the memory has that long to take it. Then its gate opens if it is granted space, and it
  goes on once all of it is back.
* Where that failed, or nothing went, nothing can be taken from the job for ``REST``, for twice as
  long each time: its gate is not shut for nothing again and again.
* Where channels may be held (``channels``), what does not drain within the bound is stopped in its
  middle. It goes on when the gate opens, or when the job is to give memory: then it must end first.
* A thread of its own says to all jobs that the node lives, whatever the node's other threads wait
  for. When it stops, gates open by themselves (docs/gate.md).
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from cotenant.devices import proctree
from cotenant.devices.nvidia.page import LEFT, VARIABLE, ControlPage, Evicted
from cotenant.devices.nvidia.pagefolder import PageFolder
from cotenant.devices.nvidia.shim import SHIM
from cotenant.domain.costs import AWAY, COPYING, Eviction, drain
from cotenant.domain.device import Launch
from cotenant.domain.errors import DeviceError
from cotenant.domain.units import MS, S

log = logging.getLogger("cotenant.devices")

PATIENCE: Final = 2 * S
BEATS: Final = 8
"""Of the node within that time."""
DRAIN_WITHIN: Final = 8 * S
"""How long a revocation waits for what is in flight; below what a call to a device may take."""
HOLD_WITHIN: Final = 1 * S
"""How long channels may take to leave."""
SURE: Final = 2 * S
"""How long a process must have been shown and not attached."""
EVICT_WITHIN: Final = 20 * S
"""How long memory may take to go."""
REST: Final = 10 * S
"""How long nothing is taken from a job that could not give what was asked of it."""
MOST_REST: Final = 600 * S
"""The longest of those times, which double."""
_SHARED: Final = Path("/dev/shm")


class Gates:
    """Pages by job. ``grant`` and ``revoke`` of one job do not overlap; all else may.

    ``node`` names the node whose pages these are, the same after a restart. ``driver``: the real
    library. ``bound_ns``: see ``ControlPage``. ``base``: a ``tmpfs``. ``channels``: how
    those of jobs that are launched from now on are held (``page.LEFT``: not at all).
    """

    def __init__(
        self, node: str, driver: Path, bound_ns: int = 2 * MS, base: Path = _SHARED
    ) -> None:
        self._driver = driver
        self._bound_ns = bound_ns
        self.channels = LEFT
        self._place = PageFolder(base, _short(node))
        self.folder = self._place.path
        self._pages: dict[str, ControlPage] = {}
        self._outside: dict[str, dict[int, int]] = {}
        """Processes that were shown and not attached at the last look, and since when (ns)."""
        self._beyond: dict[str, frozenset[int]] = {}
        """Those for long enough."""
        self._failed: set[str] = set()
        self._left: set[str] = set()
        """Jobs that were forgotten while processes of theirs lived."""
        self._granted: set[str] = set()
        self._away_until: dict[str, int] = {}
        """Until when (ns) a gate stays closed, whatever is granted."""
        self._rests: dict[str, tuple[int, int]] = {}
        """Until when (ns) nothing is taken from a job from which nothing went, and for how long."""
        self.eviction = COPYING
        """What evictions and restores were seen to take."""
        self._lock = threading.Lock()
        """Gates turn, and pages come and go, under it."""
        self._ends = threading.Event()
        self._beater: threading.Thread | None = None

    def open(self) -> None:
        """Make the directory, and remove the pages of jobs that are gone, here and where nodes were
        killed. Raises DeviceError."""
        self._place.open()
        self._ends.clear()
        self._beater = threading.Thread(target=self._beat, name="cotenant-beat", daemon=True)
        self._beater.start()

    def close(self) -> None:
        """Open all gates. Pages of jobs that go on are kept for the next node."""
        self._ends.set()
        if self._beater is not None:
            self._beater.join()
            self._beater = None
        for job, page in list(self._pages.items()):
            self._drop(job, page, keep=bool(proctree.marked(VARIABLE, str(page.path))))
        self._place.close()

    def _beat(self) -> None:
        while not self._ends.wait(PATIENCE / BEATS / S):
            with self._lock:
                for job, page in self._pages.items():
                    try:
                        page.beat()
                        if job in self._granted:
                            self._settle(job, page)
                    except OSError as error:
                        self._fail(job, str(error))

    def _fail(self, job: str, why: str) -> None:
        """Say once what is wrong with a job's page."""
        if job not in self._failed:
            self._failed.add(job)
            log.error("a job's page cannot be written", extra={"job": job, "why": why})

    # --- jobs -------------------------------------------------------------------------------

    def launch(self, job: str, quota: int = 0) -> Launch:
        """Make the job's page anew, closed; what its processes need. ``quota``: bytes of device
        memory that it may have, 0 for any number. Raises DeviceError."""
        if (before := self._pages.get(job)) is not None:
            self._drop(job, before)
        page = self._make(job)
        page.path.unlink(missing_ok=True)
        page.open()
        page.close_gate()
        page.set_quota(quota)
        with self._lock:
            self._pages[job] = page
        return Launch(
            fixed=page.env(self._driver),
            prepend={"LD_PRELOAD": str(SHIM), "LD_LIBRARY_PATH": str(SHIM.parent)},
            mounts=(str(page.path), str(SHIM.parent)),
        )

    def take_over(self, job: str) -> bool:
        """Whether a job that was launched, perhaps by a node before this, has a page; its gate is
        closed."""
        if job not in self._pages:
            page = self._make(job)
            try:
                page.adopt()
            except DeviceError as error:
                log.warning("a job's page is gone", extra={"job": job, "why": str(error)})
                return False
            with self._lock:
                self._pages[job] = page
        with self._lock:
            self._left.discard(job)
            self._pages[job].close_gate()
        return True

    def _make(self, job: str) -> ControlPage:
        path = self.folder / _short(job)
        return ControlPage(path, self._bound_ns, PATIENCE, channels=self.channels)

    def forget(self, job: str) -> None:
        """Its page goes, once no process has it. No effect on one without a page."""
        page = self._pages.get(job)
        if page is None:
            return
        self._outside.pop(job, None)
        self._beyond.pop(job, None)
        if not proctree.marked(VARIABLE, str(page.path)):
            self._drop(job, page)
            return
        with self._lock:
            if self._pages.get(job) is page:
                self._granted.discard(job)
                self._left.add(job)
                page.close_gate()

    def _drop(self, job: str, page: ControlPage, keep: bool = False) -> None:
        """No effect if the job has another page by now."""
        with self._lock:
            if self._pages.get(job) is not page:
                return
            del self._pages[job]
            for known in (self._granted, self._left, self._failed):
                known.discard(job)
            self._away_until.pop(job, None)
            self._rests.pop(job, None)
            page.close(keep)

    def grant(self, job: str) -> None:
        """Open the gate, once the job's memory may come back. Raises DeviceError for a job that has
        none."""
        page = self.page(job)
        with self._lock:
            self._granted.add(job)
            self._settle(job, page)

    def _settle(self, job: str, page: ControlPage) -> None:
        """Under the lock: open the gate if it is to be."""
        if time.monotonic_ns() >= self._away_until.get(job, 0):
            self._away_until.pop(job, None)
            page.open_gate()

    def revoke(self, job: str) -> int:
        """Close the gate and wait until nothing of the job is on the GPU; the ns that took. Raises
        DeviceError where it neither drains nor can be held: it stays closed."""
        page = self.page(job)
        began = time.monotonic_ns()
        with self._lock:
            self._granted.discard(job)
            page.close_gate()
        if not self.stops(job) or not self._stop(job, page):
            self._drain(job, page)
        return time.monotonic_ns() - began

    def stops(self, job: str) -> bool:
        """Whether kernels of a job may be stopped in their middle."""
        return bool(self.channels and self.page(job).channels)

    def _stop(self, job: str, page: ControlPage) -> bool:
        """Whether the job is off the GPU: drained, or held where that takes too long."""
        if page.wait_drained(drain(self._bound_ns).most):
            return True
        with self._lock:
            page.hold()
        if page.wait_held(HOLD_WITHIN):
            return True
        errors = [seat.channels.error for seat in page.seats() if seat.channels.error]
        with self._lock:
            page.release()
        said = {"job": job, "errors": [f"{error:#x}" for error in errors]}
        log.warning("a job's channels could not be held", extra=said)
        return False

    def _drain(self, job: str, page: ControlPage) -> None:
        if not page.wait_drained(DRAIN_WITHIN):
            raise DeviceError(f"{job}: {self._undrained(page)}")

    def evict(self, job: str, size: int) -> int:
        """Take up to so many bytes off the GPU; how many went. Not while it does so already. Raises
        DeviceError where the job's work does not end, or its memory does not go, in time."""
        page = self.page(job)
        with self._lock:
            self._away_until[job] = time.monotonic_ns() + DRAIN_WITHIN + EVICT_WITHIN
            page.close_gate()
            page.release()
        moved = None
        try:
            if not page.wait_drained(DRAIN_WITHIN):
                raise DeviceError(f"{job}: no memory was taken: {self._undrained(page)}")
            with self._lock:
                number = page.evict(size)
            moved = page.wait_evicted(number, EVICT_WITHIN)
            if moved is None or moved.errors:
                why = "it takes too long" if moved is None else f"the driver said {moved.errors}"
                raise DeviceError(f"{job}: not all of its memory was taken: {why}")
            return moved.moved
        except OSError as error:
            raise DeviceError(f"{job}: no memory was taken: its page is gone ({error})") from error
        finally:
            with self._lock:
                if self._pages.get(job) is page:
                    self._evicted(job, moved)

    def _evicted(self, job: str, moved: Evicted | None) -> None:
        """Under the lock: what follows from an eviction."""
        now = time.monotonic_ns()
        went = moved is not None and moved.moved > 0
        self._away_until[job] = now + (AWAY if went else 0)
        if moved is not None and went and not moved.errors:
            self._rests.pop(job, None)
            cost, out = self.eviction, self.eviction.out.seen(moved.moved, moved.took_ns)
            self.eviction = Eviction(out, cost.back, cost.away)
        else:
            _, before = self._rests.get(job, (0, 0))
            rest = min(MOST_REST, 2 * before or REST)
            self._rests[job] = now + rest, rest

    def evictable(self, job: str) -> int:
        """Bytes that could be taken from a job now, as its processes say themselves."""
        page, (rests_until, _) = self._pages.get(job), self._rests.get(job, (0, 0))
        if page is None or time.monotonic_ns() < rests_until:
            return 0
        return sum(max(0, seat.memory.evictable) for seat in page.seats())

    def _returned(self, page: ControlPage) -> None:
        """Take note of how long it took until memory was back, if it is."""
        came, cost = page.returned(), self.eviction
        if came is not None and not came.errors:
            self.eviction = Eviction(cost.out, cost.back.seen(came.moved, came.took_ns), cost.away)

    def page(self, job: str) -> ControlPage:
        """Raises DeviceError for a job that has none."""
        found = self._pages.get(job)
        if found is None:
            raise DeviceError(f"{job}: it has no control page")
        return found

    def _undrained(self, page: ControlPage) -> str:
        late = [seat for seat in page.seats() if not seat.drained]
        pids = ", ".join(str(seat.pid) for seat in late) or "none that is attached"
        return (
            f"its gate was closed {DRAIN_WITHIN / S:g} s ago and work is still on the GPU "
            f"(processes: {pids}): a long kernel, a hung driver, or a stopped process"
        )

    # --- who is behind the gate -------------------------------------------------------------

    def look(self, shown: Mapping[str, Collection[int]]) -> None:
        """Take note of the processes of each job that the driver shows on the GPU."""
        for job in list(self._left):
            self.forget(job)
        with self._lock:
            for known in self._pages.values():
                self._returned(known)
        now = time.monotonic_ns()
        for job, pids in shown.items():
            page = self._pages.get(job)
            if page is None:
                continue
            before = self._outside.get(job, {})
            outside = {pid for pid in pids if not page.attached(pid) and _computes(pid)}
            self._outside[job] = {pid: before.get(pid, now) for pid in outside}
            since = self._outside[job].items()
            self._beyond[job] = frozenset(pid for pid, first in since if now - first >= SURE)

    def memory(self, job: str) -> int:
        """Bytes on the GPU, as the processes of a job say themselves."""
        page = self._pages.get(job)
        return sum(seat.memory.resident for seat in page.seats()) if page is not None else 0

    def away(self, job: str) -> int:
        """Bytes of a job's memory that are on the host, as its processes say themselves."""
        page = self._pages.get(job)
        return sum(seat.memory.evicted for seat in page.seats()) if page is not None else 0

    def beyond(self, job: str) -> frozenset[int]:
        """Processes of a job that compute where the gate cannot hold them."""
        return self._beyond.get(job, frozenset())


def _short(name: str) -> str:
    """A file name for any name."""
    return hashlib.sha256(name.encode()).hexdigest()[:24]


def _computes(pid: int) -> bool:
    """Whether a process has memory of its own still: one that ends has none, while the driver shows
    it."""
    try:
        return bool(Path(f"/proc/{pid}/maps").read_bytes())
    except OSError:
        return False
