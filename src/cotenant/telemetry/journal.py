"""The journal's writer: what the policy was told and what it decided, on disk, at a few µs.

``append`` encodes into a buffer; a thread writes the buffer every ``FLUSH_S`` seconds. A full
disk or a slow one never holds the node up: entries are dropped and counted, a ``Gap`` says so
in the journal, and the ``Header`` behind it lets a replay go on from there.

Who does what: the caller's thread encodes, decides when a segment is full, and takes
checkpoints, since only it knows when it is between two events. The thread touches files. They
share the chunks under one lock, which is held for moments only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from zlib import crc32

import msgspec

from cotenant import __version__
from cotenant.domain.actions import Action
from cotenant.domain.events import Event
from cotenant.domain.plan import Plan
from cotenant.domain.snapshot import Snapshot
from cotenant.policy.dispatcher import Dispatcher
from cotenant.policy.planner import Planner
from cotenant.telemetry.records import (
    BLOCK,
    FORMAT,
    LENGTH,
    Entry,
    Gap,
    Header,
    PlanRecord,
    Record,
    read,
)
from cotenant.telemetry.segments import SegmentFiles

__all__ = ["Gap", "Header", "Journal", "PlanRecord", "Record", "checkpoint", "read"]

log = logging.getLogger("cotenant.journal")

FLUSH_S = 0.05
RETRY_S = 5.0
"""Seconds between attempts to write again after a failure."""
CLOSE_S = 5.0
"""Longest wait for the last block at ``close``; a disk that hangs must not hold the node up."""

_BLOCK_SPACE = bytes(BLOCK.size)
_LENGTH_SPACE = bytes(LENGTH.size)


def checkpoint(dispatcher: Dispatcher, planner: Planner, now: int, wall: float) -> Header:
    """A header of these states. ``now`` ns, monotonic; ``wall`` seconds since the epoch."""
    encode = msgspec.msgpack.encode
    return Header(
        format=FORMAT,
        cotenant=__version__,
        wall=wall,
        now=now,
        devices=dispatcher.devices,
        dispatcher=encode(dispatcher.state),
        planner=encode(planner.state),
        tuning=planner.tuning,
    )


class _Chunk:
    """Entries encoded back to back behind room for the block's own header."""

    def __init__(self, starts_segment: bool = False) -> None:
        self.data = bytearray(_BLOCK_SPACE)
        self.starts_segment = starts_segment
        self.records = 0
        self.first = 0
        self.gap: Gap | None = None

    @property
    def empty(self) -> bool:
        return len(self.data) == BLOCK.size

    def seal(self) -> bytearray:
        """The whole block, its header filled in."""
        with memoryview(self.data) as view, view[BLOCK.size :] as body:
            BLOCK.pack_into(view, 0, len(body), crc32(body))
        return self.data


