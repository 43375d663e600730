"""What options may be: each turns a word into a value, or says what would be right."""

from __future__ import annotations

import argparse

from cotenant.domain.units import parse_bytes, parse_duration
from cotenant.domain.workload import Share


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def shares(text: str) -> Share:
    """A share of the kind of device that the job runs on, ``0.25`` or ``25%``, or shares by kind,
    ``cpu=0.25,gpu=10%``."""
    if "=" not in text:
        return share(text)
    found = {}
    for part in text.split(","):
        kind, _, value = part.partition("=")
        if not kind or kind in found:
            raise argparse.ArgumentTypeError(f"{text!r} is not like cpu=0.25,gpu=0.5")
        found[kind] = share(value)
    return found


def shapes(text: str) -> dict[str, tuple[int, ...]]:
    """Shapes of inputs, ``image=1x3x64x64``, several with commas."""
    found = {}
    for part in text.split(","):
        name, _, lengths = part.partition("=")
        axes = lengths.split("x")
        if not name or not all(axis.isascii() and axis.isdigit() and int(axis) for axis in axes):
            raise argparse.ArgumentTypeError(f"{text!r} is not like image=1x3x64x64")
        found[name] = tuple(map(int, axes))
    return found


def share(text: str) -> float:
    """``0.25`` or ``25%``."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 0.25 or 25%")
    return value


def size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def duration(text: str) -> int:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def above_zero(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def units(text: str) -> tuple[int, ...]:
    """``1,2,4``: numbers of cores."""
    return tuple(above_zero(part) for part in text.split(","))
