"""``cotenant run`` and ``logs`` with a node elsewhere, which gets of this shell what is named."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Final

from cotenant.cli import finding
from cotenant.cli.output import note
from cotenant.cli.running import limits, told_end
from cotenant.domain.errors import InvalidRequest
from cotenant.domain.submission import Submission
from cotenant.domain.units import S
from cotenant.domain.workload import ENDED_STATES
from cotenant.serving import joblogs
from cotenant.serving.jobs_client import JobsClient

FOLLOW_S: Final = 20.0


def run(args: argparse.Namespace) -> int:
    """Submit a job; with ``--follow`` show its log until it has ended."""
    client, bounds = finding.remote(args), limits(args)
    try:
        wanted = Submission(
            command=tuple(args.command),
            name=args.name,
            cwd="" if args.cwd == "." else args.cwd,
            env=dict(args.env),
            weight=args.weight,
            guaranteed=args.guaranteed,
            limit=args.limit,
            kinds=tuple(args.on),
            memory=args.memory,
            memory_guaranteed=args.memory_guaranteed,
            grace_s=args.grace / S,
            time_limit_s=bounds.pop("time_limit") / S,
            **bounds,
        )
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    job = client.submit(wanted, args.files)
    if not args.follow:
        print(job)
        return 0
    note(f"job {job}")
    try:
        _copy(client, job, FOLLOW_S)
    except KeyboardInterrupt:
        note(f"job {job} goes on; stop it with: cotenant cancel --node {args.node} {job}")
        return 0
    return told_end(client.job(job))


def logs(args: argparse.Namespace) -> int:
    """A job's output, with ``-f`` until it has ended."""
    if args.lines is not None:
        raise InvalidRequest("over the jobs API a log comes whole: leave -n out, or pipe to tail")
    client = finding.remote(args)
    with contextlib.suppress(KeyboardInterrupt):
        _copy(client, client.job(args.job).id, FOLLOW_S if args.follow else 0.0)
    return 0


def _copy(client: JobsClient, job: str, wait_s: float) -> None:
    """A log to stdout: until the job has ended, or without ``wait_s`` what there is."""
    place = joblogs.START
    while True:
        piece, state = client.log(job, place, wait_s)
        sys.stdout.buffer.write(piece.data)
        sys.stdout.buffer.flush()
        if not piece.data and (not wait_s or state in ENDED_STATES):
            return
        place = piece.next
