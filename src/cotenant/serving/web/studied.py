"""The pages that are worked out of the journal: decisions, and what another policy would have made
of the last minutes. The work is done elsewhere (``studies``); here it is asked for, and kept."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Generic, TypeVar

from cotenant.serving.web.frame import Page, row, table
from cotenant.serving.web.html import Content, Html, join, tag
from cotenant.serving.web.look import Look, name_of
from cotenant.serving.web.shown import clock, milliseconds, number, percent, seconds
from cotenant.serving.web.studies import Comparison, Figures, Studies, StudyFailed
from cotenant.telemetry.explain import Explanation

log = logging.getLogger("cotenant.serving")

LAST: Final = 10
"""Of each kind of decision, so many are shown."""
FRESH_S: Final = 10.0
"""For how long an explanation is shown again."""
WAIT_S: Final = 6.0
POLL_S: Final = 2
SPANS: Final = {60: "1 minute", 180: "3 minutes", 300: "5 minutes", 600: "10 minutes"}

T = TypeVar("T")


class Kept(Generic[T]):
    """The newest outcome of one kind of study, and the one under way."""

    def __init__(self) -> None:
        self.found: T | None = None
        self.problem = ""
        self.at = 0.0
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether one is under way."""
        return self._task is not None

    def start(self, study: Callable[[], Awaitable[T]]) -> None:
        """Begin one, unless there is one."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(study))

    async def _run(self, study: Callable[[], Awaitable[T]]) -> None:
        try:
            self.found, self.problem = await study(), ""
        except StudyFailed as error:
            self.problem = str(error)
        except Exception:
            log.exception("a study of the journal failed")
            self.problem = "it failed inside the server; its log says how"
        finally:
            self.at, self._task = time.monotonic(), None

    async def wait(self, within_s: float) -> None:
        """Until it is done, for so long at most."""
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=within_s)

    async def close(self) -> None:
        """End it."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task


class Studied:
    """See the module's text."""

    def __init__(self, studies: Studies) -> None:
        self._studies = studies
        self._told: Kept[Explanation] = Kept()
        self._compared: Kept[Comparison] = Kept()
        self._asked = "", 0

    async def close(self) -> None:
        """End what is under way."""
        await self._told.close()
        await self._compared.close()

    async def decisions(self, found: Look) -> Page:
        """Why the node did what it did."""
        kept = self._told
        if kept.at + FRESH_S < time.monotonic() or (kept.found is None and not kept.problem):
            kept.start(lambda: self._studies.explain(LAST))
            await kept.wait(WAIT_S)
        parts: list[Content] = []
        if kept.running:
            parts.append(tag("p", "The journal is being read …", role="status"))
        if kept.problem:
            parts.append(tag("p", f"Nothing can be told: {kept.problem}", class_="bad"))
        if kept.found is not None and not kept.problem:
            parts.append(_explained(kept.found, found))
        refresh = POLL_S if kept.running else 0
        return Page("Decisions", "Decisions", join(parts), refresh, live=False)

    def compare(self, policy: str, span: str) -> None:
        """Begin a comparison; one at a time. Raises StudyFailed for what is not offered."""
        if policy not in self._studies.policies or not span.isdigit() or int(span) not in SPANS:
            raise StudyFailed("choose a policy and a time from the lists")
        if self._compared.running:
            raise StudyFailed("another one is under way; try again when it is done")
        self._asked = policy, int(span)
        self._compared.start(lambda: self._studies.compare(policy, int(span)))

    def what_if(self, found: Look, problem: str = "") -> Page:
        """The form, and what came of it."""
        kept, (policy, span) = self._compared, self._asked
        parts: list[Content] = [_form(self._studies.policies, policy, span)]
        problem = problem or ("" if kept.running else kept.problem)
        if kept.running:
            said = f"Telling the last {SPANS[span]} again under {policy} …"
            parts.append(tag("p", said, role="status"))
        elif problem:
            parts.append(tag("p", f"Nothing can be told: {problem}", class_="bad", role="status"))
        elif kept.found is not None:
            parts.append(_compared(kept.found, found))
        refresh = POLL_S if kept.running else 0
        return Page("What if", "What if", join(parts), refresh, live=False)


