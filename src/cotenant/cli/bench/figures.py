"""What samples come to: quantiles, ratios between arms, medians over rounds."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable
from typing import Any


def quantile(samples: list[float], share: float) -> float:
    """The nearest-rank quantile; nan without samples."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def middle(values: list[float]) -> float:
    """Median of the values that are numbers."""
    numbers = [v for v in values if not math.isnan(v)]
    return statistics.median(numbers) if numbers else float("nan")


def spread(values: list[float]) -> list[float]:
    """Quartiles of the values that are numbers."""
    numbers = sorted(v for v in values if not math.isnan(v))
    return [quantile(numbers, 0.25), quantile(numbers, 0.75)] if numbers else []


def ratios(
    compared: Iterable[str],
    figures: dict[str, dict[str, float]],
    raw: dict[str, Any],
    cores: int,
) -> dict[str, dict[str, float]]:
    """For each arm of one round: its latencies (``compared``: p99 for p99_ms) by those of the
    service alone, and its training by what the service leaves."""
    alone = raw["alone"]
    used = alone["service_cpu_s"] + alone["generator_cpu_s"]
    found: dict[str, dict[str, float]] = {}
    for arm, own in figures.items():
        found[arm] = {}
        for name in compared:
            for other in ("alone", "cotenant_alone"):
                beside = figures.get(other, figures["alone"])
                found[arm][f"{name}_vs_{other}"] = own[f"{name}_ms"] / beside[f"{name}_ms"]
        left = figures["train"]["train_rate"] * (1.0 - used / (raw[arm]["wall_s"] * cores))
        found[arm]["train_vs_left"] = own["train_rate"] / left if left > 0 else float("nan")
    return found


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


def ratio_text(ratio: dict[str, Any], key: str) -> str:
    """A ratio and its quartiles."""
    if not ratio[key] or math.isnan(ratio[key]):
        return "-"
    low, high = ratio[f"{key}_quartiles"]
    return f"{ratio[key]:.2f} [{low:.2f}-{high:.2f}]"


def without_nan(lines: list[str]) -> str:
    """A table for people: what an arm does not measure is a dash."""
    return re.sub(r"\bnan\b%?", lambda found: "-".rjust(len(found[0])), "\n".join(lines))


def finite(value: Any) -> Any:
    """What an arm does not measure is null: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
