"""``cotenant top``: the loop between the node, the keyboard and the screen."""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cotenant.cli import finding, options, views
from cotenant.cli.joblog import JobLog
from cotenant.cli.output import command, console, show
from cotenant.cli.servicelog import PREFIX, service_log
from cotenant.cli.top import view
from cotenant.cli.top.keys import Keyboard
from cotenant.cli.top.state import Mode, Order, Row, Top
from cotenant.domain.errors import CotenantError, EnvironmentProblem
from cotenant.serving.control_client import ControlClient
from cotenant.telemetry.explain import Explanation, explain
from cotenant.telemetry.records import Entry

LOG_LINES = 200
EXPLAINED = 5
"""Of each kind."""

Journal = Callable[[Path], Iterable[Entry]]
"""Reads the newest of a journal's directory."""


def make_command(journal: Journal) -> Callable[[argparse.Namespace], int]:
    """The command, which explains from what ``journal`` reads."""

    @command
    def cmd_top(args: argparse.Namespace) -> int:
        """A live view until ``q`` or Ctrl-C; without a terminal a picture every so often."""
        client, screen = finding.client(args), console()
        status = client.status()
        if args.once:
            return show(views.top_view(status))
        with contextlib.suppress(KeyboardInterrupt, EOFError):
            if screen.is_terminal and sys.stdin.isatty():
                _Session(client, journal, args.interval).run(screen, status)
            else:
                _watch(client, screen, status, args.interval)
        return 0

    return cmd_top


def _watch(client: ControlClient, screen: Any, status: dict[str, Any], interval: float) -> None:
    """Pictures without keys: one below the other in a pipe, in place on a terminal."""
    if not screen.is_terminal:
        while True:
            screen.print(views.top_view(status))
            sys.stdout.flush()
            time.sleep(interval)
            status = client.status()
    from rich.live import Live

    problem = ""
    with Live(console=screen, screen=True, auto_refresh=False) as live:
        while True:
            live.update(views.top_view(status, problem), refresh=True)
            time.sleep(interval)
            try:
                status, problem = client.status(), ""
            except EnvironmentProblem as error:
                problem = str(error)  # it may be restarting: keep the last figures


class _Session:
    """One sitting at a terminal."""

    def __init__(self, client: ControlClient, journal: Journal, interval: float) -> None:
        self._client = client
        self._journal = journal
        self._interval = interval
        self._top = Top()
        self._status: dict[str, Any] = {}
        self._problem = ""
        self._log: tuple[Row, Path] | None = None
        self._explaining: _Explaining | None = None

    def run(self, screen: Any, status: dict[str, Any]) -> None:
        """Until it is over."""
        from rich.live import Live

        self._status = status
        self._top.see(time.monotonic(), status)
        due = time.monotonic() + self._interval
        with (
            Keyboard(sys.stdin.fileno()) as keyboard,
            Live(console=screen, screen=True, auto_refresh=False) as live,
        ):
            while not self._top.over:
                live.update(self._picture(screen), refresh=True)
                for key in keyboard.read(max(0.0, due - time.monotonic())):
                    self._press(key)
                if time.monotonic() >= due:
                    self._look()
                    due = time.monotonic() + self._interval

    def _look(self) -> None:
        try:
            self._status, self._problem = self._client.status(), ""
        except EnvironmentProblem as error:
            self._problem = str(error)  # it may be restarting: keep the last figures
        else:
            self._top.see(time.monotonic(), self._status)

    def _press(self, key: str) -> None:
        order = self._top.press(key)
        if order is None:
            return
        try:
            self._carry_out(order)
        except CotenantError as error:
            self._top.message, self._top.mode = str(error), Mode.LIST
        else:
            self._look()

    def _carry_out(self, order: Order) -> None:
        row = order.row
        match order.what:
            case "hold":
                self._client.hold(row.id)
                self._top.message = f"held {row.name}: h lets it run again"
            case "resume":
                self._client.resume(row.id)
                self._top.message = f"released {row.name}"
            case "cancel":
                self._client.cancel(row.id)
                self._top.message = f"cancelled {row.name}"
            case "log":
                path = service_log(self._client, f"{PREFIX}{row.id}" if _serves(row) else row.id)
                self._log = row, path or Path(self._client.log_path(row.id))
            case "explain":
                directory = (self._status.get("journal") or {}).get("directory")
                self._explaining = _Explaining(row, self._journal, directory)

    def _picture(self, screen: Any) -> view.Picture:
        top = self._top
        if top.mode is Mode.LOG and self._log is not None:
            row, path = self._log
            log = JobLog(path)
            with contextlib.closing(log):
                text = view.log_text(b"".join(log.read(LOG_LINES)))
            return view.page(f"log of {row.name}: {path}", text, end=True)
        if top.mode is Mode.EXPLAIN and self._explaining is not None:
            return self._explaining.page()
        now, size = time.monotonic(), (screen.width, screen.height)
        return view.picture(top, self._status, now, size, self._problem)


def _serves(row: Row) -> bool:
    return row.kind == "service"


class _Explaining:
    """Reads a journal in a thread of its own, since that may take seconds."""

    def __init__(self, row: Row, journal: Journal, directory: str | None) -> None:
        self._row = row
        self._journal = journal
        self._directory = directory
        self._told: Explanation | None = None
        self._why_not = "this node keeps no journal" if directory is None else ""
        if directory is not None:
            threading.Thread(target=self._read, args=(Path(directory),), daemon=True).start()

    def _read(self, directory: Path) -> None:
        try:
            self._told = explain(self._journal(directory), time.time(), EXPLAINED)
        except (CotenantError, OSError) as error:
            self._why_not = str(error)

    def page(self) -> view.Picture:
        """What is known by now."""
        title = f"why {self._row.name} is as it is"
        if self._told is not None:
            return view.page(title, view.explanation(self._row, self._told))
        return view.page(title, views.plain(self._why_not or "reading the journal …", "dim"))


def add_top(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.description = (
        "Watch a node. On a terminal: arrows or j and k select, s sorts, / filters, h holds a job "
        "or lets it go on, c cancels it, l shows a log, Enter says why, q ends."
    )
    parser.add_argument("--interval", type=options.positive, default=1.0, metavar="S",
                        help="seconds (1)")  # fmt: skip
    parser.add_argument("--once", action="store_true", help="print one picture and stop")
