"""What the commands print: a node's status, its jobs, answers and replays, as ``rich`` renders.

Everything shown comes from elsewhere (names that users chose, reasons that models gave), so it
goes in as plain text: no markup, no control characters. A number that was not measured yet is
None and shown as a dash.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cotenant.domain.units import MS, format_bytes
from cotenant.sim.replay import Report
from cotenant.telemetry.explain import Explanation, moment

DASH = "–"
BAR_CELLS = 20
SERVICE_COLOURS = ("cyan", "blue", "bright_cyan", "bright_blue")
JOB_COLOURS = ("yellow", "magenta", "bright_yellow", "bright_magenta")
_BAD_STATES = ("failed", "UNAVAILABLE", "backoff")
_GOOD_STATES = ("running", "READY", "succeeded")


# --- values -----------------------------------------------------------------------------------


def plain(value: Any, style: str = "") -> Text:
    """Text as it is, without control characters; a dash for None."""
    return Text("".join(c if c.isprintable() else "?" for c in known(value)), style=style)


def known(value: Any) -> str:
    """A value as it is, or a dash."""
    return DASH if value is None else str(value)


def number(value: float | None, digits: int = 1) -> str:
    """``12.3``, ``1,234``, or a dash."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 0) -> str:
    """A share as ``31%``, or a dash."""
    return DASH if value is None else f"{100 * value:.{digits}f}%"


def seconds(value: float | None) -> str:
    """``850ms``, ``12.0s``, ``3m20s``, ``2h05m``, ``3d04h``, or a dash."""
    if value is None:
        return DASH
    if value < 1:
        return f"{1000 * value:.0f}ms"
    if value < 60:
        return f"{value:.1f}s"
    minutes, rest = divmod(int(value), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours < 48 else f"{hours // 24}d{hours % 24:02d}h"


def new_table(*columns: str, right: Iterable[str] = ()) -> Table:
    """An empty table without lines; columns named in ``right`` are aligned so."""
    made = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="ellipsis")
    return made


def state_text(value: Any) -> Text:
    colour = "red" if value in _BAD_STATES else "green" if value in _GOOD_STATES else ""
    return plain(value, colour)


# --- status and top ---------------------------------------------------------------------------


def status_view(status: dict[str, Any]) -> RenderableType:
    """The node in short: where it is, what it runs on, its services and jobs."""
    lines: list[RenderableType] = [headline(status), _endpoints(status)]
    for device in status.get("devices") or ():
        lines.append(_device(device, job_names(status)))
        lines += [plain(f"  note: {limit}", "dim") for limit in device.get("limits") or ()]
        if trouble := device.get("trouble"):
            lines.append(plain(f"  does not answer: {trouble}", "red"))
    lines += [Text(), _services(status)]
    jobs = status.get("jobs") or []
    lines += [Text(), jobs_view(jobs) if jobs else plain("no jobs", "dim"), Text()]
    lines += [plan_line(status), *journal_lines(status)]
    return Group(*lines)


def top_view(status: dict[str, Any], problem: str = "") -> RenderableType:
    """Who runs where right now, how services do against their objectives, how far jobs are.
    ``problem`` is shown when the figures are old because the node does not answer."""
    jobs = [j for j in status.get("jobs") or [] if j.get("state") not in ("succeeded", "cancelled")]
    parts: list[RenderableType] = [headline(status), *_devices(status), Text()]
    parts += [_partitions(status), Text()]
    parts += [_services(status), Text()]
    if jobs:
        parts += [jobs_view(jobs), Text()]
    parts += [plan_line(status), *journal_lines(status)]
    if problem:
        parts.append(plain(problem, "bold red"))
    return Group(*parts)


def headline(status: dict[str, Any]) -> Text:
    state = "draining" if status.get("draining") else "ready" if status.get("ready") else "starting"
    line = Text("cotenant ", style="bold")
    line.append_text(plain(status.get("version")))
    line.append_text(plain(f"  {state}", "green" if state == "ready" else "yellow"))
    since, pid = seconds(status.get("uptime_s")), known(status.get("pid"))
    line.append_text(plain(f"  up {since}, pid {pid}", "dim"))
    return line


def _endpoints(status: dict[str, Any]) -> Text:
    parts = [f"{name} {status[name]}" for name in ("http", "grpc") if status.get(name)]
    return plain("  ".join([*parts, f"state in {known(status.get('state_dir'))}"]))


