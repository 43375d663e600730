"""Jobs as real processes: whatever they do, and whoever is killed, is survived and recorded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from cotenant.devices import proctree
from cotenant.domain.device import Launch
from cotenant.domain.errors import (
    Conflict,
    DeviceError,
    EnvironmentProblem,
    InvalidRequest,
    NotFound,
)
from cotenant.domain.port import JobStatus
from cotenant.domain.reservation import Adopted
from cotenant.domain.units import S
from cotenant.domain.workload import JobSpec, RestartPolicy
from cotenant.runtime.boundedlog import BoundedLog
from cotenant.runtime.jobs import JobOptions, JobSupervisor
from cotenant.runtime.jobstore import JobStore
from cotenant.runtime.jobverdict import RestartRules
from tests.installed import SITE

PATIENCE_S = 30.0
QUICK = JobOptions(
    rules=RestartRules(first_s=0.02, most_s=0.1), sample_every_s=0.1, store_retry_s=0.2
)
FOREVER = "while :; do sleep 0.05; done"

LIBC_SIGNALS = 0b11 << 31
"""Signals 32 and 33 are the C library's own: no program can set them, so it inherits them."""


class Node:
    """A supervisor, what it called back, and a directory for what jobs write."""

    def __init__(self, directory: Path, most: int = 8, **kwargs: Any) -> None:
        self.directory = directory
        self.most = most
        self.waiting: list[str] = []
        self.running: set[str] = set()
        self.calls: list[tuple[str, str]] = []
        self.pids: dict[str, int] = {}
        kwargs.setdefault("options", QUICK)
        self.store = JobStore(directory / "jobs.db")
        self.jobs = JobSupervisor(self.store, directory, self, **kwargs)

    def on_job_queued(self, spec: JobSpec) -> None:
        self.waiting.append(spec.id)
        self.start_next()

    def start_next(self) -> None:
        """Start who came first, as the node's dispatcher does: never more than so many at once."""
        while self.waiting and len(self.running) < self.most:
            id = self.waiting.pop(0)
            self.running.add(id)
            self.jobs.start(id)

    async def launch_job(self, spec: JobSpec) -> Launch:
        if spec.name == "unwanted":
            raise DeviceError("no room for it")
        return Launch({"GOMP_SPINCOUNT": "1000", "MINE": "0"}, {resource.RLIMIT_NOFILE: (77, 78)})

    def on_job_ready(self, spec: JobSpec, _: int) -> None:
        self.calls.append(("ready", spec.id))
        self.pids[spec.id] = self.status(spec.id).pid

    def on_job_listens(self, id: str) -> None:
        """Nothing is asked of these jobs."""

    def on_job_adopts(self, id: str, process: Adopted) -> None:
        """They have reservations in tests of a whole node."""

    def on_job_exited(self, id: str) -> None:
        if ("ready", id) in self.calls:
            self.calls.append(("exited", id))
        self.running.discard(id)
        self.waiting = [other for other in self.waiting if other != id]
        self.start_next()

    def submit(self, script: str, **fields: Any) -> str:
        fields = {"name": "job", "cwd": str(self.directory), "grace": 10 * S, **fields}
        return self.jobs.submit(JobSpec(id="", command=("sh", "-c", script), **fields))

    def status(self, id: str) -> JobStatus:
        return next(status for status in self.jobs.statuses() if status.id == id)

    async def state(self, id: str, *states: str) -> JobStatus:
        await until(lambda: self.status(id).state in states, lambda: str(self.status(id)))
        return self.status(id)

    def lines(self, name: str) -> list[str]:
        path = self.directory / name
        return path.read_text().splitlines() if path.exists() else []

    def log(self, id: str) -> str:
        path = Path(self.jobs.log_path(id))
        return path.read_text() if path.exists() else ""

    def processes(self) -> list[int]:
        """All processes of all its jobs, shims included."""
        mine = str(self.directory).encode()
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid():
                with contextlib.suppress(OSError):
                    texts = Path(f"/proc/{name}/environ"), Path(f"/proc/{name}/cmdline")
                    if any(mine in text.read_bytes() for text in texts):
                        found.append(int(name))
        return found


async def until(true: Callable[[], object], say: Callable[[], str] = lambda: "") -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, f"waited in vain: {say()}"
        await asyncio.sleep(0.01)


def stands_still(root: int) -> bool:
    """Whether nobody below does anything. A shell that waits in the kernel for its child to begin
    a program (vfork) is not stopped itself where the child is."""
    return not any(map(proctree.runs, proctree.descendants(root)))


@contextlib.asynccontextmanager
async def node(directory: Path, **kwargs: Any) -> AsyncIterator[Node]:
    made = Node(directory, **kwargs)
    await made.jobs.open()
    try:
        yield made
    finally:
        await made.jobs.close()
        await until(lambda: not made.processes(), lambda: f"left: {made.processes()}")


def run(test: Callable[[], Any]) -> None:
    uvloop.run(test())


