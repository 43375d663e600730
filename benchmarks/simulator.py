"""Simulated requests per second of one core, and whether memory grows with the length of a run.

Each run is a fresh process; lengths and scenarios are interleaved over rounds. A plain loop that
pushes to and pops from a heap runs in every process as a yardstick for the machine.
"""

from __future__ import annotations

import argparse
import heapq
import json
import multiprocessing
import os
import resource
import statistics
import time
from pathlib import Path

import msgspec

from cotenant.domain.units import S
from cotenant.policy.planner import Planner
from cotenant.sim.scenario_file import parse_scenario, read_scenario
from cotenant.sim.world import World
from cotenant.telemetry.compiled import policy_is_compiled

SCENARIOS = Path(__file__).parents[1] / "examples" / "scenarios"
ONE_GPU = """
name: one-gpu
duration: 60s
device: {kind: sm, units: 7}
services:
  - name: s
    objective: {latency: 50ms}
    batch: {max: 16}
    instances: 4
    cost: {first: 2ms, per_row: 500us, parallel: 0.8, saturates: 7}
    arrivals: {kind: poisson, rate: 2000}
jobs:
  - {name: j, cost: {rate: 10}}
"""
LENGTHS = (1, 4)


def measure(which: str, length: int) -> dict[str, float]:
    """One run in this process."""
    heap: list[tuple[int, int]] = []
    began = time.perf_counter()
    for i in range(100_000):
        heapq.heappush(heap, (i * 7919 % 100_003, i))
        if len(heap) > 50:
            heapq.heappop(heap)
    yardstick = time.perf_counter() - began
    found = (
        parse_scenario(ONE_GPU, SCENARIOS)
        if which == "one-gpu"
        else read_scenario(SCENARIOS / f"{which}.yaml")
    )
    scenario = msgspec.structs.replace(found, duration=length * 30 * S)
    began = time.process_time()
    outcome = World(scenario, Planner(), (0, 0)).run()
    took = time.process_time() - began
    requests = sum(s.offered for s in outcome.services.values())
    return {
        "requests_per_s": requests / took,
        "times_real_time": length * 30 / took,
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "yardstick_ms": yardstick * 1000,
    }


def main() -> None:
    """Run and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    # One core is what it says: numpy's BLAS has a thread for each, which spins for a tenth of a
    # second of CPU time after it was made, whether it is used or not.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    samples: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for which in ("one-gpu", "camera-box", "two-tenants"):
            for length in LENGTHS:
                with context.Pool(1) as pool:
                    found = pool.apply(measure, (which, length))
                samples.setdefault(f"{which} {length * 30} s", []).append(found)
    titles = ("requests/s", "x real time", "memory MiB", "yardstick ms")
    print(f"{'scenario':<20}" + "".join(f"{title:>14}" for title in titles))
    for name, found in samples.items():
        keys = ("requests_per_s", "times_real_time", "rss_mib", "yardstick_ms")
        medians = [statistics.median(f[key] for f in found) for key in keys]
        print(f"{name:<20}" + "".join(f"{median:>14,.1f}" for median in medians))
    if args.json:
        document = {"compiled": policy_is_compiled(), "samples": samples}
        args.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
