"""The job of ``cotenant optimize``: ``python -m cotenant.optimize NAME --models DIR …``.

Exit codes: 0 done, 1 it could not be, or a recipe that was asked for made nothing, 143 ended.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import msgspec

from cotenant.domain.errors import CotenantError
from cotenant.optimize import arguments
from cotenant.optimize.running import Result, failed, optimize, the_version
from cotenant.optimize.writing import FOLDER
from cotenant.report import report
from cotenant.runtime.repository import Repository


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="cotenant optimize")
    arguments.add(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, for machines")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _ended)
    try:
        return run(args)
    except CotenantError as error:
        print(f"cotenant: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def run(args: argparse.Namespace) -> int:
    """What the arguments ask for; raises CotenantError."""
    asked = arguments.asked(args)
    repository = Repository(args.models)
    files = the_version(repository, args.model, args.version)
    result = optimize(repository, files, asked, _Progress())
    _show(result, files.path.parent / FOLDER, args.json)
    missed = failed(result, asked)
    for row in missed:
        print(f"cotenant: recipe {row.name}: {row.why}", file=sys.stderr)
    return 1 if missed else 0


class _Progress:
    """Tells the node, and whoever reads the log."""

    def __init__(self) -> None:
        self._step = 0

    def __call__(self, text: str) -> None:
        self._step += 1
        report(self._step, unit="steps")
        print(text, file=sys.stderr, flush=True)


def _show(result: Result, folder: Path, as_json: bool) -> None:
    from cotenant.optimize.picture import draw
    from cotenant.optimize.showing import result_view, show

    path = folder / "optimize.png"
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(result), indent=2).decode())
    else:
        show(result_view(result), sys.stdout)
    try:
        why = draw(result, path)
    except OSError as error:
        why = f"no picture: {path} cannot be written: {error.strerror}"
    print(why or f"picture: {path}", file=sys.stderr)


def _ended(number: int, frame: FrameType | None) -> None:
    """Let what is open be closed, and what is half-done be undone."""
    del frame
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
