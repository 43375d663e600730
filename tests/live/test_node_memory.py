"""Memory of a box that is short: instances that idle and jobs give what others need, and live."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cotenant.devices.cpu import CpuDevice

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.live.conftest import Answer, Box, Boxes

X = np.ones((1, 4), np.float32)
MIB = 2**20
KEEPS = """
import signal, sys, time
def give(most):
    cache.clear()
    print("gave", flush=True)
if sys.argv[1] == "asked":
    import cotenant
    cotenant.on_memory(give)
else:
    signal.signal(signal.SIGUSR1, lambda *_: give(0))
cache = bytearray(b"x") * (300 << 20)
while True:
    time.sleep(0.05)
"""
JOB: dict[str, Any] = {"memory": 600 * MIB, "memory_guaranteed": 100 * MIB}
CPU = {"kind": "cpu", "memory": "800MiB", "kv": 0}


class StandIn:
    """In place of a kernel that pages out: the job lets go of its memory at a signal, as if that
    had been written to swap."""

    name = "stand-in"

    def __init__(self) -> None:
        self.taken: list[int] = []

    def place(self, job: str) -> str:
        return ""

    def take(self, job: str, pids: Iterable[int], size: int) -> None:
        self.taken.append(size)
        os.kill(next(iter(pids)), signal.SIGUSR1)

    def forget(self, job: str) -> None:
        pass


class Evicting(CpuDevice):
    """A CPU that can take memory back from jobs."""

    def __init__(self, way: StandIn) -> None:
        super().__init__(realtime="never", memory=(800 * MIB, 0))
        self.way = way

    def open(self) -> None:
        super().open()
        self._reclaim = self.way


def held(box: Box) -> dict[str, int]:
    """What each holder of the CPU's memory has, by its kind."""
    (cpu,) = box.status()["devices"]
    return {line["kind"]: line["held"] for line in cpu["holders"]}


def eventually(box: Box, model: str) -> Answer:
    """The answer once the model is there."""
    return box.until(lambda: (a := box.infer(model, x=X)).status not in (404, 503) and a)


def test_a_job_is_asked_for_what_a_model_needs_and_lives(boxes: Boxes) -> None:
    box = boxes()
    box.configure([{"name": "scale", "memory": "500MiB"}], devices=[CPU]).start(ready=False)
    job = box.submit(sys.executable, "-c", KEEPS, "asked", **JOB)
    box.until(lambda: held(box).get("job", 0) > 300 * MIB, box.log)
    box.model("scale", "scale")
    assert eventually(box, "scale").status == 200
    box.until(lambda: held(box)["job"] < 300 * MIB)
    assert box.job("job").state == "running"
    log = Path(box.control.log_path(job))
    box.until(lambda: log.exists() and "gave" in log.read_text())
    told = box.ask("GET", "/metrics").body.decode()
    assert f'cotenant_memory_bytes{{device="cpu",holder="{job}",kind="job",what="held"}}' in told


def test_what_a_job_does_not_give_is_taken_and_it_lives(boxes: Boxes) -> None:
    box = boxes()
    box.configure([{"name": "scale", "memory": "500MiB"}])
    way = StandIn()

    async def main() -> None:
        async with box.here(devices=[Evicting(way)]) as node:
            spec = box.job_spec(sys.executable, "-c", KEEPS, "not asked", **JOB)
            node.submit_job(spec)
            await until(lambda: any(line.held > 300 * MIB for line in lines(node)))
            box.model("scale", "scale")
            await until(lambda: node.model_ready("scale"))
            assert way.taken and min(way.taken) > 0
            (status,) = node.jobs()
            assert status.state == "running"

    def lines(node: Any) -> list[Any]:
        return node.core.dispatcher.budgets.lines("cpu")

    async def until(true: Any) -> None:
        end = time.monotonic() + 40
        while not true():
            assert time.monotonic() < end, "waited in vain"
            await asyncio.sleep(0.02)

    asyncio.run(main())


def test_a_job_that_nobody_can_take_from_keeps_what_it_has(boxes: Boxes) -> None:
    box = boxes()
    box.configure([{"name": "scale", "memory": "500MiB"}], devices=[CPU]).start(ready=False)
    box.submit(sys.executable, "-c", KEEPS, "not asked", **JOB)
    box.until(lambda: held(box).get("job", 0) > 300 * MIB, box.log)
    (cpu,) = box.status()["devices"]
    assert any("asked" in limit for limit in cpu["limits"]), "it is said"
    box.model("scale", "scale")
    box.until(lambda: "version refused" in box.log())
    assert box.infer("scale", x=X).status in (404, 503)
    assert box.job("job").state == "running"


def test_models_that_do_not_fit_together_take_turns_in_memory(boxes: Boxes) -> None:
    box = boxes()
    names = [f"scale{i}" for i in range(3)]
    for i, name in enumerate(names):
        box.model("scale", name, factor=2.0 + i)
    services = [{"name": name, "memory": "350MiB", "idle": "unload"} for name in names]
    box.configure(services, devices=[CPU]).start()
    states = {name: box.service(name)["state"] for name in names}
    assert sorted(states.values()) == ["ASLEEP", "READY", "READY"]
    for _ in range(2):
        for i, name in enumerate(names):
            answer = eventually(box, name)
            assert answer.values == [2.0 + i] * 4
            assert sum(held(box).values()) <= 800 * MIB
    assert {box.service(name)["state"] for name in names} == {"ASLEEP", "READY"}


def test_the_same_request_again_is_answered_without_the_model(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "scale", factor=2.0)
    box.configure([{"name": "scale", "cache": "32KiB"}], devices=[CPU]).start()
    answers = [box.infer("scale", x=X * n) for n in (1, 2, 1, 1)]
    assert [a.values[0] for a in answers] == [2.0, 4.0, 2.0, 2.0]
    assert box.service("scale")["answered"] == 2
    told = box.ask("GET", "/metrics").body.decode()
    assert 'cotenant_result_hits_total{service="scale"} 2.0' in told
    assert held(box)["results"] > 0
    box.model("scale", "scale", version=2, factor=3.0)
    box.until(lambda: box.infer("scale", x=X).values == [3.0] * 4)
