"""The pages of jobs, and the buttons for those who may use them."""

from __future__ import annotations

from typing import Final
from urllib.parse import quote

from cotenant.domain.workload import ENDED_STATES
from cotenant.serving.web.frame import Page, cell, chart, facts, kept, link, part, row, table
from cotenant.serving.web.html import Html, join, tag
from cotenant.serving.web.look import Look, Row
from cotenant.serving.web.shown import known, number, percent

FRESH_S: Final = 3
"""Seconds after which buttons and the end of a log are fetched again."""
_OVER: Final = ENDED_STATES | {"stopping"}


def jobs_page(found: Look, controls: bool) -> Page:
    """All jobs, oldest first; ``controls``: with buttons."""
    heads = (
        *("Job", "State", "On", "Progress", "Progress/s", "Granted", "Pauses", "Restarts"),
        *("Reported", "Note"),
        *(("Do",) if controls else ()),
    )
    rows = []
    for job in found.rows("jobs"):
        key = f"job/{job['id']}"
        rows.append(
            row(
                link("jobs", str(job["id"]), str(job.get("name") or job["id"])),
                *(cell(found, f"{key}/{k}") for k in ("state", "on")),
                *(
                    cell(found, f"{key}/{k}", class_="n")
                    for k in ("progress", "rate", "held", "pauses", "restarts")
                ),
                *(cell(found, f"{key}/{k}") for k in ("metrics", "note")),
                *((tag("td", buttons(job)),) if controls else ()),
            )
        )
    older = f"{found.left_out:,} older jobs that ended are left out; see cotenant jobs."
    body = part(
        "jobs",
        table("Jobs, oldest first", heads, rows, "This node has no jobs."),
        tag("p", older, class_="quiet") if found.left_out else None,
        every_s=FRESH_S if controls else 0,
    )
    return Page("Jobs", "Jobs", body, shape=found.shape)


def job_page(found: Look, job: Row, log: str, controls: bool) -> Page:
    """One job: how far it is, and the end of its log; ``controls``: with buttons."""
    name, key = str(job.get("name") or job["id"]), f"job/{job['id']}"
    guaranteed = job.get("guaranteed")
    shown = facts(
        ("Id", str(job["id"])),
        ("State", kept(found, f"{key}/state")),
        ("Progress", kept(found, f"{key}/progress")),
        ("Progress/s", kept(found, f"{key}/rate")),
        ("Reported", kept(found, f"{key}/metrics")),
        ("On", kept(found, f"{key}/on")),
        ("Granted", kept(found, f"{key}/held")),
        ("Pauses", kept(found, f"{key}/pauses")),
        ("Restarts", kept(found, f"{key}/restarts")),
        ("Weight", number(job.get("weight"))),
        ("Guaranteed", percent(guaranteed) if isinstance(guaranteed, float) else known(guaranteed)),
        ("Note", kept(found, f"{key}/note")),
    )
    text = log or "Nothing was written yet."
    content = join(
        [
            part(f"actions/{job['id']}", buttons(job)) if controls else None,
            shown,
            chart("progress", f"job:{job['id']}", f"Progress of {name} a second"),
            tag("h2", "End of its log", id="log"),
            part(
                "log",
                tag("pre", text, class_="log", tabindex="0", role="region", aria_labelledby="log"),
                every_s=FRESH_S,
            ),
        ]
    )
    return Page(f"Job {name}", "Jobs", content, shape=found.shape)


def buttons(job: Row) -> Html | None:
    """What can be done to a job as it stands; cancelling it asks first."""
    if job.get("state") in _OVER:
        return None
    name, path = str(job.get("name") or job["id"]), _path(job)
    do, said = ("resume", "Resume") if job.get("held") else ("hold", "Hold")
    return tag(
        "div",
        tag(
            "form",
            tag("button", said, aria_label=f"{said} {name}"),
            method="post",
            action=f"{path}/{do}",
        ),
        tag("a", "Cancel", href=f"{path}/cancel", aria_label=f"Cancel {name}"),
        class_="do",
    )


def confirm_page(job: Row) -> Page:
    """Asks whether a job is really to be cancelled."""
    name = str(job.get("name") or job["id"])
    content = tag(
        "form",
        tag("p", f"Job {name} ({job['id']}) ends for good. What it has not saved is lost."),
        tag("p", tag("button", f"Cancel {name}"), " ", tag("a", "Leave it", href=_path(job))),
        method="post",
        action=f"{_path(job)}/cancel",
    )
    return Page(f"Cancel {name}?", "Jobs", content, 0, live=False)


def _path(job: Row) -> str:
    return f"/dashboard/jobs/{quote(str(job['id']), safe='')}"
