"""The figures of ``cotenant bench colocate`` as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


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
