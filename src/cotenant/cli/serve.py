"""``cotenant serve``: a node in the foreground, by a configuration file or of one model alone."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cotenant.cli import options
from cotenant.domain.config import NodeConfig
from cotenant.domain.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from cotenant.runtime.node import Node

OF_MODELS = ("latency", "percentile", "http", "token_file", "shape", "state_dir")
"""Options that a configuration file has keys for."""


def cmd_serve(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    from cotenant.cli import modelfile
    from cotenant.engines.registry import suffixes

    if modelfile.is_model(args.what):
        return _serve_model(args)
    for name in OF_MODELS:
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} is for a model's file; {args.what} says it by itself")
    from cotenant.cli import wiring

    try:
        config = wiring.read_config(args.what)
    except ConfigError as error:
        if args.what.name.endswith(modelfile.CONFIGS):
            raise
        ends = ", ".join(suffixes())
        raise ConfigError(f"{error}; a model's file would end in {ends}") from None
    if args.check:
        print(f"{args.what}: in order ({len(config.services)} services, {len(config.jobs)} jobs)")
        return 0
    _run(args, config)
    return 0


def _serve_model(args: argparse.Namespace) -> int:
    from cotenant.cli import curl, modelfile

    model = modelfile.find(args.what)
    usual = modelfile.Wishes()
    wishes = modelfile.Wishes(
        args.latency or usual.latency,
        usual.percentile if args.percentile is None else args.percentile,
        args.http or usual.http,
        args.token_file,
        args.shape or {},
    )
    state = Path(args.state_dir or os.environ.get("COTENANT_STATE_DIR") or "cotenant-state")

    def tell(node: Node) -> None:
        entry = next(entry for entry in node.index() if entry.name == model.name)
        if entry.state != "READY":
            why = entry.reason or "no version of it loads"
            raise ModelError(f"{args.what} cannot be served: {why}")
        shapes = wishes.shapes or dict(node.models.repository.settings(model.name).shapes)
        line = curl.line(
            node.metadata(model.name), str(node.addresses["http"]), shapes, wishes.token_file
        )
        print(f"cotenant: {model.name} answers; Ctrl-C ends it.", flush=True)
        if line:
            print(f"Ask it from another terminal:\n\n{line}\n", flush=True)

    with modelfile.placed(model, state.absolute(), wishes) as config:
        if args.check:
            print(f"{args.what}: in order (1 service, 0 jobs)")
            return 0
        _run(args, config, tell)
    return 0


def _run(
    args: argparse.Namespace, config: NodeConfig, tell: Callable[[Node], None] | None = None
) -> None:
    import uvloop

    from cotenant.cli import logs, wiring

    logs.set_up(args.log)
    uvloop.run(wiring.serve(config, tell))


def add_serve(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``cotenant serve``."""
    serve = subparsers.add_parser(
        "serve",
        help="run a node in the foreground",
        description="Run a node: one that a YAML file describes, or one with a single model.",
    )
    serve.add_argument(
        "what",
        type=Path,
        metavar="FILE",
        help="the node's YAML file, or a model: its file, or its directory",
    )
    serve.add_argument(
        "--log",
        default="warning",
        choices=["debug", "info", "warning", "error"],
        help="log from this level upwards (default: warning)",
    )
    serve.add_argument("--check", action="store_true", help="only check the configuration")
    model = serve.add_argument_group("of a model without a YAML file")
    model.add_argument(
        "--latency",
        metavar="TIME",
        help="answers are to come within this (100ms; of a language model the first token: 1s)",
    )
    model.add_argument(
        "--percentile", type=float, metavar="P", help="so many per cent of them (99)"
    )
    model.add_argument("--http", metavar="ADDRESS", help="listen here (127.0.0.1:8000)")
    model.add_argument(
        "--token-file", metavar="FILE", help="holds the bearer token that clients must send"
    )
    model.add_argument(
        "--shape",
        type=options.shapes,
        metavar="SHAPES",
        help="of inputs with free axes, image=1x3x64x64 (free axes are 1)",
    )
    model.add_argument(
        "--state-dir",
        metavar="DIR",
        help="the node's state directory ($COTENANT_STATE_DIR, else ./cotenant-state)",
    )
    serve.set_defaults(func=cmd_serve)
