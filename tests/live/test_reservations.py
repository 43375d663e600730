"""Space that an outside scheduler reserves on a node, and processes that it starts there."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cotenant.devices import proctree
from cotenant.domain.errors import CotenantError, InvalidRequest, NotFound
from cotenant.domain.reservation import Reservation, ReservationStatus
from tests.live.conftest import Box, Boxes

CORES = tuple(sorted(os.sched_getaffinity(0)))[:2]
TWO_CORES = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")

SPINS = ("sh", "-c", "while :; do :; done")
Starts = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def starts() -> Iterator[Starts]:
    """Start a process that is nobody's child here in the end; it is ended with the test."""
    made: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command or SPINS, start_new_session=True)
        made.append(process)
        return process

    yield start
    for process in made:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def box(boxes: Boxes) -> Iterator[Box]:
    """A node on two cores with a service; what is reserved is released in the end."""
    made = boxes()
    made.model("count", "count")
    made.configure(
        [{"name": "count", "objective": {"latency": "30s"}}],
        devices=[{"kind": "cpu", "cores": list(CORES)}],
    ).start()
    yield made
    release_all(made)


def release_all(box: Box) -> None:
    with contextlib.suppress(CotenantError):
        for status in box.control.reservations():
            box.control.release(status.reservation.id)
        box.until(lambda: not keepers(box), lambda: keepers(box))


def keepers(box: Box) -> list[int]:
    """What stands for processes that have not come."""
    return [job.pid for job in box.control.jobs() if job.pid]


def status(box: Box, id: str = "r") -> ReservationStatus | None:
    return next((s for s in box.control.reservations() if s.reservation.id == id), None)


def ready(box: Box, id: str = "r") -> bool:
    found = status(box, id)
    return found is not None and found.state == "ready"


def cores(process: subprocess.Popen[bytes]) -> set[int]:
    return os.sched_getaffinity(process.pid)


@TWO_CORES
def test_a_reserved_core_is_its_adopted_processes_alone(box: Box, starts: Starts) -> None:
    wanted = Reservation("r", "cpu", units=1, limit=0.5, name="team/pod")
    answer = box.control.reserve(wanted)
    assert answer.holds and answer.made
    assert box.control.reserve(wanted).made, "the same again"
    box.until(lambda: ready(box), lambda: status(box))
    process = starts(
        "sh", "-c", "while :; do sh -c 'i=0; while [ $i -lt 9999 ]; do i=$((i+1)); done'; done"
    )
    box.control.adopt("r", process.pid)
    found = status(box)
    assert found is not None and [p.pid for p in found.adopted] == [process.pid]
    (own,) = found.partitions
    (core,) = next(p["units"] for p in box.status()["partitions"] if p["id"] == own)
    box.until(lambda: cores(process) == {core}, lambda: cores(process))
    assert box.infer("count", n=np.array([1000])).status == 200
    box.control.release("r")
    box.until(lambda: status(box) is None)
    box.until(lambda: cores(process) == set(CORES), lambda: cores(process))
    assert process.poll() is None, "who was adopted is not ended with the reservation"


@TWO_CORES
def test_an_adopted_process_takes_turns_like_a_job(box: Box, starts: Starts) -> None:
    assert box.control.reserve(Reservation("r", "cpu", share=0.4)).made
    box.until(lambda: ready(box))
    process = starts()
    box.control.adopt("r", process.pid)
    job = box.job("r")
    assert not job.command
    box.until(lambda: box.job("r").cpu_s > job.cpu_s, lambda: box.job("r"))


@TWO_CORES
def test_what_was_promised_outlives_the_node(box: Box, starts: Starts) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        wanted = Reservation(f"r{number}", "cpu", share=0.25, memory=1 << 20)
        assert box.control.reserve(wanted).made
        box.until(lambda id=wanted.id: ready(box, id))
        process = starts()
        box.control.adopt(wanted.id, process.pid)
        before = status(box, wanted.id)
        box.stop(number)
        box.until(lambda p=process: not proctree.is_stopped(p.pid))
        box.start()
        box.until(lambda id=wanted.id: ready(box, id), lambda id=wanted.id: status(box, id))
        assert status(box, wanted.id) == before
        assert box.control.reserve(wanted).made


@TWO_CORES
def test_a_keeper_that_is_killed_comes_again_and_nobody_gets_its_room(box: Box) -> None:
    assert box.control.reserve(Reservation("r", "cpu", share=0.6)).made
    box.until(lambda: ready(box))
    for pid in keepers(box):
        os.kill(pid, signal.SIGKILL)
    for _ in range(20):
        assert not box.control.reserve(Reservation("other", "cpu", share=0.6)).holds
    box.until(lambda: not ready(box) or bool(keepers(box)))
    box.until(lambda: ready(box), lambda: status(box))


