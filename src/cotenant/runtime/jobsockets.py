"""A socket for each reservation, on which processes that somebody else starts report.

A pod has the socket's directory mounted, and nothing else of the node's. The socket itself says
whose report it is: what the message says of that is not believed. A directory stays while its
reservation does, also from daemon to daemon, for who has it mounted finds no other.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from cotenant.domain.errors import EnvironmentProblem
from cotenant.runtime.jobreports import Report, ReportSocket

log = logging.getLogger("cotenant.jobs")

NAME = "sock"
"""Of the socket in its directory."""


class JobSockets:
    """``receive`` is told the job and the report, and says whether it could use it."""

    def __init__(self, directory: Path, receive: Callable[[str, Report], bool]) -> None:
        self._directory = directory
        self._receive = receive
        self._open: dict[str, ReportSocket] = {}

    def directory(self, job: str) -> str:
        """What a job's processes are to have mounted, at the same path; empty if there is none."""
        return str(self._open[job].path.parent) if job in self._open else ""

    def open(self, job: str) -> None:
        """Listen for a job's reports; without them it is none the worse."""
        if job in self._open:
            return
        folder = self._directory / job
        made = ReportSocket(folder / NAME, lambda report, _: self._receive(job, report), mode=0o666)
        try:
            # Whoever has it mounted may be any user. Above it is a directory of the node's alone.
            self._directory.mkdir(mode=0o700, exist_ok=True)
            folder.mkdir(exist_ok=True)
            folder.chmod(0o755)
            made.open()
        except (OSError, EnvironmentProblem) as error:
            log.warning("its pods cannot report: %s", error, extra={"job": job})
            return
        self._open[job] = made

    def drain(self, job: str) -> None:
        """Read what waits now."""
        if job in self._open:
            self._open[job].drain()

    def remove(self, job: str) -> None:
        """The job is over."""
        if made := self._open.pop(job, None):
            made.close()
        shutil.rmtree(self._directory / job, ignore_errors=True)

    def close(self) -> None:
        """Listen no more; the directories are there for the next daemon."""
        while self._open:
            _, made = self._open.popitem()
            with contextlib.suppress(OSError):
                made.close()
