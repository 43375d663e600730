"""What learning the jobs' utility curves costs and brings, in simulation.

``two-jobs``: per seed, how far each job's learned speed-up curve is from its true one (mean
absolute error over all sizes), the share of all unit time spent on trying out, and the jobs' steps
beside those of the same planner without learning. Then one job alone on four cores, which loses no
work or 20 ms of it at each grant, beside a service of three instances: learning decides whether the
job borrows or owns space, and whether idle space is lent. Its steps without learning, and where
nothing is ever lent, stand beside it.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path

from cotenant.policy.planner import Planner
from cotenant.policy.planstate import Tuning
from cotenant.policy.trials import TRY_FOR
from cotenant.sim.outcome import Outcome
from cotenant.sim.scenario import Scenario
from cotenant.sim.scenario_file import parse_scenario, read_scenario
from cotenant.sim.world import World

SCENARIOS = Path(__file__).parents[1] / "examples" / "scenarios"
ONE_JOB = """
name: one-job
duration: 900s
device: {kind: cpu, units: 4}
services:
  - name: api
    objective: {latency: 50ms}
    instances: 3
    cost: {first: 4ms, per_row: 1ms, parallel: 0.5, saturates: 2, cv: 0.1}
    arrivals: {kind: poisson, rate: 60}
jobs:
  - {name: train, cost: {rate: 10, parallel: 0.9, resume: LOST}}
"""
TRY_OUT = re.compile(r"tried out with (\d+) more")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    curves = [of_curves(read_scenario(SCENARIOS / "two-jobs.yaml"), n) for n in range(args.seeds)]
    pauses = [of_pauses(lost_ms, seed) for lost_ms in (0, 20) for seed in range(args.seeds)]
    for title, samples in (("two jobs", curves), ("one job on four cores", pauses)):
        print(title)
        for sample in samples:
            print("  " + "  ".join(f"{k} {v:.4g}" for k, v in sample.items()))
    for name in [name for name in curves[0] if name != "seed"]:
        print(f"median {name:24} {statistics.median(s[name] for s in curves):.4g}")
    if args.json:
        args.json.write_text(json.dumps({"two_jobs": curves, "one_job": pauses}, indent=1) + "\n")


def of_curves(scenario: Scenario, seed: int) -> dict[str, float]:
    """One seed of ``two-jobs``."""
    planner = Planner()
    learned = World(scenario, planner, (seed, 0)).run()
    found: dict[str, float] = {"seed": seed}
    for job in scenario.jobs:
        curve = planner.state.curves[job.spec.id]
        true = [job.cost.speed(units) for units in range(1, curve.units + 1)]
        errors = [abs(k / t - 1) for k, t in zip(curve.rates()[1:], true, strict=True)]
        found[f"{job.spec.name}_error"] = statistics.mean(errors)
    tried = [int(m[1]) for _, why in learned.reasons for w in why if (m := TRY_OUT.search(w))]
    found["try_outs"] = len(tried)
    units = scenario.devices[0].spec.compute
    found["explored"] = TRY_FOR * sum(tried) / (scenario.duration * units)
    return found | compared(learned, scenario, seed)


def of_pauses(lost_ms: int, seed: int) -> dict[str, float]:
    """One seed of a job that loses ``lost_ms`` of work at each grant."""
    scenario = parse_scenario(ONE_JOB.replace("LOST", f"{lost_ms}ms"), SCENARIOS)
    learned = World(scenario, Planner(), (seed, 0)).run()
    kept = World(scenario, Planner(Tuning(lend=False)), (seed, 0)).run()
    return {
        "seed": seed,
        "lost_ms": lost_ms,
        "steps_s_never_lent": kept.figures()["job_rate"],
    } | compared(learned, scenario, seed)


def compared(learned: Outcome, scenario: Scenario, seed: int) -> dict[str, float]:
    """Steps per second with and without learning, and what was attained with it."""
    fixed = World(scenario, Planner(Tuning(learn=False)), (seed, 0)).run()
    steps, plain = learned.figures()["job_rate"], fixed.figures()["job_rate"]
    return {
        "steps_s": steps,
        "steps_s_without": plain,
        "times": steps / plain,
        "attained": learned.figures()["attainment"],
    }


if __name__ == "__main__":
    main()
