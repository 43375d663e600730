"""Studies of the node's journal for its dashboard, each in a process that gives way to the rest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

import msgspec

from cotenant.serving.web.studies import Comparison, StudyFailed
from cotenant.telemetry.explain import Explanation

T = TypeVar("T")

NICE_EXPLAIN = 5
NICE_COMPARE = 19
EXPLAIN_S = 60.0
COMPARE_S = 120.0
PATIENCE_S = 20.0
"""For how long settings of a policy are tried."""
MOST_BYTES = 4 * 2**20
"""Of what a study says."""

POLICIES = {
    "static": "the best fixed split of the device",
    "exclusive": "services alone, no job beside them",
    "spatial": "partitions that change, and nothing lent",
    "temporal": "no partitions, all that is idle is lent",
    "shared": "everything at once, without isolation",
    "sliced": "equal time slices",
    "reactive": "thresholds on measured latency",
    "orion": "co-running by profile",
    "tgs": "co-running at a controlled rate",
    "reef": "jobs are killed to preempt them",
    "quotas": "shares, and stolen idle time",
    "no_trend": "no forecast of a rise",
    "no_feedback": "predictions are trusted",
    "no_hysteresis": "a change at the first wish",
}
"""Those of ``cotenant.sim.policies`` that the page offers; the node need not import the rest."""


class JournalStudies:
    """See ``Studies``. ``directory``: of the journal, None if the node keeps none. ``cores`` are
    those that devices compute on: where there are others, studies run there."""

    policies = POLICIES

    def __init__(self, directory: Path | None, cores: Collection[int] = ()) -> None:
        self._directory = directory
        self._cores = os.sched_getaffinity(0) - set(cores)
        self._busy: set[str] = set()
        self._running: set[asyncio.subprocess.Process] = set()

    async def explain(self, last: int) -> Explanation:
        """See Studies."""
        said = await self._study("explain", NICE_EXPLAIN, EXPLAIN_S, str(last))
        return self._decoded(said, Explanation)

    async def compare(self, policy: str, seconds: int) -> Comparison:
        """See Studies."""
        if policy not in POLICIES:
            raise StudyFailed(f"there is no policy {policy!r} to compare with")
        asked = policy, str(seconds), str(PATIENCE_S)
        return self._decoded(
            await self._study("compare", NICE_COMPARE, COMPARE_S, *asked), Comparison
        )

    @property
    def running(self) -> int:
        """How many processes there are."""
        return len(self._running)

    def close(self) -> None:
        """End what runs."""
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    @staticmethod
    def _decoded(said: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(said, type=kind)
        except msgspec.DecodeError:
            raise StudyFailed("the study ended in the middle of what it said") from None

    async def _study(self, kind: str, nice: int, within_s: float, *asked: str) -> bytes:
        if self._directory is None:
            raise StudyFailed("this node keeps no journal (node.journal.enabled)")
        if kind in self._busy:
            raise StudyFailed("another one is under way; try again when it is done")
        self._busy.add(kind)
        try:
            return await self._run(within_s, kind, str(nice), str(self._directory), *asked)
        finally:
            self._busy.discard(kind)

    async def _run(self, within_s: float, *arguments: str) -> bytes:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "cotenant.cli.study", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **threads},
            limit=MOST_BYTES,
        )
        self._running.add(process)
        try:
            if self._cores:
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(process.pid, self._cores)
            said, wrong = await asyncio.wait_for(process.communicate(), within_s)
        except TimeoutError:
            raise StudyFailed(f"it was not done within {within_s:g} s; ask for less time") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
            self._running.discard(process)
        if process.returncode:
            why = wrong.decode(errors="replace").strip().rpartition("\n")[2]
            raise StudyFailed(why[:500] or "the study was ended: it took more than it may")
        return said
