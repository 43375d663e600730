"""Replay: a journal's events through the policy again give the same actions, or it says where.

The dispatcher is rebuilt from the first header and fed the events; the planner is fed the
snapshots. Each later header of the same run must equal the state that the replay has reached.
After a difference, a gap or a restart of the node the replay goes on from the next header.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from cotenant.policy.dispatcher import Dispatcher
from cotenant.policy.planner import Planner
from cotenant.telemetry.records import Entry, Gap, Header, PlanRecord, Record

_encode = msgspec.msgpack.encode


class Difference(msgspec.Struct, frozen=True):
    """Where a replay left its journal. ``kind``: ``actions`` of the dispatcher, a ``plan``, or
    the ``state`` at a checkpoint. ``now`` in ns (monotonic), ``wall`` in seconds since the epoch;
    ``expected`` is what the journal holds, ``got`` what the replay gave."""

    kind: str
    now: int
    wall: float
    event: str
    expected: tuple[str, ...]
    got: tuple[str, ...]


class Report(msgspec.Struct):
    """What a replay found. ``segments`` counts headers, ``runs`` starts of the node, ``skipped``
    entries that could not be replayed (behind a gap or a difference), ``differing`` the stretches
    between headers in which something differed; ``difference`` is the first."""

    segments: int = 0
    runs: int = 0
    events: int = 0
    actions: int = 0
    plans: int = 0
    skipped: int = 0
    gaps: list[Gap] = []
    versions: list[str] = []
    since: float = 0.0
    until: float = 0.0
    differing: int = 0
    difference: Difference | None = None

    @property
    def identical(self) -> bool:
        """Whether everything that could be replayed came out the same."""
        return self.difference is None


def replay(records: Iterable[Entry]) -> Report:
    """Replay entries as ``cotenant.telemetry.records.read`` yields them.

    Raises JournalError if the journal is damaged or of a Cotenant whose states do not fit.
    """
    replayer = _Replay()
    for entry in records:
        replayer.feed(entry)
    return replayer.report


class _Replay:
    def __init__(self) -> None:
        self.report = Report()
        self.header: Header | None = None
        self.dispatcher: Dispatcher | None = None
        """None while the state is unknown."""
        self.planner = Planner()

    def feed(self, entry: Entry) -> None:
        match entry:
            case Header():
                self._resynchronise(entry)
            case Gap():
                self.report.gaps.append(entry)
                self.dispatcher = None
            case Record():
                self._decide(entry)
            case PlanRecord():
                self._plan(entry)

    def _resynchronise(self, header: Header) -> None:
        report, before = self.report, self.header
        same_run = before is not None and before.run == header.run
        report.segments += 1
        report.runs += not same_run
        if header.cotenant not in report.versions:
            report.versions.append(header.cotenant)
        report.since = report.since or header.wall
        report.until = header.wall
        self.header = header
        if same_run and self.dispatcher is not None:
            self._compare_states(header, self.dispatcher)
        self.dispatcher = Dispatcher(header.devices, header.dispatcher_state())
        self.planner = Planner(header.tuning, header.planner_state())

    def _compare_states(self, header: Header, dispatcher: Dispatcher) -> None:
        for kept, ours, name in (
            (header.dispatcher, dispatcher.state, "dispatcher"),
            (header.planner, self.planner.state, "planner"),
        ):
            if _encode(ours) == kept:
                continue
            # A field that came later makes other bytes, and no difference.
            found = _first_unequal(msgspec.msgpack.decode(kept, type=type(ours)), ours, name)
            if found is not None:
                path, left, right = found
                self._differ("state", header.now, f"checkpoint: {path}", (left,), (right,))
                return

    def _decide(self, record: Record) -> None:
        if self.dispatcher is None:
            self.report.skipped += 1
            return
        try:
            actions = tuple(self.dispatcher.handle(record.now, record.event))
        except Exception as exc:  # on a tampered journal, or because the policy is another one
            failure = f"{type(exc).__name__}: {exc}"
            self._differ("actions", record.now, repr(record.event), _shown(record.actions), failure)
            return
        self._count(record.now)
        self.report.events += 1
        self.report.actions += len(actions)
        if actions != record.actions:
            event = repr(record.event)
            self._differ("actions", record.now, event, _shown(record.actions), _shown(actions))

    def _plan(self, record: PlanRecord) -> None:
        if self.dispatcher is None:
            self.report.skipped += 1
            return
        plan = self.planner.plan(record.snapshot)
        self._count(record.now)
        self.report.plans += 1
        if plan != record.plan:
            self._differ("plan", record.now, "Snapshot", (repr(record.plan),), (repr(plan),))

    def _count(self, now: int) -> None:
        if self.header is not None:
            self.report.until = self.header.wall_at(now)

    def _differ(
        self, kind: str, now: int, event: str, expected: tuple[str, ...], got: tuple[str, ...] | str
    ) -> None:
        wall = self.header.wall_at(now) if self.header is not None else 0.0
        self.report.differing += 1
        self.dispatcher = None
        if self.report.difference is None:
            shown = (got,) if isinstance(got, str) else got
            self.report.difference = Difference(kind, now, wall, event, expected, shown)


def _shown(actions: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(map(repr, actions))


def _first_unequal(left: Any, right: Any, path: str) -> tuple[str, str, str] | None:
    """(path, left, right) of the first place where two states differ, the order of keys included;
    None if they are the same."""
    fields: Iterable[tuple[str, Any, Any]]
    names = getattr(left, "__struct_fields__", None) or getattr(left, "__dataclass_fields__", None)
    if names and type(left) is type(right):
        fields = ((f".{n}", getattr(left, n), getattr(right, n)) for n in names)
    elif isinstance(left, dict) and isinstance(right, dict) and list(left) == list(right):
        fields = ((f"[{key!r}]", left[key], right[key]) for key in left)
    elif isinstance(left, list | tuple) and type(left) is type(right) and len(left) == len(right):
        fields = ((f"[{i}]", a, b) for i, (a, b) in enumerate(zip(left, right, strict=True)))
    elif left == right and not isinstance(left, dict):
        return None
    else:
        return path, repr(left), repr(right)
    for name, a, b in fields:
        found = _first_unequal(a, b, path + name)
        if found is not None:
            return found
    return None
