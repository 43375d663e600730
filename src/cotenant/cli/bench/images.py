"""The service of the benchmark that answers at once: a small convolutional network."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from cotenant.cli.bench import arrivals
from cotenant.cli.bench.figures import quantile, ratio_text, without_nan
from cotenant.cli.bench.model import request, write_model, write_model_of
from cotenant.cli.bench.rigs import NodeRig, generate

OBJECTIVE_MS = 100.0
SLACK = 20
"""The objective is at least so many times the length that was asked for (``--service``). With less,
what is measured beside long requests is who refuses more."""


class Images:
    """A ``Service`` whose requests take about so many seconds on one core; 0: as the base model."""

    patterns = arrivals.PATTERNS
    compared = ("p99",)
    start_s = 60.0

    def __init__(self, service_s: float = 0.0) -> None:
        self._service_s = service_s
        self._objective_ms = max(OBJECTIVE_MS, SLACK * service_s * 1e3)
        self._spacing = max(0.02, 2 * service_s)
        """Seconds between requests while their execution is measured: none waits for another."""
        self.exec_s = 0.0

    def place(self, models: Path) -> None:
        model = models / "bench" / "1" / "model.onnx"
        if self._service_s:
            write_model_of(model, self._service_s)
        else:
            write_model(model)

    def config(self) -> str:
        return f"objective: {{latency: {self._objective_ms:g}ms}}, batch: {{max: 8}}, threads: 1"

    def calibrate(self, nodes: list[NodeRig], core: int) -> None:
        """Measure the execution time that loads are fractions of."""
        node = nodes[0]
        times = [self._spacing * i for i in range(60)]
        passes = []
        for _ in range(5):
            before = node.executed()
            generate(node.port, request("bench", node.port), times, core)
            seconds, count = (b - a for a, b in zip(before, node.executed(), strict=True))
            passes.append(seconds / count)
        self.exec_s = statistics.median(passes)

    def rate(self, load: float) -> float:
        return load / self.exec_s

    def ask(self, node: NodeRig, times: list[float], _seed: int, core: int) -> dict[str, Any]:
        return generate(node.port, request("bench", node.port), times, core)

    def nothing(self) -> dict[str, Any]:
        return {"latency_ms": [], "status": [], "lag_ms": [], "cpu_s": 0.0}

    def summarise(self, raw: dict[str, Any]) -> dict[str, float]:
        """Attainment counts refusals as missed."""
        served = [x for x, s in zip(raw["latency_ms"], raw["status"], strict=True) if s == 200]
        total = len(raw["status"])
        met = sum(x <= self._objective_ms for x in served)
        return {
            "p50_ms": quantile(served, 0.50),
            "p95_ms": quantile(served, 0.95),
            "p99_ms": quantile(served, 0.99),
            "attainment": met / total if total else float("nan"),
            "refused": float(total - len(served)),
        }

    def about(self) -> dict[str, Any]:
        return {"exec_ms": self.exec_s * 1e3, "objective_ms": self._objective_ms}

    def said(self) -> str:
        return f"service: {self.exec_s * 1e3:.2f} ms a request on one core"

    def table(self, result: dict[str, Any], cores: int) -> str:
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
                f"{ratio_text(ratio, 'p99_vs_alone'):<20}{ratio_text(ratio, 'train_vs_left'):<20}"
            )
        return without_nan(lines)
