"""``cotenant bench colocate``: one service and one training job on one box, shared in several ways.

Arms, interleaved within each round, with the same arrivals:

alone        the service by itself, an ordinary server: no pinning, ordinary priority
cotenant_alone   the service by itself under Cotenant as in the arm ``cotenant``
train        the training job by itself on all cores
unmanaged    both, no scheduling
nice         both, the job at nice 19
split        both, the last core(s) to the job, the first to the service, for good
slicing      both, whole box for one or the other in turn: the job is stopped for each request
cotenant         both, Cotenant: the service's core is lent to the job and taken back per request
cotenant_plain   both, Cotenant without the right to real-time priority

The served model runs on one thread in every arm. ``left`` is what the service (and the load
generator, which lives on the same box) leaves: 1 - CPU time of both in ``alone`` / core time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import random
import re
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from cotenant import __version__
from cotenant.cli.bench import arrivals
from cotenant.cli.bench.model import request, write_model, write_model_of
from cotenant.cli.bench.rigs import (
    CotenantJob,
    Job,
    NodeRig,
    PlainJob,
    generate,
    steal_s,
    wait_for_steps,
)
from cotenant.domain.errors import EnvironmentProblem
from cotenant.domain.units import S, parse_duration

ARMS = (
    *("alone", "cotenant_alone", "train", "unmanaged", "nice", "split", "slicing"),
    *("cotenant", "cotenant_plain"),
)
OBJECTIVE_MS = 100.0
SLACK = 20
"""The objective is at least so many times the length that was asked for (``--service``). With less,
what is measured beside long requests is who refuses more."""
SETTLE_S = 0.3
WARM_STEPS = 5


class Bench:
    """Nodes and jobs of all arms, started once; arms then take turns."""

    def __init__(
        self, directory: Path, cores: list[int], arms: tuple[str, ...], service_s: float = 0.0
    ) -> None:
        self.cores = cores
        self.arms = arms
        self.objective_ms = max(OBJECTIVE_MS, SLACK * service_s * 1e3)
        self._spacing = max(0.02, 2 * service_s)
        """Seconds between requests while their execution is measured: none waits for another."""
        self._directory = directory
        self._models = directory / "models"
        model = self._models / "bench" / "1" / "model.onnx"
        if service_s:
            write_model_of(model, service_s)
        else:
            write_model(model)
        self.nodes: dict[str, NodeRig] = {}
        self.jobs: dict[str, Job] = {}
        self.exec_s = 0.0

    def start(self) -> None:
        """Start every node and job; jobs are left suspended."""
        first, rest = {self.cores[0]}, set(self.cores[1:] or self.cores)
        n = len(self.cores)
        free = "realtime: never, pin: false"
        node_of = {
            "plain": self._node("plain", free, "", None),
            "split": self._node("split", f"realtime: never, cores: [{self.cores[0]}]", "", first),
            "slicing": self._node(
                "slicing", "realtime: never", f"policy: {{split: {{cores: {n}, size: {n}}}}}", None
            ),
            "cotenant": self._node("cotenant", "realtime: auto", "", None),
            "cotenant_plain": self._node("cotenant_plain", "realtime: never", "", None),
        }
        uses = {
            "alone": "plain",
            "unmanaged": "plain",
            "nice": "plain",
            "cotenant_alone": "cotenant",
        }
        for arm in self.arms:
            name = uses.get(arm, arm)
            if name in node_of:
                self.nodes[arm] = node_of[name]
        for node in dict.fromkeys(self.nodes.values()):
            node.start()
        self._calibrate()
        for arm in self.arms:
            self._start_job(arm, rest, n)

    def _node(self, name: str, device: str, policy: str, cores: set[int] | None) -> NodeRig:
        config = f"""
node: {{state_dir: ./state, models: {self._models}, http: "127.0.0.1:0", grpc: null}}
devices: [{{kind: cpu, {device}}}]
{policy}
services:
  - name: bench
    objective: {{latency: {self.objective_ms:g}ms}}
    batch: {{max: 8}}
    threads: 1
