"""``cotenant profile``: how long a model takes, by rows and cores; it needs no node."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
from rich import progress
from rich.console import Console, Group, RenderableType
from rich.text import Text

from cotenant.cli import options
from cotenant.cli.output import as_json, command, note, show
from cotenant.cli.views import new_table, plain
from cotenant.devices import processor
from cotenant.domain.config import ModelSettings
from cotenant.domain.errors import InvalidRequest
from cotenant.domain.profile import ModelProfile
from cotenant.domain.units import MS, S, format_bytes
from cotenant.domain.workload import BatchSpec
from cotenant.runtime.profiling import Ask, Progress, profile, write_profile
from cotenant.runtime.repository import Repository

MOST_ROWS = 4096


@command
def cmd_profile(args: argparse.Namespace) -> int:
    """Measures, shows, and writes what it found into the version's directory."""
    if args.version and not (args.version.isascii() and args.version.isdigit()):
        raise InvalidRequest(f"--version {args.version}: versions are whole numbers")
    repository, box = Repository(args.models), processor.look()
    files = (
        repository.files(args.model, args.version)
        if args.version
        else repository.newest(args.model)
    )
    settings = repository.settings(args.model)
    if args.engine:
        settings = msgspec.structs.replace(settings, engine=args.engine)
    units, rows = _units(args.units, len(box.cores)), _rows(args.max_batch, settings)
    ask = Ask(units, rows, args.seconds, tuple(args.shape))
    with _bar(f"{files.name} version {files.version}") as tell:
        found = asyncio.run(profile(files, settings, ask, box, tell))
    if args.json:
        as_json(found)
    else:
        show(profile_view(found))
    if not args.dry_run:
        note(f"written to {write_profile(found, files.path.parent)}")
    return 0


def _units(asked: tuple[int, ...], cores: int) -> tuple[int, ...]:
    most = max(asked, default=0)
    if most > cores:
        raise InvalidRequest(f"--units {most}: this process may use {cores} cores")
    return tuple(sorted(set(asked or (1, cores))))


def _rows(asked: int, settings: ModelSettings) -> int:
    if asked > MOST_ROWS:
        raise InvalidRequest(f"--max-batch {asked}: at most {MOST_ROWS}")
    return asked or (settings.batch or BatchSpec()).max


@contextlib.contextmanager
def _bar(text: str) -> Iterator[Progress]:
    """How far it is, on stderr, where that is a terminal."""
    screen = Console(stderr=True)
    with progress.Progress(console=screen, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(text, total=1.0)
        yield lambda done: bar.update(task, completed=done)


def profile_view(found: ModelProfile) -> RenderableType:
    """A line on the whole, and a row for each size."""
    columns = ("SIZE", "UNITS", "ROWS", "MEDIAN", "P95", "SPREAD", "ROWS/S", "RUNS")
    made = new_table(*columns, right=columns)
    for f in found.figures:
        made.add_row(
            str(f.size),
            str(f.units),
            str(f.rows),
            f"{f.median_ns / MS:.3g} ms",
            f"{f.p95_ns / MS:.3g} ms",
            f"{f.cv:.1%}",
            f"{f.rows * S / f.median_ns:.4g}",
            str(f.runs),
        )
    head = (
        f"{found.model} version {found.version}, engine {found.engine}: loaded in "
        f"{found.load_ns / S:.2f} s, {format_bytes(found.memory_loaded)} then, "
        f"{format_bytes(found.memory_peak)} at most"
    )
    parts: list[RenderableType] = [plain(head), plain(f"on {found.processor or 'the processor'}")]
    parts += [plain(f"executed by {line}") for line in found.executed]
    if found.unjoined:
        parts.append(plain(f"rows are not joined: {found.unjoined}", "yellow"))
    return Group(*parts, Text(), made)


def add_profile(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.description = (
        "Measure a model in a process of its own, on the processor. The figures are written to "
        ".profile.json in the version's directory, where a scenario of cotenant simulate can "
        "take them from. Language models cannot be profiled."
    )
    parser.add_argument("model", metavar="NAME", help="a directory in that of the models")
    parser.add_argument("--models", type=Path, default=Path("models"), metavar="DIR",
                        help="where the models are (./models)")  # fmt: skip
    parser.add_argument("--version", default="", metavar="V", help="default: the newest")
    parser.add_argument("--units", type=options.units, default=(), metavar="N,N",
                        help="numbers of cores (1 and all of this process)")  # fmt: skip
    parser.add_argument("--max-batch", type=options.above_zero, default=0, metavar="N",
                        help="most rows; powers of two up to it (batch.max)")  # fmt: skip
    parser.add_argument("--seconds", type=options.positive, default=10.0, metavar="S",
                        help="for measuring; each size runs 6 times even so (10)")  # fmt: skip
    parser.add_argument("--shape", type=options.shapes, action="append", default=[],
                        metavar="NAME=AxB",
                        help="also with an input of this shape; as often as wanted")  # fmt: skip
    parser.add_argument("--engine", default="", metavar="E", help="default: as model.yaml says")
    parser.add_argument("--dry-run", action="store_true", help="write no file")
