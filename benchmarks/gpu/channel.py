"""Controls of a process's own channels: does a kernel that runs stand still, and what does a
neighbour have of that? Last, because nobody knows what a driver makes of it.

``left``: nothing is controlled; what a neighbour is delayed by a long kernel. ``disabled`` and
``preempted``: the two ways of holding, with a shorter time slice.
"""

from __future__ import annotations

import time

from cotenant.devices.nvidia.page import DISABLED, LEFT, PREEMPTED, ControlPage
from cotenant.devices.nvidia.trial import STEPS

from processes import Died, Job, open_page
from record import MS, US, Record, S, Setting

WAYS = {"left": LEFT, "disabled": DISABLED, "preempted": PREEMPTED}
HOLDS = 8
"""Of one kernel of a second."""
BURST = 100
"""Kernels of 10 us that the neighbour launches."""


def run(setting: Setting, record: Record) -> None:
    """The neighbour alone, then beside the long kernel."""
    with record.part("neighbour"), Job(setting) as neighbour:
        neighbour.answer()
        record.sampled("alone_us", [_burst(neighbour) for _ in range(20)])
        for name, way in WAYS.items():
            with record.part(name):
                record.need(2.5)
                page = open_page(setting, name, 2 * MS, way)
                try:
                    with Job(setting, page.path) as job:
                        job.answer()
                        _one(record, name, Held(page, job, neighbour))
                finally:
                    page.close()


def _burst(neighbour: Job) -> float:
    return float(neighbour.ask("burst", us=10, count=BURST)["total_ns"]) / US


class Held:
    """A long kernel, which is held and let go."""

    def __init__(self, page: ControlPage, job: Job, neighbour: Job) -> None:
        self.page, self.job, self.neighbour = page, job, neighbour

    def steps(self) -> int:
        """How far it is."""
        return int(self.job.ask("kernel", step="steps")["said"])

    def hold(self) -> float:
        """Us until it was off the device, as the driver says."""
        begun = time.monotonic_ns()
        self.page.close_gate()
        self.page.hold()
        if not self.page.wait_held(1 * S):
            errors = sorted({seat.channels.error for seat in self.page.seats()})
            raise Died(f"not held; errors: {', '.join(map(hex, errors))}")
        return (time.monotonic_ns() - begun) / US

    def release(self, at: int) -> float:
        """Us until it was seen to go on."""
        begun = time.monotonic_ns()
        self.page.open_gate()
        while self.steps() <= at:
            if time.monotonic_ns() - begun > 2 * S:
                raise Died("it does not go on")
        return (time.monotonic_ns() - begun) / US


def _one(record: Record, name: str, held: Held) -> None:
    found: dict[str, list[float]] = {
        key: [] for key in ("beside_us", "held_us", "beside_held_us", "moved", "resumed_us")
    }
    held.job.ask("kernel", step="start")
    try:
        for _ in range(HOLDS):
            found["beside_us"].append(_burst(held.neighbour))
            if not held.page.channels:
                continue
            found["held_us"].append(held.hold())
            before = held.steps()
            found["beside_held_us"].append(_burst(held.neighbour))
            time.sleep(0.02)
            after = held.steps()
            found["moved"].append(after - before)
            found["resumed_us"].append(held.release(after))
        held.job.ask("kernel", step="end")
        record.figure(f"{name}.whole", held.steps() == STEPS)
    finally:
        (seat,) = (seat for seat in held.page.seats() if seat.pid == held.job.pid)
        record.figure(f"{name}.groups", seat.channels.groups)
        record.figure(f"{name}.slice_error", hex(seat.channels.slice_error))
        for key, values in found.items():
            if values:
                record.sampled(f"{name}.{key}", values)
