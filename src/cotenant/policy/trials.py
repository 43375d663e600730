"""What is tried out, because what happens anyway does not show it.

Two questions, one at a time, each for ``TRY_FOR``:

* What would a job make of more units? A job of which too little is known has some of the richest
  job's, seldom enough to stay below ``EXPLORE`` of all units' time.
* What does borrowing cost jobs? They have for themselves all that services can do without, at most
  once in ``OWN_EVERY``. Speed alone does not tell it while there are always as many pauses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from cotenant.domain.units import S
from cotenant.policy.utility import Curve
from cotenant.policy.views import View

EXPLORE: Final = 0.03
"""Share of the time of all units that may go into trying out what jobs make of more."""
TRY_FOR: Final = 90 * S
"""Progress is known over a minute."""
OWN_EVERY: Final = 3600 * S


class Trials(msgspec.Struct):
    """``job``: whose turn it is to have more. ``more_at``, ``own_at``: when something of either
    kind last began (ns)."""

    job: str = ""
    more_at: int = 0
    own_at: int = -OWN_EVERY

    def owning(self, now: int) -> bool:
        """Whether jobs have space of their own to show what borrowing costs them."""
        return now - self.own_at < TRY_FOR

    def may_own(self, now: int) -> bool:
        """Whether they may have it."""
        return not self.job and now - self.own_at > OWN_EVERY

    def more(self, now: int, shares: Mapping[str, int], curves: Mapping[str, Curve]) -> list[str]:
        """Begin or end trying out what a job would make of more than its share; why, if so."""
        if self.job:
            if now - self.more_at < TRY_FOR:
                return []
            done, self.job = self.job, ""
            return [f"job {done} was tried out; its space is what it was"]
        moved, units = _moved(shares), sum(shares.values())
        if not moved or self.owning(now):
            return []
        if now - self.more_at < TRY_FOR * moved / (units * EXPLORE):
            return []
        self.more_at = now
        for job, have in sorted(shares.items(), key=lambda item: (item[1], item[0])):
            curve = curves.get(job)
            if curve is not None and curve.unsure(min(have + moved, curve.units)):
                self.job = job
                return [f"job {job} is tried out with {moved} more: what it gains is not known"]
        return []

    def applied(self, shares: dict[str, int], view: View) -> dict[str, int]:
        """The units of jobs with what is being tried out; guarantees and limits hold."""
        mine = self.job
        if mine not in shares or len(shares) < 2:
            return shares
        jobs, compute = {j.id: j for j in view.jobs}, view.device.compute
        others = [(units, job) for job, units in shares.items() if job != mine]
        units, richest = max(others)
        kept = max(1, int(jobs[richest].guaranteed * compute + 1e-9))
        most = max(1, int(jobs[mine].limit * compute + 1e-9))
        moved = max(0, min(_moved(shares), units - kept, most - shares[mine]))
        return shares | {richest: units - moved, mine: shares[mine] + moved}


def _moved(shares: Mapping[str, int]) -> int:
    """Units that a job is given to try: a third of what the richest has."""
    return max(shares.values(), default=0) // 3