def alive(pid: int) -> bool:
    return proctree.start_time(pid) != 0


def test_a_process_cannot_hide_behind_its_name() -> None:
    code = "open('/proc/self/comm', 'w').write(') Z 1 (x'); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = proctree.stat(process.pid)
        assert found is not None
        assert (found.parent, found.is_dead) == (os.getpid(), False)
        assert process.pid in proctree.descendants(os.getpid())
        assert proctree.threads([process.pid]) == [process.pid]
        assert proctree.resident_bytes([process.pid]) > 1 << 20
        assert alive(process.pid)
        assert proctree.kill(lambda: [process.pid] if alive(process.pid) else []) == []
        assert not alive(process.pid)  # a zombie by now: dead, though not yet reaped
    assert proctree.stat(process.pid) is None
    assert proctree.resident_bytes([process.pid]) == 0


def test_what_cannot_be_killed_is_named_in_bounded_time() -> None:
    assert proctree.kill(lambda: [2**22 + 1], within_s=0.05) == [2**22 + 1]


def test_a_job_runs_to_its_end_and_says_what_it_said(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            good = n.submit("echo out; echo err >&2; pwd; exit 0", name="good")
            bad = n.submit("exit 7", name="bad", restart=RestartPolicy.NEVER)
            status = await n.state(good, "succeeded")
            assert (status.exit_code, status.reason, status.pid) == (0, "", 0)
            assert n.log(good) == f"out\nerr\n{tmp_path}\n"
            status = await n.state(bad, "failed")
            assert status.exit_code == 7 and status.reason
            for id in (good, bad):
                calls = [call for call, job in n.calls if job == id]
                assert calls in ([], ["ready", "exited"])
            await until(lambda: not list(tmp_path.glob("jobs/*/run-*")))

    run(main)


def test_it_works_on_the_standard_loop_too(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            await n.state(n.submit("true"), "succeeded")

    asyncio.run(main())


def test_a_job_that_its_devices_refuse_says_why(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            id = n.submit("true", name="unwanted", restart=RestartPolicy.NEVER)
            assert "no room for it" in (await n.state(id, "failed")).reason
            assert n.calls == []

    asyncio.run(main())


def test_the_job_starts_clean(tmp_path: Path) -> None:
    script = """
import json, os, resource, signal
print(json.dumps({
    "fds": sorted(map(int, os.listdir("/proc/self/fd")))[:-1],
    "leader": os.getsid(0) == os.getpid() == os.getpgid(0),
    "policy": os.sched_getscheduler(0), "nice": os.nice(0),
    "oom": open("/proc/self/oom_score_adj").read().strip(),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE),
    "ignored": [l.split()[1] for l in open("/proc/self/status") if l.startswith("SigIgn")],
    "blocked": [l.split()[1] for l in open("/proc/self/status") if l.startswith("SigBlk")],
    "env": {k: v for k, v in os.environ.items() if k.startswith(("COTENANT", "GOMP", "MINE"))},
}))
"""

    async def main() -> None:
        async with node(tmp_path) as n:
            # Through sh, so that what Python itself ignores (SIGPIPE) is told from what it got.
            ids = [
                n.submit("grep SigIgn /proc/self/status"),
                n.jobs.submit(
                    JobSpec(
                        id="",
                        name="py",
                        command=(sys.executable, "-I", "-c", script),
                        env={"MINE": "1"},
                    )
                ),
            ]
            for id in ids:
                await n.state(id, "succeeded")
            assert int(n.log(ids[0]).split()[1], 16) & ~LIBC_SIGNALS == 0
            seen = json.loads(n.log(ids[1]))
            assert seen["fds"] == [0, 1, 2]
            assert seen["leader"]
            assert (seen["policy"], seen["nice"], seen["oom"]) == (os.SCHED_OTHER, 0, "500")
            assert int(seen["blocked"][0], 16) == 0
            assert seen["env"]["MINE"] == "1", "what the job sets itself stands"
            assert seen["files"] == [77, 78]
            assert seen["env"]["GOMP_SPINCOUNT"] == "1000"
            assert seen["env"]["COTENANT_JOB_ID"] == ids[1]
            assert seen["env"]["COTENANT_REPORT_SOCKET"] == str(tmp_path / "report.sock")
            assert seen["env"]["COTENANT_JOB_RUN"]

    run(main)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"command": ("no-such-program-here",)}, "no-such-program-here"),
        ({"command": ("/etc/passwd",)}, "/etc/passwd"),
        ({"command": ("true",), "cwd": "/no/such/place"}, "/no/such/place"),
    ],
    ids=["missing", "not executable", "no directory"],
)
def test_what_cannot_start_fails_at_once_and_is_named(
    tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            id = n.jobs.submit(JobSpec(id="", name="x", **fields))
            status = await n.state(id, "failed")
            assert named in status.reason
            assert status.restarts == 0
            assert n.calls == []

    run(main)


def test_a_job_that_exits_at_once_in_a_loop_is_given_up(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            id = n.submit("echo run >> runs; exit 3", max_restarts=3)
            status = await n.state(id, "failed")
            assert status.exit_code == 3 and status.reason
            assert (status.restarts, len(n.lines("runs"))) == (3, 4)

    run(main)


def test_forks_and_daemons_die_with_their_job(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            script = (
                f"({FOREVER}) & setsid sh -c '({FOREVER}) & (trap \"\" TERM HUP; {FOREVER}) &' & "
                "sleep 0.2; exit 0"
            )
            id = n.submit(script)
            await n.state(id, "succeeded")
            assert not proctree.marked("COTENANT_JOB_ID", id)

    run(main)


def test_cancel_gives_grace_and_then_takes_all(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path, most=2) as n:
            kind = n.submit(f"trap 'echo saved > saved; exit 0' TERM; echo up > up1; {FOREVER}")
            deaf = n.submit(
                f"trap '' TERM; (trap '' TERM; {FOREVER}) & echo up > up2; {FOREVER}",
                grace=S // 5,
            )
            waiting = n.submit("true", name="later")
            await until(lambda: n.lines("up1") and n.lines("up2") and len(n.pids) == 2)
            assert n.jobs.cancel("later") == waiting
            assert n.status(waiting).state == "cancelled"
            os.kill(n.pids[kind], signal.SIGSTOP)  # a stopped one must hear it, too
            n.jobs.cancel(kind[:6])
            n.jobs.cancel(deaf, reason="it could not be made to yield")
            await n.state(kind, "cancelled")
            assert (await n.state(deaf, "cancelled")).reason == "it could not be made to yield"
            assert n.lines("saved") == ["saved"]
            assert not proctree.marked("COTENANT_JOB_ID", deaf)
            assert sorted(n.calls) == sorted(
                (call, id) for id in (kind, deaf) for call in ("ready", "exited")
            )
            assert n.jobs.cancel(kind) == kind  # once more does nothing
            with pytest.raises(NotFound, match="did you mean later"):
                n.jobs.cancel("latre")

    run(main)


def shim_of(n: Node, id: str) -> int:
    found = proctree.stat(n.pids[id])
    assert found is not None
    return found.parent


def test_a_job_that_ended_before_it_heard_of_a_stop_is_done(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            id = n.submit("echo run >> runs; while [ ! -e go ]; do sleep 0.01; done")
            await until(lambda: n.lines("runs") and id in n.pids)
            shim = shim_of(n, id)
            os.kill(shim, signal.SIGSTOP)
            (tmp_path / "go").touch()
            await until(lambda: not proctree.start_time(n.pids[id]))
            n.jobs.stop(id, "its partition goes to others", again=True)
            os.kill(shim, signal.SIGCONT)
            await n.state(id, "succeeded")
            assert n.lines("runs") == ["run"]

    run(main)


def test_a_job_that_ignores_a_stop_and_ends_in_time_is_done(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            script = "trap '' TERM; echo run >> runs; while [ ! -e go ]; do sleep 0.01; done"
            id = n.submit(script, grace=60 * S)
            await until(lambda: n.lines("runs") and id in n.pids)
            n.jobs.stop(id, "its partition goes to others", again=True)
            await asyncio.sleep(0.3)
            (tmp_path / "go").touch()
            await n.state(id, "succeeded")
            assert n.lines("runs") == ["run"]

    run(main)


@pytest.mark.parametrize("deaf", [False, True])
def test_a_job_that_saves_its_work_or_is_killed_runs_again(tmp_path: Path, deaf: bool) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            heard = "" if deaf else "exit 0"
            id = n.submit(f"trap '{heard}' TERM; echo run >> runs; {FOREVER}", grace=S // 5)
            await until(lambda: n.lines("runs") and id in n.pids)
            n.jobs.stop(id, "its partition goes to others", again=True)
            await until(lambda: n.lines("runs") == ["run"] * 2)
            n.jobs.cancel(id)
            await n.state(id, "cancelled")

    run(main)


def test_children_finish_their_checkpoint_within_the_grace(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            child = f"trap 'sleep 0.3; echo saved > saved; exit 0' TERM; echo > up; {FOREVER}"
            (tmp_path / "child.sh").write_text(child)
            id = n.submit("sh child.sh; echo never")  # the outer shell dies of SIGTERM at once
            await until((tmp_path / "up").exists)
            n.jobs.cancel(id)
            await n.state(id, "cancelled")
            assert n.lines("saved") == ["saved"]

    run(main)


TRAINER = """
import os, signal, sys, time
ask, asked = os.pipe()
answer, answered = os.pipe()
if os.fork() == 0:  # its data loader, which does not expect to be stopped by itself
    os.close(asked)
    while os.read(ask, 1):
        os.write(answered, b"x")
    os._exit(0)
os.close(answered)
def save(*_):
    for _ in range(20):
        os.write(asked, b"x")
        assert os.read(answer, 1), "the loader is dead"
        time.sleep(0.02)
    open("saved", "a").write("saved\\n")
    sys.exit()
signal.signal(signal.SIGTERM, save)
open("up", "w").close()
while True:
    time.sleep(1)
"""


@pytest.mark.parametrize(
    "wrapped",
    [
        "exec {0}",
        "{0}; echo never",
        "trap 'echo trapped >> saved; exit 0' TERM; {0}",
        "sh -c '{0}; echo never'; echo never",
        "setsid -w {0}",
        "nohup {0}",
        "{0} | cat",
    ],
    ids=["alone", "shell", "trap", "shells", "setsid", "nohup", "pipeline"],
)
def test_a_trainer_keeps_its_loaders_until_it_has_saved(tmp_path: Path, wrapped: str) -> None:
    (tmp_path / "train.py").write_text(TRAINER)

    async def main() -> None:
        async with node(tmp_path) as n:
            id = n.submit(wrapped.format(f"{sys.executable} -I -S train.py"))
            await until((tmp_path / "up").exists)
            n.jobs.cancel(id)
            await n.state(id, "cancelled")
            assert n.lines("saved")[:1] == ["saved"], n.log(id)
            assert not proctree.marked("COTENANT_JOB_ID", id)

    run(main)


@pytest.mark.parametrize(
    ("script", "state"),
    [
        ("(sleep 600) &", "succeeded"),
        ("nohup sleep 600 > /dev/null 2>&1 & exit 0", "succeeded"),
        ("exec setsid sleep 600", "succeeded"),
        ("sleep 600 & exit 3", "failed"),
    ],
)
def test_what_a_command_leaves_in_the_background_is_ended_and_that_is_said(
    tmp_path: Path, script: str, state: str
) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            id = n.submit(script, restart=RestartPolicy.NEVER)
            status = await n.state(id, state)
            assert status.reason
            assert "cotenant" in n.log(id)
            assert not proctree.marked("COTENANT_JOB_ID", id)

    run(main)


def test_what_ends_by_itself_soon_after_the_command_is_not_held_against_it(tmp_path: Path) -> None:
    pool = (
        "import multiprocessing as mp\n"
        "if __name__ == '__main__':\n"
        "    pool = mp.get_context('spawn').Pool(2)\n"
        "    print(sum(pool.map(abs, range(5))))\n"
    )
    (tmp_path / "pool.py").write_text(pool)

    async def main() -> None:
        async with node(tmp_path) as n:
            ids = [
                n.submit("(sleep 0.2; echo late) & exit 0"),
                n.submit(f"{sys.executable} -I pool.py"),
            ]
            for id in ids:
                status = await n.state(id, "succeeded")
                assert (status.reason, status.exit_code) == ("", 0)
            assert [n.log(id) for id in ids] == ["late\n", "10\n"]

    run(main)


def test_a_plain_print_is_in_the_log_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            id = n.submit(f"{sys.executable} -S -c 'import time; print(1); time.sleep(600)'")
            await until(lambda: n.log(id) == "1\n")
            assert n.status(id).state == "running"

    run(main)


@pytest.mark.parametrize(
    "command",
    [
        ("script", "-qec", "sh -c 'while :; do echo >> beats; sleep 0.02; done'", "/dev/null"),
        ("bash", "-c", "set -m; sh -c 'while :; do echo >> beats; sleep 0.02; done'; exit 3"),
    ],
    ids=["script", "shell"],
)
def test_who_watches_a_job_goes_on_with_it_after_a_hold(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not here")

    async def main() -> None:
        async with node(tmp_path) as n:
            id = n.jobs.submit(JobSpec(id="", name="w", command=command, cwd=str(tmp_path)))
            await until(lambda: n.lines("beats"))
            for _ in range(5):
                n.jobs.hold(id)
                shim = parent(n.pids[id])
                await until(lambda shim=shim: stands_still(shim))
                beats = len(n.lines("beats"))
                n.jobs.resume(id)
                await until(lambda beats=beats: len(n.lines("beats")) > beats)
            assert n.status(id).state == "running"
            n.jobs.cancel(id)
            await n.state(id, "cancelled")

    run(main)


def test_a_log_is_bounded_and_keeps_the_newest(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            limit = 64 * 1024
            id = n.submit("seq 1 200000", log_limit=limit)
            await n.state(id, "succeeded")
            log = Path(n.jobs.log_path(id))
            older = log.with_name("log.1")
            assert log.stat().st_size + older.stat().st_size <= limit
            kept = (older.read_text() + log.read_text()).splitlines()
            assert kept[-1] == "200000"
            assert kept[-1000:] == [str(n) for n in range(199001, 200001)]

    run(main)


def test_a_full_disk_costs_log_lines_and_nothing_else(tmp_path: Path) -> None:
    log = BoundedLog("/dev/full", 4096)
    for _ in range(10):
        log.write(b"x" * 100)
    assert log.dropped == 1000
    log._path, log._fd = str(tmp_path / "log"), -1  # room again
    log.write(b"hello\n")
    assert b"1000 bytes of log were lost" in (tmp_path / "log").read_bytes()
    assert (tmp_path / "log").read_bytes().endswith(b"hello\n")


def test_a_job_over_its_memory_ends_alone(tmp_path: Path) -> None:
    eat = "import time\nkept = bytearray(b'x') * (200 << 20)\ntime.sleep(600)"

    async def main() -> None:
        async with node(tmp_path) as n:
            other = n.submit(FOREVER, memory=64 << 20)
            id = n.jobs.submit(
                # In a child, because it is the tree that counts.
                JobSpec(
                    id="",
                    name="eater",
                    command=("sh", "-c", f'"{sys.executable}" -I -S -c "{eat}"; true'),
                    memory=100 << 20,
                )
            )
            status = await n.state(id, "failed")
            assert "100MiB" in status.reason, "it names the limit"
            assert status.restarts == 0
            assert n.status(other).state == "running"

    run(main)


def test_readers_that_share_their_data_stay_within_its_memory(tmp_path: Path) -> None:
    readers = """
import os, time
data = bytearray(b"x") * (60 << 20)
for _ in range(6):
    if os.fork() == 0:
        sum(data[::4096])
        time.sleep(0.5)
        os._exit(0)
for _ in range(6):
    os.wait()
print("fine")
"""

    async def main() -> None:
        async with node(tmp_path) as n:
            id = n.jobs.submit(
                JobSpec(
                    id="",
                    name="readers",
                    command=(sys.executable, "-I", "-S", "-c", readers),
                    memory=150 << 20,
                )
            )
            status = await n.state(id, "succeeded", "failed")
            assert (status.state, n.log(id)) == ("succeeded", "fine\n"), status.reason

    run(main)


def test_a_job_that_is_held_while_it_starts_makes_room_and_runs_once_released(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with node(tmp_path, most=1) as n:
            id = n.submit(f"while :; do echo >> beats; sleep 0.02; done & {FOREVER}")
            assert n.status(id).state == "starting"
            n.jobs.hold(id)
            await n.state(id, "held")
            await n.state(n.submit("true", name="second"), "succeeded")
            n.jobs.resume(id)
            await until(lambda: ("ready", id) in n.calls and n.lines("beats"))
            beats = len(n.lines("beats"))
            await until(lambda: len(n.lines("beats")) > beats)

    run(main)


def test_hold_stops_a_job_and_release_continues_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path, most=1) as n:
            script = f"(while :; do echo >> beats; sleep 0.02; done) & {FOREVER}"
            id = n.submit(script)
            waiting = n.submit("true", name="second")
            n.jobs.hold(waiting)
            await until(lambda: len(n.lines("beats")) > 2 and id in n.pids)
            pid = n.pids[id]

            assert n.jobs.hold(id) == id
            assert n.status(id).state == "held"
            assert n.calls == [("ready", id), ("exited", id)]
            await until(lambda: proctree.is_stopped(pid))
            os.kill(pid, signal.SIGCONT)  # whoever continues it, it is stopped again
            await until(lambda: proctree.is_stopped(pid))
            await until(lambda: stands_still(pid))
            beats = len(n.lines("beats"))
            await asyncio.sleep(0.1)
            assert len(n.lines("beats")) == beats

            n.jobs.resume(id)
            await until(lambda: n.calls[2:] == [("ready", id)])
            await until(lambda: len(n.lines("beats")) > beats)
            assert n.status(id).state == "running"

            n.jobs.hold(id)
            n.jobs.cancel(id)  # while it is stopped
            await n.state(id, "cancelled")
            assert n.status(waiting).state == "queued"
            assert "held" in n.status(waiting).reason
            n.jobs.resume("second")
            await n.state(waiting, "succeeded")
            with pytest.raises(InvalidRequest, match="cancelled"):
                n.jobs.hold(id)

    run(main)


def test_progress_comes_from_reports_else_from_cpu_time(tmp_path: Path) -> None:
    report = """
import time
from cotenant.report import report
step = 0
while True:
    step += 1
    report(step, unit="images", loss=1.0 / step)
    time.sleep(0.02)
"""

    async def main() -> None:
        async with node(tmp_path) as n:
            quiet = n.submit("while :; do :; done")
            loud = n.jobs.submit(
                JobSpec(
                    id="",
                    name="loud",
                    command=(sys.executable, "-S", "-c", report),
                    env={"PYTHONPATH": SITE},
                )
            )
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.connect(str(tmp_path / "report.sock"))
                bad = [
                    b"no json",
                    b"[]",
                    b'{"job": "x", "run": "y", "step": 1}',
                    b'{"job": "%s", "run": "old", "step": 1e9}' % loud.encode(),
                    b"{" * 9000,
                ]
                for message in bad:
                    sock.send(message)
            await until(lambda: n.jobs.talk.invalid == len(bad))
            await until(lambda: n.status(loud).rate > 0 and n.status(quiet).rate > 0)
            status = n.status(loud)
            assert status.progress_unit == "images"
            assert 0 < status.metrics["loss"] <= 1
            status = n.status(quiet)
            assert status.progress_unit == "cpu-s"
            assert 0 < status.progress == status.cpu_s

    run(main)


SAVER = """
import os, signal, sys, time
from cotenant.report import report
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
with open("told", "a") as told:
    print(os.environ.get("COTENANT_CHECKPOINT", "nothing"), file=told)
while not stop:
    time.sleep(0.01)
report(7, checkpoint="saved.npz")
"""


def saver(n: Node, **fields: Any) -> str:
    """A job that saves its work when it is stopped, and says so last."""
    command = (sys.executable, "-S", "-c", SAVER)
    env = {"PYTHONPATH": SITE, **fields.pop("env", {})}
    fields = {"name": "saver", "cwd": str(n.directory), "grace": 10 * S, **fields}
    return n.jobs.submit(JobSpec(id="", command=command, env=env, **fields))


def test_what_a_job_says_last_is_what_its_next_run_goes_on_from(tmp_path: Path) -> None:
    async def main() -> None:
        path = str(tmp_path / "saved.npz")
        async with node(tmp_path) as n:
            id = saver(n)
            await until(lambda: n.lines("told") == ["nothing"])
            n.jobs.stop(id, "its partition goes to others", again=True)
            await until(lambda: n.lines("told") == ["nothing", path])
            assert n.status(id).checkpoint == path
            assert n.status(id).checkpoint_step == 7
            assert 0 < n.status(id).checkpoint_at <= time.time()
        async with node(tmp_path) as n:
            await until(lambda: n.lines("told") == ["nothing", path, path])
            n.jobs.cancel(id)
            await n.state(id, "cancelled")
            assert n.status(id).checkpoint == path

    run(main)


def test_a_job_goes_on_from_what_it_was_submitted_with_until_it_has_its_own(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            id = saver(n, env={"COTENANT_CHECKPOINT": "/elsewhere/3.npz"})
            await until(lambda: n.lines("told") == ["/elsewhere/3.npz"])
            n.jobs.stop(id, "its partition goes to others", again=True)
            await until(lambda: len(n.lines("told")) == 2)
            assert n.lines("told")[1] == str(tmp_path / "saved.npz")
            n.jobs.cancel(id)
            await n.state(id, "cancelled")

    run(main)


def test_a_job_that_says_it_of_each_step_costs_the_store_little(tmp_path: Path) -> None:
    flood = """
import json, os, socket, time
sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
job = {"job": os.environ["COTENANT_JOB_ID"], "run": os.environ["COTENANT_JOB_RUN"]}
step = 0
while True:
    step += 1
    said = {"path": f"/c/{step}", "step": step, "at": step}
    message = json.dumps({**job, "step": step, "checkpoint": said}).encode()
    sock.sendto(message, os.environ["COTENANT_REPORT_SOCKET"])
    if step % 20 == 0:
        time.sleep(0.01)
"""

    async def main() -> None:
        async with node(tmp_path) as n:
            written: list[str] = []
            transition = n.store.transition

            def counting(id: str, to: Any, **fields: Any) -> Any:
                written.extend([fields["checkpoint"]] if "checkpoint" in fields else [])
                return transition(id, to, **fields)

            n.store.transition = counting  # type: ignore[method-assign]
            command = (sys.executable, "-S", "-c", flood)
            id = n.jobs.submit(JobSpec(id="", name="flood", command=command))
            await until(lambda: (n.status(id).checkpoint_step or 0) > 300)
            newest = n.status(id).checkpoint_step
            assert newest is not None
            assert len(written) < newest / 10
            n.jobs.cancel(id)
            await n.state(id, "cancelled")
            assert n.store.get(id).checkpoint == n.status(id).checkpoint != written[0]

    run(main)


def test_what_is_no_path_is_not_handed_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            id = n.submit(f"echo $COTENANT_JOB_RUN > run; {FOREVER}")
            await until(lambda: n.lines("run"))
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.connect(str(tmp_path / "report.sock"))
                bad = ["", "a\0b", "x" * 5000, "\ud800", 3]
                for path in bad:
                    said = {"job": id, "run": n.lines("run")[0], "checkpoint": {"path": path}}
                    sock.send(json.dumps(said).encode())
            await until(lambda: n.jobs.talk.invalid == len(bad))
            assert n.status(id).checkpoint == ""

    run(main)


def test_closing_stops_all_and_the_next_daemon_takes_them_up(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path, most=2) as n:
            script = f"echo up >> $COTENANT_JOB_ID; trap 'exit 0' TERM; {FOREVER}"
            ids = [n.submit(script) for _ in range(3)]
            held = ids[1]
            await until(lambda: n.lines(ids[0]) and n.lines(held) and len(n.pids) == 2)
            n.jobs.hold(held)
        assert not n.processes()
        with pytest.raises(EnvironmentProblem, match="no orders"):
            n.submit("true")
        async with node(tmp_path, most=2) as n:
            await until(lambda: len(n.lines(ids[0])) == 2 and n.lines(ids[2]))
            taken_up = ["running", "queued", "running"]
            await until(lambda: [n.status(id).state for id in ids] == taken_up)
            assert n.lines(held) == ["up"]
            assert all(n.status(id).restarts == 0 for id in ids)

    run(main)


def test_the_same_job_under_one_id_is_one_job_for_the_next_daemon_too(tmp_path: Path) -> None:
    spec = JobSpec(
        "mine", "", ("sh", "-c", "echo up >> $COTENANT_JOB_ID"), str(tmp_path), {"A": "1"}
    )
    other = JobSpec("mine", "", ("true",), str(tmp_path))

    async def main() -> None:
        async with node(tmp_path) as n:
            assert n.jobs.submit(spec) == n.jobs.submit(spec) == "mine"
            with pytest.raises(Conflict):
                n.jobs.submit(other)
            await until(lambda: n.status("mine").state == "succeeded")
        async with node(tmp_path) as n:
            assert n.jobs.submit(spec) == "mine"
            with pytest.raises(Conflict):
                n.jobs.submit(other)
            assert n.lines("mine") == ["up"] and len(n.jobs.statuses()) == 1

    run(main)


def test_what_is_sent_again_comes_after_what_it_came_after(tmp_path: Path) -> None:
    spec = JobSpec("two", "nightly", ("true",), str(tmp_path), after=("nightly",))

    async def main() -> None:
        async with node(tmp_path) as n:
            n.jobs.submit(JobSpec("one", "nightly", ("true",), str(tmp_path)))
            assert n.jobs.submit(spec) == n.jobs.submit(spec) == "two"
            await n.state("two", "succeeded")

    run(main)


@pytest.mark.parametrize("weight", [0.0, -1.0, 1e308, float("inf"), float("nan")])
def test_a_weight_that_cannot_be_divided_by_is_refused(tmp_path: Path, weight: float) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            with pytest.raises(InvalidRequest):
                n.submit("true", weight=weight)

    run(main)


def test_a_directory_has_one_supervisor_and_a_short_path(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path):
            with pytest.raises(EnvironmentProblem, match="another Cotenant"):
                await Node(tmp_path).jobs.open()
        deep = tmp_path / ("d" * 120)
        with pytest.raises(EnvironmentProblem, match="107; choose a state directory"):
            await Node(deep).jobs.open()
        async with node(tmp_path):
            pass

    run(main)


def test_a_killed_shim_leaves_nothing_and_its_job_is_restarted(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            script = f"setsid sh -c '({FOREVER}) & {FOREVER}' & echo $$ >> runs; {FOREVER}"
            id = n.submit(script)
            once = n.submit(FOREVER, restart=RestartPolicy.NEVER)
            await until(lambda: n.lines("runs") and len(n.pids) == 2)
            await until(lambda: len(proctree.descendants(n.pids[id])) >= 3)
            first = proctree.marked("COTENANT_JOB_ID", id)
            for shim in (parent(n.pids[id]), parent(n.pids[once])):
                os.kill(shim, signal.SIGKILL)
            await until(lambda: len(n.lines("runs")) == 2)
            assert not any(map(alive, first))
            assert n.status(id).restarts == 1
            status = await n.state(once, "failed")
            assert status.reason
            for job in (id, once):
                calls = [call for call, of in n.calls if of == job]
                assert calls[:2] == ["ready", "exited"]

    run(main)


def parent(pid: int) -> int:
    found = proctree.stat(pid)
    assert found is not None
    return found.parent


DAEMON = """
import asyncio, sys
from pathlib import Path
from cotenant.devices import proctree
from cotenant.domain.device import Launch
from cotenant.domain.workload import JobSpec, RestartPolicy
from cotenant.runtime.jobs import JobSupervisor
from cotenant.runtime.jobstore import JobStore

class Shell:
    started = 0

    def on_job_queued(self, spec):
        if self.started < 4:
            self.started += 1
            jobs.start(spec.id)

    async def launch_job(self, spec):
        return Launch()

    def on_job_ready(self, spec, pid):
        print("ready", spec.id, proctree.descendants(pid)[0], flush=True)

    def on_job_listens(self, id):
        pass

    def on_job_adopts(self, id, process):
        pass

    def on_job_exited(self, id):
        print("exited", id, flush=True)

async def main():
    global jobs
    directory = Path(sys.argv[1])
    jobs = JobSupervisor(JobStore(directory / "jobs.db"), directory, Shell())
    await jobs.open()
    for number in range(int(sys.argv[2])):
        script = sys.argv[3].replace("NUMBER", str(number))
        jobs.submit(JobSpec(id=f"j{number}", name="job", command=("sh", "-c", script),
                            cwd=str(directory), restart=RestartPolicy.NEVER))
    print("submitted", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@contextlib.contextmanager
def daemon(directory: Path, count: int, script: str):
    """A supervisor in a process of its own, to be killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", DAEMON, str(directory), str(count), script],
        env={**os.environ, "PYTHONPATH": SITE},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_killed_daemon_loses_no_job_and_runs_none_twice(tmp_path: Path) -> None:
    # 0: ends while no daemon is there. 1: was stopped and squeezed, is set free. 2: runs on.
    # 3: its shim is killed as well. 4, 5: still in the queue.
    script = (
        "echo NUMBER >> started; case NUMBER in 0) while [ ! -e end0 ]; do sleep 0.02; done;; "
        "4|5) exit 0;; esac; while [ ! -e end ]; do sleep 0.02; done; echo NUMBER >> finished"
    )

    async def main() -> None:
        with daemon(tmp_path, 6, script) as process:
            pids: dict[str, int] = {}
            assert process.stdout is not None
            while len(pids) < 4:
                words = process.stdout.readline().split()
                assert words, "the daemon died"
                if words[0] == "ready":
                    pids[words[1]] = int(words[2])
            os.kill(pids["j1"], signal.SIGSTOP)  # as the dispatcher would between slices
            await until(lambda: proctree.is_stopped(pids["j1"]))
            cpus = os.sched_getaffinity(0)
            os.sched_setaffinity(pids["j1"], {min(cpus)})
            process.kill()
            process.wait()
        await until(lambda: not proctree.is_stopped(pids["j1"]))
        assert os.sched_getaffinity(pids["j1"]) == cpus
        os.kill(parent(pids["j3"]), signal.SIGKILL)
        (tmp_path / "end0").touch()
        (tmp_path / "end").touch()
        await until(lambda: not alive(pids["j0"]))
        (tmp_path / "end").unlink()

        async with node(tmp_path, most=4) as n:
            assert (await n.state("j0", "succeeded")).exit_code == 0
            assert n.status("j3").state == "failed"
            for id in ("j4", "j5"):
                await n.state(id, "succeeded")
            (tmp_path / "end").touch()
            for id in ("j1", "j2"):
                await n.state(id, "succeeded")
            assert sorted(n.lines("started")) == list("012345")
            assert set(n.lines("finished")) >= set("012")

    run(main)


def test_an_adopted_job_keeps_its_process_and_outlives_a_second_crash(tmp_path: Path) -> None:
    script = "echo $$ >> started; while [ ! -e end ]; do sleep 0.02; done"

    def crash(count: int) -> int:
        with daemon(tmp_path, count, script) as process:
            assert process.stdout is not None
            while (words := process.stdout.readline().split())[0] != "ready":
                pass
            os.kill(int(words[2]), signal.SIGSTOP)
        return int(words[2])

    async def main() -> None:
        pids = set()
        for count in (1, 0, 0):
            pid = crash(count)
            pids.add(pid)
            await until(lambda pid=pid: not proctree.is_stopped(pid))  # each crash set it free
        assert len(pids) == 1
        async with node(tmp_path) as n:
            await until(lambda: n.pids)
            assert n.pids == {"j0": pids.pop()}
            assert n.calls == [("ready", "j0")]
            n.jobs.hold("j0")
            n.jobs.resume("j0")
            (tmp_path / "end").touch()
            status = await n.state("j0", "succeeded")
            assert status.exit_code == 0
            assert len(n.lines("started")) == 1

    run(main)


def test_daemons_killed_at_any_moment_start_each_job_once(tmp_path: Path) -> None:
    """Kills spread over the start of the jobs, where a race would be."""
    script = "echo NUMBER >> started; while [ ! -e end ]; do sleep 0.05; done"

    async def main() -> None:
        for attempt in range(4):
            directory = tmp_path / str(attempt)
            with daemon(directory, 4, script) as process:
                assert process.stdout is not None
                while process.stdout.readline().split() != ["submitted"]:
                    pass
                await asyncio.sleep(attempt * 0.015)
                process.kill()
                process.wait()
            async with node(directory, most=4) as n:
                await until(lambda n=n: len(n.lines("started")) >= 4)
                (directory / "end").touch()
                for number in range(4):
                    await n.state(f"j{number}", "succeeded")
                assert sorted(n.lines("started")) == list("0123")

    run(main)


def test_a_disk_that_fills_up_stops_new_runs_only(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as n:
            running = n.submit(f"trap 'exit 0' TERM; {FOREVER}")
            await until(lambda: running in n.pids)
            write, refused = n.store.transition, []

            def full(*args: Any, **fields: Any) -> Any:
                refused.append(args)
                raise EnvironmentProblem("the disk is full")

            n.store.transition = full  # type: ignore[method-assign]
            waiting = n.submit("true")
            await until(lambda: refused)
            assert n.status(waiting).state == "queued"
            assert n.status(waiting).reason
            n.jobs.cancel(running)
            await n.state(running, "cancelled")
            n.store.transition = write  # type: ignore[method-assign]
            await n.state(waiting, "succeeded")
            assert n.store.get(running).state.value == "cancelled"

    run(main)
