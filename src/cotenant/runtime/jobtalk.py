"""What programs of jobs say to the node, and what it asks them.

They report progress and checkpoints, those of reservations each over a socket of its own. A program
that said that it listens is asked for memory, or for a checkpoint, at the address that it said so
from.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from cotenant.domain.errors import InvalidRequest, NotReady
from cotenant.domain.workload import JobState
from cotenant.runtime.jobledger import JobLedger
from cotenant.runtime.joblive import LiveJob
from cotenant.runtime.jobreports import Address, Report, ReportSocket
from cotenant.runtime.jobsockets import JobSockets

MAX_ASKED = 64
"""Programs of a job that are asked for memory, or for a checkpoint: the newest."""


class JobTalk:
    """See the module's text. ``live``: the jobs that run, which come and go. ``on_listens`` is told
    of a job one of whose programs can now be asked for memory."""

    def __init__(
        self,
        directory: Path,
        ledger: JobLedger,
        live: Mapping[str, LiveJob],
        on_listens: Callable[[str], None],
    ) -> None:
        self._ledger = ledger
        self._live = live
        self._on_listens = on_listens
        self._reports = ReportSocket(directory / "report.sock", self._on_report)
        self._outside = JobSockets(directory / "reports", self._on_outside_report)

    @property
    def path(self) -> Path:
        """Where jobs report."""
        return self._reports.path

    @property
    def invalid(self) -> int:
        """Messages on the report socket that were ignored."""
        return self._reports.invalid

    def open(self) -> None:
        """Listen; raises EnvironmentProblem if the path is too long or cannot be bound."""
        self._reports.open()

    def open_for(self, id: str) -> None:
        """Listen for what a reservation's processes report."""
        self._outside.open(id)

    def drain(self, id: str) -> None:
        """Take in what waits now."""
        self._reports.drain()
        self._outside.drain(id)

    def remove(self, id: str) -> None:
        """The job is over."""
        self._outside.remove(id)

    def close(self) -> None:
        """Listen no more."""
        self._outside.close()
        self._reports.close()

    def _on_report(self, report: Report, sender: Address) -> bool:
        live = self._live.get(report.job)
        if live is None or live.run.run != report.run:
            return False
        if not report.listens:
            self._take_in(report.job, live, report)
        if report.saves and sender:
            _newest(live.savers, sender)
        if report.memory and sender:
            new = _newest(live.givers, sender)
            live.run.note_giver()
            if new:
                self._on_listens(report.job)
        return True

    def _on_outside_report(self, id: str, report: Report) -> bool:
        live = self._live.get(id)
        if live is None or report.listens:  # from its network namespace nobody can be answered
            return False
        self._take_in(id, live, report)
        return True

    def _take_in(self, id: str, live: LiveJob, report: Report) -> None:
        live.progress.note(time.monotonic(), report)
        if report.checkpoint is not None:
            live.note_checkpoint(report.checkpoint)
            self.save_checkpoint(id, live)

    def directory(self, id: str) -> str:
        """The directory of a reservation's socket for reports; empty if there is none."""
        return self._outside.directory(id)

    def save_checkpoint(self, id: str, live: LiveJob) -> None:
        """Have the record know of a job's newest checkpoint."""
        record = self._ledger.records[id]
        if not self._ledger.saved:
            return  # the disk is full: it is not to be owed a step a second
        if fields := live.unsaved_checkpoint(record, time.monotonic()):
            self._ledger.step(id, record.state, **fields)

    def gave(self, id: str) -> bool:
        """Whether a program of the job's run could be asked for memory, perhaps by an earlier
        daemon: one that is held, or was taken over, cannot say so itself."""
        live = self._live.get(id)
        return live is not None and live.run.noted_giver

    def ask_memory(self, id: str, most: int) -> bool:
        """Ask a job's programs that it have at most so many bytes; whether any of them listens."""
        live = self._live.get(id)
        if live is None:
            return False
        message = msgspec.json.encode({"run": live.run.run, "most": most})
        for address in list(live.givers):
            if not self._reports.send(message, address):
                del live.givers[address]
        return bool(live.givers)

    async def checkpoint(self, id: str, within_s: float) -> str:
        """Ask a running job's programs for a checkpoint; the path of the next that is reported.
        Raises ``InvalidRequest`` if it cannot be asked, ``NotReady`` if none came."""
        record, live = self._ledger.records[id], self._live.get(id)
        if live is None or record.state is not JobState.RUNNING:
            raise InvalidRequest(f"job {id} is {record.state.value}; ask it while it runs")
        message = msgspec.json.encode({"run": live.run.run, "checkpoint": True})
        for address in list(live.savers):
            if not self._reports.send(message, address):
                del live.savers[address]
        if not live.savers:
            raise InvalidRequest(
                f"job {id} takes no such requests: let it call cotenant.on_checkpoint(save)"
            )
        written: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        live.awaited.add(written)
        try:
            await asyncio.wait({written}, timeout=within_s)
        finally:
            live.awaited.discard(written)
        if written.cancelled():
            raise NotReady(f"job {id} ended before it reported a checkpoint: cotenant logs {id}")
        if not written.done():
            raise NotReady(
                f"job {id} was asked, and reported no checkpoint within {within_s:g} s; it may be "
                "paused, or still write it: cotenant jobs --json tells its newest"
            )
        return written.result()

    def can_be_asked(self, id: str) -> bool:
        """Whether one of a job's programs said that it gives memory when it is asked."""
        live = self._live.get(id)
        return live is not None and bool(live.givers)


def _newest(addresses: dict[Address, None], sender: Address) -> bool:
    """Add to who can be asked, or have it be the newest of them; whether it was not there."""
    new = addresses.pop(sender, False) is False
    addresses[sender] = None
    while len(addresses) > MAX_ASKED:
        del addresses[next(iter(addresses))]
    return new
