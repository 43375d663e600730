"""The pages of this moment: who holds what, and services."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from typing import Any
from urllib.parse import quote

from cotenant.domain.port import IndexEntry, ModelMeta, TensorMeta
from cotenant.serving.web.frame import (
    Page,
    cell,
    chart,
    facts,
    kept,
    link,
    meter,
    part,
    row,
    table,
)
from cotenant.serving.web.html import Content, Html, join, tag
from cotenant.serving.web.look import Look, Row, name_of, refusals
from cotenant.serving.web.shown import known, number, size
from cotenant.serving.web.trying import Tried

MOST_PREFILLED = 512
"""Elements of an input that is filled in with zeros."""


def now_page(found: Look) -> Page:
    """Who held what in the last minute, by device."""
    status = found.status
    about = tag(
        "p",
        f"Cotenant {known(status.get('version'))} is ",
        tag("strong", kept(found, "node/state")),
        ", up ",
        kept(found, "node/up"),
        ". Plan ",
        kept(found, "plan/version"),
        ", ",
        kept(found, "plan/age"),
        " old: ",
        kept(found, "plan/reasons"),
        ".",
    )
    devices = [_device(found, device) for device in found.rows("devices")]
    journal = (status.get("journal") or {}).get("error")
    problem = tag("p", f"The journal is not written: {journal}", class_="bad") if journal else None
    return Page("Now", "Now", join([about, problem, *devices]), shape=found.shape)


def _device(found: Look, device: Row) -> Html:
    name, units = str(device.get("id")), device.get("units") or []
    compute = device.get("compute") or len(units) or 1
    about = [f"{known(device.get('kind'))}, {len(units)} units, level {known(device.get('level'))}"]
    about += [f"memory {size(device['memory'])}"] if device.get("memory") else []
    about += [] if device.get("trains", True) else ["jobs do not run here"]
    trouble = device.get("trouble")
    shares = [
        row(
            name_of(found, workload),
            workload.partition(":")[0] if ":" in workload else "nobody",
            cell(found, f"held/{name}/{workload}", class_="n"),
            meter(found, f"held/{name}/{workload}", f"share of {name_of(found, workload)}"),
        )
        for workload in found.held.get(name, {})
    ]
    partitions = [p for p in found.rows("partitions") if p.get("device") == name]
    return tag(
        "section",
        tag("h2", f"Device {name}"),
        tag("p", ", ".join(about), class_="quiet"),
        tag("p", str(trouble), class_="bad") if trouble else None,
        chart(
            "device", name, f"Units of {name} by who held them, the last minute", data_most=compute
        ),
        part(
            f"device/{name}",
            table(
                f"Who held {name} in the last minute",
                ("Who", "What", "Share", "As a bar"),
                shares,
            ),
            table(
                f"Partitions of {name} now",
                ("Partition", "Runs now", "Busy by", "Slice", "Back p99", "Switches"),
                [_partition(found, p) for p in partitions],
            ),
            _memory(found, device),
        ),
    )


def _partition(found: Look, partition: Row) -> Html:
    name = str(partition.get("id"))
    key = f"partition/{name}"
    plain, numbers = ("now", "busy"), ("slice", "back", "switches")
    return row(
        name,
        *(cell(found, f"{key}/{k}") for k in plain),
        *(cell(found, f"{key}/{k}", class_="n") for k in numbers),
    )


def _memory(found: Look, device: Row) -> Html | None:
    tenants = device.get("tenants") or {}
    rows = [
        row(name_of(found, who) if ":" in who else _tenant(found, who), size(told["memory"]))
        for who, told in tenants.items()
        if told.get("memory")
    ]
    if not rows:
        return None
    return table(f"Memory of {device.get('id')}", ("Who", "Occupies"), rows)


def _tenant(found: Look, who: str) -> str:
    return found.names.get(f"job:{who}", who)


def services_page(found: Look) -> Page:
    """All services against their objectives."""
    heads = (
        *("Service", "State", "Version", "p95", "Objective", "Met", "Requests/s", "Queue"),
        *("Refused", "Variants"),
    )
    rows = []
    for service in found.rows("services"):
        key = f"service/{service['name']}"
        rows.append(
            row(
                link("services", str(service["name"])),
                cell(found, f"{key}/state"),
                cell(found, f"{key}/version"),
                cell(found, f"{key}/p95", class_="n"),
                _objective(service),
                *(cell(found, f"{key}/{k}", class_="n") for k in ("met", "rate", "queue")),
                *(cell(found, f"{key}/{k}") for k in ("refused", "variants")),
            )
        )
    body = part("services", table("Services", heads, rows, "This node has no services."))
    return Page("Services", "Services", body, shape=found.shape)


def _objective(service: Row) -> Html:
    percentile = f"p{service.get('percentile') or 99:g}"
    return tag("td", f"{percentile} {number(service.get('objective_ms'))} ms", class_="n")


def service_page(
    found: Look,
    service: Row,
    versions: Sequence[IndexEntry],
    trial: Html | None,
) -> Page:
    """One service: its chart, refusals, versions and variants, and ``trial``, a form to try it."""
    name = str(service["name"])
    key, objective = f"service/{name}", service.get("objective_ms")
    shown = facts(
        ("State", kept(found, f"{key}/state")),
        ("p50", kept(found, f"{key}/p50")),
        ("p95", kept(found, f"{key}/p95")),
        ("p99", kept(found, f"{key}/p99")),
        ("Objective", f"p{service.get('percentile') or 99:g} {number(objective)} ms"),
        ("Met", kept(found, f"{key}/met")),
        ("Requests/s", kept(found, f"{key}/rate")),
        ("Queue", kept(found, f"{key}/queue")),
        ("Rows in a batch", kept(found, f"{key}/batch")),
        ("Answered", kept(found, f"{key}/answered")),
        ("Refused", kept(found, f"{key}/refused")),
        ("Variants", kept(found, f"{key}/variants")),
    )
    notes = [tag("li", str(note)) for note in service.get("notes") or ()]
    of = f"service:{name}"
    content = join(
        [
            shown,
            tag("ul", *notes) if notes else None,
            chart(
                "latency", of, f"p95 of {name} against its objective", data_objective=objective or 0
            ),
            chart("rate", of, f"Requests a second to {name}"),
            part(f"service/{name}", _refused(name, service), _versions(name, versions)),
            _accuracy(service),
            trial,
        ]
    )
    return Page(f"Service {name}", "Services", content, shape=found.shape)


def _refused(name: str, service: Row) -> Html:
    rows = [row(reason.lower(), tag("td", f"{n:,}", class_="n")) for reason, n in refusals(service)]
    return table(f"Refusals of {name}", ("Reason", "Requests"), rows)


def _versions(name: str, versions: Sequence[IndexEntry]) -> Html:
    rows = [row(known(v.version), v.state.lower(), known(v.reason)) for v in versions]
    return table(f"Versions of {name}", ("Version", "State", "Why"), rows)


def _accuracy(service: Row) -> Html | None:
    accuracy = service.get("accuracy")
    if not isinstance(accuracy, dict):
        return None
    rows = [
        row(str(k), known(v if not isinstance(v, float) else f"{v:.4g}"))
        for k, v in accuracy.items()
    ]
    return table("Accuracy on its check data", ("What", "Found"), rows)


def trying(name: str, meta: ModelMeta | None, tried: Tried | None) -> Html:
    """A form to send a request to a model, and what came of the last."""
    if meta is None:
        return tag("section", tag("h2", "Try it"), tag("p", "No version is loaded now."))
    shapes = [
        row(t.name, t.datatype, _shape(t), "no" if t.optional else "yes") for t in meta.inputs
    ]
    given = tried.given if tried is not None else example(meta)
    said: Content = None
    if tried is not None:
        said = tag("span", tried.headline, "\n", tried.text)
    form = tag(
        "form",
        tag("label", "Request, as JSON", for_="input"),
        tag("textarea", given, id="input", name="input", rows="12", spellcheck="false"),
        tag("p", tag("button", "Send")),
        tag("label", "Answer", for_="answer"),
        tag("output", said, id="answer", class_="log", for_="input", aria_live="polite"),
        method="post",
        action=f"{_path(name)}/try#answer",
        data_try=True,
    )
    needs = ("Input", "Type", "Shape", "Needed")
    return tag("section", tag("h2", "Try it"), table(f"Inputs of {name}", needs, shapes), form)


def _path(name: str) -> str:
    return f"/dashboard/services/{quote(name, safe='')}"


def _shape(tensor: TensorMeta) -> str:
    return " × ".join("any" if n < 0 else str(n) for n in tensor.shape) or "one"


def example(meta: ModelMeta) -> str:
    """A request to a model that is small and fits, as JSON."""
    needed = [t for t in meta.inputs if not t.optional]
    if meta.pieces:
        values: dict[str, Any] = {t.name: "hello" if t.datatype == "BYTES" else 1 for t in needed}
        return json.dumps(values, indent=1)
    inputs = []
    for tensor in needed:
        shape = [1 if n < 0 else n for n in tensor.shape]
        count = prod(shape)
        filler = {"BYTES": "text", "BOOL": False}.get(tensor.datatype, 0)
        data = [filler] * count if count <= MOST_PREFILLED else []
        inputs.append(
            {"name": tensor.name, "datatype": tensor.datatype, "shape": shape, "data": data}
        )
    shown = [json.dumps(one) for one in inputs]
    return '{"inputs": [\n ' + ",\n ".join(shown) + "\n]}"


def login_page(action: str, label: str, problem: str) -> Page:
    """The form that asks for a token."""
    form = tag(
        "form",
        tag("p", problem, class_="bad", role="alert") if problem else None,
        # For password managers, which keep the token under a name.
        tag("input", name="username", value="cotenant", autocomplete="username", hidden=True),
        tag("label", label, for_="token"),
        tag(
            "input",
            type="password",
            id="token",
            name="token",
            autocomplete="current-password",
            required=True,
            autofocus=True,
        ),
        tag("p", tag("button", "Sign in")),
        method="post",
        action=action,
    )
    return Page("Sign in", "", form, 0, live=False)
