"""What it costs to put memory behind addresses and to take it away, and how fast copies are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from driver import Pinned, cu, free_bytes, open_device
from evicting import Mapped
from kernels import Kernels, copy_rate
from record import US, Record, Setting

SIZES_MB = (2, 64, 512)
TIMES = 20
COPIED_MB = (2, 64, 512)


def run(setting: Setting, record: Record) -> None:
    """Each size in turn, round after round; copies after that."""
    device = open_device()
    stream = cu("cuStreamCreate", 1)
    Kernels(device)  # nothing is measured on a context that was never used
    most = min(setting.most_bytes or free_bytes(), free_bytes()) * 3 // 4
    for size in SIZES_MB:
        with record.part(f"map.{size}_mb"):
            fits(size, most)
            _map(record, size, lambda: record.need(0.3 * record.left_s))
    for size in COPIED_MB:
        with record.part(f"copy.{size}_mb"):
            fits(size, most)
            record.need(0.5)
            _copy(record, size, stream)


def fits(size: int, most: int) -> None:
    """Raises MemoryError if there is no room for so many MB."""
    if size << 20 > most:
        raise MemoryError(f"{size} MB are more than what may be used ({most >> 20} MB)")


def _map(record: Record, size: int, in_time: Callable[[], None]) -> None:
    memory = Mapped(size << 20)
    steps: dict[str, list[float]] = {}
    try:
        for turn in range(TIMES + 1):
            in_time()
            took = {**memory.fetch(), **memory.leave()}
            for step, ns in took.items():
                if turn:  # the first is to warm up
                    steps.setdefault(step, []).append(ns / US)
    finally:
        memory.close()
    for step, values in steps.items():
        record.sampled(f"map.{size}_mb.{step}_us", values)


def _copy(record: Record, size: int, stream: Any) -> None:
    pinned, at = Pinned(size << 20), cu("cuMemAlloc", size << 20)
    try:
        times = 20 if size < 512 else 8
        for way, values in copy_rate(int(at), pinned, stream, times).items():
            record.sampled(f"copy.{size}_mb.{way}_gb_s", values)
    finally:
        cu("cuMemFree", at)
        pinned.close()
