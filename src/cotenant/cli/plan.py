"""``cotenant plan``: who has which partition, and what the planner would do now."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from cotenant.cli.views import DASH, known, new_table, plain, seconds
from cotenant.domain.units import format_bytes

Doc = dict[str, Any]


def plan_view(found: Doc) -> RenderableType:
    """The plan in force and, of a dry run, the next one with its steps."""
    plan = found.get("plan") or {}
    lines: list[RenderableType] = [*_plan("in force", plan, plan.get("age_s"))]
    if found.get("changing"):
        lines.append(
            plain(f"on its way to another layout: {', '.join(found['changing'])}", "yellow")
        )
    if "next" in found:
        then = found["next"]
        lines.append(Text())
        if then is None:
            lines.append(plain("planned now: the same; the plan in force stays"))
        else:
            lines += _plan("planned now", then, None)
        for device in found.get("devices") or ():
            lines += _device(device)
    return Group(*lines)


def _plan(when: str, plan: Doc, age_s: float | None) -> list[RenderableType]:
    age = "" if age_s is None else f", {seconds(age_s)} old"
    lines: list[RenderableType] = [
        plain(f"plan {known(plan.get('version'))} ({when}{age})", "bold")
    ]
    lines += [plain(f"  {reason}", "dim") for reason in plan.get("reasons") or ()]
    lines += [
        plain(f"  {name} has no place: {why}", "red")
        for name, why in (plan.get("unplaced") or {}).items()
    ]
    partitions = plan.get("partitions") or []
    if not partitions:
        return [*lines, plain("  no partitions yet", "dim")]
    shown = new_table("PARTITION", "DEVICE", "COMPUTE", "MEMORY", "SERVICES", "JOBS", "LENT",
                  right=("COMPUTE", "MEMORY"))  # fmt: skip
    for p in partitions:
        shown.add_row(
            plain(p.get("id")),
            plain(p.get("device")),
            plain(p.get("compute")),
            plain(format_bytes(p["memory"]) if p.get("memory") else DASH),
            plain(" ".join(p.get("services") or ()) or DASH),
            plain(" ".join(p.get("jobs") or ()) or DASH),
            plain("while idle" if p.get("lent") else DASH),
        )
    return [*lines, shown]


def _device(device: Doc) -> list[RenderableType]:
    """What a device would have to do; nothing, if its layout stays."""
    goes, comes = device.get("goes") or [], device.get("comes") or []
    if not (goes or comes or device.get("problem")):
        return []
    lines: list[RenderableType] = [Text(), plain(f"device {known(device.get('id'))}", "bold")]
    lines += [plain(f"  goes: {', '.join(goes)}")] if goes else []
    lines += [plain(f"  comes: {', '.join(comes)}")] if comes else []
    if device.get("problem"):
        return [*lines, plain(f"  it would refuse: {device['problem']}", "red")]
    for number, step in enumerate(device.get("steps") or (), 1):
        how = "as it took here" if step.get("measured") else "assumed"
        lines.append(
            plain(f"  {number}. {step.get('what')}: {seconds(step.get('seconds'))} ({how})")
        )
    if device.get("steps"):
        lines.append(plain(f"  {seconds(device.get('seconds'))} in all, once what goes is idle"))
    return lines
