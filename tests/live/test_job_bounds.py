"""Jobs that come after others, have their time, and save their work when they are asked."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from cotenant.domain.errors import InvalidRequest, NotFound, NotReady
from cotenant.domain.units import S
from cotenant.domain.workload import JobSpec, RestartPolicy
from tests.installed import SITE
from tests.live.test_jobs import FOREVER, node, run, until

SAVES = """
import sys, threading, time, cotenant
wanted = threading.Event()
assert cotenant.on_checkpoint(wanted.set)
cotenant.on_checkpoint(lambda: 1 / 0)  # what it raises is its own
cotenant.report(0, checkpoint="step-0")
print("listening", flush=True)
for step in range(10**9):
    if wanted.is_set() and "--deaf" not in sys.argv:
        wanted.clear()
        cotenant.report(step, checkpoint=f"step-{step}")
    time.sleep(0.01)
"""


def saving(directory: Path, *arguments: str) -> JobSpec:
    (directory / "saves.py").write_text(SAVES)
    command = (sys.executable, "saves.py", *arguments)
    return JobSpec("", "train", command, str(directory), {**os.environ, "PYTHONPATH": SITE})


def test_a_job_starts_once_those_before_it_have_succeeded(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            first = n.submit("while [ ! -e go ]; do sleep 0.02; done", name="first")
            second = n.submit("echo 2 >> ran", name="second", after=("first",))
            third = n.submit("echo 3 >> ran", after=(first, second))
            await until(lambda: first in n.pids)
            assert [n.status(id).state for id in (second, third)] == ["queued", "queued"]
            assert first in n.status(second).reason
        async with node(tmp_path) as n:  # it waits for the same, whichever node it is
            await until(lambda: first in n.pids)
            assert n.status(third).state == "queued"
            (tmp_path / "go").touch()
            await n.state(third, "succeeded")
            assert n.lines("ran") == ["2", "3"]
            late = n.submit("echo 4 >> ran", after=("second",))
            await n.state(late, "succeeded")
            with pytest.raises(NotFound):
                n.submit("true", after=("none",))

    run(main)


def test_what_comes_after_a_job_that_fails_or_is_cancelled_never_starts(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            wait = "while [ ! -e go ]; do sleep 0.02; done; exit 1"
            bad = n.submit(wait, restart=RestartPolicy.NEVER)
            held = n.submit("true")
            n.jobs.hold(held)
            chain = [n.submit("echo >> ran", after=(bad,))]
            chain.append(n.submit("echo >> ran", after=(chain[0],)))
            other = n.submit("echo >> ran", after=(held,))
            (tmp_path / "go").touch()
            n.jobs.cancel(held)
            for id, why in ((chain[0], bad), (chain[1], chain[0]), (other, held)):
                assert why in (await n.state(id, "cancelled")).reason
            assert n.lines("ran") == []
            with pytest.raises(InvalidRequest):
                n.submit("true", after=(bad,))

    run(main)


def test_how_the_first_of_many_ended_is_seen_before_it_is_forgotten(tmp_path: Path) -> None:
    async def main() -> None:
        from cotenant.runtime.jobs import JobOptions

        async with node(tmp_path, options=JobOptions(keep_ended=0)) as n:
            first = n.submit("sleep 0.1")
            second = n.submit("echo >> ran", after=(first,))
            await until(lambda: n.lines("ran") or second not in n.jobs._ledger.records)
            assert n.lines("ran")

    run(main)


@pytest.mark.parametrize("deaf", [False, True])
def test_a_job_whose_time_is_over_has_failed_whatever_it_exits_with(
    tmp_path: Path, deaf: bool
) -> None:
    trap = "trap '' TERM" if deaf else "trap 'echo saved >> saved; exit 0' TERM"

    async def main() -> None:
        async with node(tmp_path) as n:
            grace = S // 2 if deaf else 10 * S
            id = n.submit(f"{trap}; {FOREVER}", time_limit=S, grace=grace)
            quick = n.submit("true", time_limit=20 * S)
            status = await n.state(id, "failed")
            assert status.restarts == 0
            assert status.reason
            assert n.lines("saved") == ([] if deaf else ["saved"])
            await n.state(quick, "succeeded")

    run(main)


def test_a_jobs_time_goes_on_with_its_next_run_and_while_it_is_held(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            id = n.submit(f"echo >> ran; {FOREVER}", time_limit=2 * S)
            await until(lambda: id in n.pids)
            await asyncio.sleep(1.2)
        async with node(tmp_path) as n:
            before = n.store.get(id).ran_s
            assert before > 1
            await until(lambda: id in n.pids)
            n.jobs.hold(id)
            await n.state(id, "failed")
            assert n.store.get(id).ran_s < before + 1.5, "not all of its time anew"

    run(main)


def test_a_job_that_is_asked_saves_its_work_and_says_where(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            id = n.jobs.submit(saving(tmp_path))
            await until(lambda: n.status(id).checkpoint and "listening" in n.log(id))
            await until(lambda: n.jobs._live[id].savers)
            first = await n.jobs.checkpoint("train", 20.0)
            second = await n.jobs.checkpoint(id, 20.0)
            assert "step-0" != Path(first).name != Path(second).name
            assert n.status(id).checkpoint == second
            assert "ZeroDivisionError" in n.log(id)
            assert not n.jobs.talk.can_be_asked(id), "it gives no memory"
            n.jobs.cancel(id)
            await n.state(id, "cancelled")
            with pytest.raises(InvalidRequest):
                await n.jobs.checkpoint(id, 20.0)

    run(main)


def test_who_does_not_listen_or_answer_is_not_waited_for_without_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            quiet = n.submit(FOREVER)
            deaf = n.jobs.submit(saving(tmp_path, "--deaf"))
            await until(lambda: quiet in n.pids)
            await until(lambda: deaf in n.jobs._live and n.jobs._live[deaf].savers)
            with pytest.raises(InvalidRequest, match="on_checkpoint"):
                await n.jobs.checkpoint(quiet, 20.0)
            with pytest.raises(NotReady):
                await n.jobs.checkpoint(deaf, 0.2)
            asked = asyncio.create_task(n.jobs.checkpoint(deaf, 20.0))
            await asyncio.sleep(0.1)
            n.jobs.cancel(deaf)
            with pytest.raises(NotReady):
                await asked

    run(main)
