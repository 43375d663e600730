"""Pictures of a run under each policy: who held what when, latency against objective, shares."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cotenant.domain.errors import EnvironmentProblem
from cotenant.domain.units import S
from cotenant.sim.outcome import Outcome
from cotenant.sim.scenario import Scenario

_COLOURS = ("#0b7048", "#c9503a", "#3b5a9a", "#8a6d1f", "#6a3d8f", "#1f8a8a")
_STYLE = """body{font:15px system-ui;margin:2em;max-width:75em}table{border-collapse:collapse}
td,th{padding:.3em .8em;text-align:right;border-bottom:1px solid #ccc}
td:first-child,th:first-child{text-align:left}img{max-width:100%}"""


def draw(scenario: Scenario, outcomes: dict[str, Outcome], path: Path) -> None:
    """Write a PNG. Raises EnvironmentProblem if matplotlib is not installed."""
    path.write_bytes(_picture(scenario, outcomes))


def report(
    scenario: Scenario,
    outcomes: dict[str, Outcome],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    path: Path,
) -> None:
    """Write one HTML file: the table (``rows``, the first its head), the picture, the notes, and
    what each policy changed and why. Raises EnvironmentProblem without matplotlib."""
    image = base64.b64encode(_picture(scenario, outcomes)).decode()
    head, *body = rows
    parts = [
        f"<title>{html.escape(scenario.name)}</title><meta charset=utf-8><style>{_STYLE}</style>",
        f"<h1>{html.escape(scenario.name)}</h1><p>{html.escape(scenario.story)}</p>",
        f"<table><tr>{''.join(f'<th>{html.escape(c)}</th>' for c in head)}</tr>",
        *(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in body),
        f"</table><p><img alt='who held what' src='data:image/png;base64,{image}'></p>",
        *(f"<p>{html.escape(note)}</p>" for note in notes),
    ]
    for policy, outcome in outcomes.items():
        lines = [f"{at / S:.1f} s: {why}" for at, reasons in outcome.reasons for why in reasons]
        if lines:
            listed = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
            parts.append(
                f"<details><summary>what {html.escape(policy)} changed, and why</summary>"
                f"<ol>{listed}</ol></details>"
            )
    path.write_text("<!doctype html>" + "\n".join(parts) + "\n")


def _picture(scenario: Scenario, outcomes: dict[str, Outcome]) -> bytes:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
        from matplotlib.patches import Patch
    except ImportError:
        raise EnvironmentProblem(
            "pictures need matplotlib: pip install 'cotenant[bench]'"
        ) from None
    names = [s.spec.name for s in scenario.services] + [j.spec.id for j in scenario.jobs]
    colour = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    figure, axes = plt.subplots(
        len(outcomes), 3, figsize=(17, 1.2 + 2.4 * len(outcomes)), squeeze=False, sharex="col"
    )
    for (space, latency, share), (policy, outcome) in zip(axes, outcomes.items(), strict=True):
        figures = outcome.figures()
        space.set_title(
            f"{policy}: {figures['attainment']:.1%} attained, "
            f"{figures['job_rate']:.1f} steps/s, {figures['utilization']:.0%} used",
            loc="left",
            fontsize=10,
        )
        _space(space, scenario, outcome, colour)
        _latency(latency, scenario, outcome, colour)
        _shares(share, outcome, colour)
    for axis, label in zip(axes[-1], ("seconds into the run",) * 3, strict=True):
        axis.set_xlabel(label)
    handles = [Patch(color=c, label=n) for n, c in colour.items()]
    figure.legend(handles=handles, loc="lower center", ncol=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0.35 / figure.get_figheight(), 1, 1))
    out = io.BytesIO()
    figure.savefig(out, dpi=100)
    plt.close(figure)
    return out.getvalue()


def _space(axis: Any, scenario: Scenario, outcome: Outcome, colour: dict[str, str]) -> None:
    for span in outcome.spans:
        axis.broken_barh(
            [(span.start / S, (span.end - span.start) / S)],
            (span.units[0], len(span.units)),
            color=colour[span.who],
            linewidth=0,
        )
    axis.set_ylim(0, sum(len(d.spec.units) for d in scenario.devices))
    axis.set_ylabel(" + ".join(d.spec.id for d in scenario.devices))
    axis.locator_params(axis="x", nbins=5)


def _latency(axis: Any, scenario: Scenario, outcome: Outcome, colour: dict[str, str]) -> None:
    times = [m.at / S for m in outcome.moments]
    for service in scenario.services:
        name = service.spec.name
        axis.plot(times, [m.p95[name] for m in outcome.moments], color=colour[name], linewidth=1)
    axis.axhline(1.0, color="grey", linestyle=":")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("p95 / objective")


def _shares(axis: Any, outcome: Outcome, colour: dict[str, str]) -> None:
    if outcome.moments:
        names = list(outcome.moments[0].share)
        axis.stackplot(
            [m.at / S for m in outcome.moments],
            [[m.share.get(name, 0.0) for m in outcome.moments] for name in names],
            colors=[colour[name] for name in names],
            linewidth=0,
        )
    axis.set_ylim(0, 1)
    axis.set_ylabel("share of compute")