def _explained(told: Explanation, found: Look) -> Html:
    span = f"from {clock(told.since)} to {clock(told.until)}"
    first = f"{told.arrived:,} requests arrived and {told.answered:,} were answered {span}."
    parts: list[Content] = [tag("p", first if told.until else "No events yet.")]
    parts += [tag("p", f"Of the journal is missing: {gap}", class_="bad") for gap in told.gaps]
    kinds = _decided(told) + _incidents(told, found) + _slowest(told)
    parts += [table(*kind) for kind in kinds if kind[2]]
    nothing = [title for title, _, rows in kinds if not rows]
    if nothing:
        parts.append(tag("p", f"Nothing to tell of: {', '.join(nothing)}.", class_="quiet"))
    return join(parts)


_Kind = tuple[str, tuple[str, ...], list[Html]]
"""Title, column heads and rows of a table."""


def _decided(told: Explanation) -> list[_Kind]:
    plans = [
        row(clock(p.wall), str(p.version), "; ".join(p.reasons) or "no reason given", p.after)
        for p in reversed(told.plans)
    ]
    refusals = [
        row(
            g.service,
            g.meaning,
            tag("td", f"{g.count:,}", class_="n"),
            tag("td", percent(g.share, 1), class_="n"),
            clock(g.last),
            g.example,
        )
        for g in told.refusals
    ]
    pauses = [
        row(clock(p.wall), p.partition, seconds(p.seconds) if p.seconds else "lasts", p.text)
        for p in reversed(told.pauses)
    ]
    heads = ("Service", "Why", "Requests", "Of arrivals", "Last", "For example")
    return [
        ("Plans, newest first", ("When", "Plan", "Why", "Layout after it"), plans),
        ("Refusals", heads, refusals),
        ("Lending paused", ("When", "Partition", "For", "Why"), pauses),
    ]


def _incidents(told: Explanation, found: Look) -> list[_Kind]:
    kinds = (
        ("Jobs", told.jobs),
        ("Services", told.services),
        ("Workers lost", told.workers),
        ("Devices that changed", told.devices),
        ("Layout changes that failed", told.layouts),
    )
    return [
        (
            title,
            ("When", "Which", "What"),
            [
                row(clock(x.wall), found.names.get(f"job:{x.subject}", x.subject), x.text)
                for x in reversed(incidents)
            ],
        )
        for title, incidents in kinds
    ]


def _slowest(told: Explanation) -> list[_Kind]:
    rows = [
        row(clock(s.wall), s.service, tag("td", milliseconds(s.total_ms), class_="n"), s.text)
        for s in told.slowest
    ]
    return [("Slowest requests", ("When", "Service", "Took", "Where the time went"), rows)]


def _form(policies: Mapping[str, str], policy: str, span: int) -> Html:
    offered = [
        tag("option", f"{name}: {about}", value=name, selected=name == policy)
        for name, about in policies.items()
    ]
    spans = [
        tag("option", said, value=str(s), selected=s == (span or 180)) for s, said in SPANS.items()
    ]
    about = (
        "The last minutes of the journal are told again in virtual time: the same requests, at the "
        "costs that were measured. It runs beside the node and gives way to everything else."
    )
    return tag(
        "form",
        tag("p", about),
        tag("label", "Policy", for_="policy"),
        tag("select", *offered, id="policy", name="policy"),
        tag("label", "The last", for_="span"),
        tag("select", *spans, id="span", name="span"),
        tag("p", tag("button", "Tell it again")),
        method="post",
        action="/dashboard/what-if",
    )


def _compared(told: Comparison, found: Look) -> Html:
    names = sorted({name for one in told.told for name in one.services})
    jobs = sorted({job for one in told.told for job in one.jobs})
    parts: list[Content] = [
        tag("h2", f"The last {seconds(told.seconds)} under {told.policy}"),
    ]
    for name in names:
        rows = [_service(one.what, one.services.get(name)) for one in told.told]
        parts.append(table(f"Service {name}", ("Told", "Requests", "In time", "p95"), rows))
    if jobs:
        heads = ("Told", *(f"{name_of(found, f'job:{job}')}, a second" for job in jobs))
        rows = [
            row(
                one.what,
                *(tag("td", number(one.jobs.get(job), 2), class_="n") for job in jobs),
            )
            for one in told.told
        ]
        parts.append(table("Progress of jobs", heads, rows))
    parts += [tag("p", note, class_="quiet") for note in told.notes]
    return join(parts)


def _service(what: str, figures: Figures | None) -> Html:
    if figures is None:
        return row(what, "–", "–", "–")
    told = f"{figures.requests:,}", percent(figures.in_time, 1), milliseconds(figures.p95_ms)
    return row(what, *(tag("td", cell, class_="n") for cell in told))
