"""The arms of the colocation benchmark: their nodes and jobs, and the turns that they take."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any, Protocol

from cotenant.cli.bench import arrivals
from cotenant.cli.bench.figures import aggregate, ratios
from cotenant.cli.bench.rigs import (
    CotenantJob,
    Job,
    NodeRig,
    PlainJob,
    busy_s,
    steal_s,
    wait_for_steps,
)

ARMS = (
    *("alone", "cotenant_alone", "train", "unmanaged", "nice", "split", "slicing"),
    *("cotenant", "cotenant_plain"),
)
SETTLE_S = 0.3
WARM_STEPS = 5


class Service(Protocol):
    """What is served in all arms, how it is asked, and what is made of its answers."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """How requests arrive, in one round after the other."""

    @property
    def compared(self) -> tuple[str, ...]:
        """Latencies (without ``_ms``) that are given by those of the arm ``alone``."""

    @property
    def start_s(self) -> float:
        """Within which a node is ready to serve it."""

    def place(self, models: Path) -> None:
        """Put the model, by the name ``bench``, into a directory of models."""

    def config(self) -> str:
        """Its entry of ``services``, but for the name."""

    def calibrate(self, nodes: list[NodeRig], core: int) -> None:
        """Measure what loads are fractions of, on the first of the nodes; warm up all of them."""

    def rate(self, load: float) -> float:
        """Requests/s of a load."""

    def ask(self, node: NodeRig, times: list[float], seed: int, core: int) -> dict[str, Any]:
        """Ask a node at these times: raw samples."""

    def nothing(self) -> dict[str, Any]:
        """What ``ask`` gives where nobody is asked."""

    def summarise(self, raw: dict[str, Any]) -> dict[str, float]:
        """Figures of raw samples."""

    def about(self) -> dict[str, Any]:
        """What was measured and chosen of it, for the report."""

    def said(self) -> str:
        """The same as a line for people."""

    def table(self, result: dict[str, Any], cores: int) -> str:
        """The figures of one load for people."""


class Bench:
    """Nodes and jobs of all arms, started once; arms then take turns."""

    def __init__(
        self, directory: Path, cores: list[int], arms: tuple[str, ...], service: Service
    ) -> None:
        self.cores = cores
        self.arms = arms
        self.service = service
        self._directory = directory
        self._models = directory / "models"
        self.nodes: dict[str, NodeRig] = {}
        self.jobs: dict[str, Job] = {}

    def start(self) -> None:
        """Start every node and job; jobs are left suspended."""
        self.service.place(self._models)
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
            node.start(self.service.start_s)
        nodes = list(dict.fromkeys([self.nodes.get("alone"), *self.nodes.values()]))
        self.service.calibrate([node for node in nodes if node is not None], self.cores[-1])
        for arm in self.arms:
            self._start_job(arm, rest, n)

    def _node(self, name: str, device: str, policy: str, cores: set[int] | None) -> NodeRig:
        config = f"""
node: {{state_dir: ./state, models: {self._models}, http: "127.0.0.1:0", grpc: null}}
devices: [{{kind: cpu, {device}}}]
{policy}
services: [{{name: bench, {self.service.config()}}}]
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

    def run(self, arm: str, times: list[float], seconds: float, seed: int) -> dict[str, Any]:
        """One arm once: raw samples and counters."""
        from cotenant.cli.bench.train_job import read_counter

        node, job = self.nodes.get(arm), self.jobs.get(arm)
        if job is not None:
            job.resume()
        time.sleep(SETTLE_S)
        cpu = node.service_cpu_s() if node else 0.0
        own = job.cpu_s() if job else 0.0
        stolen, busy, began = steal_s(), busy_s(), time.monotonic()
        first = read_counter(job.counter) if job else (0, 0)
        if node is not None:
            result = self.service.ask(node, times, seed, self.cores[-1])
        else:
            result = self.service.nothing()
        time.sleep(max(0.0, began + seconds - time.monotonic()))
        last = read_counter(job.counter) if job else (0, 0)
        result["wall_s"] = time.monotonic() - began
        result["generator_cpu_s"] = result.pop("cpu_s")
        result["service_cpu_s"] = (node.service_cpu_s() - cpu) if node else 0.0
        result["job_cpu_s"] = (job.cpu_s() - own) if job else 0.0
        known = sum(result[f"{who}_cpu_s"] for who in ("generator", "service", "job"))
        result["others_cpu_s"] = max(0.0, busy_s() - busy - known)
        result["steal_s"] = steal_s() - stolen
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


def measure(bench: Bench, load: float, rounds: int, seconds: float, seed: int) -> dict[str, Any]:
    """All arms over all rounds at one load."""
    service = bench.service
    rate = service.rate(load)
    per_round: list[dict[str, Any]] = []
    for index in range(rounds):
        pattern = service.patterns[index % len(service.patterns)]
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
            raw[arm] = bench.run(arm, times, seconds, seed + index)
        figures = {arm: _figures(service, raw[arm]) for arm in bench.arms}
        per_round.append(
            {
                "pattern": pattern,
                "raw": raw,
                "arms": figures,
                "ratios": ratios(service.compared, figures, raw, len(bench.cores)),
            }
        )
    print(" " * 70, end="\r")
    raw = {arm: _joined([each["raw"][arm] for each in per_round]) for arm in bench.arms}
    figures = {arm: _figures(service, raw[arm]) for arm in bench.arms}
    compared = ratios(service.compared, figures, raw, len(bench.cores))
    return {
        "load": load,
        "rate": rate,
        **service.about(),
        "rounds": per_round,
        **aggregate(bench.arms, per_round),
        "together": {"arms": figures, "ratios": compared},
    }


def _joined(raws: list[dict[str, Any]]) -> dict[str, Any]:
    """Raw samples of all rounds as if they were one: a single round may have few."""
    joined: dict[str, Any] = {
        key: [x for raw in raws for x in raw[key]]
        if isinstance(first, list)
        else sum(raw[key] for raw in raws)
        for key, first in raws[0].items()
    }
    return joined | {"train_rate": joined["train_rate"] / len(raws)}


def _figures(service: Service, raw: dict[str, Any]) -> dict[str, float]:
    """Of one arm in one round; ``others``: cores that were busy with other programs."""
    return service.summarise(raw) | {
        "train_rate": raw["train_rate"],
        "steal_s": raw["steal_s"],
        "others": raw["others_cpu_s"] / raw["wall_s"],
    }
