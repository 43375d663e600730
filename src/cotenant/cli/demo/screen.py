"""What the demo writes: to a terminal with a little style, into a pipe as plain text."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from cotenant.cli.views import DASH, number, plain
from cotenant.domain.port import JobStatus

PROMPT = "you: "


class Screen:
    """Reads questions from stdin and writes to stdout."""

    def __init__(self) -> None:
        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        self._console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
        self._began = time.monotonic()
        self._progress = ""
        self._asks = bool(sys.stdin and sys.stdin.isatty())  # None where it was closed
        if self._asks:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - lines can be edited from here on

    def question(self) -> str | None:
        """The next line; None where there is none any more."""
        if self._asks:
            try:
                return input(PROMPT)
            except EOFError:
                self.say()
                return None
        line = sys.stdin.readline() if sys.stdin else ""
        if not line:
            return None
        self.say(PROMPT + clean(line).strip())
        return line

    def say(self, text: str = "", style: str = "") -> None:
        """A line."""
        self._console.print(Text(text, style))

    def show(self, view: RenderableType) -> None:
        """A table, say."""
        self._console.print(view)

    def add(self, text: str) -> None:
        """A piece of an answer, at once."""
        sys.stdout.write(clean(text))
        sys.stdout.flush()

    def progress(self, what: str) -> None:
        """What is being waited for. In a terminal the seconds are counted in place; else a line
        is written once."""
        if self._console.is_terminal:
            seconds = time.monotonic() - self._began
            sys.stdout.write(f"\r\x1b[K{what} ... {seconds:.0f} s")
            sys.stdout.flush()
        elif what != self._progress:
            self.say(f"{what} ...")
        self._progress = what

    def reached(self) -> None:
        """What was waited for is there."""
        if self._console.is_terminal and self._progress:
            sys.stdout.write("\r\x1b[K")
        self._progress = ""


def clean(text: str) -> str:
    """Without what a terminal would take for orders."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def stats(status: dict[str, Any], job: JobStatus | None, tokens: int) -> RenderableType:
    """The node's figures against its objective. ``tokens``: how many were said."""
    table = Table(box=None, pad_edge=False, show_header=False, show_edge=False)
    for service in status.get("services") or ():
        percentile = service.get("percentile")
        wanted = f"objective p{number(percentile, 0)}"
        rows = (
            ("first token", "p99_ms", "objective_ms"),
            ("time per token", "p99_pace_ms", "pace_ms"),
        )
        for name, measured, objective in rows:
            found = f"p99 {_ms(service.get(measured))}"
            table.add_row(name, plain(found), plain(f"{wanted} {_ms(service.get(objective))}"))
        refused = sum((service.get("refused") or {}).values())
        table.add_row(
            "answers",
            plain(f"{number(service.get('answered'), 0)} of {tokens:,} tokens"),
            plain(f"{number(refused, 0)} refused or withdrawn"),
        )
    if job is None:
        table.add_row("training", "off", "/train on starts it")
    else:
        loss = job.metrics.get("loss")
        told = f"{number(job.progress, 0)} steps, loss {DASH if loss is None else f'{loss:.3f}'}"
        table.add_row("training", plain(job.state), plain(f"{number(job.rate)} steps/s, {told}"))
        if job.reason:
            table.add_row("", "", plain(job.reason))
    return table


def _ms(value: float | None) -> str:
    return DASH if value is None else f"{number(value, 0)} ms"
