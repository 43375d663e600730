"""Numbers as people read them; a dash for what was not measured."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from cotenant.domain.units import format_bytes

DASH = "–"


def number(value: float | None, digits: int = 1) -> str:
    """``12.3``, ``1,234``."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 0) -> str:
    """A share as ``31 %``."""
    return DASH if value is None else f"{100 * value:.{digits}f} %"


def milliseconds(value: float | None) -> str:
    """``12.3 ms``."""
    return DASH if value is None else f"{number(value)} ms"


def seconds(value: float | None) -> str:
    """``850 ms``, ``12 s``, ``3 min``, ``2.1 h``, ``3.2 days``."""
    if value is None:
        return DASH
    for most, unit, name in ((1, 0.001, "ms"), (120, 1, "s"), (7200, 60, "min")):
        if value < most:
            return f"{value / unit:.0f} {name}"
    return f"{value / 3600:.1f} h" if value < 172800 else f"{value / 86400:.1f} days"


def size(value: float | None) -> str:
    """``12 MiB``."""
    return DASH if value is None else format_bytes(value)


def known(value: Any) -> str:
    """As it is."""
    return DASH if value is None or value == "" else str(value)


def clock(wall: float) -> str:
    """Seconds since the epoch as the time of this day, with the date if it is another."""
    then = datetime.fromtimestamp(wall)
    today = then.date() == datetime.now().date()
    return then.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S")
