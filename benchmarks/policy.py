"""Microseconds per event of the dispatcher with 1, 10 and 100 services, and per plan.

Each figure is a median over interleaved rounds; samples go to the JSON file. A plain loop that
appends to a list is measured in the same rounds, as a yardstick for the machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import DeviceSpec, Partition, PreemptLevel
from cotenant.domain.plan import EMPTY_PLAN, Plan
from cotenant.domain.request import Request
from cotenant.domain.snapshot import JobFacts, ServiceFacts, Snapshot
from cotenant.domain.units import MS, S
from cotenant.policy.dispatcher import Dispatcher
from cotenant.policy.planner import Planner
from cotenant.telemetry.compiled import policy_is_compiled

EVENTS = 20_000
EXEC_NS = 100_000
WATCHED = 70
"""Plans before those that are measured: loads are watched for a minute first."""


def dispatcher_us(services: int) -> float:
    """Mean microseconds per event: arrivals on two cores, one of them lent to a job."""
    d, now = Dispatcher((_device(2),)), S
    for i in range(services):
        d.handle(now, e.ServiceAdded(f"s{i}", 50 * MS, 8, 100))
    partitions = (Partition("p0", "cpu", (0,)), Partition("p1", "cpu", (1,)))
    owners = {f"s{i}": ("p0",) for i in range(services)}
    d.handle(now, e.Planned(Plan(1, partitions, owners, {"job": ("p1",)}, ("p0",))))
    d.handle(now, e.Repartitioned("cpu", 1))
    profile = ((1, 1, EXEC_NS), (1, 8, 4 * EXEC_NS))
    for i in range(services):
        for load in d.handle(now, e.VersionOffered(f"s{i}", "1")):
            assert isinstance(load, a.Load)
            d.handle(now, e.WorkerUp(load.worker, f"s{i}", "1", "cpu", profile))
    d.handle(now, e.JobQueued("job"))
    d.handle(now, e.JobReady("job"))
    handled, request, answered = 0, 0, 0
    began = time.perf_counter_ns()
    while handled < EVENTS:
        now += 6 * EXEC_NS
        request += 1
        name = f"s{request * 7 % services}"
        open_ = d.handle(now, e.Arrived(Request(request, name, now, now + 50 * MS)))
        handled += 1
        while open_:
            action = open_.pop(0)
            answered += isinstance(action, a.Complete)
            answer = _answer(action, now)
            if answer is not None:
                open_ += d.handle(now, answer)
                handled += 1
    took = time.perf_counter_ns() - began
    assert answered == request, "it measured something else"
    return took / handled / 1e3


def _answer(action: a.Action, now: int) -> e.Event | None:
    match action:
        case a.Dispatch(batch=batch):
            return e.BatchDone(batch.id, EXEC_NS, 5000)
        case a.Revoke(job=job, partition=partition):
            return e.Revoked(job, partition, 20_000)
        case a.Grant(job=job, partition=partition):
            return e.Granted(job, partition)
        case a.WakeAt(at=at) if at <= now:
            return e.Woke()
        case _:
            return None


def planner_ms(cores: int, services: int) -> float:
    """Milliseconds for one plan of a box whose load is known: what jobs would gain is weighed."""
    facts = tuple(_service(f"s{i}", services) for i in range(services))
    jobs = tuple(JobFacts(f"j{i}", 1.0, 0.0, 1.0, 1.0, 0) for i in range(8))
    planner, present, began = Planner(), EMPTY_PLAN, 0
    for step in range(1, WATCHED + 21):
        if step == WATCHED + 1:
            began = time.perf_counter_ns()
        plan = planner.plan(Snapshot(step * S, (_device(cores),), present, facts, jobs))
        present = plan or present
    return (time.perf_counter_ns() - began) / 20 / 1e6


def fleet_ms(devices: int, workloads: int) -> float:
    """Milliseconds for one plan of many GPUs in MIG mode and as many workloads."""
    gpus = tuple(_gpu(f"gpu{i:03}") for i in range(devices))
    count = workloads * 4 // 5
    times = {f"{u}x{n}": EXEC_NS * (3 + n) // u for u in (1, 2, 3, 4, 7) for n in (1, 8)}
    facts = tuple(
        msgspec.structs.replace(_service(f"s{i}", 20), exec_ns={"mig": times}) for i in range(count)
    )
    jobs = tuple(JobFacts(f"j{i}", 1.0, 0.0, 1.0, 1.0, 0) for i in range(workloads - count))
    planner, present = Planner(), EMPTY_PLAN
    began = time.perf_counter_ns()
    for step in range(1, 6):
        plan = planner.plan(Snapshot(step * S, gpus, present, facts, jobs))
        present = plan or present
    return (time.perf_counter_ns() - began) / 5 / 1e6


def moving_ms(devices: int, workloads: int) -> float:
    """Milliseconds for the plan of such a fleet that moves services: a quarter of them has grown,
    and the integer program is solved."""
    gpus = tuple(_gpu(f"gpu{i:03}") for i in range(devices))
    count = workloads * 4 // 5
    times = {f"{u}x{n}": EXEC_NS * (3 + n) // u for u in (1, 2, 3, 4, 7) for n in (1, 8)}
    calm = [
        msgspec.structs.replace(
            _service(f"s{i}", 1), rate=2000.0 + 500.0 * (i % 20), exec_ns={"mig": times}
        )
        for i in range(count)
    ]
    grown = [
        msgspec.structs.replace(s, rate=s.rate * (3.5 if i % 4 == 0 else 0.7))
        for i, s in enumerate(calm)
    ]
    jobs = tuple(JobFacts(f"j{i}", 1.0, 0.0, 1.0, 1.0, 0) for i in range(workloads - count))
    planner, present, longest = Planner(), EMPTY_PLAN, 0
    for step in range(1, 31):
        facts = tuple(calm if step < 3 else grown)
        before = {name: tuple(parts) for name, parts in planner.state.parts.items()}
        began = time.perf_counter_ns()
        plan = planner.plan(Snapshot(step * S, gpus, present, facts, jobs))
        took = time.perf_counter_ns() - began
        present = plan or present
        moved = before != {name: tuple(parts) for name, parts in planner.state.parts.items()}
        if step >= 3 and moved:
            longest = max(longest, took)
    if not longest:
        raise RuntimeError("no service moved; there was nothing to measure")
    return longest / 1e6


def _gpu(name: str) -> DeviceSpec:
    return DeviceSpec(
        id=name,
        kind="mig",
        units=tuple(range(8)),
        memory=0,
        shapes=(),
        preempt=PreemptLevel.GATE,
        revoke_ns=MS,
        repartition_ns=282 * MS,
        mig="A100-SXM4-80GB",
        slices=7,
        pins_jobs=True,
        move_ns=10 * S,
    )


def _device(cores: int) -> DeviceSpec:
    return DeviceSpec(
        id="cpu",
        kind="cpu",
        units=tuple(range(cores)),
        memory=2**35,
        shapes=tuple(range(1, cores + 1)),
        preempt=PreemptLevel.PRIORITY,
        revoke_ns=20_000,
        repartition_ns=MS,
    )


def _service(name: str, services: int) -> ServiceFacts:
    return ServiceFacts(
        name=name,
        objective=50 * MS,
        percentile=99.0,
        guaranteed=0.0,
        limit=1.0,
        max_batch=8,
        rate=400.0 / services,
        rate_trend=1.0,
        p95=0,
        refused=0,
        answered=0,
        exec_ns={"cpu": {"1x1": 2 * MS, "1x8": 8 * MS}},
    )


def yardstick_us() -> float:
    """Microseconds of a fixed amount of plain Python."""
    began = time.perf_counter_ns()
    for _ in range(1000):
        sum(range(100))
    return (time.perf_counter_ns() - began) / 1000 / 1e3


ARMS: dict[str, Callable[[], float]] = {
    "yardstick_us": yardstick_us,
    "event_us_1_service": lambda: dispatcher_us(1),
    "event_us_10_services": lambda: dispatcher_us(10),
    "event_us_100_services": lambda: dispatcher_us(100),
    "plan_ms_2_cores_3_services": lambda: planner_ms(2, 3),
    "plan_ms_64_cores_100_services": lambda: planner_ms(64, 100),
    "plan_ms_1_gpu_5_workloads": lambda: fleet_ms(1, 5),
    "plan_ms_100_gpus_500_workloads": lambda: fleet_ms(100, 500),
    "moving_ms_4_gpus_20_workloads": lambda: moving_ms(4, 20),
    "moving_ms_100_gpus_500_workloads": lambda: moving_ms(100, 500),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    samples: dict[str, list[float]] = {name: [] for name in ARMS}
    for _ in range(args.rounds):
        for name, arm in ARMS.items():
            samples[name].append(arm())
    for name, values in samples.items():
        low, high = min(values), max(values)
        print(f"{name:<32}{statistics.median(values):>8.2f}   [{low:.2f}-{high:.2f}]")
    if args.json:
        machine = {
            "python": platform.python_version(),
            "kernel": platform.release(),
            "compiled": policy_is_compiled(),
        }
        document = {"benchmark": "policy", "machine": machine, "samples": samples}
        args.json.write_text(json.dumps(document))


if __name__ == "__main__":
    main()