def _device(device: dict[str, Any], names: dict[str, str]) -> Text:
    units, memory = device.get("units") or [], device.get("memory")
    parts = [f"{known(device.get('kind'))} with {len(units)} units"]
    parts += [format_bytes(memory)] if memory else []
    parts.append(f"level {known(device.get('level'))}")
    parts += [] if device.get("trains", True) else ["jobs do not run here"]
    held = [
        f"{names.get(tenant, tenant)} {format_bytes(found['memory'])}"
        for tenant, found in (device.get("tenants") or {}).items()
        if found.get("memory")
    ]
    parts += [f"in memory {', '.join(held)}"] if held else []
    return plain(f"device {known(device.get('id'))}: {', '.join(parts)}")


def _devices(status: dict[str, Any]) -> list[RenderableType]:
    """A line a device, where there are several."""
    devices = status.get("devices") or []
    if len(devices) < 2:
        return []
    return [Text(), *(_device(device, job_names(status)) for device in devices)]


def _partitions(status: dict[str, Any]) -> RenderableType:
    names = job_names(status)
    colours = colours_of(status)
    table = new_table(
        "PARTITION", "DEVICE", "RUNS NOW", "BUSY", "BY", "SLICE", "BACK p99", "SWITCHES",
        right=("SLICE", "BACK p99", "SWITCHES"),
    )  # fmt: skip
    for partition in status.get("partitions") or ():
        busy = {k: v or 0.0 for k, v in (partition.get("busy") or {}).items()}
        slice_ms, back = partition.get("slice_ms"), partition.get("revoke_p99_us")
        paused = slice_ms == 0 and bool(partition.get("services"))
        table.add_row(
            plain(partition.get("id")),
            plain(partition.get("device")),
            plain(holder_name(str(partition.get("holder") or "idle"), names)),
            busy_bar(busy, colours),
            shares_of(busy, names, colours),
            plain("paused", "yellow") if paused else plain(_unit(slice_ms, "ms", 0)),
            plain(_unit(back, "us", 0)),
            plain(number(partition.get("switches"), 0)),
        )
    return table


def _unit(value: float | None, unit: str, digits: int) -> str:
    return DASH if value is None else f"{number(value, digits)}{unit}"


def busy_bar(busy: dict[str, float], colours: dict[str, str], cells: int = BAR_CELLS) -> Text:
    """A bar of ``cells`` cells, shared out by workload; services are ``█``, jobs ``▒``."""
    bar = Text()
    ends, drawn = 0.0, 0
    for name, share in sorted(busy.items(), key=lambda item: (item[0].startswith("job:"), item)):
        ends += max(0.0, share)
        count = min(cells, round(ends * cells)) - drawn
        bar.append(("▒" if name.startswith("job:") else "█") * count, colours.get(name, ""))
        drawn += count
    bar.append("·" * (cells - drawn), "dim")
    return bar


def shares_of(busy: dict[str, float], names: dict[str, str], colours: dict[str, str]) -> Text:
    parts = [
        plain(f"{holder_name(name, names)} {percent(share)}", colours.get(name, ""))
        for name, share in sorted(busy.items(), key=lambda item: (-item[1], item[0]))
        if share >= 0.005
    ]
    return Text(", ").join(parts) if parts else plain("idle", "dim")


def holder_name(held: str, names: dict[str, str]) -> str:
    """``batch:digits`` and ``service:digits`` are shown as the service, jobs by their names."""
    kind, _, name = held.partition(":")
    if kind == "job":
        return names.get(name, name)
    return name or kind


def job_names(status: dict[str, Any]) -> dict[str, str]:
    return {str(j.get("id")): str(j.get("name") or j.get("id")) for j in status.get("jobs") or ()}


def colours_of(status: dict[str, Any]) -> dict[str, str]:
    """A colour for each workload, the same in every frame."""
    services = sorted(f"service:{s.get('name')}" for s in status.get("services") or ())
    jobs = [f"job:{j.get('id')}" for j in status.get("jobs") or ()]
    pairs = [(n, SERVICE_COLOURS[i % len(SERVICE_COLOURS)]) for i, n in enumerate(services)]
    pairs += [(n, JOB_COLOURS[i % len(JOB_COLOURS)]) for i, n in enumerate(jobs)]
    return dict(pairs)


