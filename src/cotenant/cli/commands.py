"""The subcommands that talk to a running node, or read what one has written.

Each returns its exit code; expected failures are raised as ``CotenantError`` for ``main`` to print.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from cotenant import __version__
from cotenant.cli import away, finding, options
from cotenant.cli.devices import KINDS, cmd_devices
from cotenant.cli.infer import add_infer, cmd_infer
from cotenant.cli.joblog import JobLog
from cotenant.cli.models import add_models, cmd_models
from cotenant.cli.optimize import add_optimize, cmd_optimize
from cotenant.cli.output import Command, as_json, command, note, show
from cotenant.cli.profile import add_profile, cmd_profile
from cotenant.cli.running import add_checkpoint, add_limits, cmd_checkpoint, limits, told_end
from cotenant.cli.servicelog import service_log, show_service_log
from cotenant.cli.stopping import add_stop, cmd_stop
from cotenant.cli.submitting import directory, has_input, inherited
from cotenant.cli.top.command import add_top, make_command
from cotenant.cli.variants import add_variants, cmd_variants
from cotenant.domain.errors import CotenantError, EnvironmentProblem, InvalidRequest
from cotenant.domain.port import JobStatus, find_job
from cotenant.domain.workload import ENDED_STATES, JobSpec
from cotenant.serving.control_client import ControlClient
from cotenant.sim.replay import replay
from cotenant.telemetry.explain import explain
from cotenant.telemetry.records import read, recent

FOLLOW_S = 0.2
ASK_S = 1.0
"""Seconds between questions after a followed job's state."""


# --- what a node says of itself ---------------------------------------------------------------


@command
def cmd_status(args: argparse.Namespace) -> int:
    """``cotenant status``: the node in short."""
    from cotenant.cli.views import status_view

    status = finding.jobs_client(args).status()
    return as_json(status) if args.json else show(status_view(status))


@command
def cmd_plan(args: argparse.Namespace) -> int:
    """``cotenant plan``: the plan in force; with ``--dry-run`` also the one that would be made."""
    from cotenant.cli.plan import plan_view

    found = _client(args).plan(args.dry_run)
    return as_json(found) if args.json else show(plan_view(found))


@command
def cmd_jobs(args: argparse.Namespace) -> int:
    """``cotenant jobs``: all jobs, oldest first."""
    from cotenant.cli.views import jobs_view

    jobs = [msgspec.to_builtins(job) for job in finding.jobs_client(args).jobs()]
    return as_json(jobs) if args.json else show(jobs_view(jobs))


# --- jobs -------------------------------------------------------------------------------------


@command
def cmd_run(args: argparse.Namespace) -> int:
    """``cotenant run``: submit a job; with ``--follow`` show its log until it has ended."""
    if finding.is_remote(args):
        return away.run(args)
    if args.files:
        raise InvalidRequest("--files is for a node elsewhere; here a job runs in --cwd")
    env, left_out = inherited()
    spec = JobSpec(
        id="",
        name=args.name,
        command=tuple(args.command),
        cwd=directory(args.cwd),
        env={**env, **dict(args.env)},
        weight=args.weight,
        guaranteed=args.guaranteed,
        limit=args.limit,
        kinds=tuple(args.on),
        memory=args.memory,
        memory_guaranteed=args.memory_guaranteed,
        grace=args.grace,
        **limits(args),
    )
    client = _client(args)
    job = client.submit(spec)
    if left_out:
        note(f"not passed on to the job, being no UTF-8 text: {', '.join(left_out)}")
    if has_input():
        note(
            "stdin is not passed on: a job's input is empty; let it read a file, as in "
            "cotenant run -- sh -c 'COMMAND < FILE'"
        )
    if not args.follow:
        print(job)
        return 0
    note(f"job {job}")
    try:
        ended = _follow(client, job, None)
    except KeyboardInterrupt:
        note(f"job {job} goes on; stop it with: cotenant cancel {job}")
        return 0
    return told_end(ended)


@command
def cmd_logs(args: argparse.Namespace) -> int:
    """``cotenant logs``: a job's output, with ``-f`` until it has ended; or a service's."""
    if finding.is_remote(args):
        return away.logs(args)
    client = _client(args)
    if path := service_log(client, args.job):
        return show_service_log(args, path)
    with contextlib.suppress(KeyboardInterrupt):
        if args.follow:
            _follow(client, args.job, args.lines)
        else:
            log = JobLog(Path(client.log_path(args.job)))
            _copy(log, args.lines)
            log.close()
    return 0


