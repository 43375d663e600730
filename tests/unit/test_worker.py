"""What a worker measures before it serves, and strings on their way through it."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import Any

import pytest

from cotenant.devices import proctree
from cotenant.runtime.messages import LENGTH
from cotenant.runtime.worker import _packed, _strings, _timed

BURNT_NS = 15_000_000


class Burner:
    """An engine that takes so much CPU time."""

    def __init__(self) -> None:
        self.walls: list[int] = []

    def run(self, _: int, __: Any) -> list[Any]:
        began, until = time.monotonic_ns(), time.thread_time_ns() + BURNT_NS
        while time.thread_time_ns() < until:
            pass
        self.walls.append(time.monotonic_ns() - began)
        return []


@pytest.mark.skipif(not proctree.run_delays(), reason="the kernel does not count run-queue delays")
def test_an_execution_is_timed_without_what_others_have_of_its_core() -> None:
    cores = os.sched_getaffinity(0)
    rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    engine = Burner()
    try:
        for pid in (0, rival.pid):
            os.sched_setaffinity(pid, {min(cores)})
        times = [_timed(engine, 1, {}) for _ in range(9)]  # type: ignore[arg-type]
    finally:
        rival.kill()
        rival.wait()
        os.sched_setaffinity(0, cores)
    assert statistics.median(engine.walls) > 1.5 * BURNT_NS, "the rival took nothing"
    assert statistics.median(times) < 1.2 * BURNT_NS


def test_strings_pass_byte_for_byte() -> None:
    texts = [b"", b"\0", b"a\0b", b"\0\0", "\u732b\U0001f600\ufffd".encode(), b" \r\n"]
    raw = b"".join(LENGTH.pack(len(text)) + text for text in texts)
    assert bytes(_packed(_strings(memoryview(raw), (len(texts), 1)))) == raw


def test_strings_are_never_mended() -> None:
    with pytest.raises(UnicodeDecodeError):
        _strings(memoryview(LENGTH.pack(1) + b"\xff"), (1,))