class Journal:
    """Writes a journal. All methods are for one thread, the node's; none raises.

    ``checkpoint`` is called within ``open``, ``append`` and ``append_plan`` and must return the
    states as they are then. So ``append`` belongs right behind ``Dispatcher.handle`` and
    ``append_plan`` right behind ``Planner.plan``, before anything else is handled or planned.
    ``segment_bytes`` is the size at which a segment ends, ``keep`` the number of segments kept,
    ``buffer_bytes`` what may wait for the disk.

    ``dropped`` counts entries that were lost since ``open``; ``error`` says why nothing can be
    written at present, None if all is well.
    """

    def __init__(
        self,
        directory: Path,
        checkpoint: Callable[[], Header],
        segment_bytes: int = 32 * 2**20,
        keep: int = 8,
        buffer_bytes: int = 16 * 2**20,
    ) -> None:
        self.directory = directory
        self.dropped = 0
        self.error: str | None = None
        self._checkpoint = checkpoint
        self._segment_bytes = segment_bytes
        self._buffer_bytes = buffer_bytes
        self._files = SegmentFiles(directory, keep)
        self._encode_into = msgspec.msgpack.Encoder().encode_into
        self._thread: threading.Thread | None = None
        self._run = ""
        self._size = 0
        # Shared with the thread, under the lock:
        self._lock = threading.Lock()
        self._chunks = [_Chunk()]
        self._pending = 0
        self._accepting = False
        self._closed = True
        self._retry_at = 0.0
        """When to try again after a failure; 0 if nothing failed."""
        self._lost: Gap | None = None
        self._awake = False
        self._wake = threading.Event()
        self._hurry = threading.Event()

    def open(self) -> None:
        """Begin a new segment and start writing."""
        self._run = f"{time.time_ns():x}"
        self._closed = False
        self._hurry.clear()
        self._resume(fresh=True)
        self._thread = threading.Thread(
            target=self._write_all, name="cotenant-journal", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Write what is buffered and stop; waits at most ``CLOSE_S`` seconds."""
        thread, self._thread = self._thread, None
        with self._lock:
            self._closed, self._accepting = True, False
            if not self._retry_at:
                self._own_up()
            self._awake = True
        self._hurry.set()
        self._wake.set()
        if thread is not None:
            thread.join(CLOSE_S)

    def append(self, now: int, event: Event, actions: Sequence[Action]) -> None:
        """Note one event and the actions that the dispatcher answered it with."""
        self._put(now, Record(now, event, tuple(actions)))

    def append_plan(self, now: int, snapshot: Snapshot, plan: Plan | None) -> None:
        """Note one run of the planner."""
        self._put(now, PlanRecord(now, snapshot, plan))

    # --- the caller's thread ------------------------------------------------------------------

    def _put(self, now: int, entry: Entry) -> None:
        with self._lock:
            if self._accepting:
                chunk = self._chunks[-1]
                if self._encode(chunk, now, entry):
                    if not chunk.records:
                        chunk.first = now
                    chunk.records += 1
                    if self._pending < self._buffer_bytes and self._size < self._segment_bytes:
                        return
            else:
                self._lose(1, now, now, "")
        self._seldom()

    def _encode(self, chunk: _Chunk, now: int, entry: Entry) -> bool:
        """Append an entry to a chunk and see that it gets written; False if it cannot be."""
        data = chunk.data
        start = len(data)
        try:
            data += _LENGTH_SPACE
            self._encode_into(entry, data, -1)
        except Exception as exc:
            # A bug of whoever made the entry, but no reason to take the node down.
            del data[start:]
            self._accepting = False
            self._lose(1, now, now, f"an entry could not be encoded: {exc}")
            return False
        size = len(data) - start
        LENGTH.pack_into(data, start, size - LENGTH.size)
        self._pending += size
        self._size += size
        if not self._awake:
            self._awake = True
            self._wake.set()
        return True

    def _seldom(self) -> None:
        """What is not on the hot path: full buffers, full segments, failures."""
        if self._closed:
            return
        if self._retry_at:
            if time.monotonic() >= self._retry_at:
                self._resume(fresh=True)
        elif not self._accepting:
            if self._pending <= self._buffer_bytes // 2:
                self._resume(fresh=False)
        elif self._pending >= self._buffer_bytes:
            self._accepting = False
            log.warning(
                "the journal's disk does not keep up; entries are dropped from now on",
                extra={"directory": str(self.directory)},
            )
        else:
            self._resume(fresh=True)

    def _resume(self, fresh: bool) -> None:
        """Begin a segment (``fresh``) or go on in the present one, from a checkpoint."""
        try:
            header = msgspec.structs.replace(self._checkpoint(), run=self._run)
        except Exception:
            log.exception("no checkpoint for the journal")
            with self._lock:
                self._accepting = False
                self._retry_at = time.monotonic() + RETRY_S
                self.error = "the node's state could not be encoded; see the node's log"
            return
        with self._lock:
            if self._retry_at > time.monotonic():
                return  # the thread failed in the meantime
            if fresh:
                self._chunks.append(_Chunk(starts_segment=True))
            chunk = self._chunks[-1]
            self._accepting, self._retry_at = True, 0.0
            self._own_up()
            self._encode(chunk, header.now, header)
            if fresh:
                self._size = 0  # checkpoints aside, lest a large one fills a small segment

    def _own_up(self) -> None:
        """Write down what was lost, if something was; with the lock held."""
        if self._lost is not None:
            lost, self._lost = self._lost, None
            chunk = self._chunks[-1]
            chunk.gap = lost if chunk.gap is None else _joined(chunk.gap, lost)
            self._encode(chunk, lost.until, lost)

    def _lose(self, records: int, since: int, until: int, reason: str) -> None:
        """Count what is lost; with the lock held."""
        self.dropped += records
        lost = Gap(records, since, until, reason or self.error or "the disk did not keep up")
        self._lost = lost if self._lost is None else _joined(self._lost, lost)

    # --- the writing thread -------------------------------------------------------------------

    def _write_all(self) -> None:
        while True:
            self._wake.wait()
            self._hurry.wait(FLUSH_S)  # for more to write at one go
            with self._lock:
                chunks, self._chunks = self._chunks, [_Chunk()]
                closed = self._closed
                self._awake = closed
                if not closed:
                    self._wake.clear()
            self._write(chunks)
            if closed:
                self._files.close()
                return

    def _write(self, chunks: list[_Chunk]) -> None:
        for index, chunk in enumerate(chunks):
            try:
                if chunk.starts_segment:
                    self._files.start()
                if not chunk.empty:
                    self._files.write(chunk.seal())
            except OSError as exc:
                self._failed(exc, chunks[index:])
                return
            with self._lock:
                self._pending -= len(chunk.data) - BLOCK.size
            if chunk.starts_segment and self.error is not None:
                self.error = None
                log.info("the journal is written again", extra={"dropped": self.dropped})

    def _failed(self, exc: OSError, unwritten: list[_Chunk]) -> None:
        first_time = self.error is None
        self._files.close()
        with self._lock:
            self.error = f"cannot write {self.directory}: {exc.strerror or exc}"
            for chunk in (*unwritten, *self._chunks):
                if chunk.gap is not None:
                    self.dropped -= chunk.gap.records  # counted when it happened
                    self._lose(chunk.gap.records, chunk.gap.since, chunk.gap.until, self.error)
                if chunk.records:
                    self._lose(chunk.records, chunk.first, chunk.first, self.error)
            self._chunks, self._pending = [_Chunk()], 0
            self._accepting, self._retry_at = False, time.monotonic() + RETRY_S
        if first_time:
            log.warning(
                "%s; the node goes on without its journal, trying again every %g s",
                self.error,
                RETRY_S,
                extra={"directory": str(self.directory)},
            )


def _joined(a: Gap, b: Gap) -> Gap:
    times = [t for t in (a.since, b.since) if t]
    return Gap(
        a.records + b.records,
        min(times, default=0),
        max(a.until, b.until),
        a.reason if b.reason in a.reason else f"{a.reason}; {b.reason}",
    )
