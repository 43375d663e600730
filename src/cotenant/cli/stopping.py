"""``cotenant stop``: the node answers what it has accepted, puts its jobs back, and ends."""

from __future__ import annotations

import argparse
import time

from cotenant.cli import finding, options
from cotenant.cli.output import command
from cotenant.devices import proctree
from cotenant.domain.errors import EnvironmentProblem

LOOK_S = 0.05


@command
def cmd_stop(args: argparse.Namespace) -> int:
    """Tells the node to stop and waits until its process is gone."""
    within_s = args.timeout / 1e9
    client = finding.client(args)
    status = client.status()
    pid = int(status["pid"])
    start = proctree.start_time(pid)
    client.shutdown()
    end = time.monotonic() + within_s
    while start and proctree.start_time(pid) == start:
        if time.monotonic() >= end:
            raise EnvironmentProblem(
                f"the node (pid {pid}) is still stopping after {within_s:g} s: jobs have their "
                f"grace to save their work. Wait with: cotenant stop --timeout 5m, or end it at "
                f"once with: kill -9 {pid} (the next node takes its jobs up)"
            )
        time.sleep(LOOK_S)
    print(f"stopped the node in {status['state_dir']} (pid {pid}); its jobs are queued again")
    return 0


def add_stop(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.description = (
        "Stop a node. It answers the requests that it has accepted. Its jobs are stopped within "
        "their grace, stay queued, and go on when a node starts there again."
    )
    parser.add_argument("--timeout", type=options.duration, default="60s", metavar="TIME",
                        help="how long to wait until it is gone (60s)")  # fmt: skip
