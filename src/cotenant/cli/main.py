"""The ``cotenant`` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from cotenant import __version__
from cotenant.cli.bench.colocate import add_bench
from cotenant.cli.commands import add_commands
from cotenant.cli.demo.command import add_demo
from cotenant.cli.doctor import add_doctor
from cotenant.cli.initial import add_init
from cotenant.cli.serve import add_serve
from cotenant.cli.simulate.command import add_simulate
from cotenant.cli.tokens import add_token
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
    add_serve(commands)
    add_init(commands)
    add_doctor(commands)
    add_commands(commands)
    add_token(commands)
    add_bench(commands)
    add_simulate(commands)
    add_demo(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
