"""A service at half of what it can do, beside a training job: what does either lose?

The processes of all arms are started once; then arms take turns, in another order each round.
"""

from __future__ import annotations

import importlib.util
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from driver import open_device
from processes import Job
from record import US, Record, Setting, summary

LOAD = 0.5
BOUNDS_US = {"gated": 200, "loose": 1000}
"""Processes behind a gate, and how much work each may have in flight."""
WINDOW_S, SETTLE_S = 2.5, 0.3
LEAST_WINDOW_S = 0.3
ROLES = ("service", "training")
CALIBRATING = 200
"""Requests, one after the other, the second half of which says how long one takes."""


@dataclass(frozen=True)
class Arm:
    """Who runs where. ``server``: the process that serves, on a stream of kind ``stream``;
    ``trainer``: the one that trains. With ``gate`` the trainer's is closed while requests are
    unanswered, and unless ``wait`` is off a request runs once it is drained."""

    server: str = ""
    trainer: str = ""
    stream: str = "plain"
    gate: bool = False
    wait: bool = True


ARMS = {
    "alone": Arm(server="node"),
    "train": Arm(trainer="other"),
    "train_gated": Arm(trainer="gated"),
    "train_loose": Arm(trainer="loose"),
    "slicing": Arm(server="node", trainer="other"),
    "priority": Arm(server="both", trainer="both", stream="priority"),
    "green": Arm(server="both", trainer="both", stream="green"),
    "gate": Arm(server="node", trainer="gated", gate=True),
    "gate_loose": Arm(server="node", trainer="loose", gate=True),
    "gate_at_once": Arm(server="node", trainer="gated", gate=True, wait=False),
    "gate_green": Arm(server="node", trainer="gated", stream="green", gate=True),
}
"""
alone, train       one of both
train_gated, _loose  behind a gate that stays open, by its bound
slicing            two processes, nothing else
priority, green    one process: streams with priorities; halves of the multiprocessors
gate, gate_loose   the gate is closed for requests
gate_at_once       as gate, but a request does not wait for the drain
gate_green         as gate, and the service has half of the multiprocessors
"""


@dataclass
class Bench:
    """The processes, and which arms they can do."""

    jobs: dict[str, Job]
    torch: bool
    service_ms: float = 0.0
    arms: dict[str, Arm] = field(default_factory=dict)


def run(setting: Setting, record: Record) -> None:
    """As many rounds as there is time for, one at least."""
    device = open_device()
    torch = not device.standin and _torch()
    record.figure("tenants", "PyTorch" if torch else "chains of kernels")
    jobs: dict[str, Job] = {}
    try:
        for name in ("node", "other", "both"):
            jobs[name] = Job(setting)
        bench = Bench(jobs, torch)
        _prepare(bench, setting, record)
        _rounds(bench, setting, record)
    finally:
        for job in jobs.values():
            job.close()


def _torch() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


# --- who takes part ---------------------------------------------------------------------------


