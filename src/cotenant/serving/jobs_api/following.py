"""A job's log for those who wait for more of it: a request is answered when there is some."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from cotenant.domain.port import JobStatus, NodePort, find_job
from cotenant.domain.workload import ENDED_STATES
from cotenant.serving import joblogs
from cotenant.serving.joblogs import Piece
from cotenant.serving.jobs_api.disk import on_disk

MOST_WAIT_S: Final = 30.0
MOST_WAITING: Final = 64
"""Requests that wait at one time; further ones are answered at once."""
POLL_S: Final = 0.25


class Following:
    """See the module's text. ``close`` lets all that wait be answered."""

    def __init__(self, node: NodePort) -> None:
        self._node = node
        self._closing = asyncio.Event()
        self._waiting = 0
        self._seen: list[JobStatus] = []
        self._seen_at = 0.0

    async def piece(self, ref: str, place: str, wait_s: float) -> tuple[Piece, JobStatus]:
        """What of a job's log comes after a place, and how the job stood just before: there is no
        more of one that had ended by then and gave nothing. Raises NotFound, InvalidRequest."""
        end = time.monotonic() + (wait_s if self._waiting < MOST_WAITING else 0.0)
        self._waiting += 1
        try:
            self._look()
            id = find_job(self._seen, ref).id  # another job may get the name meanwhile
            path = self._node.job_log_path(id)
            while True:
                job = find_job(self._seen, id)
                piece = await on_disk(joblogs.read, path, place)
                left = end - time.monotonic()
                if piece.data or piece.gap or job.state in ENDED_STATES or left <= 0:
                    return piece, job
                if self._closing.is_set():
                    return piece, job
                try:
                    async with asyncio.timeout(min(POLL_S, left)):
                        await self._closing.wait()
                except TimeoutError:
                    if time.monotonic() - self._seen_at >= POLL_S:
                        self._look()
        finally:
            self._waiting -= 1

    def _look(self) -> None:
        """See how all jobs stand: for a node with many that is work, so once for all who wait."""
        self._seen, self._seen_at = self._node.jobs(), time.monotonic()

    def close(self) -> None:
        """Nobody waits any longer."""
        self._closing.set()
