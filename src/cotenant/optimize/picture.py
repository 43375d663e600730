"""A picture of a run: what each candidate may lose, against how fast it is here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Final

from cotenant.domain.workload import ORIGINAL
from cotenant.optimize.running import Result, Row

_KEPT: Final = "#2a7f3f"
_REFUSED: Final = "#b5651d"
_SHOWN: Final = 5
"""Times the drop that is allowed: what loses more stands at the upper edge."""


def draw(result: Result, path: Path) -> str:
    """Write a PNG; returns why there is none, "" if there is."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no picture: it needs matplotlib (pip install 'cotenant[optimize]')"
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in result.rows if row.accuracy and row.ratio and row.name != ORIGINAL]
    lows = [100 * row.accuracy.drop for row in rows if row.accuracy]
    allowed = 100 * result.max_drop
    top, low = _SHOWN * max(allowed, 0.2), min([0.0, *lows])
    figure, axes = plt.subplots(figsize=(9, 5.4), layout="constrained")
    axes.set_ylim(low - 0.1 * (top - low), top * 1.12)
    axes.axhspan(-200, allowed, color=_KEPT, alpha=0.08)
    axes.axhline(allowed, color=_KEPT, linewidth=0.8)
    axes.axvline(1.0, color="#555555", linewidth=0.8)
    axes.plot([1.0], [0.0], "k*", markersize=12)
    for number, row in enumerate(sorted(rows, key=lambda row: -row.ratio)):
        _point(axes, row, top, number)
    axes.set_xlabel("speed (the original's best here is 1)")
    axes.set_ylabel("accuracy lost, and what may be lost, in points")
    axes.set_title(
        f"{result.model} version {result.version}: kept in green, refused in brown; "
        f"triangles lose more than {top:g} points",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return ""


def _point(axes: Any, row: Row, top: float, number: int) -> None:
    """A candidate: what it lost and, above, the bound."""
    assert row.accuracy is not None
    kept = row.state in ("candidate", "promoted")
    colour, speed = (_KEPT if kept else _REFUSED), 1 / row.ratio
    drop, bound = 100 * row.accuracy.drop, 100 * row.accuracy.bound
    over = drop > top
    if over:
        drop = top
        axes.plot([speed], [drop], marker="^", color=colour, markersize=6)
    else:
        axes.plot([speed, speed], [drop, min(bound, top)], color=colour, linewidth=1.5)
        axes.plot([speed], [min(bound, top)], marker="_", color=colour, markersize=9)
        axes.plot([speed], [drop], marker="o", color=colour, markersize=6)
    axes.annotate(
        row.name,
        (speed, drop),
        xytext=(4, -4 if over else (-9, 5)[number % 2]),
        textcoords="offset points",
        fontsize=8 if kept else 6,
        color=colour,
        weight="bold" if kept else "normal",
        rotation=0 if kept else -30 if over else 25,
        rotation_mode="anchor",
    )
