"""20 GB of a job that leave the device and come back, with checksums.

Twice, where the shim can do it: the job moves its memory itself (what the driver allows at best),
and the node orders it through the page of a job that knows nothing of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cotenant.devices.nvidia.page import ControlPage

from driver import free_bytes, open_device
from processes import Died, Job, open_page
from record import MS, Record, S, Setting

WANTED_BYTES = 20 * 10**9
PIECE_BYTES = 64 << 20
TIMES = 3
BOUND_NS = 50 * MS
"""Of the gate: copies of pieces are not to wait for each other."""

Mover = Callable[[float], dict[str, Any]]
"""Moves all within so many seconds; answers with what it knows of the time that took."""


def run(setting: Setting, record: Record) -> None:
    """As much as there is room and time for."""
    device = open_device()
    room = free_bytes() * 7 // 10
    wanted = min(setting.most_bytes or WANTED_BYTES, WANTED_BYTES, room)
    piece = min(PIECE_BYTES, max(2 << 20, wanted // 4 >> 21 << 21))
    wanted = wanted // piece * piece
    record.figure("wanted_bytes", wanted)
    record.figure("piece_bytes", piece)
    record.figure("standin", device.standin)
    with record.part("own"):
        _own(setting, record, (wanted, piece))
    with record.part("shim"):
        if not hasattr(ControlPage, "evict"):
            raise NotImplementedError("not in this version: the shim does not move memory")
        _by_page(setting, record, (wanted, piece))


def _own(setting: Setting, record: Record, sizes: tuple[int, int]) -> None:
    """The job is asked to move what it holds."""
    page = open_page(setting, "own", BOUND_NS)
    try:
        with Job(setting, page.path) as job:
            job.answer()
            held = _hold(record, job, "hold", "own", sizes, setting.seed, record.left_s / 3)

            def out(seconds: float) -> dict[str, Any]:
                page.beat()
                return job.ask("evict", seconds)

            def back(seconds: float) -> dict[str, Any]:
                page.beat()
                return job.ask("restore", seconds)

            _cycles(record, job, "own", held, (out, back), record.left_s / 2)
    finally:
        page.close()


def _by_page(setting: Setting, record: Record, sizes: tuple[int, int]) -> None:
    """The job holds memory as any job does; node and shim move it."""
    path = Path(setting.folder, "evict-shim")
    more: dict[str, Any] = {"pool_bytes": 2 * sizes[0]}
    page: Any = ControlPage(path, bound_ns=BOUND_NS, **more)
    page.open()
    try:
        with Job(setting, page.path) as job:
            job.answer()
            held = _hold(record, job, "hold_plain", "shim", sizes, setting.seed, record.left_s / 3)

            def out(seconds: float) -> dict[str, Any]:
                begun = time.monotonic_ns()
                page.close_gate()
                if not page.wait_drained(round(seconds * S)):
                    raise Died("the gate did not drain")
                drained = time.monotonic_ns()
                found = page.wait_evicted(page.evict(held), round(seconds * S))
                return {"drain_s": (drained - begun) / S, **_answer(found)}

            def back(seconds: float) -> dict[str, Any]:
                found = page.wait_restored(page.restore(), round(seconds * S))
                page.open_gate()
                return _answer(found)

            _cycles(record, job, "shim", held, (out, back), record.left_s)
    finally:
        page.close()


def _answer(found: Any) -> dict[str, Any]:
    if found is None:
        raise Died("the shim did not answer")
    if found.errors:
        raise Died(f"the driver refused: errors {found.errors}")
    return {"moved_bytes": found.moved, "move_s": found.took_ns / S}


def _hold(
    record: Record, job: Job, what: str, name: str, sizes: tuple[int, int], *rest: float
) -> int:
    seed, seconds = rest
    size, piece = sizes
    job.tell(what, size=size, piece=piece, seed=seed, seconds=seconds)
    held = job.answer(2 * seconds + 5)
    record.figure(f"{name}.held", held)
    found: int = held["bytes"]
    return found


def _cycles(
    record: Record, job: Job, name: str, held: int, movers: tuple[Mover, Mover], *rest: float
) -> None:
    """Out and in, and the same sums after each."""
    end = time.monotonic() + rest[0]
    before = job.ask("sums", record.left_s)["sums"]
    found: dict[str, list[float]] = {}
    same = True
    for turn in range(TIMES):
        if turn and time.monotonic() > end:
            break
        for way, move in zip(("out", "in"), movers, strict=True):
            free, begun = free_bytes(), time.monotonic()
            took = move(max(1.0, record.left_s))
            all_s = time.monotonic() - begun
            # On the stand-in the memory of another process is not seen.
            took |= {"all_s": all_s, "gb_s": held / all_s / 1e9}
            took["freed_share"] = (free_bytes() - free) / held
            for what, value in took.items():
                found.setdefault(f"{way}.{what}", []).append(value)
        same = same and job.ask("sums", record.left_s)["sums"] == before
        record.figure(f"{name}.same", same)
        for what, values in found.items():
            record.sampled(f"{name}.{what}", values)