"""
        return NodeRig(name, self._directory, config, cores)

    def _start_job(self, arm: str, rest: set[int], n: int) -> None:
        counter = self._directory / f"{arm}.steps"
        if arm in ("train", "unmanaged"):
            # One process serves both arms: what differs is what runs beside it.
            shared = self.jobs.get("train") or self.jobs.get("unmanaged")
            self.jobs[arm] = shared or PlainJob(counter, n, None, 0)
        elif arm == "nice":
            self.jobs[arm] = PlainJob(counter, n, None, 19)
        elif arm == "split":
            self.jobs[arm] = PlainJob(counter, len(rest), rest, 0)
        elif arm in ("slicing", "cotenant", "cotenant_plain"):
            self.jobs[arm] = CotenantJob(self.nodes[arm], counter, n)
        else:
            return
        wait_for_steps(self.jobs[arm].counter, WARM_STEPS)
        self.jobs[arm].suspend()

    def _calibrate(self) -> None:
        """Measure the execution time that loads are fractions of."""
        node = self.nodes.get("alone") or next(iter(self.nodes.values()))
        times = [self._spacing * i for i in range(60)]
        passes = []
        for _ in range(5):
            before = node.executed()
            generate(node.port, request("bench", node.port), times, self.cores[-1])
            seconds, count = (b - a for a, b in zip(before, node.executed(), strict=True))
            passes.append(seconds / count)
        self.exec_s = statistics.median(passes)

    def run(self, arm: str, times: list[float], seconds: float) -> dict[str, Any]:
        """One arm once: raw samples and counters."""
        from cotenant.cli.bench.train_job import read_counter

        node, job = self.nodes.get(arm), self.jobs.get(arm)
        if job is not None:
            job.resume()
        time.sleep(SETTLE_S)
        cpu = node.service_cpu_s() if node else 0.0
        stolen, began = steal_s(), time.monotonic()
        first = read_counter(job.counter) if job else (0, 0)
        result: dict[str, Any] = {"latency_ms": [], "status": [], "lag_ms": [], "cpu_s": 0.0}
        if node is not None:
            result = generate(node.port, request("bench", node.port), times, self.cores[-1])
        time.sleep(max(0.0, began + seconds - time.monotonic()))
        last = read_counter(job.counter) if job else (0, 0)
        wall = time.monotonic() - began
        result["generator_cpu_s"] = result.pop("cpu_s")
        result["service_cpu_s"] = (node.service_cpu_s() - cpu) if node else 0.0
        result["steal_s"], result["wall_s"] = steal_s() - stolen, wall
        span = (last[1] - first[1]) / 1e9
        result["train_rate"] = (last[0] - first[0]) / span if span > 0 else 0.0
        if job is not None:
            job.suspend()
        return result

    def stop(self) -> None:
        """End everything."""
        for job in dict.fromkeys(self.jobs.values()):
            job.end()
        for node in dict.fromkeys(self.nodes.values()):
            node.stop()


def quantile(samples: list[float], share: float) -> float:
    """The nearest-rank quantile; nan without samples."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def summarise(raw: dict[str, Any], objective_ms: float) -> dict[str, float]:
    """Figures of one arm in one round. Attainment counts refusals as missed."""
    served = [x for x, s in zip(raw["latency_ms"], raw["status"], strict=True) if s == 200]
    total = len(raw["status"])
    return {
        "p50_ms": quantile(served, 0.50),
        "p95_ms": quantile(served, 0.95),
        "p99_ms": quantile(served, 0.99),
        "attainment": sum(x <= objective_ms for x in served) / total if total else float("nan"),
        "refused": float(total - len(served)),
        "train_rate": raw["train_rate"],
        "steal_s": raw["steal_s"],
    }


def ratios(figures: dict[str, dict[str, float]], raw: dict[str, Any], cores: int) -> dict[str, Any]:
    """The two ratios that matter, for each arm of one round."""
    alone = raw["alone"]
    used = (alone["service_cpu_s"] + alone["generator_cpu_s"]) / (alone["wall_s"] * cores)
    left = figures["train"]["train_rate"] * (1.0 - used)
    found: dict[str, Any] = {}
    for arm, own in figures.items():
        found[arm] = {
            "p99_vs_alone": own["p99_ms"] / figures["alone"]["p99_ms"],
            "p99_vs_cotenant_alone": own["p99_ms"]
            / figures.get("cotenant_alone", figures["alone"])["p99_ms"],
            "train_vs_left": own["train_rate"] / left if left else float("nan"),
        }
    return found


def middle(values: list[float]) -> float:
    """Median of the values that are numbers."""
    numbers = [v for v in values if not math.isnan(v)]
    return statistics.median(numbers) if numbers else float("nan")


