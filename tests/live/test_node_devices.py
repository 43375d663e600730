"""A box of several devices, of which one may block, fail or hang."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from cotenant.devices.cpu import CpuDevice
from cotenant.devices.null import NullDevice
from cotenant.domain.errors import DeviceError
from cotenant.domain.workload import RestartPolicy
from cotenant.sim.replay import replay
from cotenant.telemetry.records import read
from tests.fakes import SlowDevice

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.live.conftest import Box, Boxes

CPU = {"kind": "cpu"}
STAND_IN = {"kind": "null", "id": "other", "units": 3, "memory": "8GiB", "preempt": "pause"}
WAITS = ("sh", "-c", "while :; do sleep 0.05; done")
PATIENCE_S = 40.0


def device(box: Box, name: str) -> dict[str, Any]:
    return next(dict(d) for d in box.status()["devices"] if d["id"] == name)


def on(box: Box, name: str) -> set[str]:
    """Ids of the partitions of a device."""
    return {p["id"] for p in box.status()["partitions"] if p["device"] == name}


async def until(true: Callable[[], object], say: Callable[[], object] = lambda: "") -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, f"waited in vain: {say()}"
        await asyncio.sleep(0.01)


def test_a_device_that_may_block_serves_and_trains_beside_the_cpu(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "scale")
    services = [{"name": "scale", "kinds": "null"}]
    box.configure(services, devices=[{**STAND_IN, "blocking": True}, CPU]).start()
    job = box.submit(*WAITS, kinds=("null",))
    for _ in range(20):
        answer = box.infer("scale", x=np.ones((1, 4), np.float32))
        assert answer.json["outputs"][0]["data"] == [2.0] * 4
    box.until(lambda: box.job("job").partitions)
    assert set(box.job("job").partitions) <= on(box, "other")
    box.until(lambda: set(device(box, "other")["tenants"]) == {"scale#1", job})
    assert device(box, "cpu")["tenants"] == {}
    assert all(t["level"] == "PAUSE" for t in device(box, "other")["tenants"].values())
    assert any("stand-in" in limit for limit in device(box, "other")["limits"])
    metrics = box.ask("GET", "/metrics").body.decode()
    assert 'device="other",partition="other:' in metrics
    box.control.cancel(job)
    box.until(lambda: set(device(box, "other")["tenants"]) == {"scale#1"})
    assert box.infer("scale", x=np.ones((1, 4), np.float32)).status == 200


def test_what_a_model_and_a_job_occupy_on_their_device_is_measured(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "scale")
    box.configure([{"name": "scale", "kinds": "cpu"}], devices=[CPU, STAND_IN]).start()
    job = box.submit(*WAITS, kinds=("cpu",))
    box.until(lambda: box.job("job").partitions)
    assert box.infer("scale", x=np.ones((1, 4), np.float32)).status == 200
    assert set(box.job("job").partitions) <= on(box, "cpu")
    box.until(lambda: all(t["memory"] for t in device(box, "cpu")["tenants"].values()))
    assert set(device(box, "cpu")["tenants"]) == {"scale#1", job}


def test_requests_are_answered_and_a_job_runs_on_a_device_that_is_slow(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "scale")
    box.configure([{"name": "scale", "kinds": "null"}], devices=[CPU, STAND_IN])
    slow = SlowDevice(2, seed=3, slowest_s=0.02)
    plain = CpuDevice(realtime="never")

    async def main() -> None:
        async with box.here(devices=[slow, plain]) as node:
            job = node.submit_job(box.job_spec(*WAITS, kinds=("null",)))
            await until(lambda: slow.held.get(job), node.status)
            for _ in range(10):
                ask = asyncio.to_thread(box.infer, "scale", x=np.ones((1, 4), np.float32))
                assert (await ask).status == 200
            slow.fail("bind", OSError("a hiccup of the driver"))
            ask = asyncio.to_thread(box.infer, "scale", x=np.ones((1, 4), np.float32))
            assert (await ask).status == 200, "what could not be dispatched is tried again"
            node.cancel_job(job)
            await until(lambda: job not in slow.held)
        assert {kind for kind, _, _ in slow.log} >= {
            "launch", "attach", "repartition", "grant", "revoke", "bind", "detach"
        }  # fmt: skip

    asyncio.run(main())


def test_who_its_device_would_not_take_is_ended_and_the_reason_shown(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "scale")
    box.configure([{"name": "scale"}])
    slow = SlowDevice(2)

    async def main() -> None:
        slow.fail("attach", DeviceError("it is full"))
        async with box.here(devices=[slow]) as node:
            # It is tried again, and this time it is taken.
            await until(lambda: node.model_ready("scale"), node.status)
            slow.fail("attach", OSError("the driver is gone"))
            job = node.submit_job(box.job_spec(*WAITS))

            def ended() -> bool:
                return next(j for j in node.jobs() if j.id == job).state == "cancelled"

            await until(ended, node.jobs)
            assert "the driver is gone" in next(j for j in node.jobs() if j.id == job).reason
            await until(lambda: "job" not in slow.held)

    asyncio.run(main())


def test_a_device_that_hangs_holds_up_neither_other_devices_nor_the_end(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "scale")
    box.configure([{"name": "scale"}])
    slow = SlowDevice(2)
    let_go = slow.hang("facts")

    async def main() -> None:
        async with box.here(devices=[CpuDevice(realtime="never"), slow]) as node:
            await until(lambda: node.fleet.memory("cpu"))
            slow.hang("repartition")
            ask = asyncio.to_thread(box.infer, "scale", x=np.ones((1, 4), np.float32))
            assert (await ask).status == 200

    asyncio.run(main())
    let_go()


MODELS = {"cores": "cpu", "stand-ins": "null", "anywhere": None}


def test_a_box_of_a_cpu_and_two_unequal_devices_loses_nothing_whatever_one_does(
    boxes: Boxes,
) -> None:
    """One device blocks, is slow and fails at random. Every request is answered, jobs are lent
    space on all, and the journal replays with the same actions."""
    box = boxes()
    services = []
    for name, kind in MODELS.items():
        box.model("scale", name)
        services.append({"name": name} | ({"kinds": kind} if kind else {}))
    box.configure(services, devices=[CPU, STAND_IN])
    slow = SlowDevice(2, seed=7, slowest_s=0.01, failing=0.03)
    quick = NullDevice("quick", 3)
    answers: Counter[int] = Counter()
    seen: dict[str, set[str]] = {}

    async def ask(name: str, until_s: float) -> None:
        while time.monotonic() < until_s:
            one = np.ones((1, 4), np.float32)
            answer = await asyncio.to_thread(box.infer, name, x=one)
            answers[answer.status] += 1

    async def main() -> None:
        async with box.here(devices=[CpuDevice(realtime="never"), slow, quick]) as node:
            await until(lambda: all(map(node.model_ready, MODELS)), node.status)
            for index, kind in enumerate(("cpu", "null", "null")):
                fields = {"name": f"job{index}", "kinds": (kind,), "restart": RestartPolicy.ALWAYS}
                node.submit_job(box.job_spec(*WAITS, **fields))
            end = time.monotonic() + 6
            asking = asyncio.gather(*(ask(name, end) for name in MODELS for _ in range(2)))
            while time.monotonic() < end:
                for job in node.jobs():
                    seen.setdefault(job.name, set()).update(p[:4] for p in job.partitions)
                await asyncio.sleep(0.005)
            await asking
            assert not len(node.requests), "a request was never answered"

    asyncio.run(main())
    assert set(answers) <= {200, 503} and answers[200] > 50, answers
    assert seen["job0"] <= {"cpu:"} and seen["job1"] | seen["job2"] >= {"quic", "slow"}, seen
    report = replay(read(box.directory / "state" / "journal"))
    assert report.identical and report.events > 500, report.difference