def _services(status: dict[str, Any]) -> RenderableType:
    services = status.get("services") or []
    if not services:
        return plain("no services", "dim")
    table = new_table(
        "SERVICE", "STATE", "RATE/s", "QUEUE", "BATCH", "p50 ms", "p95", "p99", "OBJECTIVE",
        "MET", "REFUSED",
        right=("RATE/s", "QUEUE", "BATCH", "p50 ms", "p95", "p99", "OBJECTIVE", "MET"),
    )  # fmt: skip
    for s in services:
        objective = s.get("objective_ms")
        name = f"{s.get('name')} v{s['version']}" if s.get("version") else s.get("name")
        wanted = f"p{s.get('percentile') or 99:g} {number(objective, 0)}ms"
        state = state_text(s.get("state"))
        if s.get("reason"):
            state.append_text(plain(f": {s['reason']}", "red"))
        table.add_row(
            plain(name),
            state,
            plain(number(s.get("rate"))),
            plain(number(s.get("queue"), 0)),
            plain(number(s.get("batch_mean"))),
            *(_latency(s.get(key), objective) for key in ("p50_ms", "p95_ms", "p99_ms")),
            plain(wanted),
            _attainment(s.get("attainment"), s.get("percentile")),
            plain(refusals_text(s.get("refused") or {})),
        )
    notes = [
        plain(f"  {s.get('name')}: {n}", "yellow") for s in services for n in s.get("notes", ())
    ]
    return Group(table, *notes)


def _latency(value: float | None, objective: float | None) -> Text:
    bad = value is not None and objective is not None and value > objective
    return plain(number(value), "red" if bad else "")


def _attainment(value: float | None, percentile: float | None) -> Text:
    bad = value is not None and 100 * value < (percentile or 99)
    return plain(percent(value, 1), "red" if bad else "")


def refusals_text(refused: dict[str, int]) -> str:
    shown = [f"{count:,} {reason.lower()}" for reason, count in sorted(refused.items()) if count]
    return ", ".join(shown) or "0"


def plan_line(status: dict[str, Any]) -> Text:
    plan = status.get("plan") or {}
    reasons = plan.get("reasons") or []
    why = "; ".join(map(str, reasons)) or "no plan yet"
    age = seconds(plan.get("age_s"))
    return plain(f"plan {known(plan.get('version'))} ({age} old): {why}", "dim")


def journal_lines(status: dict[str, Any]) -> list[Text]:
    journal = status.get("journal") or {}
    lines: list[Text] = []
    if journal.get("error"):
        lines.append(plain(f"journal: {journal['error']}", "red"))
    if journal.get("dropped"):
        lines.append(plain(f"journal: {journal['dropped']:,} records were dropped", "yellow"))
    return lines


# --- jobs -------------------------------------------------------------------------------------


def jobs_view(jobs: list[dict[str, Any]]) -> RenderableType:
    """A line a job, oldest first."""
    if not jobs:
        return plain("no jobs", "dim")
    counts = ("PROGRESS", "RATE/s", "GRANTED", "PAUSES", "RESTARTS")
    table = new_table("JOB", "NAME", "STATE", "ON", *counts, "NOTE", right=counts)
    for job in jobs:
        progress = job.get("progress")
        shown = f"{number(progress, 0)} {job.get('progress_unit') or ''}" if progress else DASH
        table.add_row(
            plain(job.get("id")),
            plain(job.get("name")),
            state_text(job.get("state")),
            plain(" ".join(job.get("partitions") or ()) or DASH),
            plain(shown.strip()),
            plain(number(job.get("rate"), 2)),
            plain(seconds(job.get("held_s"))),
            plain(number(job.get("pauses"), 0)),
            plain(number(job.get("restarts"), 0)),
            plain(job_note(job)),
        )
    return table


def job_note(job: dict[str, Any]) -> str:
    parts = [str(job["reason"])] if job.get("reason") else []
    if job.get("guaranteed"):
        parts.append(f"guaranteed {_share(job['guaranteed'])}")
    metrics = sorted((job.get("metrics") or {}).items())[:3]
    parts += [
        f"{name}={DASH if value is None else format(value, '.4g')}" for name, value in metrics
    ]
    return ", ".join(parts)


def _share(share: float | dict[str, float]) -> str:
    if isinstance(share, dict):
        return ", ".join(f"{percent(part)} of {kind}" for kind, part in share.items())
    return percent(share)


# --- explain and replay -----------------------------------------------------------------------


def engines_view(engines: dict[str, list[dict[str, Any]]]) -> RenderableType:
    """By service, what opened each of its instances, which operators that executes where, what its
    warm-up and ``cotenant profile`` measured, and which engines there are beside it."""
    out: list[RenderableType] = []
    told = [
        tuple(_engine_lines(service, one)) for service, opened in engines.items() for one in opened
    ]
    alike = dict.fromkeys(told)  # instances that say the same say it once
    _section(out, "Engines of this moment", [line for lines in alike for line in lines])
    return Group(*out)


