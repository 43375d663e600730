"""20 GB of a job that leave the device and come back, with checksums.

The job is behind the gate, and does nothing else meanwhile.
"""

from __future__ import annotations

import time
from typing import Any

from cotenant.devices.nvidia.page import ControlPage

from driver import free_bytes, open_device
from processes import Job, open_page
from record import MS, Record, Setting

ASKS = "how fast do 20 GB leave and come back, and are they what they were?"
WANTED_BYTES = 20 * 10**9
PIECE_BYTES = 64 << 20
TIMES = 3
BOUND_NS = 50 * MS
"""Of the gate: copies of pieces are not to wait for each other."""


class OwnEviction:
    """The job moves its memory itself, when it is asked to.

    The one place to change once the shim does this for a job that knows nothing of it: ``evict``
    and ``restore`` are then the page's, and the job only holds and checks.
    """

    WHO = "the job itself"

    def __init__(self, page: ControlPage, job: Job) -> None:
        self._page, self._job = page, job

    def evict(self, seconds: float) -> dict[str, Any]:
        """All that is held; the gate is closed and drained."""
        self._page.beat()
        return self._job.ask("evict", seconds)

    def restore(self, seconds: float) -> dict[str, Any]:
        """All of it."""
        self._page.beat()
        return self._job.ask("restore", seconds)


def run(setting: Setting, record: Record) -> None:
    """As much as there is room and time for."""
    device = open_device()
    room = free_bytes() * 7 // 10
    wanted = min(setting.most_bytes or WANTED_BYTES, WANTED_BYTES, room)
    piece = min(PIECE_BYTES, max(2 << 20, wanted // 4 >> 21 << 21))
    wanted = wanted // piece * piece
    record.figure("who", OwnEviction.WHO)
    record.figure("wanted_bytes", wanted)
    record.figure("piece_bytes", piece)
    record.figure("standin", device.standin)
    page = open_page(setting, "evict", BOUND_NS)
    try:
        with record.part("evict"), Job(setting, page.path) as job:
            job.answer()
            job.tell("hold", size=wanted, piece=piece, seed=setting.seed, seconds=record.left_s / 2)
            held = job.answer(record.left_s)
            record.figure("held", held)
            _cycles(record, page, job, held["bytes"])
    finally:
        page.close()


def _cycles(record: Record, page: ControlPage, job: Job, size: int) -> None:
    eviction = OwnEviction(page, job)
    before = job.ask("sums", record.left_s)["sums"]
    rates: dict[str, list[float]] = {}
    freed: list[float] = []
    same = True
    for turn in range(TIMES):
        if turn:
            record.need(1)
        for way, move in (("out", eviction.evict), ("in", eviction.restore)):
            free = free_bytes()
            begun = time.monotonic()
            took = move(record.left_s)
            all_s = time.monotonic() - begun
            for name, seconds in {**took, "all_s": all_s}.items():
                rates.setdefault(f"{way}.{name}", []).append(seconds)
            rates.setdefault(f"{way}.gb_s", []).append(size / all_s / 1e9)
            copy_s = max(took["copy_s"], 1e-9)
            rates.setdefault(f"{way}.copy_gb_s", []).append(size / copy_s / 1e9)
            if way == "out":
                freed.append((free_bytes() - free) / size)
        same = same and job.ask("sums", record.left_s)["sums"] == before
        record.figure("same", same)
        for name, values in rates.items():
            record.sampled(name, values)
        record.sampled("freed_share", freed)
