"""What the demo counts: how an answer came, and how training went on meanwhile. Pure.

Times are seconds of one clock.
"""

from __future__ import annotations

from statistics import median
from typing import NamedTuple

from cotenant.cli.views import number

LEAST_S = 0.5
"""Training reports some times a second: over less time than this its rate is not known."""


class Answered(NamedTuple):
    """When a question was asked, when each piece of the answer came (it may hold several tokens,
    or the last may be none that one sees), when it was over, how many tokens there were in all."""

    asked: float
    pieces: tuple[float, ...]
    ended: float
    tokens: int

    @property
    def first_s(self) -> float | None:
        """Time to the first token."""
        return self.pieces[0] - self.asked if self.pieces else None

    @property
    def tokens_per_s(self) -> float | None:
        """From the first piece on; None where there was only one token."""
        took = self.ended - self.pieces[0] if self.pieces else 0.0
        return (self.tokens - 1) / took if took > 0 and self.tokens > 1 else None

    @property
    def token_p50_s(self) -> float | None:
        """Median time between two pieces."""
        gaps = [after - before for before, after in zip(self.pieces, self.pieces[1:], strict=False)]
        return median(gaps) if gaps else None


class Steps(NamedTuple):
    """How far training was at some time. ``run``: which start of the job this is."""

    at: float
    done: float
    run: int = 0


class Rates:
    """Training steps per second: during the newest answer, and before it. None: not known."""

    def __init__(self) -> None:
        self.idle: float | None = None
        self.during: float | None = None
        self._last: Steps | None = None

    def forget(self) -> None:
        """What comes next has nothing to do with what was before: training was held or let go."""
        self._last = self.idle = self.during = None

    def asked(self, now: Steps | None) -> None:
        """A question is asked now. Where no time has passed since the answer before, the rate of
        an idle node is still the last one known."""
        self.idle, self._last = self._since(now) or self.idle, now

    def answered(self, now: Steps | None) -> None:
        """Its answer is over."""
        self.during, self._last = self._since(now), now

    def _since(self, now: Steps | None) -> float | None:
        last = self._last
        if last is None or now is None or now.run != last.run or now.at - last.at < LEAST_S:
            return None
        return max(0.0, now.done - last.done) / (now.at - last.at)


def line(answered: Answered, rates: Rates, training: str = "") -> str:
    """An answer in one line; ``training`` in place of rates where there are none."""
    parts = []
    if answered.first_s is not None:
        parts.append(f"first token {number(1000 * answered.first_s, 0)} ms")
    if answered.tokens_per_s is not None:
        parts.append(f"{number(answered.tokens_per_s)} tokens/s")
    if answered.token_p50_s is not None:
        parts.append(f"{number(1000 * answered.token_p50_s, 0)} ms a token (p50)")
    parts.append(f"{answered.tokens} token" + "s" * (answered.tokens != 1))
    if training:
        parts.append(f"training {training}")
    else:
        parts.append(f"training {number(rates.during)} steps/s, idle {number(rates.idle)}")
    return " · ".join(parts)
