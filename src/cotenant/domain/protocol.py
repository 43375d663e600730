"""Which events answer which action: written before the code, tested, and printed in the docs.

An action that takes time is always answered by exactly one of its events. Where a failure and
an ordinary answer can cross (a worker dies while its last batch is on the way back), the first
one counts and the dispatcher ignores the other.
"""

from __future__ import annotations

from cotenant.domain import actions as a
from cotenant.domain import events as e

ANSWERS: dict[type, tuple[type, ...]] = {
    a.Dispatch: (e.BatchDone, e.BatchFailed, e.WorkerDown, e.ActionFailed),
    a.Recall: (),
    a.Grant: (e.Granted, e.ActionFailed, e.JobExited),
    a.Revoke: (e.Revoked, e.ActionFailed, e.JobExited),
    a.Load: (e.WorkerUp, e.LoadFailed),
    a.Unload: (e.WorkerDown, e.LoadFailed),
    a.Start: (e.JobReady, e.JobExited),
    a.Stop: (e.JobExited,),
    a.Repartition: (e.Repartitioned, e.ActionFailed),
    a.WakeAt: (e.Woke,),
    a.Resize: (),
    a.Serve: (),
    a.Decline: (),
    a.Emit: (),
    a.Complete: (),
    a.Reject: (),
}

EFFECTS: dict[tuple[type, type], str] = {
    (a.Dispatch, e.BatchDone): "answers every request of the batch that is finished; others have "
    "had a turn and stay on the worker for the next; the partition is free, or the worker goes on "
    "with the batch it has at hand. With `more` the lease goes on, and so does the batch",
    (a.Dispatch, e.BatchFailed): "refuses every request of the batch; the partition is free, or "
    "the worker goes on with the batch it has at hand",
    (a.Dispatch, e.WorkerDown): "each request of the batch goes back to the queue once, the second "
    "time it is refused; what the worker only had at hand goes back; the partition is free",
    (a.Dispatch, e.ActionFailed): "the batch did not reach its worker, which is idle; its requests "
    "go back to the queue once; the partition is free",
    (a.Grant, e.Granted): "the partition is lent",
    (a.Grant, e.ActionFailed): "the partition is free and not lent to this job for a while",
    (a.Grant, e.JobExited): "the partition is free",
    (a.Revoke, e.Revoked): "the partition is free for the batch that waits",
    (a.Revoke, e.ActionFailed): "the job is stopped, and killed if it does not obey",
    (a.Revoke, e.JobExited): "the partition is free for the batch that waits",
    (a.Load, e.WorkerUp): "the instance takes batches; its version serves once all have answered",
    (a.Load, e.LoadFailed): "a version that serves already is tried again later; one that was "
    "offered is declined where no device can load it",
    (a.Unload, e.WorkerDown): "the instance is forgotten",
    (a.Unload, e.LoadFailed): "the instance, which was being loaded, is forgotten",
    (a.Start, e.JobReady): "the job may be granted partitions",
    (a.Start, e.JobExited): "the job is forgotten until it is queued again",
    (a.Stop, e.JobExited): "the job's partitions are free; another may start in its place",
    (a.Repartition, e.Repartitioned): "the new partitions are free",
    (a.Repartition, e.ActionFailed): "the old layout of the device stays; the planner is told",
    (a.WakeAt, e.Woke): "due slices, holds and time-outs are acted on",
}

_SAYS: dict[type, str] = {
    a.Recall: "ends the lease of a batch, whose last turn answers the `Dispatch`",
    a.Resize: "says how much memory a pool, a job or a cache may have; they report it (`Held`)",
    a.Serve: "says which version is the current one",
    a.Decline: "says that a version is not served",
    a.Emit: "sends pieces of answers",
    a.Complete: "ends requests",
    a.Reject: "ends a request",
}


def answer_table() -> str:
    """The table as Markdown (``docs/protocol.md`` is made from it)."""
    lines = ["| action | answered by | effect |", "| --- | --- | --- |"]
    for action, answers in ANSWERS.items():
        if not answers:
            lines.append(f"| `{action.__name__}` | nothing: it {_SAYS[action]} | |")
        lines.extend(
            f"| `{action.__name__}` | `{answer.__name__}` | {EFFECTS[action, answer]} |"
            for answer in answers
        )
    return "\n".join(lines)
