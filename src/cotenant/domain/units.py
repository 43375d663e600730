"""Time is integer nanoseconds, memory integer bytes; this is where people's notation enters."""

from __future__ import annotations

import re
from typing import Final

US: Final = 1_000
MS: Final = 1_000_000
S: Final = 1_000_000_000

_DURATION = {
    "ns": 1,
    "us": US,
    "µs": US,
    "ms": MS,
    "s": S,
    "m": 60 * S,
    "min": 60 * S,
    "h": 3600 * S,
}
_BYTES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-zµ]+)\s*")


def parse_duration(text: str) -> int:
    """Nanoseconds of ``"20ms"``, ``"1.5 s"``, ``"250us"`` …; raises ``ValueError`` otherwise."""
    return _parse(text, _DURATION, "a duration such as 250us, 20ms, 1.5s or 2m")


def parse_bytes(text: str) -> int:
    """Bytes of ``"64MiB"``, ``"2 GB"`` …; raises ``ValueError`` otherwise."""
    return _parse(text, _BYTES, "a size such as 512KiB, 64MiB or 2GB")


def _parse(text: str, units: dict[str, int], wanted: str) -> int:
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2] not in units:
        raise ValueError(f"{text!r} is not {wanted}")
    return round(float(match[1]) * units[match[2]])


def format_duration(ns: float) -> str:
    """A short human form: ``870ns``, ``12.3us``, ``4.56ms``, ``1.20s``."""
    for unit, scale in (("s", S), ("ms", MS), ("us", US)):
        if abs(ns) >= scale:
            return f"{ns / scale:.3g}{unit}"
    return f"{ns:.0f}ns"


def format_bytes(count: float) -> str:
    """A short human form: ``512B``, ``1.5MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.4g}{unit}"
        count /= 1024
    return f"{count:.4g}GiB"
