"""A box of several devices, of which one may block, fail or hang."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from cotenant.devices.cpu import CpuDevice
from cotenant.domain.errors import DeviceError
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
    box.configure([{"name": "scale"}], devices=[{**STAND_IN, "blocking": True}, CPU]).start()
    job = box.submit(*WAITS)
    for _ in range(20):
        answer = box.infer("scale", x=np.ones((1, 4), np.float32))
        assert answer.json["outputs"][0]["data"] == [2.0] * 4
    box.until(lambda: box.job("job").partitions)
    assert set(box.job("job").partitions) <= on(box, "other")
    box.until(lambda: set(device(box, "other")["tenants"]) == {"scale#1", job})
    assert device(box, "cpu")["tenants"] == {}
    assert not device(box, "cpu")["trains"]
    assert all(t["level"] == "PAUSE" for t in device(box, "other")["tenants"].values())
    assert any("stand-in" in limit for limit in device(box, "other")["limits"])
    metrics = box.ask("GET", "/metrics").body.decode()
    assert 'device="other",partition="other:' in metrics
    box.control.cancel(job)
    box.until(lambda: set(device(box, "other")["tenants"]) == {"scale#1"})
    assert box.infer("scale", x=np.ones((1, 4), np.float32)).status == 200


def test_models_and_jobs_are_on_the_first_device_and_what_they_occupy_is_measured(
    boxes: Boxes,
) -> None:
    box = boxes()
    box.model("scale", "scale")
    box.configure([{"name": "scale"}], devices=[CPU, STAND_IN]).start()
    job = box.submit(*WAITS)
    box.until(lambda: box.job("job").partitions)
    assert box.infer("scale", x=np.ones((1, 4), np.float32)).status == 200
    assert set(box.job("job").partitions) <= on(box, "cpu")
    box.until(lambda: all(t["memory"] for t in device(box, "cpu")["tenants"].values()))
    assert set(device(box, "cpu")["tenants"]) == {"scale#1", job}


def test_requests_are_answered_and_a_job_runs_on_a_device_that_is_slow(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "scale")
    box.configure([{"name": "scale"}])
    slow = SlowDevice(2, seed=3, slowest_s=0.02)

    async def main() -> None:
        async with box.here(devices=[slow, CpuDevice(realtime="never")]) as node:
            job = node.submit_job(box.job_spec(*WAITS))
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
