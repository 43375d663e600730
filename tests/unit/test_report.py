"""``cotenant.report``: harmless anywhere, newest state, bounded rate; and the rate made of it."""

from __future__ import annotations

import importlib
import json
import math
import os
import select
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cotenant.runtime.jobreports import Progress, Report
from tests.installed import SITE

module = importlib.import_module("cotenant.report")


@pytest.fixture
def inbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "s"))
        monkeypatch.setenv("COTENANT_REPORT_SOCKET", str(tmp_path / "s"))
        monkeypatch.setenv("COTENANT_JOB_ID", "j1")
        monkeypatch.setenv("COTENANT_JOB_RUN", "r1")
        monkeypatch.setattr(module, "_reporter", module._Reporter())
        yield sock


def received(sock: socket.socket) -> list[dict[str, object]]:
    messages = []
    while select.select([sock], [], [], 0)[0]:
        messages.append(json.loads(sock.recv(65536)))
    return messages


def test_outside_cotenant_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COTENANT_REPORT_SOCKET", raising=False)
    assert module.report(1, loss=0.5) is False


def test_a_report_is_one_small_message(inbox: socket.socket) -> None:
    assert module.report(3, unit="epochs", loss=0.5, accuracy=math.nan) is True
    assert received(inbox) == [
        {
            "job": "j1",
            "run": "r1",
            "step": 3.0,
            "unit": "epochs",
            "metrics": {"loss": 0.5, "accuracy": None},
        }
    ]


def test_a_checkpoint_is_told_at_once_and_again_with_each_message(
    inbox: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for step in range(20):
        module.report(step)
    received(inbox)
    assert module.report(20, checkpoint=Path("c/20.npz")) is True
    (message,) = received(inbox)
    assert message["checkpoint"]["path"] == str(tmp_path / "c/20.npz")
    assert message["checkpoint"]["step"] == 20
    assert module.report(21, checkpoint="s3://bucket/21") is True
    module._reporter._sent = -math.inf
    assert module.report(22) is True
    told = [m["checkpoint"] for m in received(inbox)]
    assert [(c["path"], c["step"]) for c in told] == [("s3://bucket/21", 21)] * 2


@pytest.mark.parametrize("path", ["", "a\nb", "x" * 2000])
def test_what_can_be_no_path_is_refused(inbox: socket.socket, path: str) -> None:
    with pytest.raises(ValueError, match="checkpoint"):
        module.report(1, checkpoint=path)
    with pytest.raises(TypeError):
        module.report(1, checkpoint=b"bytes")
    assert received(inbox) == []


def test_any_path_that_is_taken_fits_into_a_message(inbox: socket.socket) -> None:
    longest = "/" + "\N{SNOWMAN}" * ((module.MAX_CHECKPOINT_BYTES - 1) // 3)
    metrics = {f"{i:064d}": 1.0 for i in range(module.MAX_METRICS)}
    assert module.report(1, unit="u" * 64, checkpoint=longest, **metrics) is True
    (message,) = received(inbox)
    assert message["checkpoint"]["path"] == longest


def test_many_reports_are_few_messages_and_the_newest_is_kept(
    inbox: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    inbox.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    messages = []
    for step in range(1000):
        now[0] = step / 1000
        assert module.report(step, loss=1 / (step + 1)) is True
        messages += received(inbox)
    assert 15 <= len(messages) <= 21
    module._reporter.flush()
    assert received(inbox)[-1]["step"] == 999


def test_a_dead_or_full_socket_neither_raises_nor_blocks(
    inbox: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    answers = []
    for step in range(1000):  # nobody reads
        now[0] += 1
        answers.append(module.report(step))
    assert answers[0] is True
    assert answers[-1] is False
    received(inbox)
    now[0] += 1
    assert module.report() is True
    assert received(inbox)[-1]["step"] == 999
    monkeypatch.setenv("COTENANT_REPORT_SOCKET", "/nonexistent/socket")
    now[0] += 1
    assert module.report(5) is False
    monkeypatch.setenv("COTENANT_REPORT_SOCKET", "/" + "x" * 200)
    now[0] += 1
    assert module.report(6) is False


def test_what_is_no_number_is_a_mistake_of_the_caller(inbox: socket.socket) -> None:
    with pytest.raises((TypeError, ValueError)):
        module.report(1, loss="low")
    assert module.report(2, loss=1) is True  # and the lock is free again


def test_metrics_and_names_are_bounded(inbox: socket.socket) -> None:
    assert module.report(1, **{"m" * 100 + str(n): n for n in range(100)}) is True
    (message,) = received(inbox)
    assert isinstance(message["metrics"], dict)
    assert len(message["metrics"]) <= 64
    assert all(len(name) <= 64 for name in message["metrics"])


def test_a_forked_child_reports_for_itself(inbox: socket.socket) -> None:
    assert module._reporter._lock.acquire()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if module.report(7) else 1)
    module._reporter._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert received(inbox)[0]["step"] == 7


def test_the_last_report_goes_out_at_the_end_of_the_program(inbox: socket.socket) -> None:
    code = "from cotenant.report import report\nfor n in range(50): report(n)"
    env = {**os.environ, "PYTHONPATH": SITE}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    assert received(inbox)[-1]["step"] == 49


def test_it_needs_the_standard_library_only() -> None:
    code = "import sys; sys.path.append(sys.argv[1]); from cotenant.report import report; report(1)"
    subprocess.run([sys.executable, "-I", "-S", "-c", code, SITE], check=True)


def progress_after(*reports: tuple[float, float]) -> Progress:
    progress = Progress()
    for now, step in reports:
        progress.note(now, Report(job="j", run="r", step=step))
    return progress


def test_the_rate_is_that_of_the_last_minute() -> None:
    progress = progress_after(*[(float(t), 10.0 * t) for t in range(100)])
    assert progress.rate(99.0) == pytest.approx(10.0)
    assert progress.rate(1000.0) == 0.0
    assert progress.value == 990.0


def test_going_back_to_a_checkpoint_starts_the_rate_anew() -> None:
    progress = progress_after((0, 100), (10, 200), (20, 50), (30, 80))
    assert progress.rate(30.0) == pytest.approx(3.0)


def test_many_reports_take_bounded_memory_and_still_cover_the_window() -> None:
    progress = progress_after(*[(n / 1000, float(n)) for n in range(100_000)])
    assert progress.rate(100.0) == pytest.approx(1000.0, rel=0.05)
    assert len(progress._samples) <= 256


def test_cpu_time_counts_until_the_job_reports_itself() -> None:
    progress = Progress()
    progress.note_cpu(0.0, 0.0)
    progress.note_cpu(10.0, 5.0)
    assert (progress.unit, progress.value, progress.rate(10.0)) == ("cpu-s", 5.0, 0.5)
    progress.note(11.0, Report(job="j", run="r", step=3.0, metrics={"loss": None}))
    progress.note_cpu(12.0, 6.0)
    assert (progress.unit, progress.value, progress.rate(12.0)) == ("steps", 3.0, 0.0)
    assert math.isnan(progress.metrics["loss"])
