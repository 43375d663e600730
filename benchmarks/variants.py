"""Requests that a smaller build answers instead of a refusal, on a live node.

A convolutional network reads digits: fixed random layers, and a last one that is fitted to them.
``cotenant optimize`` makes an int8 variant of it, checks it and promotes it. Then the same arrivals
go to a node that may serve the variant, and to one that may not, in turns: calm, a crowd that is
more than the original can answer, calm again. Per arm: the share of the crowd's requests, and of
all, that was answered in time, what was refused, and which share the variant answered.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from sklearn.datasets import load_digits

from cotenant.cli.bench.arrivals import poisson
from cotenant.cli.bench.figures import quantile
from cotenant.cli.bench.model import INPUT, request, write_model_of
from cotenant.cli.bench.rigs import NodeRig, generate
from cotenant.engines.onnx import OnnxEngine

ARMS = {"auto": "may vary", "original": "original only"}
MAX_DROP = "0.05"
"""Of accuracy, which the owner of this model would give for an answer."""
PHASES = ("calm", "crowd", "calm again")
CONFIG = """
node: {{http: "127.0.0.1:0", grpc: null, models: {models}, state_dir: state}}
services:
  - {{name: bench, objective: {{latency: {objective_ms}ms}}, instances: {cores}, variants: {arm}}}
