"""Whether a variant serves, by its owner's word: promoted, taken back, removed."""

from __future__ import annotations

import difflib

import msgspec

from cotenant.domain.config import ModelSettings
from cotenant.domain.errors import InvalidRequest, NotFound
from cotenant.domain.variant import VARIANTS_DIR, VariantRecord, VariantState
from cotenant.optimize import writing
from cotenant.optimize.choosing import inaccurate
from cotenant.runtime.repository import ModelFiles, Repository, VariantFiles


def promote(
    repository: Repository, files: ModelFiles, name: str, settings: ModelSettings, max_drop: float
) -> None:
    """Let a variant serve. Raises InvalidRequest if nothing good was seen of it, or it is of other
    files than the version has now."""
    with writing.workplace(files.path.parent):
        found = _named(repository, files, name)
        record = _record(found)
        if found.problem:
            raise InvalidRequest(f"{name} cannot serve: {found.problem}")
        if record.accuracy is None:
            raise InvalidRequest(
                f"{name} was never compared with its original; cotenant optimize does that"
            )
        if why := inaccurate(record.accuracy, max_drop, settings.accuracy_floor):
            raise InvalidRequest(f"{name} is not promoted: {why}")
        _state(files, found, VariantState.PROMOTED)


def demote(repository: Repository, files: ModelFiles, name: str) -> None:
    """Let a variant serve no longer; raises NotFound, InvalidRequest."""
    with writing.workplace(files.path.parent):
        found = _named(repository, files, name)
        if _record(found).state is not VariantState.PROMOTED:
            raise InvalidRequest(f"{name} is not promoted; it is {_record(found).state.value}")
        _state(files, found, VariantState.CANDIDATE)


def remove(repository: Repository, files: ModelFiles, name: str) -> None:
    """Remove a variant's directory; raises NotFound, or InvalidRequest for one that serves."""
    with writing.workplace(files.path.parent):
        found = _named(repository, files, name)
        if found.record is not None and found.record.state is VariantState.PROMOTED:
            raise InvalidRequest(f"{name} is promoted; demote it first")
        writing.remove(files.path.parent / VARIANTS_DIR / name)


def _named(repository: Repository, files: ModelFiles, name: str) -> VariantFiles:
    known = {found.name: found for found in repository.variants(files)}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known) or 'none'}"
    raise NotFound(f"{files.name} version {files.version} has no variant {name!r}; {hint}")


def _record(found: VariantFiles) -> VariantRecord:
    if found.record is None:
        raise InvalidRequest(f"{found.name}: {found.problem}")
    return found.record


def _state(files: ModelFiles, found: VariantFiles, state: VariantState) -> None:
    record = msgspec.structs.replace(_record(found), state=state)
    writing.rewrite(files.path.parent / VARIANTS_DIR / found.name, record)
