"""Who had which core when, read back from the node's journal."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.telemetry.records import Header, Record, read

SERVED, TRAINED = "served", "trained"


class Span(NamedTuple):
    """One core held without a break. Seconds into the stream; the rest of the time it was
    idle, or held back for the next request."""

    core: int
    since: float
    until: float
    holder: str


class _Holder(NamedTuple):
    kind: str
    who: str
    since: int


class _Book:
    """Follows the dispatcher's decisions. A batch counts from its dispatch, even where a job's
    last thread is still on its way off the core."""

    def __init__(self) -> None:
        self.units: dict[str, tuple[int, ...]] = {}
        self.spans: list[Span] = []
        self._holders: dict[str, _Holder] = {}
        self._batches: dict[int, a.Dispatch] = {}

    def step(self, record: Record) -> None:
        """Learn from one event and what was decided on it."""
        self._happened(record.now, record.event)
        for action in record.actions:
            match action:
                case a.Dispatch(batch=batch, worker=worker, partition=partition):
                    self._batches[batch.id] = action
                    self._hold(partition, SERVED, worker, record.now)
                case a.Grant(job=job, partition=partition):
                    self._hold(partition, TRAINED, job, record.now)
                case _:
                    pass

    def _happened(self, now: int, event: e.Event) -> None:
        match event:
            case e.Planned(plan=plan):
                self.units |= {p.id: p.units for p in plan.partitions}
            case e.BatchDone(batch=batch) | e.BatchFailed(batch=batch):
                done = self._batches.pop(batch, None)
                if done is not None:
                    self._release(done.partition, done.worker, now)
            case e.Revoked(job=job, partition=partition):
                self._release(partition, job, now)
            case e.JobExited(job=who) | e.WorkerDown(worker=who):
                for partition in list(self._holders):
                    self._release(partition, who, now)
            case _:
                pass

    def _release(self, partition: str, who: str, now: int) -> None:
        found = self._holders.get(partition)
        if found is not None and found.who == who:
            self._end(partition, now)

    def _hold(self, partition: str, kind: str, who: str, now: int) -> None:
        self._end(partition, now)
        self._holders[partition] = _Holder(kind, who, now)

    def _end(self, partition: str, now: int) -> None:
        found = self._holders.pop(partition, None)
        if found is not None and now > found.since:
            units = self.units.get(partition, ())
            self.spans += [Span(core, found.since, now, found.kind) for core in units]

    def close(self, now: int) -> None:
        """End what is still held."""
        for partition in list(self._holders):
            self._end(partition, now)


def read_spans(journal: Path, start_ns: int, seconds: float) -> list[Span]:
    """Spans within the stream, which began at ``start_ns`` (monotonic); raises JournalError."""
    book, last = _Book(), 0
    for entry in read(journal, (Header, Record)):
        if isinstance(entry, Record):
            book.step(entry)
            last = entry.now
        elif isinstance(entry, Header) and not book.units:
            partitions = entry.dispatcher_state().partitions.values()
            book.units = {p.id: p.units for p in partitions}
    book.close(last)
    found = []
    for core, since_ns, until_ns, holder in book.spans:
        begin, end = (since_ns - start_ns) / 1e9, (until_ns - start_ns) / 1e9
        if end > 0 and begin < seconds:
            since, until = round(max(0.0, begin), 6), round(min(seconds, end), 6)
            found.append(Span(core, since, until, holder))
    return found


def stacked(
    spans: list[Span], seconds: float, cores: int, bins: int
) -> dict[str, NDArray[np.float64]]:
    """Share of all cores that each holder had, in so many equal parts of the time."""
    width = seconds / bins
    found = {SERVED: np.zeros(bins), TRAINED: np.zeros(bins)}
    for span in spans:
        first, last = int(span.since / width), min(bins - 1, int(span.until / width))
        for index in range(first, last + 1):
            low, high = max(span.since, index * width), min(span.until, (index + 1) * width)
            found[span.holder][index] += max(0.0, high - low)
    return {holder: held / (width * cores) for holder, held in found.items()}


def busy_moment(spans: list[Span], length: float) -> float:
    """Where a window of this length holds most batches (seconds)."""
    starts = np.array(sorted(s.since for s in spans if s.holder == SERVED))
    if not len(starts):
        return 0.0
    inside = np.searchsorted(starts, starts + length) - np.arange(len(starts))
    return float(starts[int(inside.argmax())])