"""


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images as the model takes them, and what they show, in an order of its own."""
    found = load_digits()
    order = np.random.default_rng(3).permutation(len(found.target))
    large = np.kron(found.images / 16.0, np.ones((INPUT[1] // 8, INPUT[2] // 8)))
    images = np.repeat(large[:, np.newaxis], INPUT[0], axis=1).astype(np.float32)
    return images[order], found.target[order]


def make_model(path: Path, seconds: float) -> None:
    """A model of about so many seconds on a core, with check data."""
    write_model_of(path, seconds)
    images, labels = digits()
    model = onnx.load(path)
    scores = model.graph.output[0]
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info("flat", 1, ["n", None]))
    features_of = path.with_name("features.onnx")
    onnx.save(model, features_of)
    engine = OnnxEngine(features_of, (1,))
    parts = [engine.run(1, {"image": images[i : i + 8]})[0] for i in range(0, len(images), 8)]
    features_of.unlink()
    features, fitted = np.concatenate(parts).astype(np.float64), len(labels) // 2
    train, wanted = features[:fitted], np.eye(10)[labels[:fitted]] * 2 - 1
    ridge = 1e-4 * np.trace(train.T @ train) / train.shape[1]
    head = np.linalg.solve(train.T @ train + ridge * np.eye(train.shape[1]), train.T @ wanted)
    del model.graph.output[:]
    model.graph.output.append(scores)
    for weight in model.graph.initializer:
        if weight.name == "head":
            weight.CopyFrom(numpy_helper.from_array(head.astype(np.float32), "head"))
    onnx.save(model, path)
    np.savez(path.with_name("check.npz"), image=images[fitted:], labels=labels[fitted:])


def optimize(models: Path) -> list[dict[str, Any]]:
    """Make and promote an int8 variant, if it is good enough; what ``cotenant variants`` says."""
    command = [sys.executable, "-m", "cotenant"]
    asked = ["optimize", "bench", "--models", str(models), "--here", "--recipes", "int8"]
    asked += ["--engines", "onnxruntime", "--max-drop", MAX_DROP, "--promote"]
    subprocess.run([*command, *asked], check=True)
    told = subprocess.run(
        [*command, "variants", "bench", "--models", str(models), "--json"],
        check=True,
        capture_output=True,
    )
    found: list[dict[str, Any]] = json.loads(told.stdout)
    if not any(variant["state"] == "promoted" for variant in found):
        raise SystemExit("int8 is not good enough here: nothing to compare")
    return found


def arrivals(calm: float, crowd: float, seconds: list[float], seed: int) -> list[list[float]]:
    """Times (s) of each phase."""
    found, start = [], 0.0
    for number, (rate, length) in enumerate(zip((calm, crowd, calm), seconds, strict=True)):
        found.append([start + t for t in poisson(rate, length, 10 * seed + number)])
        start += length
    return found


def run(rig: NodeRig, phases: list[list[float]], objective_ms: float) -> dict[str, Any]:
    """Drive a node through all phases; figures by phase, and raw samples."""
    rig.start()
    try:
        times = [t for phase in phases for t in phase]
        answer = generate(rig.port, request("bench", rig.port), times, None)
        url = f"http://127.0.0.1:{rig.port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as said:
            lines = said.read().decode().splitlines()
        reasons = rig.control.status()["plan"]["reasons"]
    finally:
        rig.stop()
    counts = {
        line.split('variant="')[1].split('"')[0]: float(line.split()[-1])
        for line in lines
        if line.startswith("cotenant_variant_answers_total")
    }
    found: dict[str, Any] = {"by_variant": counts, "last_reasons": reasons, "raw": answer}
    start = 0
    for name, phase in zip(PHASES, phases, strict=True):
        part = slice(start, start + len(phase))
        found[name] = figures(answer["status"][part], answer["latency_ms"][part], objective_ms)
        start += len(phase)
    found["all"] = figures(answer["status"], answer["latency_ms"], objective_ms)
    return found


def figures(status: list[int], latency_ms: list[float], objective_ms: float) -> dict[str, float]:
    """Shares (0..1) of what was sent; p99 of what was answered."""
    good = [ms for code, ms in zip(status, latency_ms, strict=True) if code == 200]
    return {
        "attained": sum(ms <= objective_ms for ms in good) / len(status),
        "refused": sum(code in (429, 503) for code in status) / len(status),
        "p99_ms": quantile(good, 0.99),
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ms", type=float, default=10.0, help="of an execution on a core (10)")
    parser.add_argument("--seconds", type=float, nargs=3, default=[10.0, 30.0, 30.0])
    parser.add_argument("--crowd", type=float, default=1.5, help="of what the original can do")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="cotenant-variants-") as folder:
        models = Path(folder) / "models"
        make_model(models / "bench" / "1" / "model.onnx", args.ms / 1e3)
        variants, objective_ms = optimize(models), 6 * args.ms
        most = cores / (args.ms / 1e3)
        rounds: list[dict[str, Any]] = []
        for number in range(args.rounds):
            phases = arrivals(0.25 * most, args.crowd * most, args.seconds, number)
            arms = list(ARMS)[:: 1 if number % 2 else -1]
            rounds.append({})
            for arm in arms:
                config = CONFIG.format(
                    models=models, objective_ms=objective_ms, cores=cores, arm=arm
                )
                rig = NodeRig(f"{arm}-{number}", Path(folder), config, None)
                rounds[-1][arm] = run(rig, phases, objective_ms)
                told = {p: rounds[-1][arm][p]["attained"] for p in (*PHASES, "all")}
                print(number, arm, told, rounds[-1][arm]["by_variant"], flush=True)
    report(rounds)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"variants": variants, "rounds": rounds}))


def report(rounds: list[dict[str, Any]]) -> None:
    """Medians over the rounds, with the least and the most."""
    heads = ("crowd attained", "crowd refused", "all attained")
    print(f"\n{'':14} {' '.join(head.rjust(22) for head in heads)}  by variants")
    for arm, name in ARMS.items():
        cells = []
        for phase, key in (("crowd", "attained"), ("crowd", "refused"), ("all", "attained")):
            values = [found[arm][phase][key] for found in rounds]
            middle = statistics.median(values)
            cells.append(f"{middle:.1%} [{min(values):.1%}-{max(values):.1%}]".rjust(22))
        shares = [
            1.0 - counts.get("original", 0.0) / total
            for counts in (found[arm]["by_variant"] for found in rounds)
            if (total := sum(counts.values()))
        ]
        by = f"{statistics.median(shares):.0%}" if shares else "-"
        print(f"{name:14} {' '.join(cells)}  {by}")


if __name__ == "__main__":
    main()
