"""All jobs in memory, and every step's way into the store, in order, even past a full disk."""

from __future__ import annotations

import difflib
import logging
from itertools import takewhile
from typing import Any

from cotenant.domain.errors import EnvironmentProblem, NotFound
from cotenant.domain.workload import JobSpec, JobState
from cotenant.runtime.jobstore import JobRecord, JobStore, advance

log = logging.getLogger("cotenant.jobs")


class JobLedger:
    """The truth about jobs while the daemon runs.

    A step that the store does not take (its disk is full) holds here at once and is written
    later, before those after it; until then ``saved`` is False.
    """

    def __init__(self, store: JobStore) -> None:
        self.records: dict[str, JobRecord] = {}
        """By id, oldest first. Only this class writes to it."""
        self._store = store
        self._unsaved: list[tuple[str, JobState, dict[str, Any]]] = []
        self._waiting = False

    @property
    def saved(self) -> bool:
        """Whether the store has every step."""
        return not self._unsaved

    def load(self) -> None:
        """Read all jobs from the (open) store; raises ``EnvironmentProblem``."""
        self.records = {record.spec.id: record for record in self._store.list()}

    def add(self, spec: JobSpec, created: float) -> None:
        """Queue a job, on the disk by the return; raises as ``JobStore.add``."""
        self.records[spec.id] = self._store.add(spec, created)

    def step(self, id: str, to: JobState, **fields: Any) -> JobRecord:
        """One step (``advance``) of a job; never raises because of the disk."""
        before = self.records[id].state
        record = self.records[id] = advance(self.records[id], to, **fields)
        self._unsaved.append((id, to, fields))
        self.flush()
        if to is not before:
            extra = {"job": id, "job_name": record.spec.name, "run": record.run, "state": to.value}
            log.info("job %s is %s: %s", id, to.value, record.reason or "as planned", extra=extra)
        return record

    def flush(self) -> None:
        """Write what is not yet written, as far as the store takes it."""
        while self._unsaved:
            id, to, fields = self._unsaved[0]
            try:
                self._store.transition(id, to, **fields)
            except EnvironmentProblem as error:
                if not self._waiting:
                    log.warning("job steps wait: %s", error, extra={"unsaved": len(self._unsaved)})
                self._waiting = True
                return
            del self._unsaved[0]
        self._waiting = False

    def prune(self, keep: int) -> list[str]:
        """Forget the oldest ended jobs beyond ``keep``; returns their ids."""
        ended = [id for id, record in self.records.items() if record.ended]
        old = ended[: max(0, len(ended) - keep)] if self.saved else []
        for id in old:
            try:
                self._store.remove(id)
            except EnvironmentProblem as error:
                log.warning("ended job not forgotten: %s", error, extra={"job": id})
                return old[: old.index(id)]
            del self.records[id]
        return old

    def resolve(self, ref: str, before: str = "") -> str:
        """The id that ``ref`` means: an id, a name (the newest job of it) or a unique prefix of
        an id. A name goes before a prefix, so that what a user typed in full is never read as
        the beginning of something else. ``before``: what it meant when that job came. Raises
        ``NotFound`` with near matches."""
        records = dict(takewhile(lambda one: one[0] != before, self.records.items()))
        if ref in records:
            return ref
        named = [id for id, record in records.items() if record.spec.name == ref]
        if named:
            return named[-1]
        begun = [id for id in records if ref and id.startswith(ref)]
        if len(begun) == 1:
            return begun[0]
        if begun:
            raise NotFound(f"{ref!r} is the beginning of several jobs: {', '.join(begun[:5])}")
        known = {record.spec.name for record in records.values()} | records.keys()
        near = difflib.get_close_matches(ref, sorted(known), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; `cotenant jobs` lists them"
        raise NotFound(f"there is no job {ref!r}{hint}")
