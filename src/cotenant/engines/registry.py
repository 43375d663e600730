"""Which engines there are, which of them could open a model, and which does.

They are entry points of the group ``cotenant.engines``, this package's own and others' alike.
"""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Iterable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from cotenant.domain.config import AUTO
from cotenant.domain.errors import ModelError
from cotenant.domain.port import Language
from cotenant.engines.base import Candidate, EngineKind, Opening, Speaking

log = logging.getLogger("cotenant.engines")
GROUP: Final = "cotenant.engines"


@functools.cache
def kinds() -> tuple[EngineKind, ...]:
    """All engines, by preference. One that cannot be imported is left out, and said once."""
    found: list[EngineKind] = []
    for point in entry_points(group=GROUP):
        try:
            found.append(point.load())
        except Exception as error:  # somebody else's code, which may raise anything
            said = {"engine": point.name, "why": f"{type(error).__name__}: {error}"}
            log.error("an engine cannot be used", extra=said)
    return tuple(sorted(found, key=lambda kind: (kind.rank, kind.name)))


def suffixes() -> tuple[str, ...]:
    """How model files end that some engine opens, by preference."""
    return tuple(dict.fromkeys(suffix for kind in kinds() for suffix in kind.suffixes))


def choose(opening: Opening) -> EngineKind:
    """The engine for a model: the one that its settings name, else the first that does not refuse.
    Raises ModelError, which says why each of those that could be meant does."""
    name, wanted = opening.path.name, opening.settings.engine
    able = _of_file(name)
    if not able:
        ends = ", ".join(suffixes()) or "none: is cotenant installed?"
        raise ModelError(f"{name}: no engine for this kind of file; known: {ends}")
    if wanted != AUTO:
        able = [kind for kind in able if kind.name == wanted] or _not_by(wanted, name)
    reasons: dict[str, None] = {}
    for kind, why in _asked(able, opening, wanted):
        if not why:
            return kind
        reasons[f"{kind.name}: {why}"] = None
    raise ModelError(f"{name}: {'; '.join(reasons)}")


def candidates(opening: Opening) -> tuple[Candidate, ...]:
    """Every engine that opens files of this kind, by preference, and whether it would open this one
    if ``engine`` named it."""
    found: dict[str, dict[str, None]] = {}
    for kind in _of_file(opening.path.name):
        for _, why in _asked((kind,), opening, kind.name):
            found.setdefault(kind.name, {})[why] = None
    # Kinds for different processors share a name: one that can is enough.
    return tuple(
        Candidate(name, "" if "" in reasons else "; ".join(reasons))
        for name, reasons in found.items()
    )


def _of_file(name: str) -> list[EngineKind]:
    return [kind for kind in kinds() if name.endswith(kind.suffixes)]


def _asked(
    able: Iterable[EngineKind], opening: Opening, engine: str
) -> Iterator[tuple[EngineKind, str]]:
    """Each of these with why it refuses the model where its settings name this ``engine``."""
    settings = msgspec.structs.replace(opening.settings, engine=engine)
    for kind in able:
        try:
            why = kind.refuses(opening._replace(settings=settings))
        except Exception as error:  # somebody else's code, which may raise anything
            why = f"it fails: {type(error).__name__}: {error}"
        if not why and settings.draft and not kind.drafts:
            why = "it takes no draft model; leave out draft"
        yield kind, why


def _not_by(wanted: str, name: str) -> NoReturn:
    """The engine that is asked for does not open such a file, or there is none of that name."""
    those = [kind for kind in kinds() if kind.name == wanted]
    if those:
        ends = ", ".join(dict.fromkeys(suffix for kind in those for suffix in kind.suffixes))
        raise ModelError(f"{name}: engine: {wanted} opens files that end in {ends}")
    names = list(dict.fromkeys(kind.name for kind in kinds()))
    near = difflib.get_close_matches(wanted, names, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {AUTO}, {', '.join(names)}"
    raise ModelError(f"{name}: there is no engine {wanted!r}; {hint}")


def open_language(path: Path) -> Language:
    """The language of the model at ``path``; raises ModelError."""
    for kind in kinds():
        if isinstance(kind, Speaking) and path.name.endswith(kind.suffixes):
            return kind.language(path)
    raise ModelError(f"{path.name} is no language model")
