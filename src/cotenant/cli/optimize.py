"""``cotenant optimize``: a job that makes variants of a version, or the same in the foreground."""

from __future__ import annotations

import argparse
import sys

from cotenant.cli.finding import client
from cotenant.cli.output import command, note
from cotenant.cli.submitting import directory, inherited
from cotenant.domain.workload import JobSpec, RestartPolicy
from cotenant.optimize import arguments
from cotenant.optimize.__main__ import main as run_here
from cotenant.optimize.recipes.known import check_asked, chosen
from cotenant.optimize.running import the_version
from cotenant.runtime.repository import Repository


@command
def cmd_optimize(args: argparse.Namespace) -> int:
    """Submits the job and prints its id; with ``--here`` runs it."""
    arguments.asked(args)
    the_version(Repository(args.models), args.model, args.version)
    if args.recipes:
        check_asked(chosen(args.recipes))
    words = arguments.again(args)
    if args.here:
        return run_here(words)
    env, left_out = inherited()
    spec = JobSpec(
        id="",
        name=f"optimize-{args.model}",
        command=(sys.executable, "-P", "-m", "cotenant.optimize", *words),
        cwd=directory("."),
        env=env,
        restart=RestartPolicy.NEVER,
        kinds=("cpu",),
    )
    job = client(args).submit(spec)
    if left_out:
        note(f"not passed on to the job, being no UTF-8 text: {', '.join(left_out)}")
    note(
        f"follow it with: cotenant logs -f {job}; its table stays in cotenant variants {args.model}"
    )
    print(job)
    return 0


def add_optimize(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.description = (
        "Make smaller and faster variants of a version of a model, as a job on what is left over. "
        "Each is compared with the original on rows that it was not made with, and measured on "
        "this machine. None serves before it is promoted: cotenant variants."
    )
    arguments.add(parser)
    parser.add_argument("--here", action="store_true", help="run in the foreground, without a node")
