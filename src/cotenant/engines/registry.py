"""Which engines there are, and which of them opens a model.

They are entry points of the group ``cotenant.engines``, this package's own and others' alike.
"""

from __future__ import annotations

import difflib
import functools
import logging
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final, NoReturn

from cotenant.domain.config import AUTO
from cotenant.domain.errors import ModelError
from cotenant.domain.port import Language
from cotenant.engines.base import EngineKind, Opening, Speaking

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
    known = kinds()
    able = [kind for kind in known if name.endswith(kind.suffixes)]
    if not able:
        ends = ", ".join(suffixes()) or "none: is cotenant installed?"
        raise ModelError(f"{name}: no engine for this kind of file; known: {ends}")
    if wanted != AUTO:
        able = [kind for kind in able if kind.name == wanted] or _not_by(wanted, name)
    reasons: dict[str, None] = {}
    for kind in able:
        why = kind.refuses(opening)
        if not why and opening.settings.draft and not kind.drafts:
            why = "it takes no draft model; leave out draft"
        if not why:
            return kind
        reasons[f"{kind.name}: {why}"] = None
    raise ModelError(f"{name}: {'; '.join(reasons)}")


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
