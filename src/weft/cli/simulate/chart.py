"""Who held what when, for each policy, over a stretch of a run; and what came of it."""

from __future__ import annotations

from pathlib import Path

from weft.domain.errors import EnvironmentProblem
from weft.domain.units import S
from weft.sim.outcome import Outcome
from weft.sim.scenario import Scenario

_COLOURS = ("#0b7048", "#c9503a", "#3b5a9a", "#8a6d1f", "#6a3d8f", "#1f8a8a")


def draw(scenario: Scenario, outcomes: dict[str, Outcome], path: Path) -> None:
    """Write a PNG. Raises EnvironmentProblem if matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
        from matplotlib.patches import Patch
    except ImportError:
        raise EnvironmentProblem("--plot needs matplotlib: pip install 'weft[bench]'") from None
    names = [s.spec.name for s in scenario.services] + [j.spec.id for j in scenario.jobs]
    colour = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    figure, axes = plt.subplots(
        len(outcomes), 1, figsize=(12, 1.2 + 1.9 * len(outcomes)), squeeze=False, sharex=True
    )
    for axis, (policy, outcome) in zip(axes[:, 0], outcomes.items(), strict=True):
        for span in outcome.spans:
            axis.broken_barh(
                [(span.start / S, (span.end - span.start) / S)],
                (span.units[0], len(span.units)),
                color=colour[span.who],
                linewidth=0,
            )
        figures = outcome.figures()
        axis.set_title(
            f"{policy}: {figures['attainment']:.1%} attained, "
            f"{figures['job_rate']:.1f} steps/s, {figures['utilization']:.0%} used",
            loc="left",
            fontsize=10,
        )
        axis.set_ylim(0, sum(len(d.spec.units) for d in scenario.devices))
        axis.set_ylabel(" + ".join(d.spec.id for d in scenario.devices))
    axes[-1, 0].set_xlabel("seconds into the run")
    figure.legend(handles=[Patch(color=c, label=n) for n, c in colour.items()], loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