@command
def cmd_cancel(args: argparse.Namespace) -> int:
    """``cotenant cancel``: end a job for good."""
    print(f"cancelled {finding.jobs_client(args).cancel(args.job)}")
    return 0


@command
def cmd_hold(args: argparse.Namespace) -> int:
    """``cotenant hold``: keep a job from running."""
    print(f"held {finding.jobs_client(args).hold(args.job)}")
    return 0


@command
def cmd_release(args: argparse.Namespace) -> int:
    """``cotenant release``: let a held job run again."""
    print(f"released {finding.jobs_client(args).resume(args.job)}")
    return 0


def _follow(client: ControlClient, ref: str, lines: int | None) -> JobStatus:
    """Copy a job's log to stdout until the job has ended; returns how it ended."""
    log = JobLog(Path(client.log_path(ref)))
    job = find_job(client.jobs(), ref)
    try:
        asked = time.monotonic()
        while True:
            ended = job.state in ENDED_STATES  # before the last read, which then has everything
            _copy(log, lines)
            if ended:
                return job
            time.sleep(FOLLOW_S)
            if time.monotonic() - asked >= ASK_S:
                job, asked = find_job(client.jobs(), job.id), time.monotonic()
    finally:
        log.close()


def _copy(log: JobLog, lines: int | None) -> None:
    for data in log.read(lines):
        sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


# --- journals ---------------------------------------------------------------------------------


@command
def cmd_explain(args: argparse.Namespace) -> int:
    """``cotenant explain``: why the node did what it did, from its journal."""
    from cotenant.cli.views import engines_view, explain_view

    directory = args.journal or _journal_directory(args)
    told = explain(recent(directory), time.time(), args.last)
    engines = {} if args.journal else _engines(args)
    if args.json:
        return as_json({**msgspec.to_builtins(told), "engines": engines})
    show(explain_view(told))
    return show(engines_view(engines)) if engines else 0


def _engines(args: argparse.Namespace) -> dict[str, Any]:
    """By service, what opened each of its instances, if the node runs."""
    with contextlib.suppress(CotenantError):
        services = _client(args).status().get("services", ())
        return {s["name"]: s["engines"] for s in services if s.get("engines")}
    return {}


@command
def cmd_replay(args: argparse.Namespace) -> int:
    """``cotenant replay``: decide a journal's events again; 1 if anything comes out differently."""
    from cotenant.cli.views import replay_view

    report = replay(read(args.journal))
    if args.json:
        as_json({"identical": report.identical, **msgspec.to_builtins(report)})
    else:
        show(replay_view(report, __version__))
    return 0 if report.identical else 1


def _journal_directory(args: argparse.Namespace) -> Path:
    """Where the running node keeps its journal, or where one in this directory would."""
    with contextlib.suppress(EnvironmentProblem):
        directory = (_client(args).status().get("journal") or {}).get("directory")
        if directory:
            return Path(directory)
    return finding.likely(args) / "journal"


def _client(args: argparse.Namespace) -> ControlClient:
    return finding.client(args)


