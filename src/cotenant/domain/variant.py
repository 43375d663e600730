"""A variant: a version of a model in another build, smaller or for another device, and what was
seen of it. It lies in ``VERSION/variants/NAME``: the model file, and ``variant.yaml``.

* It serves only where it is ``promoted``; a ``candidate`` waits for its owner's word.
* A ``refused`` one keeps its ``variant.yaml``, which says why, and no model file.
* It is of one parent: a version whose files are others has no use for it.
"""

from __future__ import annotations

import enum
from typing import Any, Final

import msgspec
import yaml

from cotenant.domain import reading
from cotenant.domain.config import AUTO
from cotenant.domain.errors import ConfigError

VARIANTS_DIR: Final = "variants"
VARIANT_FILE: Final = "variant.yaml"
FORMAT: Final = 1


class VariantState(enum.Enum):
    """Whether a variant serves."""

    CANDIDATE = "candidate"
    PROMOTED = "promoted"
    REFUSED = "refused"


class Compared(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A variant beside its parent on the same ``rows``, none of which it was made with.

    ``measure``: see ``engines.accuracy``, or ``agreement`` with the parent where there are no
    labels. ``original`` and ``value`` are what both reach (at most 1). ``lost`` rows the parent had
    right and the variant has not, ``won`` the other way round. ``drop`` is ``original - value``,
    and with ``confidence`` no more than ``bound``. ``worst``: the class that loses most, and how
    much."""

    measure: str
    rows: int
    original: float
    value: float
    lost: int
    won: int
    drop: float
    bound: float
    confidence: float = 0.95
    worst: str = ""
    worst_drop: float = 0.0


class Timing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An execution of ``rows`` rows on ``units`` units of a ``kind`` of device by an ``engine``:
    the median (ns), and the parent's, measured in turns with it (0: it was not)."""

    kind: str
    engine: str
    units: int
    rows: int
    ns: int
    original_ns: int = 0


class VariantRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``variant.yaml``. ``recipe``: how it was made, in words, step by step. ``parent``: SHA-256
    of the parent's model (``runtime.repository.digest``). ``made``: when, ISO 8601. ``engine``: the
    one that it is for; ``kinds``: kinds of device that it is for, any where none is named.
    ``why``: what it was refused for. ``size``: bytes of its files; ``memory``: bytes that an
    instance has resident, 0 if not measured."""

    recipe: str
    parent: str
    made: str
    state: VariantState
    why: str = ""
    engine: str = AUTO
    kinds: tuple[str, ...] = ()
    libraries: dict[str, str] = {}
    accuracy: Compared | None = None
    size: int = 0
    memory: int = 0
    profile: tuple[Timing, ...] = ()
    format: int = FORMAT


def read_variant(text: str) -> VariantRecord:
    """``variant.yaml``; raises ConfigError that says what is wrong."""
    try:
        found = msgspec.convert(reading.load(text), VariantRecord)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from None
    if found.format != FORMAT:
        raise ConfigError(f"has the format {found.format}; this version reads {FORMAT}")
    if found.accuracy is not None and not _is_possible(found.accuracy):
        raise ConfigError("holds an accuracy that cannot be: rows and shares are out of range")
    if any(min(t.units, t.rows, t.ns) < 1 or t.original_ns < 0 for t in found.profile):
        raise ConfigError("holds times that cannot be; they, units and rows are above 0")
    return found


def write_variant(record: VariantRecord) -> str:
    """The text of ``variant.yaml``."""
    plain: dict[str, Any] = msgspec.to_builtins(record)
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)


def _is_possible(found: Compared) -> bool:
    return (
        found.rows > 0
        and min(found.lost, found.won) >= 0
        and 0.5 <= found.confidence < 1.0
        and max(found.original, found.value) <= 1.0
        and found.bound - found.drop >= -1e-9
    )
