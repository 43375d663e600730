"""The ``cotenant`` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cotenant import __version__
from cotenant.cli.bench.colocate import add_bench
from cotenant.cli.commands import add_commands
from cotenant.cli.demo.command import add_demo
from cotenant.cli.simulate.command import add_simulate
from cotenant.domain.errors import CotenantError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (0 done, 1 failed with one line on stderr, 2 usage)."""
    args = _parser().parse_args(argv)
    try:
        return int(args.func(args))
    except CotenantError as error:
        print(f"cotenant: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; what Python flushes at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cotenant",
        description="Serve models under a latency objective and train on everything left over.",
    )
    parser.add_argument("--version", action="version", version=f"cotenant {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    serve = commands.add_parser("serve", help="run a node in the foreground")
    serve.add_argument("config", type=Path, help="the node's YAML file")
    serve.add_argument(
        "--log",
        default="warning",
        choices=["debug", "info", "warning", "error"],
        help="log from this level upwards (default: warning)",
    )
    serve.add_argument("--check", action="store_true", help="only check the configuration")
    serve.set_defaults(func=_serve)
    add_commands(commands)
    add_bench(commands)
    add_simulate(commands)
    add_demo(commands)
    return parser


def _serve(args: argparse.Namespace) -> int:
    import uvloop

    from cotenant.cli import logs, wiring

    config = wiring.read_config(args.config)
    if args.check:
        print(f"{args.config}: in order ({len(config.services)} services, {len(config.jobs)} jobs)")
        return 0
    logs.set_up(args.log)
    uvloop.run(wiring.serve(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