def _engine_lines(service: str, one: dict[str, Any]) -> Iterator[str]:
    yield f"{service}: {one['variant']} on {one['device']} by {one['engine']}"
    yield from (f"    {line}" for line in one["executed"])
    if one["measured"]:
        yield f"    rows on units: {_times(one['measured'])}"
    if profile := one["profile"]:
        where = profile["device"] or profile["kind"]
        yield f"    profiled by {profile['engine']} on {where}: {_times(profile['measured'])}"
    able = [other["engine"] for other in one["others"] if not other["refusal"]]
    if able:
        yield f"    {', '.join(able)} could open it too: say engine: NAME in its model.yaml"
    for other in one["others"]:
        if other["refusal"]:
            yield f"    {other['engine']} could not: {other['refusal']}"


def _times(measured: list[tuple[int, int, int]]) -> str:
    return ", ".join(f"{rows} on {units}: {ns / MS:.3g} ms" for units, rows, ns in measured)


def explain_view(told: Explanation) -> RenderableType:
    """The answers under a heading each; headings without an answer are left out."""
    asked = told.asked
    span = f"{seconds(told.until - told.since)} up to {moment(told.until, asked)}"
    first = f"{told.arrived:,} requests arrived and {told.answered:,} were answered in the {span}"
    out: list[RenderableType] = [plain(first if told.until else "no events in this journal")]
    out += [plain(f"journal: {gap}", "yellow") for gap in told.gaps]
    plans: list[str] = []
    for p in reversed(told.plans):
        why = "; ".join(p.reasons) or "no reason given"
        plans += [f"{moment(p.wall, asked)}  plan {p.version}: {why}"]
        plans += [f"    before: {p.before}", f"    after:  {p.after}"]
    refusals: list[str] = []
    for g in told.refusals:
        counts = f"{g.count:,}× ({number(g.per_s, 2)}/s, {percent(g.share, 1)} of arrivals)"
        refusals += [f"{g.service}: {g.reason} {counts}, last {moment(g.last, asked)}"]
        refusals += [f"    {g.meaning}", f"    for example, {g.example}"][: 1 + bool(g.example)]
    _section(out, "Plans, newest first", plans)
    _section(out, "Refusals", refusals)
    for title, incidents in (
        ("Devices that changed", told.devices),
        ("Layout changes that failed", told.layouts),
        ("Jobs", told.jobs),
        ("Workers lost", told.workers),
        ("Services", told.services),
    ):
        lines = [f"{moment(x.wall, asked)}  {x.subject}: {x.text}" for x in reversed(incidents)]
        _section(out, title, lines)
    pauses = [
        f"{moment(p.wall, asked)}  {p.partition} was not lent for "
        f"{seconds(p.seconds) if p.seconds is not None else 'all the time since'}: {p.text}"
        for p in reversed(told.pauses)
    ]
    _section(out, "Lending paused", pauses)
    slow = [
        f"{number(s.total_ms)} ms  request {s.request} of {s.service}, "
        f"{moment(s.wall, asked)}: {s.text}"
        for s in told.slowest
    ]
    _section(out, "Slowest requests", slow)
    return Group(*out)


def _section(out: list[RenderableType], title: str, lines: list[str]) -> None:
    if lines:
        out += [Text(), plain(title, "bold"), *map(plain, lines)]


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


def replay_view(report: Report, version: str) -> RenderableType:
    """What a replay found; ``version`` is that of this Cotenant."""
    out: list[RenderableType] = [
        plain(
            f"replayed {report.events:,} events, {report.actions:,} actions and {report.plans:,}"
            f" plans from {_count(report.segments, 'checkpoint')} of"
            f" {_count(report.runs, 'run')} of the node"
        )
    ]
    out += [plain(f"gap: {gap.records or 'some'} records: {gap.reason}") for gap in report.gaps]
    if report.skipped:
        out.append(plain(f"{report.skipped:,} records could not be replayed"))
    found = report.difference
    if found is None:
        out.append(plain("no difference", "green"))
        return Group(*out)
    out.append(plain(f"first difference ({found.kind}) at {found.now} ns: {found.event}", "red"))
    out += [plain(f"  journal: {line}") for line in found.expected or ("nothing",)]
    out += [plain(f"  replay:  {line}") for line in found.got or ("nothing",)]
    others = [v for v in report.versions if v != version]
    if others:
        out.append(
            plain(
                f"written by Cotenant {', '.join(others)}, replayed by {version}: the policy may"
                " have changed on purpose"
            )
        )
    return Group(*out)
