"""The tables of docs/evaluation.md: every policy on every scenario, Cotenant less a law at a time.

Each scenario is one run of ``cotenant simulate`` (all policies, seeds on all cores); what it wrote
is kept beside the tables, so that a table can be printed again without running.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from cotenant.cli.simulate.command import interval

SCENARIOS = Path(__file__).parents[1] / "examples" / "scenarios"
RIVALS = ("static", "exclusive", "temporal", "spatial", "sliced", "shared", "reactive")
FAMILIES = ("orion", "tgs", "reef", "quotas")
LAWS = (
    "spatial",
    "no_hysteresis",
    "no_memory",
    "no_trend",
    "no_season",
    "no_learning",
    "no_feedback",
    "no_moves",
    "no_npu",
)
ATTAINS = 0.99
APART = (
    "ten-boxes",
    "two-jobs",
    "three-gpus",
    "smaller-build",
    "too-much",
    "gpu-beside-training",
    "three-llms-one-gpu",
    "llm-beside-training",
)
"""Left out unless named: two take an hour with all policies, on several GPUs not all are modelled,
one is more than anything can hold, and of one GPU that is not divided little differs."""

Samples = dict[str, dict[str, list[float]]]


def main() -> None:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for one JSON file per scenario")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--scenarios", help=f"names with commas (default: all but {', '.join(APART)})"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    names = sorted(p.stem for p in SCENARIOS.glob("*.yaml") if p.stem not in APART)
    if args.scenarios:
        names = args.scenarios.split(",")
    found: dict[str, Samples] = {}
    for name in names:
        path = args.out / f"{name}.json"
        if not path.exists():
            simulate(name, path, args.seeds)
        found[name] = best_of(json.loads(path.read_text()))
    print(comparison(found, ("cotenant", *RIVALS)))
    print(comparison(found, ("cotenant", *FAMILIES)))
    print(summary(found, ("cotenant", *RIVALS, *FAMILIES)))
    print(ablations(found))


def simulate(name: str, path: Path, seeds: int) -> None:
    """Run all policies on a scenario."""
    policies = dict.fromkeys(("cotenant", *RIVALS, *FAMILIES, *LAWS))
    command = [sys.executable, "-m", "cotenant", "simulate", str(SCENARIOS / f"{name}.yaml")]
    command += ["--policies", ",".join(policies), "--seeds", str(seeds), "--json", str(path)]
    command += ["--no-search"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    print(done.stdout, file=sys.stderr)


def best_of(document: dict[str, Any]) -> Samples:
    """Per policy, the figures of its best setting by seed."""
    found: Samples = {}
    for run in document["runs"]:
        if document["best_setting"][run["policy"]] != run["setting"]:
            continue
        samples = found.setdefault(run["policy"], {})
        for key, value in run.items():
            if key not in ("policy", "setting", "seed", "services"):
                samples.setdefault(key, []).append(value)
    return found


def attained(samples: dict[str, list[float]]) -> str:
    """Attainment in percent, with its confidence interval if that is more than 0.05 points."""
    mean, half = statistics.mean(samples["attainment"]), interval(samples["attainment"])
    return f"{mean:.2%}" + (f" ±{half * 100:.1f}" if half > 0.0005 else "")


def comparison(found: dict[str, Samples], policies: tuple[str, ...]) -> str:
    """Attained / job steps per second, a row for each scenario. Bold: attains 99 % and trains
    most, to a hundredth, of the table's policies that do."""
    lines = [row(("", *policies)), row(("---",) * (len(policies) + 1))]
    for name, samples in found.items():
        trains = {
            p: statistics.mean(samples[p]["job_rate"])
            for p in policies
            if p in samples and statistics.mean(samples[p]["attainment"]) >= ATTAINS
        }
        most = max(trains.values(), default=0.0)
        cells = [f"`{name}`"]
        for policy in policies:
            if policy not in samples:  # not modelled for this one
                cells.append("–")
                continue
            rate = statistics.mean(samples[policy]["job_rate"])
            cell = f"{attained(samples[policy])} / {rate:.1f}"
            best = policy in trains and rate > 0.99 * most
            cells.append(f"**{cell}**" if best else cell)
        lines.append(row(cells))
    return "\n".join(lines) + "\n"


def summary(found: dict[str, Samples], policies: tuple[str, ...]) -> str:
    """Both demands that can be measured, over all scenarios."""
    head = (
        "policy",
        "scenarios that attain 99 %",
        "lowest attained",
        "job steps against cotenant",
        "utilization",
        "re-layouts a run",
        "s lost to them",
    )
    lines = [row(head), row(("---",) * len(head))]
    for policy in policies:
        all_of = [samples[policy] for samples in found.values() if policy in samples]
        if not all_of:
            continue
        attains = [statistics.mean(s["attainment"]) for s in all_of]
        ratios = [
            statistics.mean(samples[policy]["job_rate"])
            / statistics.mean(samples["cotenant"]["job_rate"])
            for samples in found.values()
            if policy in samples and statistics.mean(samples["cotenant"]["job_rate"])
        ]
        cells = (
            f"`{policy}`",
            f"{sum(a >= ATTAINS for a in attains)} of {len(attains)}",
            f"{min(attains):.1%}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
            f"{statistics.mean(mean(s, 'utilization') for s in all_of):.0%}",
            f"{statistics.mean(mean(s, 'repartitions') for s in all_of):.1f}",
            f"{statistics.mean(mean(s, 'repartition_s') for s in all_of):.2f}",
        )
        lines.append(row(cells))
    return "\n".join(lines) + "\n"


def ablations(found: dict[str, Samples]) -> str:
    """Cotenant less a law, where that changes attainment by 0.05 points or training by 1 %."""
    lines = [
        row(("without", "scenario", "attained", "points", "job steps/s", "times", "re-layouts"))
    ]
    lines.append(row(("---",) * 7))
    for law in LAWS:
        for name, samples in found.items():
            if law not in samples:
                continue
            whole, less = samples["cotenant"], samples[law]
            points = (mean(less, "attainment") - mean(whole, "attainment")) * 100
            times = mean(less, "job_rate") / (mean(whole, "job_rate") or 1.0)
            if abs(points) < 0.05 and abs(times - 1) < 0.01:
                continue
            changes = f"{mean(less, 'repartitions'):.1f} ({mean(whole, 'repartitions'):.1f})"
            cells = (
                f"`{law}`",
                f"`{name}`",
                attained(less),
                f"{points:+.2f}",
                f"{mean(less, 'job_rate'):.1f}",
                f"{times:.2f}",
                changes,
            )
            lines.append(row(cells))
    return "\n".join(lines) + "\n"


def mean(samples: dict[str, list[float]], key: str) -> float:
    """Over the seeds."""
    return statistics.mean(samples[key])


def row(cells: tuple[str, ...] | list[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
