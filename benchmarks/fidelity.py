"""Does a simulation calibrated at one load predict a live run at another?

A live node serves beside a training job while the load alternates between two levels, so that
both see the same machine. Costs are fitted to the journal at the first level alone; what was
asked at the second is then simulated with them, and compared with what the node answered.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

from cotenant import __version__
from cotenant.cli.bench import arrivals
from cotenant.cli.bench.arms import Bench
from cotenant.cli.bench.figures import quantile
from cotenant.cli.bench.images import Images
from cotenant.cli.bench.rigs import steal_s
from cotenant.cli.bench.train_job import read_counter
from cotenant.domain.units import MS, S
from cotenant.policy.planstate import Tuning
from cotenant.sim.policies import Scheduled, simulate
from cotenant.sim.recorded import Recording
from cotenant.telemetry.compiled import policy_is_compiled
from cotenant.telemetry.records import read

LEVELS = ("calibrated at", "predicted at")
SEEDS = 5


class Phase:
    """One stretch at one load."""

    def __init__(self, level: int, start: int, end: int, rate: float) -> None:
        self.level, self.window, self.train_rate = level, (start, end), rate


def phase(bench: Bench, level: int, load: float, seconds: float, seed: int) -> Phase:
    """Load the node for a while."""
    node, job = bench.nodes["cotenant"], bench.jobs["cotenant"]
    times = arrivals.make("poisson", bench.service.rate(load), seconds, seed)
    start, first = time.monotonic_ns(), read_counter(job.counter)
    bench.service.ask(node, times, seed, bench.cores[-1])
    end, last = time.monotonic_ns(), read_counter(job.counter)
    return Phase(level, start, end, (last[0] - first[0]) / ((last[1] - first[1]) / S))


def live(directory: Path, loads: list[float], rounds: int, seconds: float) -> list[Phase]:
    """Run the node through all phases."""
    bench = Bench(directory, sorted(os.sched_getaffinity(0)), ("cotenant",), Images())
    try:
        bench.start()
        bench.jobs["cotenant"].resume()
        time.sleep(3)
        return [
            phase(bench, level, loads[level], seconds, seed=100 * level + index)
            for index in range(rounds)
            for level in (0, 1)
        ]
    finally:
        bench.stop()


def recording(journal: Path, phases: list[Phase], level: int) -> Recording:
    """What the journal holds of one level."""
    mine = [p for p in phases if p.level == level]
    found = Recording(read(journal), [p.window for p in mine])
    for job in found.jobs:
        for each in mine:
            found.note_progress(job, *each.window, each.train_rate)
    return found


def main() -> None:
    """Run and print; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each phase")
    parser.add_argument("--loads", default="0.25,0.5", help="calibrated at, predicted at")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    loads = [float(part) for part in args.loads.split(",")]
    stolen = steal_s()
    with tempfile.TemporaryDirectory(prefix="cotenant-fidelity-") as directory:
        phases = live(Path(directory), loads, args.rounds, args.seconds)
        journal = Path(directory) / "cotenant" / "state" / "journal"
        sides = [recording(journal, phases, level) for level in (0, 1)]
    costs = sides[0].costs()
    print(f"{'':<20}{'p50 ms':>16}{'p95 ms':>16}{'p99 ms':>16}{'steps/s':>16}   (live, simulated)")
    document = {
        "date": time.strftime("%Y-%m-%d"),
        "cotenant": __version__,
        "machine": {
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "compiled": policy_is_compiled(),
        },
        "options": {"loads": loads, "rounds": args.rounds, "seconds": args.seconds},
        "steal_s": steal_s() - stolen,
        "levels": [],
    }
    for level, side in enumerate(sides):
        scenario = side.scenario(costs)
        (name,) = side.services
        runs = [simulate(scenario, Scheduled(Tuning()), seed) for seed in range(SEEDS)]
        seen = [ns / MS for ns in side.latencies[name]]
        pairs = {
            f"p{share * 100:g}_ms": (
                quantile(seen, share),
                statistics.median(r.services[name].quantile_ns(share) / MS for r in runs),
            )
            for share in (0.5, 0.95, 0.99)
        }
        pairs["train_rate"] = (
            statistics.mean(p.train_rate for p in phases if p.level == level),
            statistics.median(r.figures()["job_rate"] for r in runs),
        )
        cells = "".join(f"{a:>8.2f}{b:>8.2f}" for a, b in pairs.values())
        print(f"{LEVELS[level]:<15}{loads[level]:<5}{cells}")
        print(f"{'error':<20}" + "".join(f"{b / a - 1:>16.1%}" for a, b in pairs.values()))
        document["levels"].append({"load": loads[level], "requests": len(seen), "pairs": pairs})
    if args.json:
        args.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
