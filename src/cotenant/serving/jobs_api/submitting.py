"""From a submission to a job in a directory of its own."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

import msgspec

from cotenant.domain.errors import EnvironmentProblem
from cotenant.domain.port import NodePort
from cotenant.domain.submission import Submission
from cotenant.domain.workload import ENDED_STATES, JobSpec
from cotenant.serving.jobs_api.requests import Busy
from cotenant.serving.jobs_api.uploads import Uploads

MOST_LIVE: Final = 1000
"""Jobs that have not ended; beyond, nobody can submit one over the network."""


class Submitting:
    """See the module's text. ``directory``: where each job has a directory under its id, which goes
    with its record. ``environment``: what every job gets beside its own."""

    def __init__(
        self, node: NodePort, uploads: Uploads, directory: Path, environment: Mapping[str, str]
    ) -> None:
        self._node = node
        self._uploads = uploads
        self._directory = directory
        self._environment = environment
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """Those of one id come in turn: what was sent twice is unpacked once."""

    async def submit(self, wanted: Submission) -> str:
        """Queue a job; its id. Raises as NodePort.submit_job and Uploads.unpacked, and Busy."""
        known = self._known()
        if wanted.id not in known and sum(known.values()) >= MOST_LIVE:
            raise Busy(f"{MOST_LIVE} jobs wait or run, as many as may; try again later")
        id = wanted.id
        while not id or (not wanted.id and id in known):
            id = secrets.token_hex(4)
        wanted = msgspec.structs.replace(wanted, id=id)
        if wanted.cwd:
            return self._node.submit_job(wanted.spec(wanted.cwd, self._environment))
        # Other files are another directory, and with that another job.
        place = self._directory / id / (f"files-{wanted.files[:16]}" if wanted.files else "files")
        spec = wanted.spec(str(place), self._environment)
        async with self._turns.setdefault(id, asyncio.Lock()):
            if id in self._known():  # sent again, perhaps while the first one was unpacked
                return self._node.submit_job(spec)
            return await self._with_files(spec, wanted.files, place)

    async def _with_files(self, spec: JobSpec, archive: str, place: Path) -> str:
        async with self._uploads.unpacked(archive) as files:
            self._move(files, place)
            try:
                return self._node.submit_job(spec)
            except BaseException:
                with contextlib.suppress(OSError):
                    place.rename(files)
                    place.parent.rmdir()
                raise

    def _known(self) -> dict[str, bool]:
        """The ids of all jobs, and whether each lives."""
        return {job.id: job.state not in ENDED_STATES for job in self._node.jobs()}

    @staticmethod
    def _move(files: Path, place: Path) -> None:
        try:
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if place.exists():  # of a node that was killed before it knew of the job
                shutil.rmtree(place)
            files.rename(place)
        except OSError as error:
            raise EnvironmentProblem(
                f"the job's directory cannot be made: {error.strerror}"
            ) from None
