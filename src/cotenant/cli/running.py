"""``cotenant run``: how long a job may run, what it comes after, how often it is tried again, and
how it ended, as an exit code. ``cotenant checkpoint``: its work saved now."""

from __future__ import annotations

import argparse
from typing import Any

from cotenant.cli import finding, options
from cotenant.cli.output import command, note
from cotenant.domain.errors import InvalidRequest
from cotenant.domain.port import JobStatus
from cotenant.domain.workload import JobState, RestartPolicy

MAX_RESTARTS = 5


def add_limits(run: argparse.ArgumentParser) -> None:
    """Options of ``cotenant run``."""
    run.add_argument("--restart", choices=[p.value for p in RestartPolicy], default=None,
                     help="when it is started again (on-failure)")  # fmt: skip
    run.add_argument("--max-restarts", type=options.count, default=None, metavar="N",
                     help=f"in a row ({MAX_RESTARTS})")  # fmt: skip
    run.add_argument("--retry", type=options.count, default=None, metavar="N",
                     help="as --restart on-failure --max-restarts N; 0: never")  # fmt: skip
    run.add_argument("--time-limit", type=options.duration, default=0, metavar="TIME",
                     help="it is stopped, and has failed, once it ran for so long, such as "
                          "8h (no limit)")  # fmt: skip
    run.add_argument("--after", action="append", default=[], metavar="JOB",
                     help="start it once that job has succeeded; if that does not, it is "
                          "cancelled; again for more")  # fmt: skip


def limits(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a JobSpec that these options say."""
    restart, most = args.restart, args.max_restarts
    if args.retry is not None:
        if restart is not None or most is not None:
            raise InvalidRequest("--retry stands for --restart and --max-restarts: leave these out")
        restart = "on-failure" if args.retry else "never"
        most = args.retry or None
    return {
        "restart": RestartPolicy(restart or "on-failure"),
        "max_restarts": MAX_RESTARTS if most is None else most,
        "time_limit": args.time_limit,
        "after": tuple(args.after),
    }


def exit_code(job: JobStatus) -> int:
    """What a followed job's end is for a shell: its command's code, 128 + N after signal N."""
    if job.state == JobState.SUCCEEDED.value:
        return 0
    code = job.exit_code or 1
    return code if code > 0 else 128 - code


def told_end(job: JobStatus) -> int:
    """Say how a followed job ended, unless well; its exit code."""
    if job.reason or job.state != JobState.SUCCEEDED.value:
        note(f"job {job.id} {job.state}" + (f": {job.reason}" if job.reason else ""))
    return exit_code(job)


@command
def cmd_checkpoint(args: argparse.Namespace) -> int:
    """``cotenant checkpoint``: prints the path that the job reports."""
    within_s = args.timeout / 1e9
    print(finding.jobs_client(args).checkpoint(args.job, within_s))
    return 0


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.description = (
        "Ask a running job to write a checkpoint now, and print where it is once the job has said "
        "so. The job has to take part: cotenant.on_checkpoint(save)."
    )
    parser.add_argument("job", metavar="JOB", help="id, name, or the beginning of an id")
    parser.add_argument("--timeout", type=options.duration, default="60s", metavar="TIME",
                        help="how long to wait for it (60s)")  # fmt: skip
