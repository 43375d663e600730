"""Which candidates are kept: those that may not lose too much, are faster here than the original,
and are beaten in nothing by another. Each other one is refused with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from cotenant.domain.variant import Compared
from cotenant.optimize.bounds import rows_wanted

LEAST_GAIN: Final = 0.03
"""Of the original's time: what is not faster by so much is not worth another build."""


class Marks(msgspec.Struct, frozen=True):
    """What a candidate is judged by; less is better. ``ratio``: its time over the original's;
    ``size``: bytes."""

    name: str
    drop: float
    ratio: float
    size: int


def inaccurate(found: Compared, allowed: float, floor: float) -> str:
    """Why a comparison does not speak for a variant; "" if it does. ``allowed``: what may be lost;
    ``floor``: what must be reached where there are labels."""
    if found.measure != "agreement" and found.value < floor:
        return f"its accuracy {found.value:.4f} is below the floor {floor:g} of model.yaml"
    if found.bound <= allowed:
        return ""
    where = f"; most in class {found.worst} ({found.worst_drop:.3f})" if found.worst else ""
    if found.drop > allowed:
        return f"it loses {found.drop:.4f}, more than {allowed:g}{where}"
    wanted = rows_wanted(found.lost, found.won, found.rows, allowed)
    more = f"; about {wanted} would do, if they are alike" if wanted else ""
    return (
        f"cannot tell with {found.rows} rows: it loses {found.drop:.4f} on them, but might lose "
        f"{found.bound:.4f}, and {allowed:g} is allowed{more}"
    )


def slow(ratio: float, surely: float) -> str:
    """Why its times do not speak for it; "" if they do."""
    if ratio > 1 - LEAST_GAIN:
        return f"it is not faster here: it takes {ratio:.2f} times as long as the original"
    if surely >= 1:
        return (
            f"it cannot be told to be faster: {ratio:.2f} of the original's time, or {surely:.2f}"
        )
    return ""


def dominated(marks: Sequence[Marks]) -> dict[str, str]:
    """By name, those that another one beats or equals in everything; and the name of one that does
    and stays. Of equal ones the first stays."""
    stay = [
        mine
        for number, mine in enumerate(marks)
        if not any(
            _covers(other, mine) and (not _covers(mine, other) or before < number)
            for before, other in enumerate(marks)
            if before != number
        )
    ]
    return {
        mine.name: next(other.name for other in stay if _covers(other, mine))
        for mine in marks
        if mine not in stay
    }


def _covers(one: Marks, other: Marks) -> bool:
    """Whether it is no worse in anything."""
    return one.drop <= other.drop and one.ratio <= other.ratio and one.size <= other.size
