"""Memory of jobs in virtual time, on a GPU whose jobs are behind launch gates.

Its laws are those of the live device (``docs/gpu-memory.md``) and of who orders it
(``cotenant.runtime.jobgiving``), but that nobody is asked first:

1. A job has all of its memory, on the device or on the host, and computes only while all of it is
   on the device.
2. What it has beyond an order is taken ``ASKED`` ns later, and each as many again. It goes, and
   comes back, at the device's ``eviction``.
3. It stays away for as long as that says, and comes back once the job is granted space and there is
   room. What was granted to others and not taken by them counts as room.
"""

from __future__ import annotations

from collections.abc import Callable

from cotenant.domain import events as e
from cotenant.domain.costs import ASKED
from cotenant.domain.device import DeviceSpec
from cotenant.sim.physics import Progress


class _Job:
    """Bytes: ``here`` of its ``size`` are on the device; it is to have ``most`` (-1: any)."""

    def __init__(self, progress: Progress, size: int) -> None:
        self.progress = progress
        self.size = size
        self.here = 0
        self.most = -1
        self.moving = False
        self.away_until = 0


class JobMemory:
    """See the module's text. ``after``: calls a function so many ns later; ``now``: the time;
    ``drain``: draws how long a job's work takes to drain (ns)."""

    def __init__(
        self,
        spec: DeviceSpec,
        now: Callable[[], int],
        after: Callable[[int, Callable[[], None]], None],
        feed: Callable[[e.Event], None],
        drain: Callable[[], int],
    ) -> None:
        self._cost = spec.eviction
        shared = 0 < spec.memory <= spec.kv
        self._shared = shared
        self._capacity = spec.memory if shared else max(0, spec.memory - spec.kv)
        self._now, self._after, self._feed, self._drain = now, after, feed, drain
        self._others: dict[str, int] = {}
        self._jobs: dict[str, _Job] = {}

    @property
    def room(self) -> int:
        """Bytes of the device that nobody has."""
        here = sum(job.here for job in self._jobs.values())
        return max(0, self._capacity - sum(self._others.values()) - here)

    # --- who has what -----------------------------------------------------------------------

    def occupies(self, holder: str, size: int) -> None:
        """An instance has so many bytes there; 0: it is gone."""
        grew = size >= self._others.get(holder, 0)
        self._others[holder] = size
        if not grew:
            self._return_all()

    def pool(self, held: e.Held) -> None:
        """A pool has so much, where pools share the memory with jobs."""
        if self._shared:
            self.occupies(held.holder, held.held)

    def started(self, progress: Progress) -> None:
        """A job runs, and takes its memory as far as there is room."""
        if progress.spec.memory:
            job = self._jobs[progress.spec.id] = _Job(progress, progress.spec.memory)
            job.here = min(job.size, self.room)
            self._tell(job)

    def ended(self, name: str) -> None:
        """A job is gone, with what it had."""
        if self._jobs.pop(name, None) is not None:
            self._return_all()

    # --- what is taken ----------------------------------------------------------------------

    def order(self, name: str, most: int) -> None:
        """A job is to have at most so many bytes; -1: any number."""
        job = self._jobs.get(name)
        if job is not None:
            job.most = most
            self._after(ASKED, lambda: self._take(job))

    def _take(self, job: _Job) -> None:
        size = job.here - job.most
        if not self._there(job) or job.most < 0 or size <= 0:
            return
        if job.moving:
            self._after(ASKED, lambda: self._take(job))
            return
        self._move(job, self._drain() + self._cost.out.ns(size), lambda: self._gone(job, size))

    def _gone(self, job: _Job, size: int) -> None:
        job.here -= size
        job.progress.tally.evicted += size
        job.away_until = self._now() + self._cost.away
        self._tell(job)
        self._after(self._cost.away, lambda: self._return(job))
        self._after(ASKED, lambda: self._take(job))
        self._return_all()

    # --- what comes back --------------------------------------------------------------------

    def granted(self, name: str) -> None:
        """A job may use the device."""
        job = self._jobs.get(name)
        if job is not None:
            self._return(job)

    def _return_all(self) -> None:
        for job in list(self._jobs.values()):
            self._return(job)

    def _return(self, job: _Job) -> None:
        size = job.size - job.here
        may = self._there(job) and job.progress.held and self._now() >= job.away_until
        if not may or job.moving or not size or size > self.room:
            return
        job.here = job.size
        self._move(job, self._cost.back.ns(size), lambda: self._tell(job))
        self._feed(_held(job))

    # --- inside -----------------------------------------------------------------------------

    def _there(self, job: _Job) -> bool:
        return self._jobs.get(job.progress.spec.id) is job

    def _move(self, job: _Job, took: int, done: Callable[[], None]) -> None:
        def moved() -> None:
            job.moving = False
            if self._there(job):
                done()

        job.moving = True
        job.progress.rest(self._now(), True)
        self._after(took, moved)

    def _tell(self, job: _Job) -> None:
        """It computes if all of its memory is there; what there is is told."""
        job.progress.rest(self._now(), job.here < job.size)
        self._feed(_held(job))

    def check(self) -> None:
        """Raise AssertionError naming the law that is broken."""
        for name, job in self._jobs.items():
            assert 0 <= job.here <= job.size, f"{name}: has {job.here} bytes of {job.size}"
            resting = job.moving or job.here < job.size
            assert job.progress.resting == resting, f"{name}: computes without its memory"


def _held(job: _Job) -> e.Held:
    """As a node tells it: all can be taken, and what is away is wanted."""
    return e.Held(job.progress.spec.id, job.here, job.size, job.here, 0)