def spread(values: list[float]) -> list[float]:
    """Quartiles of the values that are numbers."""
    numbers = sorted(v for v in values if not math.isnan(v))
    return [quantile(numbers, 0.25), quantile(numbers, 0.75)] if numbers else []


def measure(bench: Bench, load: float, rounds: int, seconds: float, seed: int) -> dict[str, Any]:
    """All arms over all rounds at one load."""
    rate = load / bench.exec_s
    per_round: list[dict[str, Any]] = []
    for index in range(rounds):
        pattern = arrivals.PATTERNS[index % 2]
        times = arrivals.make(pattern, rate, seconds, seed + index)
        # Shuffled: after one that kept all cores busy the host may be slower for a while.
        order = random.Random(seed + index).sample(bench.arms, len(bench.arms))
        raw = {}
        for arm in order:
            print(
                f"  load {load:g}, round {index + 1}/{rounds} ({pattern}): {arm:<12}",
                end="\r",
                flush=True,
            )
            raw[arm] = bench.run(arm, times, seconds)
        figures = {arm: summarise(raw[arm], bench.objective_ms) for arm in bench.arms}
        per_round.append(
            {
                "pattern": pattern,
                "raw": raw,
                "arms": figures,
                "ratios": ratios(figures, raw, len(bench.cores)),
            }
        )
    print(" " * 70, end="\r")
    return {
        "load": load,
        "rate": rate,
        "exec_ms": bench.exec_s * 1e3,
        "objective_ms": bench.objective_ms,
        "rounds": per_round,
        **aggregate(bench.arms, per_round),
    }


def aggregate(arms: tuple[str, ...], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds (and quartiles of the ratios) for each arm."""
    result: dict[str, Any] = {"arms": {}, "ratios": {}}
    for arm in arms:
        keys = rounds[0]["arms"][arm]
        result["arms"][arm] = {k: middle([r["arms"][arm][k] for r in rounds]) for k in keys}
        chosen = {k: [r["ratios"][arm][k] for r in rounds] for k in rounds[0]["ratios"][arm]}
        result["ratios"][arm] = {k: middle(v) for k, v in chosen.items()}
        result["ratios"][arm] |= {f"{k}_quartiles": spread(v) for k, v in chosen.items()}
    return result


def table(result: dict[str, Any], cores: int) -> str:
    """The figures of one load for people."""
    lines = [
        f"load {result['load']:g} of one core = {result['rate']:.0f} requests/s of "
        f"{result['exec_ms']:.1f} ms within {result['objective_ms']:g} ms on {cores} cores; "
        f"medians over {len(result['rounds'])} rounds, quartiles in brackets",
        f"{'arm':<15}{'p50 ms':>8}{'p95 ms':>8}{'p99 ms':>8}{'attained':>10}{'refused':>9}"
        f"{'steps/s':>9}  {'p99 / alone':<20}{'train / left':<20}",
    ]
    for arm, own in result["arms"].items():
        ratio = result["ratios"][arm]
        lines.append(
            f"{arm:<15}{own['p50_ms']:>8.2f}{own['p95_ms']:>8.2f}{own['p99_ms']:>8.2f}"
            f"{own['attainment']:>10.2%}{own['refused']:>9.0f}{own['train_rate']:>9.1f}  "
            f"{_ratio(ratio, 'p99_vs_alone'):<20}{_ratio(ratio, 'train_vs_left'):<20}"
        )
    return re.sub(r"\bnan\b%?", lambda found: "-".rjust(len(found[0])), "\n".join(lines))


def _ratio(ratio: dict[str, Any], key: str) -> str:
    if not ratio[key] or math.isnan(ratio[key]):
        return "-"
    low, high = ratio[f"{key}_quartiles"]
    return f"{ratio[key]:.2f} [{low:.2f}-{high:.2f}]"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """p99 against alone over training against what is left, a panel a load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, len(results), figsize=(5 * len(results), 4.2), squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        for arm in [a for a in result["arms"] if a not in ("alone", "train", "cotenant_alone")]:
            ratio = result["ratios"][arm]
            x, y = ratio["train_vs_left"], ratio["p99_vs_alone"]
            (xl, xh), (yl, yh) = ratio["train_vs_left_quartiles"], ratio["p99_vs_alone_quartiles"]
            axis.errorbar(
                x,
                y,
                xerr=[[max(0, x - xl)], [max(0, xh - x)]],
                yerr=[[max(0, y - yl)], [max(0, yh - y)]],
                fmt="o",
                capsize=3,
                label=arm,
            )
        axis.axhline(1.05, linestyle=":", color="grey")
        axis.axvline(0.90, linestyle=":", color="grey")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:.3g}"))
        axis.yaxis.set_minor_formatter(ticker.StrMethodFormatter("{x:.3g}"))
        axis.set_xlabel("training rate / what is left (right is better)")
        axis.set_ylabel("p99 / p99 alone (down is better)")
        axis.set_title(f"{result['exec_ms']:.0f} ms, load {result['load']:g} of one core")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def cmd_colocate(args: argparse.Namespace) -> int:
    """Run the benchmark; see the module's text."""
    for module in ("torch", "onnx", *(["matplotlib"] if args.plot else [])):
        if importlib.util.find_spec(module) is None:
            raise EnvironmentProblem(
                f"the benchmark needs {module}; install it with: pip install 'cotenant[demo]'"
            )
    arms = tuple(args.arms.split(",")) if args.arms else ARMS
    unknown = [a for a in arms if a not in ARMS]
    if unknown or not {"alone", "train"} <= set(arms):
        raise EnvironmentProblem(
            f"--arms: must contain alone and train, from {', '.join(ARMS)}; wrong: {unknown}"
        )
    # To be told to stop is to be interrupted: what was started is stopped first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cores = sorted(os.sched_getaffinity(0))
    results: list[dict[str, Any]] = []
    for service_s in args.service:
        with tempfile.TemporaryDirectory(prefix="cotenant-bench-") as directory:
            bench = Bench(Path(directory), cores, arms, service_s)
            try:
                bench.start()
                print(f"service: {bench.exec_s * 1e3:.2f} ms a request on one core")
                for load in args.load:
                    result = measure(bench, load, args.rounds, args.seconds, args.seed)
                    results.append(result)
                    print(table(result, len(cores)), end="\n\n", flush=True)
            finally:
                bench.stop()
    if args.json:
        Path(args.json).write_text(json.dumps(_document(args, cores, results), allow_nan=False))
    if args.plot:
        plot(results, Path(args.plot))
    return 0


