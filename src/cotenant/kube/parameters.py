"""What a claim says beyond which devices it wants: objective, memory, guarantee, limit.

They are the driver's own words, which the API server does not check. Whatever is not understood is
refused: a misspelt guarantee must not become none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, Final

import msgspec

from cotenant.domain.errors import InvalidRequest
from cotenant.domain.units import S, parse_duration
from cotenant.kube.names import API, DRIVER, PARAMETERS

LONGEST: Final = 3600 * S
"""The longest objective (ns) that means anything."""
_QUANTITY = re.compile(
    r"([0-9]{1,20}(?:\.[0-9]{1,20})?)"
    r"([numkMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]{1,2})?"
)
_SUFFIX: Final = {
    **{letter: Fraction(1, 1000 ** (3 - i)) for i, letter in enumerate("num")},
    **{letter: Fraction(1000 ** (i + 1)) for i, letter in enumerate("kMGTPE")},
    **{f"{letter}i": Fraction(1024 ** (i + 1)) for i, letter in enumerate("KMGTPE")},
}


class Parameters(msgspec.Struct, frozen=True):
    """As understood; None where nothing was said. ``guarantee``: per cents of the claimed share;
    ``limit``: per cents of the device; ``memory`` in bytes; ``objective`` in ns."""

    guarantee: int | None = None
    limit: int | None = None
    memory: int | None = None
    objective: int | None = None


class _Written(msgspec.Struct, forbid_unknown_fields=True):
    apiVersion: str  # noqa: N815 (the API's spelling)
    kind: str
    guarantee: int | None = None
    limit: int | None = None
    memory: str | int | None = None
    objective: str | None = None


_OWN: Final = ("guarantee", "limit", "memory", "objective")


def quantity(written: str | int) -> Fraction:
    """A Kubernetes quantity that is not negative: ``50``, ``"1.5Gi"``, ``"100m"``, ``"2e3"``.
    Raises ValueError."""
    match = _QUANTITY.fullmatch(str(written))
    if match is None:
        raise ValueError(f"{str(written)[:40]!r} is not a quantity such as 50, 512Mi or 2G")
    number, suffix = Fraction(match[1]), match[2] or ""
    if suffix[:1] in ("e", "E") and len(suffix) > 1 and suffix != "Ei":
        return number * Fraction(10) ** int(suffix[1:])
    return number * _SUFFIX.get(suffix, Fraction(1))


def read(raw: object) -> Parameters:
    """Understand what a claim or class says to this driver. Raises InvalidRequest, which says what
    is wrong and what would be right."""
    try:
        written = msgspec.convert(raw, _Written)
    except (msgspec.ValidationError, UnicodeError) as error:
        raise InvalidRequest(f"parameters: {error}; there are {', '.join(_OWN)}") from None
    if (written.apiVersion, written.kind) != (API, PARAMETERS):
        raise InvalidRequest(
            f"parameters: {written.kind!r} of {written.apiVersion!r} is not known here; write"
            f" apiVersion: {API} and kind: {PARAMETERS}"
        )
    return Parameters(
        guarantee=_per_cent("guarantee", written.guarantee),
        limit=_per_cent("limit", written.limit),
        memory=_memory(written.memory),
        objective=_objective(written.objective),
    )


def _per_cent(name: str, written: int | None) -> int | None:
    if written is not None and not 1 <= written <= 100:
        raise InvalidRequest(f"{name} is {written}; it is whole per cents, 1 to 100")
    return written


def _memory(written: str | int | None) -> int | None:
    if written is None:
        return None
    try:
        found = quantity(written)
    except ValueError as error:
        raise InvalidRequest(f"memory: {error}") from None
    if found.denominator != 1 or found > 2**62:
        raise InvalidRequest(f"memory is {written}; it is whole bytes, such as 2Gi")
    return int(found)


def _objective(written: str | None) -> int | None:
    if written is None:
        return None
    try:
        found = parse_duration(written[:40])
    except (ValueError, OverflowError):
        raise InvalidRequest(
            f"objective is {written[:40]!r}; it is how long the pod may be kept from what is its"
            " own, such as 20ms"
        ) from None
    if not 0 < found <= LONGEST:
        raise InvalidRequest(f"objective is {written[:40]!r}; it is above 0 and at most 1h")
    return found


def merged(config: Iterable[dict[str, Any]], request: str) -> Parameters:
    """What holds for a request by ``allocation.devices.config``: what the claim says, and where it
    says nothing, what the class says. Raises InvalidRequest, also where two of one source differ.
    """
    found: dict[str, dict[str, int]] = {"FromClass": {}, "FromClaim": {}}
    for entry in config:
        if not mine(entry) or not _concerns(entry.get("requests") or [], request):
            continue
        source = found.setdefault(str(entry.get("source")), {})
        for name, value in msgspec.structs.asdict(read(entry["opaque"].get("parameters"))).items():
            if value is None:
                continue
            if source.setdefault(name, value) != value:
                raise InvalidRequest(
                    f"{name} is given twice for request {request!r}, and differs; give it once"
                )
    return Parameters(**{**found["FromClass"], **found["FromClaim"]})


def mine(entry: dict[str, Any]) -> bool:
    """Whether a configuration entry is for this driver."""
    return (entry.get("opaque") or {}).get("driver") == DRIVER


def _concerns(requests: list[str], request: str) -> bool:
    return not requests or request in requests or request.partition("/")[0] in requests