@TWO_CORES
def test_what_there_is_no_room_for_is_refused_and_leaves_nothing(box: Box) -> None:
    dry = box.control.reserve(Reservation("r", "cpu", units=1), dry_run=True)
    assert dry.holds and not dry.made and not box.control.reservations()
    assert box.control.reserve(Reservation("a", "cpu", share=0.7)).made
    for wanted in (
        Reservation("b", "cpu", share=0.5),
        Reservation("b", "cpu", units=2),
        Reservation("b", "cpu", share=0.1, within=1),
        Reservation("b", "cpu", share=0.1, memory=2**60),
    ):
        answer = box.control.reserve(wanted)
        assert not answer.holds and answer.reason and not answer.made
    assert [s.reservation.id for s in box.control.reservations()] == ["a"]
    box.control.release("a")
    box.control.release("a")
    box.until(lambda: box.control.reserve(Reservation("b", "cpu", share=0.5)).made)


@TWO_CORES
def test_what_can_never_be_reserved_is_an_error(box: Box) -> None:
    for wrong in (
        Reservation("", "cpu", share=0.1),
        Reservation("x" * 300, "cpu", share=0.1),
        Reservation("r\n", "cpu", share=0.5),
        Reservation("r", "gpu7", share=0.1),
        Reservation("r", "cpu"),
        Reservation("r", "cpu", share=0.5, units=1),
        Reservation("r", "cpu", share=-0.5),
        Reservation("r", "cpu", share=1.5),
        Reservation("r", "cpu", share=float("nan")),
        Reservation("r", "cpu", units=99),
        Reservation("r", "cpu", units=-1),
        Reservation("r", "cpu", share=0.5, limit=0.4),
        Reservation("r", "cpu", share=0.5, limit=2.0),
        Reservation("r", "cpu", share=0.5, memory=-1),
        Reservation("r", "cpu", share=0.5, within=-1),
    ):
        with pytest.raises(InvalidRequest):
            box.control.reserve(wrong)
    assert not box.control.reservations()


@TWO_CORES
def test_who_is_not_to_be_adopted_is_not(box: Box, starts: Starts) -> None:
    assert box.control.reserve(Reservation("r", "cpu", share=0.2)).made
    assert box.control.reserve(Reservation("other", "cpu", share=0.2)).made
    box.until(lambda: ready(box) and ready(box, "other"))
    assert box.process is not None
    ended = starts("true")
    ended.wait()
    for pid in (box.process.pid, os.getpid(), 1, ended.pid, *box.workers(), *keepers(box)):
        with pytest.raises(InvalidRequest):
            box.control.adopt("r", pid)
    process = starts()
    with pytest.raises(NotFound):
        box.control.adopt("nothing", process.pid)
    box.control.adopt("other", process.pid)
    with pytest.raises(InvalidRequest):
        box.control.adopt("r", process.pid)
    with pytest.raises(InvalidRequest):
        box.control.reserve(Reservation("r", "cpu", share=0.3))
    with pytest.raises(InvalidRequest):
        box.control.hold("r")


REPORTER = """
import os, sys
from cotenant.report import report
for word in sys.stdin:
    said = report(int(word), checkpoint=f"/c/{int(word)}.npz")
    print(said, flush=True)
"""


@TWO_CORES
def test_a_process_from_elsewhere_reports_on_a_socket_of_its_reservation(box: Box) -> None:
    for id in ("r", "s"):
        assert box.control.reserve(Reservation(id, "cpu", share=0.2, name=f"team/{id}")).made
        box.until(lambda id=id: ready(box, id), lambda id=id: status(box, id))
    mine, other = status(box), status(box, "s")
    assert mine is not None and other is not None
    assert mine.reports != other.reports
    socket = f"{mine.reports}/sock"
    # Whatever it says it is: it is who has this socket.
    said_to_be = {"COTENANT_REPORT_SOCKET": socket, "COTENANT_JOB_ID": other.job}
    with subprocess.Popen(
        [sys.executable, "-c", REPORTER],
        env={**os.environ, **said_to_be},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as pod:
        assert pod.stdin is not None and pod.stdout is not None

        def reports(step: int) -> None:
            pod.stdin.write(f"{step}\n")
            pod.stdin.flush()
            assert pod.stdout.readline() == "True\n"
            box.until(lambda: box.job(mine.job).checkpoint_step == step)

        reports(7)
        assert box.job(mine.job).checkpoint == "/c/7.npz"
        assert box.job(other.job).checkpoint == ""
        inode = Path(mine.reports).stat().st_ino  # what a pod has mounted
        box.stop(signal.SIGKILL)
        box.start()
        box.until(lambda: ready(box), lambda: status(box))
        assert box.job(mine.job).checkpoint_step == 7
        assert Path(mine.reports).stat().st_ino == inode
        reports(8)
        pod.stdin.close()
    release_all(box)
    box.until(lambda: not Path(mine.reports).exists())
