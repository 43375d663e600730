"""``cotenant models``: what can be served, and loading, unloading and rolling back."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import msgspec
from rich.console import RenderableType

from cotenant.cli import finding
from cotenant.cli.output import as_json, command, show
from cotenant.cli.views import new_table, plain, state_text
from cotenant.domain.errors import InvalidRequest
from cotenant.domain.port import IndexEntry

ACTIONS = ("load", "unload", "rollback")


@command
def cmd_models(args: argparse.Namespace) -> int:
    """Does what is asked, then shows the models that it concerns."""
    client = finding.client(args)
    if args.action and not args.model:
        raise InvalidRequest(f"which model? cotenant models {args.action} NAME")
    match args.action:
        case "load":
            client.load(args.model)
        case "unload":
            client.unload(args.model)
        case "rollback":
            client.rollback(args.model)
    found = [e for e in client.models() if not args.model or e.name == args.model]
    if args.json:
        return as_json([msgspec.to_builtins(entry) for entry in found])
    return show(models_view(found))


def models_view(found: Sequence[IndexEntry]) -> RenderableType:
    """A line for each version that is loaded, and for each model that is not."""
    if not found:
        return plain("no models; put one at NAME/1/model.onnx in the models' directory", "dim")
    table = new_table("MODEL", "VERSION", "STATE", "NOTE")
    for entry in found:
        version, note = entry.version or None, entry.reason
        table.add_row(plain(entry.name), plain(version), state_text(entry.state), plain(note))
    return table


def add_models(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.description = (
        "List models, or change which are served. load: the newest version serves (and a rollback "
        "is undone). unload: none does, once what was accepted is answered. rollback: the version "
        "before the present one serves and stays, also after a restart, until load."
    )
    parser.add_argument("action", nargs="?", choices=ACTIONS, metavar="load|unload|rollback",
                        help="without: list them")  # fmt: skip
    parser.add_argument("model", nargs="?", default="", metavar="NAME", help="of a model")
