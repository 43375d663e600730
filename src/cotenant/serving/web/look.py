"""What of a node changes while somebody looks: one look is the same for pages and the stream.

A page shows cells. Each has a key, such as ``service/digits/p95``, and the stream says which of
them have another text now. ``shape`` tells whether the same cells are there at all.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import msgspec

from cotenant.domain.port import Held, NodePort
from cotenant.domain.workload import ENDED_STATES
from cotenant.serving.web.shown import DASH, known, milliseconds, number, percent, seconds

Row = dict[str, Any]

MOST_ENDED: Final = 100


class Look(msgspec.Struct):
    """One look at a node. ``cells``: texts by key; ``meters``: shares (0..1) by key; ``names``: of
    workloads, as people know them; ``points``: of each service p95 (ms) and rate, of each job its
    rate. ``left_out``: jobs that ended long ago."""

    status: Row
    past: list[Held]
    cells: dict[str, str] = {}
    meters: dict[str, float] = {}
    names: dict[str, str] = {}
    held: dict[str, dict[str, float]] = {}
    points: dict[str, list[float | None]] = {}
    left_out: int = 0

    @property
    def shape(self) -> str:
        """The same as long as the same cells are there."""
        keys = "\0".join(sorted(self.cells))
        return hashlib.sha256(keys.encode()).hexdigest()[:16]

    def rows(self, kind: str) -> list[Row]:
        """Devices, partitions, services or jobs as the status has them."""
        return list(self.status.get(kind) or ())

    def forget_ended(self) -> None:
        """Of jobs that ended keep the newest, so that a page stays small."""
        jobs = self.rows("jobs")
        ended = [job for job in jobs if job.get("state") in ENDED_STATES]
        self.left_out = max(0, len(ended) - MOST_ENDED)
        old = {job["id"] for job in ended[: self.left_out]}
        self.status = {**self.status, "jobs": [job for job in jobs if job["id"] not in old]}

    def cell(self, key: str) -> str:
        """The text of a cell."""
        return self.cells.get(key, DASH)


def look(node: NodePort) -> Look:
    """Look at a node."""
    found = Look(node.status(), node.timeline())
    found.forget_ended()
    jobs, services = found.rows("jobs"), found.rows("services")
    found.names = {f"job:{j['id']}": str(j.get("name") or j["id"]) for j in jobs}
    found.names |= {f"service:{s['name']}": str(s["name"]) for s in services}
    _node(found)
    for partition in found.rows("partitions"):
        _partition(found, partition)
    for service in services:
        _service(found, service)
    for job in jobs:
        _job(found, job)
    _minute(found)
    return found


def name_of(found: Look, workload: str) -> str:
    """A workload as people know it."""
    return found.names.get(workload) or workload.partition(":")[2] or workload


def _node(found: Look) -> None:
    status, plan = found.status, found.status.get("plan") or {}
    state = "draining" if status.get("draining") else "ready" if status.get("ready") else "starting"
    found.cells |= {
        "node/state": state,
        "node/up": seconds(status.get("uptime_s")),
        "plan/version": known(plan.get("version")),
        "plan/age": seconds(plan.get("age_s")),
        "plan/reasons": "; ".join(map(str, plan.get("reasons") or ())) or "no plan yet",
    }


def _partition(found: Look, row: Row) -> None:
    key = f"partition/{row.get('id')}"
    kind, _, name = str(row.get("holder") or "idle").partition(":")
    busy = {k: v or 0.0 for k, v in (row.get("busy") or {}).items()}
    shares = sorted(busy.items(), key=lambda item: (-item[1], item[0]))
    told = [f"{name_of(found, w)} {percent(part)}" for w, part in shares if part >= 0.005]
    back = row.get("revoke_p99_us")
    paused = row.get("slice_ms") == 0 and row.get("services")
    found.cells |= {
        f"{key}/now": found.names.get(f"job:{name}", name) if kind == "job" else name or kind,
        f"{key}/busy": ", ".join(told) or "idle",
        f"{key}/slice": "paused" if paused else milliseconds(row.get("slice_ms")),
        f"{key}/back": DASH if back is None else f"{number(back, 0)} µs",
        f"{key}/switches": number(row.get("switches"), 0),
    }


def refusals(row: Row) -> list[tuple[str, int]]:
    """Reasons for which a service refused requests, and how many."""
    refused = (row.get("refused") or {}).items()
    return sorted((str(reason), count) for reason, count in refused if count)


def _service(found: Look, row: Row) -> None:
    key = f"service/{row['name']}"
    reason = f": {row['reason']}" if row.get("reason") else ""
    told = [f"{count:,} {reason.lower()}" for reason, count in refusals(row)]
    found.cells |= {
        f"{key}/state": f"{known(row.get('state'))}{reason}",
        f"{key}/version": known(row.get("version")),
        f"{key}/rate": number(row.get("rate")),
        f"{key}/queue": number(row.get("queue"), 0),
        f"{key}/batch": number(row.get("batch_mean")),
        f"{key}/p50": milliseconds(row.get("p50_ms")),
        f"{key}/p95": milliseconds(row.get("p95_ms")),
        f"{key}/p99": milliseconds(row.get("p99_ms")),
        f"{key}/met": percent(row.get("attainment"), 1),
        f"{key}/refused": ", ".join(told) or "none",
        f"{key}/variants": variants(row),
        f"{key}/answered": number(row.get("answered"), 0),
    }
    found.points[f"service:{row['name']}"] = [row.get("p95_ms"), row.get("rate")]


def variants(row: Row) -> str:
    """Which variant serves, by kind of device, and which could not."""
    told = row.get("variants") or {}
    parts = [f"{name} on {kind}" for kind, name in (told.get("serving") or {}).items()]
    for kind, failed in (told.get("failed") or {}).items():
        parts += [f"{name} failed on {kind}: {why}" for name, why in failed.items()]
    return ", ".join(parts) or "one alone"


def _job(found: Look, row: Row) -> None:
    key = f"job/{row['id']}"
    progress = row.get("progress")
    done = f"{number(progress, 0)} {row.get('progress_unit') or ''}".strip() if progress else DASH
    metrics = sorted((row.get("metrics") or {}).items())
    found.cells |= {
        f"{key}/state": known(row.get("state")),
        f"{key}/on": " ".join(row.get("partitions") or ()) or DASH,
        f"{key}/progress": done,
        f"{key}/rate": number(row.get("rate"), 2),
        f"{key}/held": seconds(row.get("held_s")),
        f"{key}/pauses": number(row.get("pauses"), 0),
        f"{key}/restarts": number(row.get("restarts"), 0),
        f"{key}/note": known(row.get("reason")),
        f"{key}/metrics": ", ".join(
            f"{name} {DASH if value is None else format(value, '.4g')}" for name, value in metrics
        )
        or DASH,
    }
    found.points[f"job:{row['id']}"] = [row.get("rate")]


def _minute(found: Look) -> None:
    """Of each device, the share that each workload had of it in the last minute."""
    for device in found.rows("devices"):
        compute = device.get("compute") or len(device.get("units") or ()) or 1
        total = sum(span.seconds for span in found.past) or 1.0
        mine: dict[str, float] = {}
        for span in found.past:
            for workload, units in span.devices.get(device["id"], {}).items():
                share = units * span.seconds / (compute * total)
                mine[workload] = mine.get(workload, 0.0) + share
        kept = {w: min(1.0, s) for w, s in sorted(mine.items()) if s >= 0.0005}
        kept["idle"] = max(0.0, 1.0 - sum(kept.values()))
        found.held[device["id"]] = kept
        for workload, share in kept.items():
            key = f"held/{device['id']}/{workload}"
            found.cells[key], found.meters[key] = percent(share, 1), round(share, 4)
