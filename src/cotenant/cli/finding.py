"""Which node a command is for: the one that was named, else the only one that runs. With an address
as its name it is asked over its jobs API, which some commands can.

In order: ``--state-dir``, ``--node``, ``$COTENANT_STATE_DIR``, ``./cotenant-state`` if a node runs
there, and the only node of those that ``runtime.nodes`` finds.
"""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from cotenant.cli.output import as_json, command, show
from cotenant.domain.errors import EnvironmentProblem, InvalidRequest, NotFound
from cotenant.runtime import nodes
from cotenant.serving.control_client import ControlClient

if TYPE_CHECKING:
    from cotenant.serving.jobs_client import JobsClient

HERE = Path("cotenant-state")
SOCKET = "control.sock"


def add_node(parser: argparse.ArgumentParser) -> None:
    """The options that say which node."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--state-dir",
        metavar="DIR",
        help="the node's state directory (default: $COTENANT_STATE_DIR, else ./cotenant-state "
        "if a node runs there, else the only node that runs)",
    )
    which.add_argument(
        "--node",
        metavar="NAME",
        help="its name: cotenant nodes lists them; for commands about jobs also the address of "
        "its jobs API, https://box:8443, with $COTENANT_TOKEN and $COTENANT_CA",
    )


def client(args: argparse.Namespace, timeout: float = 10.0) -> ControlClient:
    """The node that the arguments mean; raises NotFound, EnvironmentProblem, InvalidRequest."""
    if is_remote(args):
        raise InvalidRequest(
            "this command speaks to nodes on this machine alone; those that take the address of a "
            "jobs API are status, jobs, run, logs, hold, release, cancel and checkpoint"
        )
    return ControlClient(state_dir(args) / SOCKET, timeout)


def is_remote(args: argparse.Namespace) -> bool:
    """Whether the arguments give the address of a jobs API."""
    return bool(args.node) and args.node.startswith(("http://", "https://"))


def remote(args: argparse.Namespace) -> JobsClient:
    """The node at that address; raises InvalidRequest, EnvironmentProblem."""
    from cotenant.serving.jobs_client import JobsClient

    token = os.environ.get("COTENANT_TOKEN", "")
    return JobsClient(args.node, token, os.environ.get("COTENANT_CA"))


def jobs_client(args: argparse.Namespace) -> ControlClient | JobsClient:
    """The node that the arguments mean, for what both ways can; raises as ``client``."""
    return remote(args) if is_remote(args) else client(args)


def state_dir(args: argparse.Namespace) -> Path:
    """The state directory of that node."""
    return directory(args.state_dir, args.node)


def directory(given: str | None, name: str | None) -> Path:
    """The state directory of a node: the one given, of the node so called, or of the only one.
    Raises NotFound, EnvironmentProblem, InvalidRequest."""
    if given:
        return Path(given)
    if name:
        return _named(name)
    if usual := os.environ.get("COTENANT_STATE_DIR"):
        return Path(usual)
    if answers(HERE / SOCKET):
        return HERE
    found = nodes.running()
    if len(found) == 1:
        return Path(found[0].state_dir)
    if found:
        lines = "".join(f"\n    --node {one.name}   ({one.state_dir})" for one in found)
        raise InvalidRequest(f"{len(found)} nodes run on this machine; say which:{lines}")
    raise EnvironmentProblem(
        "no node is running that could be found; start one with: cotenant serve cotenant.yaml\n"
        "    (or name the directory of one that runs: --state-dir DIR)"
    )


def likely(args: argparse.Namespace) -> Path:
    """The state directory of a node that need not run any more, to look at what it left."""
    given = args.state_dir or os.environ.get("COTENANT_STATE_DIR")
    return Path(given) if given and not args.node else HERE


def _named(name: str) -> Path:
    found = {one.name: one for one in nodes.running()}
    if name in found:
        return Path(found[name].state_dir)
    known = ", ".join(found) or "none"
    raise NotFound(
        f"no node named {name!r} runs on this machine; running: {known} (cotenant nodes)"
    )


def answers(path: Path) -> bool:
    """Whether a node listens on a control socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(str(path))
        except OSError:
            return False
    return True


# --- cotenant nodes -----------------------------------------------------------------------------


@command
def cmd_nodes(args: argparse.Namespace) -> int:
    """``cotenant nodes``: those that run on this machine."""
    from cotenant.cli.views import new_table, plain

    found = nodes.running()
    if args.json:
        return as_json(found)
    if not found:
        return show(plain("no nodes; start one with: cotenant serve cotenant.yaml"))
    table = new_table("NODE", "PID", "HTTP", "VERSION", "STATE DIRECTORY")
    for one in found:
        row = (one.name, one.pid, one.http, one.version, one.state_dir)
        table.add_row(*map(plain, row))
    return show(table)
