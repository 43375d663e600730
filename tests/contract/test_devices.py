"""The contract of devices: the same for every kind; for the CPU also as ``/proc`` shows it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cotenant.devices import cpu, proctree
from cotenant.devices.base import Device
from cotenant.devices.cpu import CONTINUE_LOOKS, JOB_NICE, WORKER_PRIORITY, CpuDevice
from cotenant.devices.npu import NpuDevice
from cotenant.devices.null import NullDevice
from cotenant.domain.device import (
    REST_EVERY,
    Launch,
    Partition,
    PreemptLevel,
    Tenant,
    TenantKind,
)
from cotenant.domain.device_config import NpuConfig
from cotenant.domain.errors import DeviceError, EnvironmentProblem
from cotenant.domain.reservation import Adopted
from cotenant.domain.units import S
from cotenant.runtime.rlimits import limit

PATIENCE_S = 20.0
JOB, WORKER = Tenant("j", TenantKind.JOB), Tenant("w", TenantKind.WORKER, exec_timeout=3 * S)
CORES = tuple(sorted(os.sched_getaffinity(0)))[:2]
TWO_CORES = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
# Three processes that compute: a shell, and two children of it.
BUSY = "while :; do :; done & while :; do :; done & while :; do :; done"
ROOT = (
    "import subprocess, sys\n"
    "run = [subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)]\n"
    "for _ in sys.stdin: run.append(subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL))\n"
)
THREADS = (
    "import threading, time\n"
    "for _ in range(3): threading.Thread(target=time.sleep, args=(1000,)).start()\n"
    "time.sleep(1000)"
)


def until(true: Callable[[], Any], say: Callable[[], object] = lambda: "") -> Any:
    end = time.monotonic() + PATIENCE_S
    while not (found := true()):
        assert time.monotonic() < end, f"waited in vain: {say()}"
        time.sleep(0.01)
    return found


def null_device() -> Device:
    return NullDevice(units=2)


def blocking_null() -> Device:
    return NullDevice("stand-in", 4, 2**30, PreemptLevel.GATE, blocking=True)


def real_cpu() -> Device:
    return CpuDevice(cores=CORES)


def unprivileged_cpu() -> Device:
    return CpuDevice(cores=CORES, realtime="never")


def emulated_npu() -> Device:
    return NpuDevice(NpuConfig(emulate=CORES))


@pytest.fixture(
    params=[null_device, blocking_null, real_cpu, unprivileged_cpu, emulated_npu],
    ids=lambda make: make.__name__,
)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    made: Device = request.param()
    made.open()
    yield made
    made.close()


@pytest.fixture
def device_cpu() -> Iterator[CpuDevice]:
    made = CpuDevice(cores=CORES, realtime="never")
    made.open()
    yield made
    made.close()


class Tree:
    """A job's processes: a root that stands for the shim, and what descends from it."""

    def __init__(self, command: list[str]) -> None:
        self.root = subprocess.Popen(
            [sys.executable, "-S", "-c", ROOT, *command],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def another(self) -> None:
        """The root starts the command once more."""
        before = len(self.pids)
        assert self.root.stdin is not None
        self.root.stdin.write(b"\n")
        self.root.stdin.flush()
        until(lambda: len(self.pids) > before)

    @property
    def pids(self) -> list[int]:
        return proctree.descendants(self.root.pid)

    @property
    def threads(self) -> list[int]:
        return proctree.threads(self.pids)

    def masks(self) -> set[tuple[int, ...]]:
        found = set()
        for tid in self.threads:
            with contextlib.suppress(ProcessLookupError):
                found.add(tuple(sorted(os.sched_getaffinity(tid))))
        return found

    def states(self) -> set[bytes]:
        stats = [proctree.stat(pid) for pid in self.pids]
        return {s.state for s in stats if s is not None}

    def ticks(self) -> int:
        """CPU time used, in clock ticks."""
        stats = [proctree.stat(pid) for pid in self.pids]
        return sum(s.cpu_ticks for s in stats if s is not None)

    def is_stopped(self) -> bool:
        return self.states() == {b"T"}

    def end(self) -> None:
        proctree.kill(lambda: self.pids)
        self.root.kill()
        self.root.communicate()


@pytest.fixture
def trees() -> Iterator[Callable[..., Tree]]:
    made: list[Tree] = []

    def make(*command: str, processes: int = 1) -> Tree:
        tree = Tree(list(command))
        made.append(tree)
        until(lambda: len(tree.pids) >= processes)
        return tree

    yield make
    for tree in made:
        tree.end()


def parts(device: Device) -> list[Partition]:
    """A single-unit partition for each unit."""
    spec = device.spec
    return [Partition(f"{spec.id}:{u}", spec.id, (u,)) for u in spec.units]


# --- every device ---------------------------------------------------------------------------


def test_a_device_says_what_it_is(device: Device) -> None:
    spec = device.spec
    assert spec.units == tuple(sorted(set(spec.units)))
    assert spec.shapes
    assert max(spec.shapes) <= len(spec.units)
    assert isinstance(spec.preempt, PreemptLevel)
    assert all(limit.strip() for limit in spec.limits)


def test_any_cut_into_its_shapes_is_a_layout(device: Device) -> None:
    units = device.spec.units
    for size in device.spec.shapes:
        cut = [units[i : i + size] for i in range(0, len(units) - size + 1, size)]
        device.repartition(tuple(Partition(f"p{u}", device.spec.id, u) for u in cut))
    device.repartition(())


def test_partitions_that_overlap_or_do_not_exist_are_refused(device: Device) -> None:
    one = parts(device)[0]
    with pytest.raises(DeviceError):
        device.repartition((one, Partition("again", device.spec.id, one.units)))
    with pytest.raises(DeviceError):
        device.repartition((Partition("far", device.spec.id, (9999,)),))


@pytest.mark.parametrize("tenant", [JOB, WORKER], ids=["job", "worker"])
def test_what_a_launch_asks_for_can_be_given_to_a_process(device: Device, tenant: Tenant) -> None:
    launch = device.launch(tenant, None)
    shown = "import os, resource; print(dict(os.environ), resource.getrlimit(resource.RLIMIT_CPU))"
    done = subprocess.run(
        [sys.executable, "-c", shown],
        env={**os.environ, **launch.env},
        preexec_fn=lambda: limit(launch.limits),
        capture_output=True,
        check=True,
        text=True,
    )
    assert all(name in done.stdout and value in done.stdout for name, value in launch.env.items())


def test_a_tenants_level_is_at_most_that_of_its_device(
    device: Device, trees: Callable[..., Tree]
) -> None:
    tree = trees("sleep", "1000")
    for tenant, pid in ((JOB, tree.root.pid), (WORKER, tree.pids[0])):
        assert PreemptLevel.NONE <= device.attach(tenant, pid) <= device.spec.preempt


def test_what_tenants_occupy_is_known_while_they_are_attached(
    device: Device, trees: Callable[..., Tree]
) -> None:
    tree = trees("sleep", "1000")
    assert device.facts() == {}
    device.attach(JOB, tree.root.pid)
    device.attach(WORKER, tree.pids[0])
    device.refresh()
    assert set(device.facts()) == {"j", "w"}
    assert all(seen.memory >= 0 for seen in device.facts().values())
    device.detach("j")
    device.detach("w")
    assert device.facts() == {}


def test_a_job_is_granted_and_taken_back(device: Device, trees: Callable[..., Tree]) -> None:
    tree = trees("sleep", "1000")
    device.attach(JOB, tree.root.pid)
    for partition in parts(device):
        device.grant("j", partition)
    for partition in parts(device):
        assert device.revoke("j", partition) >= 0
    assert device.revoke("j", parts(device)[0]) >= 0, "what it does not hold is no error"
    device.refresh()
    device.detach("j")


def test_who_was_never_attached_is_refused(device: Device) -> None:
    partition = parts(device)[0]
    with pytest.raises(DeviceError, match="nobody"):
        device.grant("nobody", partition)
    with pytest.raises(DeviceError, match="nobody"):
        device.revoke("nobody", partition)
    with pytest.raises(DeviceError, match="nobody"):
        device.bind("nobody", partition)
    with pytest.raises(DeviceError, match="nobody"):
        device.adopt("nobody", Adopted(os.getpid(), 1))


def test_who_was_adopted_may_be_gone_by_now(device: Device, trees: Callable[..., Tree]) -> None:
    tree, other = trees("sleep", "1000"), trees("sleep", "1000")
    device.attach(JOB, tree.root.pid)
    pid = other.pids[0]
    device.adopt("j", Adopted(pid, proctree.start_time(pid)))
    other.end()
    device.grant("j", parts(device)[0])
    device.refresh()
    device.revoke("j", parts(device)[0])
    device.detach("j")


def test_forgetting_twice_is_harmless(device: Device, trees: Callable[..., Tree]) -> None:
    tree = trees("sleep", "1000")
    device.attach(JOB, tree.root.pid)
    device.attach(WORKER, tree.pids[0])
    for _ in range(2):
        device.detach("j")
        device.detach("w")


def test_processes_that_are_gone_harm_nothing(device: Device, trees: Callable[..., Tree]) -> None:
    tree = trees("sleep", "1000")
    worker = tree.pids[0]
    device.attach(JOB, tree.root.pid)
    device.attach(WORKER, worker)
    tree.end()
    partition = parts(device)[0]
    device.grant("j", partition)
    device.refresh()
    device.bind("w", partition)
    device.revoke("j", partition)
    device.refresh()


def test_a_device_can_be_opened_again(device: Device) -> None:
    before = device.spec
    device.close()
    device.open()
    assert device.spec == before


# --- the CPU: jobs --------------------------------------------------------------------------


def test_an_attached_job_stands_still_until_it_is_granted_a_core(
    device_cpu: CpuDevice, trees: Callable[..., Tree]
) -> None:
    tree = trees("sh", "-c", BUSY, processes=3)
    device_cpu.attach(JOB, tree.root.pid)
    until(tree.is_stopped, tree.states)
    device_cpu.grant("j", parts(device_cpu)[0])
    until(lambda: b"T" not in tree.states())
    assert tree.masks() == {CORES[:1]}


@TWO_CORES
def test_what_a_job_forks_while_it_is_attached_stands_still_and_is_confined_with_it(
    device_cpu: CpuDevice, trees: Callable[..., Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = trees("sleep", "1000")
    look = proctree.descendants

    def forks_after_the_look(root: int, table: Any) -> list[int]:
        monkeypatch.undo()
        found = look(root, table)
        tree.another()
        return found

    monkeypatch.setattr(proctree, "descendants", forks_after_the_look)
    device_cpu.attach(JOB, tree.root.pid)
    until(tree.is_stopped, tree.states)
    assert len(tree.pids) == 2
    device_cpu.grant("j", parts(device_cpu)[0])
    until(lambda: b"T" not in tree.states())
    assert tree.masks() == {CORES[:1]}


@TWO_CORES
def test_a_job_runs_on_the_union_of_what_it_is_granted(
    device_cpu: CpuDevice, trees: Callable[..., Tree]
) -> None:
    tree = trees("sh", "-c", BUSY, processes=3)
    first, second = parts(device_cpu)
    device_cpu.attach(JOB, tree.root.pid)
    device_cpu.grant("j", first)
    device_cpu.grant("j", second)
    assert tree.masks() == {CORES}
    device_cpu.revoke("j", first)
    assert tree.masks() == {CORES[1:]}
    device_cpu.revoke("j", second)
    until(tree.is_stopped, tree.states)
    device_cpu.grant("j", first)
    until(lambda: b"T" not in tree.states())
    assert tree.masks() == {CORES[:1]}


@TWO_CORES
def test_every_thread_is_moved(device_cpu: CpuDevice, trees: Callable[..., Tree]) -> None:
    tree = trees(sys.executable, "-c", THREADS)
    until(lambda: len(tree.threads) == 4)
    device_cpu.attach(JOB, tree.root.pid)
    device_cpu.grant("j", parts(device_cpu)[1])
    assert tree.masks() == {CORES[1:]}
    assert len(tree.threads) == 4


@TWO_CORES
def test_children_are_born_where_their_parents_may_run(
    device_cpu: CpuDevice, trees: Callable[..., Tree], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    script = f"while [ ! -e {go} ]; do sleep 0.01; done; sleep 1000 & sleep 1000 & wait"
    tree = trees("sh", "-c", script)
    device_cpu.attach(JOB, tree.root.pid)
    device_cpu.grant("j", parts(device_cpu)[1])
    go.touch()
    until(lambda: len(tree.pids) == 3)
    assert tree.masks() == {CORES[1:]}


def test_what_is_born_while_the_job_stands_still_is_stopped_at_the_next_look(
    device_cpu: CpuDevice, trees: Callable[..., Tree]
) -> None:
    tree = trees("sleep", "1000")
    device_cpu.attach(JOB, tree.root.pid)
    until(tree.is_stopped)
    tree.another()
    assert not tree.is_stopped()
    device_cpu.refresh()
    until(tree.is_stopped, tree.states)
    device_cpu.grant("j", parts(device_cpu)[0])
    until(lambda: b"T" not in tree.states())
    assert tree.masks() == {CORES[:1]}


@TWO_CORES
def test_what_is_born_outside_the_jobs_cores_is_confined_at_the_next_look(
    device_cpu: CpuDevice, trees: Callable[..., Tree]
) -> None:
    tree = trees("sleep", "1000")
    device_cpu.attach(JOB, tree.root.pid)
    device_cpu.grant("j", parts(device_cpu)[0])
    tree.another()
    assert tree.masks() == {CORES[:1], CORES}
    device_cpu.refresh()
    assert tree.masks() == {CORES[:1]}


@TWO_CORES
def test_who_leaves_the_jobs_cores_is_brought_back_at_the_next_look(
    device_cpu: CpuDevice, trees: Callable[..., Tree]
) -> None:
    tree = trees(sys.executable, "-c", THREADS)
    until(lambda: len(tree.threads) == 4)
    first, second = parts(device_cpu)
    device_cpu.attach(JOB, tree.root.pid)
    device_cpu.grant("j", first)
    device_cpu.refresh()
    for core in (CORES, CORES[1:]):
        os.sched_setaffinity(tree.threads[2], core)
        device_cpu.refresh()
        assert tree.masks() == {CORES[:1]}
    device_cpu.grant("j", second)
    os.sched_setaffinity(tree.threads[2], CORES[1:])
    device_cpu.refresh()
    assert tree.masks() == {CORES, CORES[1:]}, "one of its own cores is a job's to choose"


def test_what_stops_on_the_news_of_a_pause_is_continued_and_what_stops_later_is_not(
    device_cpu: CpuDevice, trees: Callable[..., Tree]
) -> None:
    tree = trees("sleep", "1000")
    (pid,) = tree.pids
    device_cpu.attach(JOB, tree.root.pid)
    device_cpu.grant("j", parts(device_cpu)[0])
    for _ in range(2):
        os.kill(pid, signal.SIGSTOP)
        until(tree.is_stopped)
        device_cpu.refresh()
        until(lambda: not tree.is_stopped())
    for _ in range(CONTINUE_LOOKS):
        device_cpu.refresh()
    os.kill(pid, signal.SIGSTOP)
    until(tree.is_stopped)
    device_cpu.refresh()
    assert tree.is_stopped()


def test_looking_does_not_continue_a_job_that_stands_still(
    device_cpu: CpuDevice, trees: Callable[..., Tree]
) -> None:
    tree = trees("sleep", "1000")
    partition = parts(device_cpu)[0]
    device_cpu.attach(JOB, tree.root.pid)
    device_cpu.grant("j", partition)
    device_cpu.revoke("j", partition)
    until(tree.is_stopped)
    device_cpu.refresh()
    assert tree.is_stopped()


@pytest.mark.parametrize(
    "command",
    [
        ["script", "-qec", "sleep 1000", "/dev/null"],
        ["strace", "-f", "-o", "/dev/null", "sleep", "1000"],
        ["bash", "-c", "set -m; sleep 1000; sleep 1001"],
        ["bash", "-c", "set -m; sleep 1000 & wait; sleep 1001"],
        ["script", "-qec", "bash -ic 'sleep 1000; sleep 1001'", "/dev/null"],
    ],
    ids=["script", "strace", "shell", "background", "shell in script"],
)
def test_who_watches_a_job_goes_on_with_it_after_a_pause(
    device_cpu: CpuDevice, trees: Callable[..., Tree], command: list[str]
) -> None:
    if shutil.which(command[0]) is None or (command[0] == "script" and not shutil.which("bash")):
        pytest.skip(f"{command[0]} is not here")

    def sleeps() -> bool:
        return any(is_command(pid, "sleep\x001000") for pid in tree.pids)

    tree = trees(*command)
    until(sleeps)
    device_cpu.attach(JOB, tree.root.pid)
    partition = parts(device_cpu)[0]
    before = tree.pids
    for _ in range(20):
        device_cpu.grant("j", partition)
        device_cpu.refresh()
        device_cpu.revoke("j", partition)
    device_cpu.grant("j", partition)
    for _ in range(CONTINUE_LOOKS):
        time.sleep(0.02)
        device_cpu.refresh()
    until(lambda: tree.states().isdisjoint({b"T"}), tree.states)
    assert tree.pids == before
    assert sleeps()


def is_command(pid: int, text: str) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(text.encode())
    return False


def test_a_detached_job_runs_freely(device_cpu: CpuDevice, trees: Callable[..., Tree]) -> None:
    tree = trees("sh", "-c", BUSY, processes=3)
    device_cpu.attach(JOB, tree.root.pid)
    until(tree.is_stopped)
    device_cpu.detach("j")
    until(lambda: b"T" not in tree.states())
    assert tree.masks() == {CORES}


def test_an_adopted_tree_does_as_the_job_does(
    device_cpu: CpuDevice, trees: Callable[..., Tree]
) -> None:
    tree, other = trees("sleep", "1000"), trees("sh", "-c", BUSY, processes=2)
    device_cpu.attach(JOB, tree.root.pid)
    for pid in other.pids:
        device_cpu.adopt("j", Adopted(pid, proctree.start_time(pid)))
    until(other.is_stopped)
    device_cpu.grant("j", parts(device_cpu)[0])
    until(lambda: b"T" not in other.states())
    assert other.masks() == {CORES[:1]}
    device_cpu.revoke("j", parts(device_cpu)[0])
    until(other.is_stopped)
    device_cpu.detach("j")
    until(lambda: b"T" not in other.states())
    assert other.masks() == {CORES}


def test_who_has_the_pid_of_one_that_was_adopted_is_left_alone(
    device_cpu: CpuDevice, trees: Callable[..., Tree]
) -> None:
    tree, stranger = trees("sleep", "1000"), trees("sh", "-c", BUSY)
    device_cpu.attach(JOB, tree.root.pid)
    pid = stranger.pids[0]
    device_cpu.adopt("j", Adopted(pid, proctree.start_time(pid) - 1))
    device_cpu.refresh()
    assert not stranger.is_stopped() and stranger.masks() == {CORES}


def test_closing_gives_jobs_back(trees: Callable[..., Tree]) -> None:
    device = CpuDevice(cores=CORES, realtime="never")
    device.open()
    tree = trees("sh", "-c", BUSY, processes=3)
    device.attach(JOB, tree.root.pid)
    until(tree.is_stopped)
    device.close()
    until(lambda: b"T" not in tree.states())


def test_without_real_time_jobs_are_nicer_than_requests(
    device_cpu: CpuDevice, trees: Callable[..., Tree]
) -> None:
    tree = trees("sleep", "1000")
    device_cpu.attach(JOB, tree.root.pid)
    assert {os.getpriority(os.PRIO_PROCESS, tid) for tid in tree.threads} == {JOB_NICE}


def test_a_job_whose_last_core_was_taken_back_uses_no_more_time(
    device_cpu: CpuDevice, trees: Callable[..., Tree]
) -> None:
    tree = trees("sh", "-c", BUSY, processes=3)
    partition = parts(device_cpu)[0]
    device_cpu.attach(JOB, tree.root.pid)
    for _ in range(3):
        device_cpu.grant("j", partition)
        granted = tree.ticks()
        until(lambda since=granted: tree.ticks() > since + 2)
        device_cpu.revoke("j", partition)
        before = tree.ticks()
        time.sleep(20 / proctree.TICKS_PER_SECOND)
        assert tree.ticks() <= before + 1


def test_looking_while_granting_leaves_the_last_word_to_the_grant(
    device_cpu: CpuDevice, trees: Callable[..., Tree]
) -> None:
    tree = trees("sh", "-c", BUSY, processes=3)
    partition = parts(device_cpu)[0]
    device_cpu.attach(JOB, tree.root.pid)
    end = threading.Event()

    def look() -> None:
        while not end.is_set():
            device_cpu.refresh()

    looker = threading.Thread(target=look)
    looker.start()
    try:
        for _ in range(50):
            device_cpu.grant("j", partition)
            device_cpu.revoke("j", partition)
        until(tree.is_stopped, tree.states)
        device_cpu.grant("j", partition)
        until(lambda: b"T" not in tree.states(), tree.states)
    finally:
        end.set()
        looker.join()


# --- the CPU: workers -----------------------------------------------------------------------


@TWO_CORES
def test_a_worker_is_bound_to_its_partition(
    device_cpu: CpuDevice, trees: Callable[..., Tree]
) -> None:
    tree = trees(sys.executable, "-c", THREADS)
    until(lambda: len(tree.threads) == 4)
    (worker,) = tree.pids
    device_cpu.attach(WORKER, worker)
    for partition in parts(device_cpu):
        device_cpu.bind("w", partition)
        assert tree.masks() == {partition.units}


@TWO_CORES
def test_who_leaves_a_workers_cores_is_brought_back_at_the_next_look(
    device_cpu: CpuDevice, trees: Callable[..., Tree]
) -> None:
    tree = trees(sys.executable, "-c", THREADS)
    until(lambda: len(tree.threads) == 4)
    device_cpu.attach(WORKER, tree.pids[0])
    first, second = parts(device_cpu)
    device_cpu.bind("w", first)
    device_cpu.refresh()
    for cores in (CORES, second.units):
        os.sched_setaffinity(tree.threads[2], cores)
        device_cpu.refresh()
        assert tree.masks() == {first.units}


def test_workers_that_are_not_pinned_stay_where_they_are(trees: Callable[..., Tree]) -> None:
    device = CpuDevice(cores=CORES, realtime="never", pin=False)
    device.open()
    tree = trees("sleep", "1000")
    before = tree.masks()
    device.attach(WORKER, tree.pids[0])
    device.bind("w", parts(device)[0])
    assert tree.masks() == before
    assert any("not pinned" in limit for limit in device.spec.limits)
    device.close()


def has_real_time() -> bool:
    device = CpuDevice(cores=CORES)
    device.open()
    return device.spec.preempt is PreemptLevel.PRIORITY


REAL_TIME = pytest.mark.skipif(not has_real_time(), reason="real-time priority is not allowed")


@REAL_TIME
def test_with_real_time_workers_come_before_jobs(trees: Callable[..., Tree]) -> None:
    device = CpuDevice(cores=CORES)
    device.open()
    worker, job = trees("sleep", "1000"), trees("sleep", "1000")
    device.attach(WORKER, worker.pids[0])
    device.attach(JOB, job.root.pid)
    (pid,) = worker.pids
    assert os.sched_getscheduler(pid) & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO
    assert os.sched_getparam(pid).sched_priority == WORKER_PRIORITY
    assert {os.sched_getscheduler(tid) for tid in job.threads} == {os.SCHED_OTHER}
    device.close()


@REAL_TIME
def test_with_real_time_a_worker_is_bounded_and_told_to_rest_well_before() -> None:
    device = CpuDevice(cores=CORES)
    device.open()
    launch = device.launch(WORKER, None)
    soft_us, hard_us = launch.limits[resource.RLIMIT_RTTIME]
    assert WORKER.exec_timeout == soft_us * 1000 < hard_us * 1000
    assert 0 < int(launch.env[REST_EVERY]) <= WORKER.exec_timeout // 4
    device.close()


def test_without_real_time_a_worker_needs_no_rest(device_cpu: CpuDevice) -> None:
    assert device_cpu.launch(WORKER, None) == Launch()


def test_what_a_jobs_processes_occupy_is_added_up(
    device_cpu: CpuDevice, trees: Callable[..., Tree]
) -> None:
    tree = trees(sys.executable, "-c", "import time; x = bytearray(72 << 20); time.sleep(1000)")
    until(lambda: proctree.resident_bytes(tree.pids) > 72 << 20)
    device_cpu.attach(JOB, tree.root.pid)
    assert device_cpu.facts()["j"].memory > 64 << 20
    tree.another()
    until(lambda: all(proctree.resident_bytes([pid]) > 72 << 20 for pid in tree.pids))
    device_cpu.refresh()
    until(lambda: device_cpu.facts()["j"].memory > 128 << 20)


@REAL_TIME
def test_closing_gives_this_process_its_priority_back() -> None:
    script = (
        "import os\n"
        "from cotenant.devices.cpu import CpuDevice\n"
        "device = CpuDevice()\n"
        "device.open()\n"
        "device.protect_self()\n"
        "assert os.sched_getscheduler(0) != os.SCHED_OTHER\n"
        "device.close()\n"
        "assert os.sched_getscheduler(0) == os.SCHED_OTHER, os.sched_getscheduler(0)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# --- the CPU: what a machine may lack -------------------------------------------------------

SHOW = (
    "import json\n"
    "from cotenant.devices.cpu import CpuDevice\n"
    "device = CpuDevice()\n"
    "device.open()\n"
    "print(json.dumps([device.spec.preempt.name, device.spec.units, device.spec.limits]))\n"
)


def shown(*prefix: str, cores: set[int] | None = None) -> list[Any]:
    """Level, cores and limits of the device in a process started with ``prefix``."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", SHOW],
        capture_output=True,
        check=True,
        preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
    )
    found: list[Any] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs setpriv")
def test_without_the_right_to_real_time_the_level_is_pause_and_that_is_said() -> None:
    drop = ["setpriv", "--bounding-set", "-sys_nice", "--inh-caps", "-sys_nice"]
    level, _, limits = shown(*drop)
    assert level == "PAUSE"
    assert any("not allowed here" in limit for limit in limits)


def test_the_right_may_be_refused_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tid: int, priority: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(cpu, "_make_realtime", refuse)
    device = CpuDevice(cores=CORES)
    device.open()
    assert device.spec.preempt is PreemptLevel.PAUSE
    assert any("not allowed here" in limit for limit in device.spec.limits)
    with pytest.raises(EnvironmentProblem, match="CAP_SYS_NICE"):
        CpuDevice(cores=CORES, realtime="require").open()


def test_real_time_can_be_switched_off() -> None:
    device = CpuDevice(cores=CORES, realtime="never")
    device.open()
    assert device.spec.preempt is PreemptLevel.PAUSE
    assert any("switched off" in limit for limit in device.spec.limits)


def test_a_restricted_mask_is_the_whole_device() -> None:
    _, units, limits = shown(cores={CORES[-1]})
    assert units == [CORES[-1]]
    assert any("one core" in limit for limit in limits)


def test_cores_outside_the_mask_are_refused_with_those_inside() -> None:
    with pytest.raises(EnvironmentProblem, match="9999") as caught:
        CpuDevice(cores=(9999,)).open()
    assert str(sorted(os.sched_getaffinity(0))) in str(caught.value)


def test_one_core_is_a_device() -> None:
    device = CpuDevice(cores=CORES[:1], realtime="never")
    device.open()
    assert device.spec.units == CORES[:1]
    assert device.spec.shapes == (1,)
    assert any("one core" in limit for limit in device.spec.limits)


# --- the emulated NPU -----------------------------------------------------------------------


@TWO_CORES
def test_a_worker_of_an_emulated_npu_stays_on_its_cores(trees: Callable[..., Tree]) -> None:
    device = NpuDevice(NpuConfig(emulate=CORES[1:]))
    device.open()
    tree = trees(sys.executable, "-c", THREADS)
    until(lambda: len(tree.threads) == 4)
    device.attach(WORKER, tree.pids[0])
    assert tree.masks() == {CORES[1:]}
    device.bind("w", parts(device)[0])
    assert tree.masks() == {CORES[1:]}
    device.close()


def test_an_emulated_npu_serves_only_and_says_what_it_is() -> None:
    device = NpuDevice(NpuConfig(emulate=CORES[:1], memory=2**28))
    device.open()
    assert not device.spec.trains
    assert device.spec.memory == 2**28
    assert any("EMULATED" in limit for limit in device.spec.limits)
    device.close()


def test_an_npu_on_cores_that_are_not_there_is_refused() -> None:
    with pytest.raises(EnvironmentProblem, match="9999"):
        NpuDevice(NpuConfig(emulate=(9999,))).open()
