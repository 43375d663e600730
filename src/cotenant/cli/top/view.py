"""The picture of ``top``, readable from 80 columns on: what a line has no room for stands below of
the row that is selected, and Enter says it all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from cotenant.cli import views
from cotenant.cli.top.state import Mode, Row, Top
from cotenant.cli.views import number, percent, plain, seconds
from cotenant.telemetry.explain import Explanation

NARROW: Final = 80
BARS: Final = "▁▂▃▄▅▆▇█"
PARTITIONS: Final = 8
"""Lines of partitions at most."""
FOOTER: Final = 2
PLANS: Final = 2
"""In an explanation of one row."""
_KEYS: Final = "↑↓  s sort: {}  / filter  h hold  c cancel  l log  ⏎ explain  q quit"
_BACK: Final = "q back"


class Picture:
    """A body, cut to the height that there is, above a footer; ``end``: its end is what is kept."""

    def __init__(self, body: RenderableType, footer: Sequence[Text], end: bool = False) -> None:
        self._body = body
        self._footer = footer
        self._end = end

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = max(1, (options.height or console.height) - len(self._footer))
        lines = console.render_lines(self._body, options.update(height=None), pad=False)
        lines = lines[-height:] if self._end else lines[:height]
        lines += [[] for _ in range(height - len(lines))]
        for line in lines:
            yield from line
            yield Segment.line()
        for text in self._footer:
            (line, *_) = console.render_lines(text, options.update(height=None), pad=False)
            yield from line
            yield Segment.line()


def picture(
    top: Top, status: dict[str, Any], now: float, size: tuple[int, int], problem: str = ""
) -> Picture:
    """The list; ``size``: columns and lines. ``problem``: why the figures are old, if they are."""
    width, height = size
    shown = top.rows
    services = [row for row in shown if row.kind == "service"]
    jobs = [row for row in shown if row.kind == "job"]
    headline = views.headline(status)
    if top.filter:
        headline.append_text(plain(f"  filter: {top.filter}", "yellow"))
    head: list[RenderableType] = [headline, _partitions(status, width), Text()]
    head += [_services(top, services, now, width)] if services else [_none(top, "services")]
    for row in services:
        if row.figures.get("state") not in ("READY", None):
            text = f"  {row.name} is {row.figures['state']}: {row.figures.get('reason') or ''}"
            head.append(_line(text, "red" if row.figures["state"] == "UNAVAILABLE" else "yellow"))
    taken = 4 + min(PARTITIONS, len(status.get("partitions") or ())) + len(head) + len(services)
    room = max(3, height - taken - FOOTER - 3)
    body = [*head, Text(), _jobs(top, _around(jobs, top.selected, room), now, width)]
    if not jobs:
        body[-1] = _none(top, "jobs")
    body += [Text(), views.plan_line(status), *views.journal_lines(status)]
    return Picture(Group(*body), [_detail(top, problem), _keys(top)])


def page(title: str, body: RenderableType, end: bool = False, note: str = _BACK) -> Picture:
    """A log (of which the ``end`` is shown), or an explanation."""
    return Picture(body, [_line(title, "bold"), _line(note, "dim")], end)


def log_text(data: bytes) -> Text:
    """The end of a log as it is shown: no control characters."""
    lines = data.decode(errors="replace").splitlines()
    return Text("\n").join(plain(line.expandtabs()) for line in lines)


def concerning(told: Explanation, row: Row) -> Explanation:
    """What of an explanation is about a row, and the last plans: the rest would not be seen."""

    def about(subject: str) -> bool:
        return subject in (row.id, row.name) or subject.startswith((f"{row.name}#", f"{row.id} "))

    def incidents(found: Iterable[Any]) -> list[Any]:
        return [one for one in found if about(one.subject)]

    mine = row.kind == "service"
    return msgspec.structs.replace(
        told,
        plans=told.plans[-PLANS:],
        refusals=[r for r in told.refusals if mine and r.service == row.name],
        slowest=[s for s in told.slowest if mine and s.service == row.name],
        pauses=[p for p in told.pauses if mine and row.name in p.services],
        jobs=incidents(told.jobs),
        workers=incidents(told.workers),
        services=incidents(told.services),
        devices=[],
        layouts=[],
    )


def explanation(row: Row, told: Explanation) -> RenderableType:
    """Why a row is as it is: what it says of itself, then what the journal says of it."""
    figures = row.figures
    notes = [views.job_note(figures)] if row.kind == "job" else list(figures.get("notes") or ())
    if row.kind != "job" and figures.get("reason"):
        notes.insert(0, str(figures["reason"]))
    state = plain(f"{row.kind} {row.name} is {figures.get('state')}", "bold")
    lines = [plain(f"  {note}") for note in notes if note]
    return Group(state, *lines, views.explain_view(concerning(told, row)))


def sparkline(cells: Sequence[float | None], objective: float | None = None) -> Text:
    """A bar for each value, as high as it is beside the largest (or, at least, the objective); red
    over that, a blank where nothing is known."""
    most = max([value for value in cells if value is not None] + [objective or 0.0])
    line = Text()
    for value in cells:
        if value is None:
            line.append(" ")
            continue
        index = round(value / most * (len(BARS) - 1)) if most > 0 else 0
        over = objective is not None and value > objective
        line.append(BARS[max(0, min(index, len(BARS) - 1))], "red" if over else "cyan")
    return line


# --- parts --------------------------------------------------------------------------------------


def _line(text: str, style: str = "") -> Text:
    """One line, cut where the terminal ends."""
    line = plain(text, style)
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _table(*columns: tuple[str, int | None]) -> Table:
    """A table of exactly these widths; None takes the rest. Names that begin with ``>`` are
    aligned to the right."""
    table = Table(
        box=None, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 1, 0, 0)
    )
    for name, width in columns:
        table.add_column(
            name.lstrip(">"),
            justify="right" if name.startswith(">") else "left",
            width=width,
            no_wrap=True,
            overflow="ellipsis",
        )
    return table


def _widths(width: int) -> tuple[int, int]:
    """Columns for names, and for a minute of figures."""
    more = max(0, width - NARROW) // 5
    return 14 + min(24, more), 10 + min(50, more)


def _marked(top: Top, row: Row) -> str:
    return "reverse" if row is top.selected else ""


def _partitions(status: dict[str, Any], width: int) -> RenderableType:
    partitions = status.get("partitions") or []
    names, colours = views.job_names(status), views.colours_of(status)
    table = _table(("PARTITION", 12), ("RUNS NOW", _widths(width)[0]), ("BUSY", 20), ("BY", None))
    for found in partitions[:PARTITIONS]:
        busy = {k: v or 0.0 for k, v in (found.get("busy") or {}).items()}
        holder = views.holder_name(str(found.get("holder") or "idle"), names)
        bar, shares = views.busy_bar(busy, colours), views.shares_of(busy, names, colours)
        table.add_row(plain(found.get("id")), plain(holder), bar, shares)
    more = len(partitions) - PARTITIONS
    return Group(table, plain(f"and {more} more", "dim")) if more > 0 else table


def _services(top: Top, rows: Sequence[Row], now: float, width: int) -> Table:
    name, cells = _widths(width)
    table = _table(
        ("SERVICE", name), (">RATE/s", 7), ("60 s", cells), (">p99 ms", 7), ("60 s", cells),
        (">GOAL", 6), (">MET", 6), (">QUEUE", 5), (">REFUSED", 7),
    )  # fmt: skip
    for row in rows:
        s, history = row.figures, top.history
        objective, met = s.get("objective_ms"), s.get("attainment")
        late = objective is not None and (s.get("p99_ms") or 0.0) > objective
        missed = met is not None and 100 * met < (s.get("percentile") or 99)
        refused = sum(n or 0 for n in (s.get("refused") or {}).values())
        version = f" v{s['version']}" if s.get("version") else ""
        table.add_row(
            plain(f"{row.name}{version}"),
            plain(number(s.get("rate"))),
            sparkline(history.cells(row.key, "rate", now, cells)),
            plain(number(s.get("p99_ms")), "red" if late else ""),
            sparkline(history.cells(row.key, "p99_ms", now, cells), objective),
            plain(f"{number(objective, 0)}ms"),
            plain(percent(met, 1), "red" if missed else ""),
            plain(number(s.get("queue"), 0)),
            plain(number(refused, 0)),
            style=_marked(top, row),
        )
    return table


def _jobs(top: Top, rows: Sequence[Row], now: float, width: int) -> Table:
    name, cells = _widths(width)
    table = _table(
        ("JOB", name), ("STATE", 9), (">RATE/s", 7), ("60 s", cells), (">PROGRESS", 14),
        (">GRANTED", 7), ("ON", None),
    )  # fmt: skip
    for row in rows:
        j = row.figures
        done = f"{number(j.get('progress'), 0)} {j.get('progress_unit') or ''}".strip()
        table.add_row(
            plain(row.name),
            views.state_text("held" if j.get("held") else j.get("state")),
            plain(number(j.get("rate"), 2)),
            sparkline(top.history.cells(row.key, "rate", now, cells)),
            plain(done if j.get("progress") else views.DASH),
            plain(seconds(j.get("held_s"))),
            plain(" ".join(j.get("partitions") or ()) or views.DASH),
            style=_marked(top, row),
        )
    return table


def _around(rows: list[Row], selected: Row | None, room: int) -> list[Row]:
    """As many rows as there is room for, the selected one among them."""
    at = next((i for i, row in enumerate(rows) if row is selected), 0)
    first = max(0, min(at - room // 2, len(rows) - room))
    return rows[first : first + room]


def _detail(top: Top, problem: str) -> Text:
    """The line above the keys: a question, an answer, or what a row had no room for."""
    if top.mode is Mode.CONFIRM and top.doomed is not None:
        asked = f"cancel job {top.doomed.name} ({top.doomed.id})? It ends for good. y/n"
        return _line(asked, "bold yellow")
    if top.mode is Mode.FILTER:
        return _line(f"filter: {top.filter}_", "bold")
    if problem or top.message:
        return _line(problem or top.message, "bold red" if problem else "bold")
    row = top.selected
    if row is None:
        return _line("nothing that the filter leaves: Esc clears it" if top.filter else "", "dim")
    if row.kind == "job":
        note = views.job_note(row.figures)
        return _line(f"{row.name} ({row.id}): {note or row.figures.get('state')}", "dim")
    refused = views.refusals_text(row.figures.get("refused") or {})
    notes = "; ".join(map(str, row.figures.get("notes") or ()))
    return _line(f"{row.name}: refused {refused}" + (f"; {notes}" if notes else ""), "dim")


def _keys(top: Top) -> Text:
    if top.mode is Mode.FILTER:
        return _line("⏎ keep  Esc clear", "dim")
    return _line(_KEYS.format(top.sort), "dim")


def _none(top: Top, what: str) -> Text:
    return plain(f"no {what}" + (" that the filter leaves" if top.filter else ""), "dim")