# --- arguments --------------------------------------------------------------------------------


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the commands of this module; each sets ``func``."""
    node = argparse.ArgumentParser(add_help=False)
    finding.add_node(node)
    machine = argparse.ArgumentParser(add_help=False)
    machine.add_argument("--json", action="store_true", help="print JSON, for machines")

    def add(name: str, func: Command, summary: str, *parents: Any) -> argparse.ArgumentParser:
        parser = subparsers.add_parser(name, help=summary, parents=list(parents))
        parser.set_defaults(func=func, parser=parser)
        return parser

    add("nodes", finding.cmd_nodes, "list the nodes that run on this machine", machine)
    add("status", cmd_status, "show what a node serves and runs", node, machine)
    add_top(add("top", make_command(recent), "watch partitions, services and jobs", node))
    plan = add("plan", cmd_plan, "show who has which partition, and why", node, machine)
    plan.add_argument(
        "--dry-run",
        action="store_true",
        help="also what would be planned now, and what that would take; changes nothing",
    )
    add("jobs", cmd_jobs, "list jobs", node, machine)
    box = add("devices", cmd_devices, "show what devices this machine has", machine)
    box.add_argument("--kind", choices=KINDS, help="only devices of this kind (all)")
    box.add_argument(
        "--channels",
        action="store_true",
        help="also stop a kernel of our own in its middle on each GPU",
    )
    box.epilog = (
        "Exits with 0 if a device of the kind can be used; 3: there is none, 4: the GPU driver "
        "is missing or fails, 5: it cannot be reached from here, 6: a Python package is missing."
    )
    add_profile(add("profile", cmd_profile, "measure how long a model takes", machine))
    add_optimize(add("optimize", cmd_optimize, "make variants of a model", node, machine))
    add_variants(add("variants", cmd_variants, "show variants, and say which serve", machine))
    _add_run(add("run", cmd_run, "submit a training or other batch job", node))
    add_checkpoint(add("checkpoint", cmd_checkpoint, "have a job save its work now", node))
    add_models(add("models", cmd_models, "list, load, unload, roll back models", node, machine))
    add_infer(add("infer", cmd_infer, "ask a model, with inputs from a file", node, machine))
    add_stop(add("stop", cmd_stop, "stop a node", node))
    logs = add("logs", cmd_logs, "print the output of a job, or of a service's workers", node)
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the job ends")
    logs.add_argument("-n", "--lines", type=options.count, help="only the last LINES lines")
    logs.add_argument("job", metavar="JOB|SERVICE", help="a job, or a service (service:NAME)")
    parsers = []
    parsers.append(add("cancel", cmd_cancel, "end a job for good", node))
    parsers.append(add("hold", cmd_hold, "keep a job from running until released", node))
    parsers.append(add("release", cmd_release, "let a held job run again", node))
    for parser in parsers:
        parser.add_argument("job", metavar="JOB", help="id, name, or the beginning of an id")
    why = add("explain", cmd_explain, "say why a node did what it did", node, machine)
    why.add_argument(
        "--last", type=options.count, default=10, metavar="N", help="of each kind (10)"
    )
    why.add_argument("--journal", type=Path, metavar="DIR", help="default: that of the node")
    again = add("replay", cmd_replay, "check that a journal's decisions come out again", machine)
    again.add_argument("journal", type=Path, metavar="JOURNAL", help="a directory or a segment")


def _add_run(run: argparse.ArgumentParser) -> None:
    run.usage = "cotenant run [options] -- COMMAND [ARGUMENT ...]"
    run.description = (
        "Submit a job. It gets this shell's environment, without COTENANT_* variables, and this "
        "working directory. Its standard input is empty, and its output goes to its log."
    )
    run.add_argument("--name", default="", help="default: the command's")
    run.add_argument("--weight", type=options.positive, default=1.0, metavar="W",
                     help="its part of what jobs share (1)")  # fmt: skip
    run.add_argument("--on", action="append", default=[], metavar="KIND",
                     help="kind of device it can run on; again for more (any)")  # fmt: skip
    run.add_argument("--guaranteed", type=options.shares, default=0.0, metavar="SHARE",
                     help="what is owed to it of its kind of device, such as 0.25 or 25%%, "
                          "or by kind: cpu=0.25,gpu=0.5 (0)")  # fmt: skip
    run.add_argument("--limit", type=options.shares, default=1.0, metavar="SHARE",
                     help="the most it may hold of it (1)")  # fmt: skip
    run.add_argument("--memory", type=options.size, default=0, metavar="SIZE",
                     help="of all its processes; over it, it is ended: 2GiB")  # fmt: skip
    run.add_argument("--memory-guaranteed", type=options.size, default=None, metavar="SIZE",
                     help="of that its own: the rest it may be told to give (all)")  # fmt: skip
    add_limits(run)
    run.add_argument("--grace", type=options.duration, default="5s", metavar="TIME",
                     help="from SIGTERM to SIGKILL when it is stopped (5s)")  # fmt: skip
    run.add_argument("--env", type=options.variable, action="append", default=[], metavar="K=V",
                     help="a variable to add to this environment, or to change")  # fmt: skip
    run.add_argument("--cwd", default=".", metavar="D", help="default: this directory")
    run.add_argument("--files", type=Path, metavar="D",
                     help="with the address of a jobs API: a directory that is copied there, for "
                          "the job to run in")  # fmt: skip
    run.add_argument("--follow", action="store_true", help="show its output until it ends")
    run.add_argument("command", nargs="+", metavar="COMMAND", help="after --")
