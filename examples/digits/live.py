"""What the demo prints: a line every two seconds, and the summary."""

from __future__ import annotations

import re

import numpy as np
from arms import ARMS, OBJECTIVE_MS, Run
from figures import answered, between, judged, mean, percentile, right, shares
from stream import BEGINS, STAGES, Digits, Stream

EVERY_S = 2.0
ROLL_S = 3.0
"""Accuracy is averaged over this long."""
LAG_S = 0.2
"""The newest requests are left out: some are still on their way."""

HEAD = (
    f"{'s':>5}  {'arm':<14}{'req/s':>6}{'p95 ms':>8}{'p99 ms':>8}  {'objective':<10}{'refused':>8}"
    f"{'accuracy':>9}{'version':>8}{'steps/s':>8}   served/trained/idle"
)


class Live:
    """Prints a line now and then; ``watch`` is called often."""

    def __init__(self, stream: Stream, digits: Digits, cores: int) -> None:
        self._stream = stream
        self._digits = digits
        self._cores = cores
        self._next = EVERY_S
        self._stage = 0

    def watch(self, run: Run) -> None:
        """Print what is due."""
        now = run.now
        stage = int(np.searchsorted(np.array(BEGINS) * run.seconds, now, side="right")) - 1
        if stage > self._stage:
            self._stage = stage
            turned = f"turned by {STAGES[stage][0]:.0f} degrees"
            print(f"{now:>5.1f}  {'':<14}-- the data drift: digits now {turned} --", flush=True)
        if now >= self._next and now <= run.seconds + 0.5:
            self._next += EVERY_S
            print(self._line(run, now), flush=True)

    def _line(self, run: Run, now: float) -> str:
        until = now - LAG_S
        window, done = between(run, until - EVERY_S, until), answered(run)
        latency = run.answers["latency_ms"][window & done]
        p95, p99 = percentile(latency, 0.95), percentile(latency, 0.99)
        over = run.answers["status"][window]
        rolling = between(run, until - ROLL_S, until) & judged(run, self._stream, self._digits)
        version = run.answers["version"].max(initial=0)
        before = next((s for s in run.samples if s.at >= now - EVERY_S - 0.1), run.samples[-1])
        use = shares(before, run.samples[-1], self._cores)
        parts = "/".join(f"{use[k]:.0%}" for k in ("served", "trained", "idle"))
        verdict = f"{'<=' if p99 <= OBJECTIVE_MS else '> '} {OBJECTIVE_MS:.0f}"
        line = (
            f"{now:>5.1f}  {ARMS[run.arm]:<14}{window.sum() / EVERY_S:>6.0f}{p95:>8.1f}{p99:>8.1f}"
            f"  {verdict:<10}{(over > 200).sum():>8}"
            f"{mean(right(run, self._stream, self._digits)[rolling]):>9.1%}{version:>8}"
            f"{use['steps_per_s']:>8.1f}   {parts}"
        )
        return without_nan(line)


def without_nan(text: str) -> str:
    """A dash, of the same width, where there is no number yet."""
    return re.sub(r"\bnan\b%?", lambda found: f"{'-':>3}".ljust(len(found[0])), text)


def summary_table(summaries: dict[str, dict[str, float]]) -> str:
    """The arms side by side."""
    lines = [
        f"{'arm':<15}{'p50 ms':>8}{'p99 ms':>8}{'in objective':>14}{'refused':>9}{'accuracy':>10}"
        f"{'last stage':>12}{'right in time':>15}{'versions':>10}{'steps/s':>9}"
    ]
    for arm, own in summaries.items():
        lines.append(
            f"{ARMS[arm]:<15}{own['p50_ms']:>8.2f}{own['p99_ms']:>8.2f}{own['attainment']:>14.2%}"
            f"{own['refused']:>9.0f}{own['accuracy']:>10.1%}{own['accuracy_last_stage']:>12.1%}"
            f"{own['right_in_time']:>15.1%}{own['swapped_in']:>10.0f}{own['steps_per_s']:>9.1f}"
        )
    return without_nan("\n".join(lines))
