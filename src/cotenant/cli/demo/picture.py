"""What ``cotenant demo`` shows: a picture in a terminal, lines in a pipe, a summary, a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cotenant.cli.demo.pair import OBJECTIVE_MS, RATE
from cotenant.cli.demo.tally import MOMENTS, Figures, Moment, Tally, spark
from cotenant.cli.views import DASH, number, percent, plain

STATES = {True: "on", False: "off"}
_BESIDE = 56
"""Columns that the picture takes beside its blocks."""


def picture(moments: Sequence[Moment], address: str, width: int) -> RenderableType:
    """The last minute of both ways, and the figures of now; ``width`` in columns."""
    blocks = max(8, min(MOMENTS, width - _BESIDE))
    last, shown = moments[-1], moments[-blocks:]
    found, late = last.figures, last.figures.p99_ms > OBJECTIVE_MS
    grid = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(3):
        grid.add_column(no_wrap=True)
    cores = max((len(moment.lent) for moment in shown if moment.lent), default=0)
    for core in range(cores):
        shares = [m.lent[core] if m.lent and core < len(m.lent) else math.nan for m in shown]
        now = f"{percent(shares[-1])} lent to training" if last.on else "nobody lends it"
        grid.add_row(f"core {core}", plain(spark(shares, 1.0), "blue"), plain(now))
    grid.add_row(
        "p99",
        _coloured([m.figures.p99_ms for m in shown]),
        plain(f"{_ms(found.p99_ms)} of {OBJECTIVE_MS:g} ms", "red" if late else "green"),
    )
    refused = f"{percent(found.in_time)} in time, {found.refused} refused"
    grid.add_row("requests", "", plain(f"{RATE:g} a second: {refused}"))
    rates = [moment.steps_per_s for moment in shown]
    known = [rate for rate in rates if not math.isnan(rate)]
    grid.add_row(
        "training",
        plain(spark(rates, max(known, default=1.0)), "magenta"),
        plain(f"{number(last.steps_per_s)} steps/s"),
    )
    state = plain(f"scheduling {STATES[last.on]}", "bold green" if last.on else "bold red")
    keys = Text(f"s switches it {STATES[not last.on]} · q or Ctrl-C ends", "dim")
    return Panel(
        Group(grid, Text(), Text(f"dashboard: http://{address}/", "cyan"), keys),
        title=Text.assemble("cotenant demo · ", state),
        width=min(width, blocks + _BESIDE),
    )


def _coloured(values: Sequence[float]) -> Text:
    """Latencies against the objective; what is late is red, and as high as can be."""
    text = Text()
    for value in values:
        late = value > OBJECTIVE_MS
        text.append(spark([min(value, OBJECTIVE_MS)], OBJECTIVE_MS), "red" if late else "green")
    return text


def line(moment: Moment, seconds: float) -> str:
    """The same for a pipe."""
    found = moment.figures
    parts = [
        f"{seconds:5.1f} s",
        f"scheduling {STATES[moment.on]:<3}",
        f"p99 {_ms(found.p99_ms)} (objective {OBJECTIVE_MS:g} ms)",
        f"in time {percent(found.in_time)}",
        f"refused {found.refused}",
        f"training {number(moment.steps_per_s)} steps/s",
    ]
    if moment.lent is not None:
        shares = " ".join(percent(share) for share in moment.lent) or DASH
        parts.append(f"cores lent to it {shares}")
    return " · ".join(parts)


def summary(tallies: Mapping[bool, Tally]) -> RenderableType:
    """All that was measured, both ways beside each other."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("scheduling")
    for name in ("seconds", "answered", "p50", "p99", "in time", "refused", "steps/s"):
        table.add_column(name, justify="right")
    for on, tally in tallies.items():
        if tally.seconds:
            found: Figures = tally.whole(OBJECTIVE_MS)
            table.add_row(
                STATES[on],
                number(tally.seconds, 0),
                number(found.answered, 0),
                _ms(found.p50_ms),
                _ms(found.p99_ms),
                percent(found.in_time),
                number(found.refused, 0),
                number(tally.steps_per_s),
            )
    return table


def plot(path: Path, moments: Sequence[Moment]) -> None:
    """A PNG of the whole run. Raises ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, sharex=True, figsize=(9, 6), layout="constrained")
    times = [moment.at for moment in moments]
    above: Any
    for above in axes:
        for before, after in pairwise(moments):
            if not before.on:
                above.axvspan(before.at, after.at, color="0.9", lw=0)
    axes[0].plot(times, [moment.figures.p99_ms for moment in moments], color="tab:red")
    axes[0].axhline(OBJECTIVE_MS, color="black", ls=":")
    axes[0].set(yscale="log", ylabel="p99, ms", title="cotenant demo; grey: scheduling off")
    axes[1].plot(times, [moment.steps_per_s for moment in moments], color="tab:purple")
    axes[1].set(ylabel="training, steps/s")
    shares = [sum(m.lent) / len(m.lent) if m.lent else math.nan for m in moments]
    axes[2].plot(times, shares, color="tab:blue")
    axes[2].set(ylim=(0, 1), ylabel="cores lent", xlabel="seconds")
    figure.savefig(path)
    pyplot.close(figure)


def _ms(value: float) -> str:
    return DASH if math.isnan(value) else f"{number(value)} ms"
