"""What ``top`` remembers between two pictures: figures of the last minute, what is selected, and
what the next key would mean. Pure: a key and the time are arguments, orders are what comes out.
"""

from __future__ import annotations

import collections
import enum
import math
from collections.abc import Sequence
from typing import Any, Final

import msgspec

SPAN_S: Final = 60.0
HIDDEN: Final = ("succeeded", "cancelled")
SORTS: Final = ("as listed", "name", "rate", "p99")
UP, DOWN, ENTER, ESCAPE, ERASE = "up", "down", "enter", "escape", "erase"


class Mode(enum.Enum):
    """What is shown, and who gets the keys."""

    LIST = "list"
    FILTER = "filter"
    CONFIRM = "confirm"
    LOG = "log"
    EXPLAIN = "explain"


class Row(msgspec.Struct, frozen=True):
    """A service or a job; ``figures`` is what the status says of it."""

    kind: str
    id: str
    name: str
    figures: dict[str, Any]

    @property
    def key(self) -> str:
        return f"{self.kind}:{self.id}"

    def matches(self, text: str) -> bool:
        """Whether a filter leaves it."""
        words = (self.name, self.id, self.kind, str(self.figures.get("state") or ""))
        return any(text.lower() in word.lower() for word in words)


class Order(msgspec.Struct, frozen=True):
    """What a key asks for: ``hold``, ``resume``, ``cancel``, ``log`` or ``explain``, of a row."""

    what: str
    row: Row


class History:
    """Figures of each row in the last ``SPAN_S`` seconds."""

    def __init__(self) -> None:
        self._samples: dict[str, collections.deque[tuple[float, dict[str, float | None]]]] = {}

    def note(self, now: float, rows: Sequence[Row]) -> None:
        """Take in what a status says at ``now`` (s); rows that are gone are forgotten."""
        kept = {row.key for row in rows}
        for key in [k for k in self._samples if k not in kept]:
            del self._samples[key]
        for row in rows:
            samples = self._samples.setdefault(row.key, collections.deque())
            figures = row.figures
            samples.append((now, {name: figures.get(name) for name in ("rate", "p99_ms")}))
            while samples[0][0] <= now - SPAN_S:
                samples.popleft()

    def cells(self, key: str, name: str, now: float, count: int) -> list[float | None]:
        """A figure's mean in each of ``count`` equal parts of the last minute, oldest first; None
        where there is none."""
        sums, numbers = [0.0] * count, [0] * count
        for at, figures in self._samples.get(key, ()):
            value = figures[name]
            index = math.floor((at - now + SPAN_S) / SPAN_S * count)
            if value is not None and 0 <= index <= count:
                cell = min(index, count - 1)
                sums[cell], numbers[cell] = sums[cell] + value, numbers[cell] + 1
        return [s / n if n else None for s, n in zip(sums, numbers, strict=True)]


class Top:
    """See the module's text."""

    def __init__(self) -> None:
        self.mode = Mode.LIST
        self.filter = ""
        self.message = ""
        self.over = False
        self.history = History()
        self.doomed: Row | None = None
        """The job that is to be cancelled, if the answer is yes."""
        self.rows: list[Row] = []
        """What is shown, services first."""
        self._sort = 0
        self._selected = ""
        self._all: list[Row] = []

    @property
    def sort(self) -> str:
        """What rows are ordered by."""
        return SORTS[self._sort]

    @property
    def selected(self) -> Row | None:
        """The row that the next key concerns."""
        return next((row for row in self.rows if row.key == self._selected), None)

    def see(self, now: float, status: dict[str, Any]) -> None:
        """Take in a status."""
        self._all = rows_of(status)
        self.history.note(now, self._all)
        self._arrange()

    def press(self, key: str) -> Order | None:
        """A key: one of the names above, or a character."""
        self.message = ""
        match self.mode:
            case Mode.FILTER:
                self._type(key)
            case Mode.CONFIRM:
                self.mode = Mode.LIST
                if key in ("y", "Y") and self.doomed is not None:
                    return Order("cancel", self.doomed)
            case Mode.LOG | Mode.EXPLAIN:
                if key in ("q", ESCAPE, ENTER, "l"):
                    self.mode = Mode.LIST
            case Mode.LIST:
                return self._command(key)
        return None

    def _command(self, key: str) -> Order | None:
        if key in ("q", "Q"):
            self.over = True
        elif key in (UP, "k", DOWN, "j"):
            self._move(-1 if key in (UP, "k") else 1)
        elif key == "s":
            self._sort = (self._sort + 1) % len(SORTS)
            self._arrange()
        elif key == "/":
            self.mode = Mode.FILTER
        elif key == ESCAPE:
            self.filter = ""
            self._arrange()
        elif self.selected is not None:
            return self._concerning(key, self.selected)
        return None

    def _concerning(self, key: str, row: Row) -> Order | None:
        if key == ENTER:
            self.mode = Mode.EXPLAIN
            return Order("explain", row)
        if key == "l":
            self.mode = Mode.LOG
            return Order("log", row)
        if key in ("h", "c") and row.kind != "job":
            self.message = f"{row.name} is a service: only jobs are held or cancelled"
        elif key == "h":
            return Order("resume" if row.figures.get("held") else "hold", row)
        elif key == "c":
            self.mode, self.doomed = Mode.CONFIRM, row
        return None

    def _type(self, key: str) -> None:
        if key == ENTER:
            self.mode = Mode.LIST
        elif key == ESCAPE:
            self.mode, self.filter = Mode.LIST, ""
        elif key == ERASE:
            self.filter = self.filter[:-1]
        elif len(key) == 1 and key.isprintable():
            self.filter += key
        self._arrange()

    def _move(self, by: int) -> None:
        keys = [row.key for row in self.rows]
        if keys:
            at = keys.index(self._selected) if self._selected in keys else 0
            self._selected = keys[max(0, min(len(keys) - 1, at + by))]

    def _arrange(self) -> None:
        left = [row for row in self._all if not self.filter or row.matches(self.filter)]
        services = [row for row in left if row.kind == "service"]
        jobs = [row for row in left if row.kind == "job"]
        self.rows = [*_sorted(services, self.sort), *_sorted(jobs, self.sort)]
        keys = [row.key for row in self.rows]
        if self._selected not in keys:
            self._selected = keys[0] if keys else ""


def rows_of(status: dict[str, Any]) -> list[Row]:
    """Services, and the jobs that have not ended well, as the node lists them."""
    services = [
        Row("service", str(s["name"]), str(s["name"]), s) for s in status.get("services") or ()
    ]
    jobs = [
        Row("job", str(j["id"]), str(j.get("name") or j["id"]), j)
        for j in status.get("jobs") or ()
        if j.get("state") not in HIDDEN
    ]
    return services + jobs


def _sorted(rows: list[Row], by: str) -> list[Row]:
    if by == "name":
        return sorted(rows, key=lambda row: row.name)
    if by in ("rate", "p99"):
        name = "rate" if by == "rate" else "p99_ms"
        return sorted(rows, key=lambda row: -(row.figures.get(name) or 0.0))
    return rows