def _document(
    args: argparse.Namespace, cores: list[int], results: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "benchmark": "colocate",
        "date": time.strftime("%Y-%m-%d"),
        "cotenant": __version__,
        "machine": {
            "cores": len(cores),
            "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "options": {"rounds": args.rounds, "seconds": args.seconds, "seed": args.seed},
        "loads": _finite(results),
    }


def _finite(value: Any) -> Any:
    """What an arm does not measure is null: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def add_bench(subparsers: Any) -> None:
    """Register ``cotenant bench colocate``."""
    bench = subparsers.add_parser("bench", help="benchmarks")
    kinds = bench.add_subparsers(title="benchmarks", metavar="NAME", required=True)
    colocate = kinds.add_parser(
        "colocate",
        help="a service and a training job on one box, with and without Cotenant",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    colocate.add_argument("--rounds", type=_count, default=6)
    colocate.add_argument("--seconds", type=float, default=5.0, help="per arm and round")
    colocate.add_argument(
        "--load", type=_loads, default=[0.1, 0.25, 0.5], help="fractions of one core, e.g. 0.1,0.5"
    )
    colocate.add_argument(
        "--service",
        type=_services,
        default=[0.0],
        help="how long a request takes on one core, e.g. 2ms,14ms,40ms (default: the base model)",
    )
    colocate.add_argument("--seed", type=int, default=1)
    colocate.add_argument("--arms", help=f"some of: {','.join(ARMS)}")
    colocate.add_argument("--json", help="write raw samples and figures to this file")
    colocate.add_argument("--plot", help="draw the figures into this PNG")
    colocate.set_defaults(func=cmd_colocate)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _services(text: str) -> list[float]:
    try:
        return [parse_duration(part) / S for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _loads(text: str) -> list[float]:
    try:
        loads = [float(part) for part in text.split(",")]
    except ValueError:
        loads = []
    if not loads or any(not 0 < load < 4 for load in loads):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected fractions of one core, such as 0.1,0.25"
        )
    return loads
