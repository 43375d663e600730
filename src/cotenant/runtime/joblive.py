"""A job that runs now: what is known of it besides its record, and both as users see them."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import msgspec

from cotenant.domain.port import JobStatus
from cotenant.domain.workload import JobState
from cotenant.runtime.jobreports import Address, Checkpoint, Progress
from cotenant.runtime.jobrun import JobRun
from cotenant.runtime.jobstore import JobRecord

_HELD = "held: release it to let it start"
MOST_SHOWN = 4096
"""Characters of a command that are shown, with one between words."""
SAVE_CHECKPOINT_EVERY_S = 1.0
"""Of one run: a job that says it of each step costs the store no more."""


class LiveJob:
    """A job's current run and what was seen of it."""

    def __init__(self, run: JobRun) -> None:
        self.run = run
        self.progress = Progress()
        self.cpu_s = 0.0
        self.told = False
        """Whether ``on_job_ready`` was the last callback."""
        self.again = False
        """Whether it was stopped to start elsewhere."""
        self.settled = asyncio.Event()
        """Its command runs, or it is clear that it will not."""
        self.givers: dict[Address, None] = {}
        """Its programs that can be asked for memory."""
        self.force: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None
        """Sees the run through."""
        self.checkpoint: Checkpoint | None = None
        """The newest that this run reported."""
        self.savers: dict[Address, None] = {}
        """Its programs that can be asked for a checkpoint."""
        self.awaited: set[asyncio.Future[str]] = set()
        """Each is told the path of the next checkpoint."""
        self._said: Checkpoint | None = None
        self._checkpoint_saved = -math.inf

    def stop(self, within_s: float) -> None:
        """Ask the shim to stop the job; kill the shim if it has not obeyed by then."""
        self.run.stop()
        if self.force is None:
            self.force = asyncio.get_running_loop().call_later(within_s, self.run.force)

    def note_cpu(self, seconds: float) -> None:
        """CPU seconds of the tree so far; the sum sinks when a process ends unreaped."""
        self.cpu_s = max(self.cpu_s, seconds)
        self.progress.note_cpu(time.monotonic(), self.cpu_s)

    def note_checkpoint(self, found: Checkpoint) -> None:
        """Take in what the run says of its newest checkpoint."""
        if found != self._said:
            self._said, now = found, time.time()
            at = min(found.at, now) if math.isfinite(found.at) and found.at > 0 else now
            self.checkpoint = msgspec.structs.replace(found, at=at)
            for waiting in self.awaited:
                if not waiting.done():
                    waiting.set_result(found.path)
            self.awaited.clear()

    def unsaved_checkpoint(self, record: JobRecord, now: float) -> dict[str, Any]:
        """What the record is to be told of a checkpoint now (s): nothing if it knows of it, or
        learnt of another a moment ago."""
        fields = self.checkpoint_fields()
        known = all(getattr(record, name) == value for name, value in fields.items())
        if known or now - self._checkpoint_saved < SAVE_CHECKPOINT_EVERY_S:
            return {}
        self._checkpoint_saved = now
        return fields

    def checkpoint_fields(self) -> dict[str, Any]:
        """What a record keeps of the newest checkpoint, if this run made one."""
        found = self.checkpoint
        if found is None:
            return {}
        return {
            "checkpoint": found.path,
            "checkpoint_step": found.step,
            "checkpoint_at": found.at,
        }

    def progress_fields(self) -> dict[str, Any]:
        """What a record keeps of the progress."""
        if not self.progress.unit:
            return {}
        return {"progress": self.progress.value, "progress_unit": self.progress.unit}


def status_of(record: JobRecord, live: LiveJob | None) -> JobStatus:
    """A job as users see it. ``partitions``, ``pauses`` and ``held_s`` are left to the node."""
    spec = record.spec
    progress = live.progress if live is not None else Progress()
    newest = live.checkpoint if live is not None else None
    waits_held = record.held and record.state in (JobState.QUEUED, JobState.BACKOFF)
    return JobStatus(
        id=spec.id,
        name=spec.name,
        state=record.state.value,
        command=_shown(spec.command),
        weight=spec.weight,
        guaranteed=spec.guaranteed,
        created=record.created,
        restarts=record.restarts,
        pid=record.pid,
        exit_code=record.exit_code,
        reason=_HELD if waits_held else record.reason or _waits(record),
        progress=progress.value if progress.unit else record.progress,
        progress_unit=progress.unit or record.progress_unit or "cpu-s",
        rate=progress.rate(time.monotonic()),
        cpu_s=record.cpu_s + (live.cpu_s if live is not None else 0.0),
        metrics=dict(progress.metrics),
        checkpoint=newest.path if newest else record.checkpoint,
        checkpoint_step=newest.step if newest else record.checkpoint_step,
        checkpoint_at=newest.at if newest else record.checkpoint_at,
        held=record.held and not record.ended,
    )


def _shown(command: tuple[str, ...]) -> tuple[str, ...]:
    """A command as lists of jobs have it: a long one is cut, or a thousand of them are too much."""
    if sum(len(word) + 1 for word in command) <= MOST_SHOWN:
        return command
    shown, left = [], MOST_SHOWN
    for word in command:
        shown.append(word if len(word) <= left else word[:left] + "…")
        left -= len(word) + 1
        if left <= 0:
            break
    return tuple(shown)


def _waits(record: JobRecord) -> str:
    waits = record.waits_for if record.state is JobState.QUEUED else ()
    return f"waits for {', '.join(waits)} to succeed" if waits else ""