def _prepare(bench: Bench, setting: Setting, record: Record) -> None:
    jobs, torch = bench.jobs, bench.torch
    for job in jobs.values():
        job.answer()
    for name, bound in BOUNDS_US.items():
        path = Path(setting.folder, f"colocate-{name}")
        jobs["node"].ask("page", name=name, path=str(path), bound_ns=bound * US)
        jobs[name] = Job(setting, path)
    for name in BOUNDS_US:
        jobs[name].answer()
    asked = [("node", "service", "plain"), ("node", "service", "green")]
    asked += [(name, "training", "plain") for name in ("other", *BOUNDS_US)]
    asked += [("both", role, kind) for kind in ("priority", "green") for role in ROLES]
    for process, role, kind in asked:  # all processes at once: most of it is loading libraries
        jobs[process].tell(role, kind=kind, torch=torch)
    able = set()
    for process, role, kind in asked:
        name = f"{role}.{process}.{kind}"
        with record.part(name):
            found = jobs[process].answer(max(5.0, record.left_s))
            record.figure(f"made.{name}.processors", found["processors"])
            able.add(name)
    if "service.node.plain" in able:
        again = jobs["node"].ask("service", 30, kind="plain", torch=torch, times=CALIBRATING)
        warm = again["ms"][CALIBRATING // 2 :]
        bench.service_ms = statistics.median(warm)
        record.sampled("request_ms", warm)
        record.figure("service_ms", bench.service_ms)
    for name in BOUNDS_US:
        if f"training.{name}.plain" in able:
            jobs["node"].ask("watch", name=name, pid=jobs[name].pid)
    for arm, how in ARMS.items():
        needed = [f"service.{how.server}.{how.stream}"] if how.server else []
        kind = how.stream if how.trainer == "both" else "plain"
        needed += [f"training.{how.trainer}.{kind}"] if how.trainer else []
        missing = [each for each in needed if each not in able]
        if missing:
            record.without(arm, f"it lacks {missing[0]}: {record.why.get(missing[0], '')}")
        else:
            bench.arms[arm] = how


# --- rounds -----------------------------------------------------------------------------------


def _rounds(bench: Bench, setting: Setting, record: Record) -> None:
    rounds: list[dict[str, Any]] = []
    window = _window(bench, record)
    record.figure("window_s", window)
    took = 0.0
    while not rounds or record.left_s > 1.1 * took:
        begun = time.monotonic()
        chance = random.Random(setting.seed + len(rounds))
        times = _arrivals(bench, chance, window)
        found: dict[str, Any] = {}
        for arm in chance.sample(list(bench.arms), len(bench.arms)):
            with record.part(arm):
                record.need(window)
                found[arm] = _take(bench, bench.arms[arm], times, window)
        rounds.append(found)
        record.samples["rounds"] = rounds
        _figures(record, rounds, list(bench.arms))
        took = time.monotonic() - begun
        if not found:
            break


def _window(bench: Bench, record: Record) -> float:
    """Seconds of an arm, so that three rounds fit."""
    each = record.left_s / (3.5 * max(1, len(bench.arms))) - SETTLE_S
    return max(LEAST_WINDOW_S, min(WINDOW_S, each))


def _arrivals(bench: Bench, chance: random.Random, window: float) -> list[float]:
    """Poisson, at this load: the same times for all arms of a round."""
    times, at = [], 0.0
    while bench.service_ms and (at := at + chance.expovariate(_rate(bench))) < window:
        times.append(at)
    return times


def _rate(bench: Bench) -> float:
    return LOAD * 1e3 / bench.service_ms


def _take(bench: Bench, arm: Arm, times: list[float], window: float) -> dict[str, Any]:
    """One arm of one round: raw samples."""
    found: dict[str, Any] = {}
    trainer = bench.jobs.get(arm.trainer)
    if trainer:
        trainer.ask("train", kind=arm.stream if arm.trainer == "both" else "plain")
        time.sleep(SETTLE_S)
        before = trainer.ask("steps")
    try:
        if arm.server:
            gate = arm.trainer if arm.gate else ""
            how = {"kind": arm.stream, "gate": gate, "wait": arm.wait, "most_s": 2 * window}
            served = bench.jobs[arm.server].ask("serve", 3 * window + 30, times=times, **how)
            for name in ("latencies_ms", "drains_us"):
                served[name] = [round(value, 4) for value in served[name]]
            found |= served
        else:
            time.sleep(window)
    finally:
        if trainer:
            after = trainer.ask("steps")
            trainer.ask("rest")
    if trainer:
        found["steps_s"] = (after["steps"] - before["steps"]) / (after["at"] - before["at"])
    return found


# --- figures ----------------------------------------------------------------------------------


def _figures(record: Record, rounds: list[dict[str, Any]], arms: list[str]) -> None:
    """Of all rounds so far: a value a round, ratios within rounds."""
    for arm in arms:
        values: dict[str, list[float]] = {}
        for each in rounds:
            for name, value in _of_round(each, arm).items():
                values.setdefault(name, []).append(value)
        for name, samples in values.items():
            record.figures.setdefault("arms", {}).setdefault(arm, {})[name] = summary(samples)
        drains = [us for each in rounds for us in each.get(arm, {}).get("drains_us", [])]
        if drains:
            record.figures["arms"][arm]["drain_us"] = summary(drains)
    record.figure("rounds", len(rounds))


def _of_round(found: dict[str, Any], arm: str) -> dict[str, float]:
    own, alone, train = (found.get(name, {}) for name in (arm, "alone", "train"))
    values: dict[str, float] = {}
    latencies = summary(own.get("latencies_ms", []))
    beside = summary(alone.get("latencies_ms", []))
    if latencies["n"]:
        values |= {"p50_ms": latencies["median"], "p99_ms": latencies["p99"]}
        values["unanswered"] = own["unanswered"]
        values["busy"] = own["busy_s"] / own["wall_s"]
        if beside["n"]:
            values["p50_vs_alone"] = latencies["median"] / beside["median"]
            values["p99_vs_alone"] = latencies["p99"] / beside["p99"]
    if "steps_s" in own:
        values["steps_s"] = own["steps_s"]
        left = train.get("steps_s", 0.0)
        if latencies["n"] and alone:
            left *= 1 - alone["busy_s"] / alone["wall_s"]
        if left > 0:
            values["train_vs_left"] = own["steps_s"] / left
    return values
