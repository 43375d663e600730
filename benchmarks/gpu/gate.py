"""What the open gate costs a launch, and how long a closed one takes to drain."""

from __future__ import annotations

import random
import time
from pathlib import Path

from cotenant.devices.nvidia.page import ControlPage

from loop import Talk
from processes import Died, Job, Look, open_page
from record import MS, US, Record, Setting

BOUNDS_US = (150, 500, 2000)
"""Settings of the page: how much work may be in flight."""
KERNELS_US = (10, 100, 1000, 20_000)
CLOSINGS = 100
"""Of each way of looking, kernel and bound."""
LOOKS = ("seat", "page", "event")
"""How a drain is seen: by one seat, without a pause; as ``ControlPage.wait_drained`` does; by the
seat, while a watcher in the job says by an event when its stream was empty (``by_event``; ``lag``:
how much later it was seen)."""

ROUNDS = 30
BURST = 200
STEP = 100
"""Kernels of 10 us that are a step."""
COST_SHARE = 0.25


def run(setting: Setting, record: Record) -> None:
    """Costs first, then drains until the time is up."""
    with record.part("cost"):
        _cost(setting, record, COST_SHARE * record.left_s)
    for number, bound in enumerate(BOUNDS_US):
        with record.part(f"drain.{bound}"):
            record.need(1)
            _drains(setting, record, bound, record.left_s / (len(BOUNDS_US) - number))


# --- the open gate --------------------------------------------------------------------------------


def _cost(setting: Setting, record: Record, seconds: float) -> None:
    """Launches in processes that live side by side and take turns."""
    end = time.monotonic() + seconds
    pages = {f"gate_{b}": open_page(setting, f"cost-{b}", b * US) for b in (BOUNDS_US[0], 2000)}
    jobs = {"bare": Job(setting), "shim": Job(setting, shim=True)}
    jobs |= {arm: Job(setting, page.path) for arm, page in pages.items()}
    try:
        for job in jobs.values():
            job.answer()
            job.ask("burst", us=0, count=BURST)
            job.ask("burst", us=10, count=STEP)
        launches: dict[str, list[float]] = {arm: [] for arm in jobs}
        steps: dict[str, list[float]] = {arm: [] for arm in jobs}
        for turn in range(ROUNDS):
            if turn >= 3 and time.monotonic() > end:
                break
            for arm in random.Random(turn).sample(list(jobs), len(jobs)):
                burst = jobs[arm].ask("burst", us=0, count=BURST)
                launches[arm].append(burst["launching_ns"] / BURST)
                steps[arm].append(jobs[arm].ask("burst", us=10, count=STEP)["total_ns"] / US)
        for arm in jobs:
            record.sampled(f"cost.launch_ns.{arm}", launches[arm])
            record.sampled(f"cost.step_us.{arm}", steps[arm])
            pairs = zip(steps[arm], steps["bare"], strict=True)
            record.sampled(f"cost.step_ratio.{arm}", [own / bare for own, bare in pairs])
    finally:
        for job in jobs.values():
            job.close()
        for page in pages.values():
            page.close()


# --- the drain ------------------------------------------------------------------------------------


def _drains(setting: Setting, record: Record, bound: int, seconds: float) -> None:
    """Closings of a gate with this bound, for all kernels."""
    end = time.monotonic() + seconds
    page = open_page(setting, f"drain-{bound}", bound * US)
    try:
        with Job(setting, page.path) as job:
            job.answer()
            for number, us in enumerate(KERNELS_US):
                share = (end - time.monotonic()) / (len(KERNELS_US) - number)
                name = f"drain.{bound}.{us}"
                with record.part(name):
                    _closings(setting, record, Closing(page, job, us, share), name)
    finally:
        page.close()


class Closing:
    """Closings of the gate of a job that launches kernels of one length without end."""

    def __init__(self, page: ControlPage, job: Job, us: int, seconds: float) -> None:
        self.page, self.job, self.us = page, job, us
        self.end = time.monotonic() + seconds

    def begin(self, talk: Talk) -> Look:
        """Start the launches, and let the gate learn how long they take."""
        self.job.ask("drive", us=self.us, talk=str(talk.path))
        least, patience = talk["launched"] + 6, time.monotonic() + 5
        while talk["launched"] < least:
            if time.monotonic() > patience:
                raise Died("the job launches nothing")
            time.sleep(0.002)
            self.page.beat()
        return Look(self.page, self.job.pid)

    def pause(self, chance: random.Random) -> None:
        """The gate is open for a while that has nothing to do with the kernels."""
        time.sleep((2_000 + chance.uniform(0, max(1_000, self.us))) / 1e6)

    def take(self, look: Look, talk: Talk, way: str) -> tuple[float, float | None]:
        """Close, wait, open: us until it was seen, and until an event said so."""
        by_event = None
        if way == "event":
            talk["watching"] = 1
            time.sleep(0.0002)
        begun = time.monotonic_ns()
        self.page.close_gate()
        if way == "page":
            if not self.page.wait_drained(2_000 * MS):
                raise Died("not drained within 2 s")
            seen = time.monotonic_ns() - begun
        else:
            if way == "event":
                talk["asked"] += 1
            look.wait(2)
            seen = time.monotonic_ns() - begun
        if way == "event":
            asked, patience = talk["asked"], time.monotonic() + 2
            while talk["answered"] != asked and time.monotonic() < patience:
                pass
            by_event = (talk["over_ns"] - begun) / US if talk["answered"] == asked else None
            talk["watching"] = 0
        self.page.open_gate()
        return seen / US, by_event


def _closings(setting: Setting, record: Record, closing: Closing, name: str) -> None:
    chance = random.Random(setting.seed)
    talk = Talk(Path(setting.folder, name), make=True)
    found: dict[str, list[float]] = {way: [] for way in (*LOOKS, "by_event", "lag")}
    look = closing.begin(talk)
    try:
        for turn in range(CLOSINGS * len(LOOKS)):
            if turn >= 2 * len(LOOKS) and time.monotonic() > closing.end:
                break
            way = LOOKS[turn % len(LOOKS)]
            closing.pause(chance)
            seen, by_event = closing.take(look, talk, way)
            found[way].append(seen)
            if by_event is not None:
                found["by_event"].append(by_event)
                found["lag"].append(seen - by_event)
        seat = next(seat for seat in closing.page.seats() if seat.pid == closing.job.pid)
        record.figure(f"{name}.flags", seat.flags)
        record.figure(f"{name}.overruns", seat.overruns)
    finally:
        look.close()
        closing.page.open_gate()
        launched = closing.job.ask("halt", 30)["launched"]
        record.figure(f"{name}.launched", launched)
    for way, values in found.items():
        record.sampled(f"{name}.{way}", values)
