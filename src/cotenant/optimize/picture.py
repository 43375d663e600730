"""A picture of a run: what each candidate may lose, against how fast it is here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from cotenant.optimize.running import Result

_COLOURS = {"candidate": "#2a7f3f", "promoted": "#2a7f3f", "refused": "#b5651d"}


def draw(result: Result, path: Path) -> str:
    """Write a PNG; returns why there is none, "" if there is."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no picture: it needs matplotlib (pip install 'cotenant[optimize]')"
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in result.rows if row.accuracy and row.ratio and row.name != "original"]
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    axes.axhspan(-1, 100 * result.max_drop, color="#2a7f3f", alpha=0.08)
    axes.axhline(100 * result.max_drop, color="#2a7f3f", linewidth=0.8)
    axes.axvline(1.0, color="#555555", linewidth=0.8)
    axes.plot([1.0], [0.0], "k*", markersize=12, label="original")
    for row in shown:
        assert row.accuracy is not None
        drop, bound = 100 * row.accuracy.drop, 100 * row.accuracy.bound
        speed, colour = 1 / row.ratio, _COLOURS.get(row.state, "#555555")
        axes.plot([speed, speed], [drop, bound], color=colour, linewidth=1.5)
        axes.plot([speed], [bound], marker="_", color=colour, markersize=9)
        axes.plot([speed], [drop], marker="o", color=colour, markersize=5 + row.size**0.5 / 400)
        label: dict[str, Any] = {"xytext": (6, -3), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(row.name, (speed, drop), **label)
    low = min([0.0, *(100 * row.accuracy.drop for row in shown if row.accuracy)])
    high = max([2 * result.max_drop, *(row.accuracy.bound for row in shown if row.accuracy)])
    axes.set_ylim(low - 0.5, min(100.0, 105 * high))
    axes.set_xlabel("speed, the original's best here = 1")
    axes.set_ylabel("accuracy lost, and its upper bound (points)")
    title = f"{result.model} version {result.version}: green is kept, brown refused"
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return ""
