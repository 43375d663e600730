"""``cotenant variants``: what there is of a version in other builds, and which of them serve."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec
from rich.console import RenderableType

from cotenant.cli.output import as_json, command, note, show
from cotenant.domain.errors import InvalidRequest
from cotenant.domain.variant import Timing, VariantState
from cotenant.domain.workload import ORIGINAL
from cotenant.optimize import promoting
from cotenant.optimize.arguments import share
from cotenant.optimize.running import Row, of_original, original_size, ratio_of, the_version
from cotenant.optimize.showing import table
from cotenant.runtime.repository import ModelFiles, Repository, VariantFiles


@command
def cmd_variants(args: argparse.Namespace) -> int:
    """Shows them; with ``--promote`` and its like changes one first."""
    repository = Repository(args.models)
    files = the_version(repository, args.model, args.version)
    wanted = [word for word in ("promote", "demote", "remove") if getattr(args, word)]
    if len(wanted) > 1:
        raise InvalidRequest(f"--{wanted[0]} and --{wanted[1]}: one change at a time")
    if args.promote:
        settings = repository.settings(args.model)
        promoting.promote(repository, files, args.promote, settings, args.max_drop)
        back = f"cotenant variants {args.model} --demote {args.promote}"
        note(f"{args.promote} is promoted; to take it back: {back}")
    elif args.demote:
        promoting.demote(repository, files, args.demote)
        note(f"{args.demote} serves no longer")
    elif args.remove:
        promoting.remove(repository, files, args.remove)
        note(f"{args.remove} is removed")
    found = repository.variants(files)
    if args.json:
        return as_json([_plain_original(files, found), *map(_plain, found)])
    return show(variants_view(files, found))


def variants_view(files: ModelFiles, found: list[VariantFiles]) -> RenderableType:
    """The original, then a line for each variant, and reasons below."""
    profile = _original_times(found)
    compared = next((f.record.accuracy for f in found if f.record and f.record.accuracy), None)
    original = Row(
        name=ORIGINAL,
        state=ORIGINAL,
        accuracy=of_original(compared),
        ratio=1.0 if profile else 0.0,
        profile=profile,
        size=original_size(files),
    )
    return table([original, *map(_row, found)])


def _row(found: VariantFiles) -> Row:
    record = found.record
    if record is None:
        return Row(name=found.name, state="unreadable", why=found.problem)
    why = record.why if record.state is VariantState.REFUSED else found.problem
    return Row(
        name=found.name,
        state=record.state.value,
        recipe=record.recipe,
        why=why,
        engine=record.engine,
        accuracy=record.accuracy,
        ratio=ratio_of(record.profile),
        profile=record.profile,
        size=record.size,
    )


def _original_times(found: list[VariantFiles]) -> tuple[Timing, ...]:
    """What the first measured variant's record says of the original: its best with any engine."""
    measured = next((f.record.profile for f in found if f.record and f.record.profile), ())
    return tuple(
        msgspec.structs.replace(t, engine="best", ns=t.original_ns, original_ns=0)
        for t in measured
        if t.original_ns
    )


def _plain_original(files: ModelFiles, found: list[VariantFiles]) -> dict[str, Any]:
    return {
        "name": ORIGINAL,
        "state": ORIGINAL,
        "size": original_size(files),
        "profile": msgspec.to_builtins(_original_times(found)),
    }


def _plain(found: VariantFiles) -> dict[str, Any]:
    record: dict[str, Any] = {} if found.record is None else msgspec.to_builtins(found.record)
    return {"name": found.name, "problem": found.problem, **record}


def add_variants(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.description = (
        "Show the variants of a version: what each was made by, what it may lose and how fast it "
        "is here, and why others were refused. Variants serve where they are promoted."
    )
    parser.add_argument("model", metavar="NAME", help="a directory in that of the models")
    parser.add_argument("--models", type=Path, default=Path("models"), metavar="DIR",
                        help="where the models are (./models)")  # fmt: skip
    parser.add_argument("--version", default="", metavar="V", help="default: the newest")
    parser.add_argument("--promote", default="", metavar="VARIANT", help="let it serve")
    parser.add_argument("--demote", default="", metavar="VARIANT", help="let it serve no longer")
    parser.add_argument("--remove", default="", metavar="VARIANT", help="remove it")
    parser.add_argument("--max-drop", type=share, default=0.01, metavar="D",
                        help="what a variant to promote may lose (0.01)")  # fmt: skip
