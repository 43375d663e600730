"""What becomes of a job whose run has ended: pure, so that every case can be tested at once."""

from __future__ import annotations

import msgspec

from cotenant.domain.workload import JobState, RestartPolicy
from cotenant.runtime.jobrun import Outcome
from cotenant.runtime.jobstore import JobRecord


class RestartRules(msgspec.Struct, frozen=True):
    """Exponential back-off, in seconds: ``first_s``, doubled each time, at most ``most_s``.

    A run of ``healthy_s`` or more ends a streak: the next restart waits ``first_s`` again, and
    a job's ``max_restarts`` counts from there.
    """

    first_s: float = 1.0
    most_s: float = 60.0
    healthy_s: float = 60.0

    def delay_s(self, streak: int) -> float:
        """Wait before restart number ``streak`` of a streak (1 is the first)."""
        return min(self.most_s, self.first_s * 2.0 ** min(max(streak, 1) - 1, 30))


def verdict(
    record: JobRecord, outcome: Outcome, *, closing: bool, recovering: bool, rules: RestartRules
) -> tuple[JobState, str, int]:
    """The state that follows, the reason for the user, and the restarts in a row so far.

    ``closing``: this daemon stopped it, to run again. ``recovering``: the run was another daemon's.
    A job that was stopped goes back to the queue whatever its code: one that saved its work exits
    with 0. One that ended before the stop reached it has ended by itself.
    """
    spec, reason, streak = record.spec, outcome.reason(record.spec), record.streak
    if record.state is JobState.STOPPING:
        to = JobState.FAILED if record.overdue else JobState.CANCELLED
        return to, record.reason, streak
    if outcome.failed in ("cwd", "exec") or outcome.over_memory:
        return JobState.FAILED, reason, streak  # it would only happen again
    if not outcome.begun and (closing or recovering):
        return JobState.QUEUED, "", streak
    if (outcome.stopped and (closing or recovering)) or (outcome.lost and closing):
        return JobState.QUEUED, "stopped with the daemon", streak
    fine = outcome.code == 0
    if fine and spec.restart is not RestartPolicy.ALWAYS:
        return JobState.SUCCEEDED, reason, 0
    if spec.restart is RestartPolicy.NEVER and outcome.begun:
        return JobState.FAILED, reason, streak
    streak = 1 if outcome.ran_s >= rules.healthy_s else streak + 1
    if streak <= spec.max_restarts or (fine and outcome.ran_s >= rules.healthy_s):
        return JobState.BACKOFF, reason, streak
    what = reason or "ended at once"
    if spec.max_restarts == 0:
        return JobState.FAILED, f"{what}; it may not be restarted (max_restarts 0)", streak
    return (
        JobState.FAILED,
        f"{what}; given up after {spec.max_restarts} restarts in a row, none of which ran for "
        f"{rules.healthy_s:g}s (the last one for {outcome.ran_s:.1f}s); see its log",
        streak,
    )
