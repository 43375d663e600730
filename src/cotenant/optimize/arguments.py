"""What may be asked for on the command line, once for the command and for the job."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cotenant.domain.errors import InvalidRequest
from cotenant.optimize.parent import ENGINES, Asked
from cotenant.optimize.recipes.known import RECIPES, chosen, known_name


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("model", metavar="NAME", help="a directory in that of the models")
    parser.add_argument("--models", type=Path, default=Path("models"), metavar="DIR",
                        help="where the models are (./models)")  # fmt: skip
    parser.add_argument("--version", default="", metavar="V", help="default: the newest")
    parser.add_argument("--data", type=Path, default=None, metavar="FILE.npz",
                        help="rows to make variants with, as check.npz has them "
                             "(a third of check.npz)")  # fmt: skip
    parser.add_argument("--max-drop", type=share, default=0.01, metavar="D",
                        help="accuracy that may be lost, with 95%% confidence (0.01)")  # fmt: skip
    recipes, engines = ", ".join(r.name for r in RECIPES), ", ".join(ENGINES)
    parser.add_argument("--recipes", type=_names, default=(), metavar="R,R",
                        help=f"of {recipes} (all)")  # fmt: skip
    parser.add_argument("--engines", type=_names, default=(), metavar="E,E",
                        help=f"of {engines} (all)")  # fmt: skip
    parser.add_argument("--units", type=_counts, default=(), metavar="N,N",
                        help="numbers of cores to measure on (1 and all it may use)")  # fmt: skip
    parser.add_argument("--seconds", type=_positive, default=300.0, metavar="S",
                        help="CPU time a core for training (300)")  # fmt: skip
    parser.add_argument("--promote", action="store_true",
                        help="let those that are kept serve at once")  # fmt: skip


def asked(args: argparse.Namespace) -> Asked:
    """What was asked for; raises InvalidRequest for what there is not."""
    cores = len(os.sched_getaffinity(0))
    if max(args.units, default=0) > cores:
        raise InvalidRequest(f"--units {max(args.units)}: this process may use {cores} cores")
    chosen(args.recipes)
    for name in args.engines:
        known_name(name, ENGINES, "engine that variants are made for")
    if args.data is not None and not args.data.is_file():
        raise InvalidRequest(f"--data {args.data}: there is no such file; give an .npz")
    return Asked(
        recipes=args.recipes,
        engines=args.engines,
        units=tuple(sorted(set(args.units or (1, cores)))),
        max_drop=args.max_drop,
        seconds=args.seconds,
        data=args.data,
        promote=args.promote,
    )


def again(args: argparse.Namespace) -> list[str]:
    """The arguments as words, for a job with another working directory."""
    words = [args.model, "--models", str(args.models.absolute())]
    for option in ("version", "max_drop", "seconds"):
        if (value := getattr(args, option)) != "":
            words += [f"--{option.replace('_', '-')}", str(value)]
    for option in ("recipes", "engines", "units"):
        if values := getattr(args, option):
            words += [f"--{option}", ",".join(map(str, values))]
    if args.data is not None:
        words += ["--data", str(args.data.absolute())]
    return words + ["--promote"] * args.promote + ["--json"] * args.json


def share(text: str) -> float:
    """A part of 1, such as 0.01."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 up to 1, such as 0.01")
    return value


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _counts(text: str) -> tuple[int, ...]:
    found = tuple(int(part) for part in text.split(","))
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text}: numbers of cores are at least 1")
    return found


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
