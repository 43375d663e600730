"""How commands write: for a person, for a pipe, as JSON, and when the reader goes away."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import msgspec

PIPE_COLUMNS = 2000
"""Width of what is written into a pipe: nothing is to be cut or wrapped there."""

Command = Callable[[argparse.Namespace], int]


def command(func: Command) -> Command:
    """Let a reader that went away (``| head``) end a command quietly."""

    @functools.wraps(func)
    def run(args: argparse.Namespace) -> int:
        try:
            code = func(args)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            with contextlib.suppress(OSError, ValueError):
                # Python flushes stdout at exit once more, and must not fail then.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0

    return run


def console() -> Any:
    """Where views are printed: a terminal, or a pipe as wide as they are."""
    from rich.console import Console

    class PlainConsole(Console):
        """Leaves a reader that went away to ``command``; rich would exit with 1."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_COLUMNS
    return PlainConsole(width=width, markup=False, highlight=False, emoji=False)


def note(text: str) -> None:
    """A line on stderr."""
    print(f"cotenant: {text}", file=sys.stderr)


def show(view: Any) -> int:
    """Print a view; returns exit code 0."""
    console().print(view)
    return 0


def as_json(value: Any) -> int:
    """Print a value as JSON; returns exit code 0."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
    return 0
