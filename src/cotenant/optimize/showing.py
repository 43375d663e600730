"""The table of a run, for a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cotenant.domain.units import MS, format_bytes
from cotenant.domain.variant import Compared, Timing
from cotenant.optimize.running import Result, Row

_STYLES = {"candidate": "green", "promoted": "bold green", "refused": "yellow", "skipped": "dim"}

_COLUMNS = (
    "VARIANT",
    "STATE",
    "ACCURACY",
    "DROP ≤ BOUND",
    "TIME",
    "SIZE",
    "ENGINE UNITS×ROWS: MS (ORIGINAL)",
)


def text(value: str, style: str = "") -> Text:
    """Without control characters: names and reasons come from elsewhere."""
    return Text("".join(c if c.isprintable() else "?" for c in value), style=style)


def accuracy(found: Compared | None) -> tuple[str, str]:
    """What it reaches, and what it loses and may lose."""
    if found is None:
        return "–", "–"
    return f"{found.value:.4f}", f"{found.drop:+.4f} ≤ {found.bound:.4f}"


def times(profile: Sequence[Timing]) -> str:
    """``1×8 4.2 ms (9.1)``: units, rows, time, and the original's."""
    lines = []
    for t in profile:
        beside = f" ({t.original_ns / MS:.3g})" if t.original_ns else ""
        lines.append(f"{t.engine} {t.units}×{t.rows}: {t.ns / MS:.3g}{beside}")
    return "\n".join(lines) or "–"


def table(rows: Sequence[Row]) -> RenderableType:
    """A line for each candidate, and reasons below."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for title in _COLUMNS:
        made.add_column(title, no_wrap=True)
    notes: list[RenderableType] = []
    for row in rows:
        style = _STYLES.get(row.state, "")
        reached, bound = accuracy(row.accuracy)
        made.add_row(
            text(row.name),
            text(row.state, style),
            reached,
            bound,
            f"{row.ratio:.2f}×" if row.ratio else "–",
            format_bytes(row.size) if row.size else "–",
            text_lines(times(row.profile)),
        )
        said = "; ".join(filter(None, (row.recipe, row.why)))
        if said:
            notes.append(text(f"{row.name}: {said}", style))
    return Group(made, Text(), *notes)


def text_lines(value: str) -> Text:
    """Several lines as they are, each without control characters."""
    return Text("\n").join(text(line) for line in value.split("\n"))


def result_view(result: Result) -> RenderableType:
    """All of a run."""
    head = (
        f"{result.model} version {result.version}: made with {result.making} rows, judged by "
        f"{result.judging} others; a drop of {result.max_drop:g} is allowed, and what may be lost "
        "with 95% confidence decides"
    )
    return Group(text(head), Text(), table(result.rows))


def show(view: Any, stream: Any) -> None:
    """Print, as wide as it needs to be where that is no terminal."""
    width = None if stream.isatty() else 2000
    Console(file=stream, width=width, markup=False, highlight=False, emoji=False).print(view)
