"""The picture of the demo: latency, accuracy and training of all arms, and Cotenant's cores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from arms import ARMS, OBJECTIVE_MS, Box, Run
from cores import SERVED, TRAINED, Span, busy_moment, stacked
from figures import answered, between, judged, mean, percentile, right, shares, swaps
from stream import BEGINS, STAGES

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

COLOURS = {"cotenant": "#0b6e4f", "unscheduled": "#c8553d", "split": "#3d5a98"}
SERVED_COLOUR, TRAINED_COLOUR, IDLE_COLOUR = "#d1495b", "#66a182", "#eceae4"
INK, FAINT = "#22262b", "#8a9099"
BIN_S = 0.5
ROLL_S = 1.5
ZOOM_S = 0.2
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


def draw(
    path: Path,
    box: Box,
    runs: dict[str, Run],
    summaries: dict[str, dict[str, float]],
    spans: list[Span],
) -> None:
    """Write the PNG. ``spans`` (of the arm ``cotenant``) may be empty."""
    with pyplot.rc_context(STYLE):
        heights = [3.0, 2.4, 1.7] + ([2.2] if spans else [])
        size = (5.0 * max(2, len(runs)), 1.35 * sum(heights))
        figure = pyplot.figure(figsize=size, layout="constrained")
        grid = figure.add_gridspec(len(heights), len(runs), height_ratios=heights)
        for row, paint in enumerate((_latency, _accuracy, _training)):
            axes = [figure.add_subplot(grid[row, column]) for column in range(len(runs))]
            for axis, run in zip(axes, runs.values(), strict=True):
                paint(axis, box, run)
                _finish(axis, run, leftmost=axis is axes[0], lowest=row == 2)
            top = max(axis.get_ylim()[1] for axis in axes)
            for axis in axes:
                axis.set_ylim(top=top)
            if row == 0:
                for axis, name in zip(axes, runs, strict=True):
                    axis.set_title(_title(name, summaries[name]), color=COLOURS[name], pad=20)
        if spans:
            last = grid[3, :].subgridspec(1, 2, width_ratios=[1, 1.35])
            seconds = next(iter(runs.values())).seconds
            _cores_over_time(figure.add_subplot(last[0]), box, spans, seconds)
            _zoom(figure.add_subplot(last[1]), box, spans)
        figure.savefig(path, dpi=110, facecolor="white")
        pyplot.close(figure)


def _title(name: str, own: dict[str, float]) -> str:
    lost = f", {own['refused']:.0f} refused" if own["refused"] else ""
    return (
        f"{ARMS[name]}: p99 {own['p99_ms']:.1f} ms, {own['attainment']:.1%} in time{lost},\n"
        f"accuracy {own['accuracy']:.0%}, {own['steps_per_s']:.0f} training steps/s"
    )


def _finish(axis: Axes, run: Run, leftmost: bool, lowest: bool) -> None:
    """What all panels over time share: the stages, and labels where they are needed."""
    axis.set_xlim(0, run.seconds)
    for begin in BEGINS[1:]:
        axis.axvline(begin * run.seconds, color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)))
    axis.tick_params(labelleft=leftmost, labelbottom=lowest)
    if not leftmost:
        axis.set_ylabel("")
    if lowest:
        axis.set_xlabel("seconds into the stream")


def _latency(axis: Axes, _box: Box, run: Run) -> None:
    done = answered(run)
    latency = run.answers["latency_ms"]
    late = done & (latency > OBJECTIVE_MS)
    colour = COLOURS[run.arm]
    axis.plot(
        run.due[done & ~late], latency[done & ~late], ".", color=colour, markersize=2, alpha=0.35
    )
    axis.plot(run.due[late], latency[late], ".", color="#b00020", markersize=4, label="too late")
    refused = ~done
    axis.plot(run.due[refused], np.full(refused.sum(), 1.1), "|", color="black", label="refused")
    middles, tops = [], []
    for since in np.arange(0.0, run.seconds - 0.5, 1.0):
        chosen = latency[between(run, since, since + 1.0) & done]
        middles.append(since + 0.5)
        tops.append(percentile(chosen, 0.99))
    axis.plot(middles, tops, color=INK, linewidth=1.3, label="p99 of each second")
    axis.axhline(OBJECTIVE_MS, color="#b00020", linewidth=1.0)
    axis.text(
        run.seconds,
        OBJECTIVE_MS * 1.07,
        f"objective {OBJECTIVE_MS:.0f} ms",
        color="#b00020",
        ha="right",
        va="bottom",
        fontsize=8.5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85},
    )
    axis.set_yscale("log")
    axis.set_ylim(1, max(300.0, axis.get_ylim()[1]))
    axis.set_yticks([1, 3, 10, 30, 100, 300], ["1", "3", "10", "30", "100", "300"])
    axis.minorticks_off()
    axis.set_ylabel("latency of each request, ms")
    axis.legend(loc="upper left", ncols=3, fontsize=8, handletextpad=0.3, columnspacing=1.0)
    for begin, (angle, _) in zip(BEGINS, STAGES, strict=True):
        axis.annotate(
            f"{angle:.0f}°",
            (begin * run.seconds, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(2, 3),
            textcoords="offset points",
            fontsize=8.5,
            color=FAINT,
        )


def _accuracy(axis: Axes, box: Box, run: Run) -> None:
    correct, test = right(run, box.stream, box.digits), judged(run, box.stream, box.digits)
    times = np.arange(0.25, run.seconds, 0.25)
    rolling = [mean(correct[test & between(run, t - ROLL_S, t)]) * 100 for t in times]
    axis.plot(times, rolling, color=COLOURS[run.arm], linewidth=1.8)
    for version, at in swaps(run).items():
        axis.axvline(at, color=INK, linewidth=0.8)
        axis.text(at, 3, f" v{version}", fontsize=8, color=INK)
    axis.set_ylim(0, 103)
    axis.set_ylabel("accuracy, %")


def _training(axis: Axes, box: Box, run: Run) -> None:
    times, rates = [], []
    for before, after in zip(run.samples, run.samples[2:], strict=False):
        times.append((before.at + after.at) / 2)
        rates.append(shares(before, after, len(box.cores))["steps_per_s"])
    axis.fill_between(times, rates, color=COLOURS[run.arm], alpha=0.25, linewidth=0)
    axis.plot(times, rates, color=COLOURS[run.arm], linewidth=1.3)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("training, steps/s")


def _cores_over_time(axis: Axes, box: Box, spans: list[Span], seconds: float) -> None:
    bins = max(4, round(seconds / BIN_S))
    found = stacked(spans, seconds, len(box.cores), bins)
    served, trained = found[SERVED] * 100, found[TRAINED] * 100
    edges = np.linspace(0, seconds, bins + 1)
    layers = [trained, served, np.clip(100 - served - trained, 0, None)]
    base = np.zeros(bins)
    colours = (TRAINED_COLOUR, SERVED_COLOUR, IDLE_COLOUR)
    for layer, colour, label in zip(layers, colours, ("training", "serving", "idle"), strict=True):
        axis.stairs(base + layer, edges, baseline=base, fill=True, color=colour, label=label)
        base = base + layer
    axis.set_xlim(0, seconds)
    axis.set_ylim(0, 100)
    axis.set_xlabel("seconds into the stream")
    axis.set_ylabel("core time, %")
    axis.set_title("Cotenant: who had the cores", color=COLOURS["cotenant"], pad=18)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 0.99), ncols=3, fontsize=8.5)


def _zoom(axis: Axes, box: Box, spans: list[Span]) -> None:
    begin = busy_moment(spans, ZOOM_S)
    colours: dict[str, Any] = {SERVED: SERVED_COLOUR, TRAINED: TRAINED_COLOUR}
    for row, core in enumerate(box.cores):
        axis.broken_barh([(0, ZOOM_S * 1e3)], (row - 0.36, 0.72), color=IDLE_COLOUR)
        for holder, colour in colours.items():
            bars = [
                (
                    (max(span.since, begin) - begin) * 1e3,
                    (min(span.until, begin + ZOOM_S) - max(span.since, begin)) * 1e3,
                )
                for span in spans
                if span.core == core and span.holder == holder
                if span.until > begin and span.since < begin + ZOOM_S
            ]
            axis.broken_barh(bars, (row - 0.36, 0.72), color=colour, linewidth=0)
    axis.set_yticks(range(len(box.cores)), [f"core {core}" for core in box.cores])
    axis.set_ylim(len(box.cores) - 0.5, -0.5)
    axis.set_xlim(0, ZOOM_S * 1e3)
    axis.set_xlabel(f"milliseconds after second {begin:.2f} of the stream")
    axis.set_title(
        f"its busiest {ZOOM_S * 1e3:.0f} ms, from the journal: each request takes a core and"
        " gives it back",
        color=COLOURS["cotenant"],
        pad=18,
    )
