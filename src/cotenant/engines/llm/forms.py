"""How large the form of an answer may be, by what its text shows. Forms come from clients."""

from __future__ import annotations

import json
import re
from typing import Final

from cotenant.domain.errors import InvalidRequest, TooLarge
from cotenant.engines.llm.asking import Expression, JsonObject, JsonSchema, Lark, OneOf, Spec

MOST_SCHEMA: Final = 1 << 16
"""Characters of a schema as JSON."""
MOST_SOURCE: Final = 1 << 14
"""Characters of an expression, a Lark grammar or a list of choices."""
MOST_DEPTH: Final = 64
"""Brackets in brackets. llguidance descends into them, and its stack has an end."""
MOST_RULES: Final = 1000
"""Lines of a Lark grammar, and references in a schema: one may lead to the next."""
MOST_CHOICES: Final = 1000
_COUNTS: Final = (
    re.compile(r'"(?:min|max)(?:Items|Length|Properties)": *(\d{1,9})'),
    re.compile(r"[{~] *(\d{1,9})"),
    re.compile(r"[{~] *\d+ *(?:,|\.\.) *(\d{1,9})"),
)
"""How often something is repeated: keywords of a schema; ``{3}``, ``{3,7}``, ``~3`` and ``~3..7``.
Numbers with more digits begin with some that are too many anyway."""


def name_of(spec: Spec) -> str:
    """What clients call it."""
    return str(spec.__struct_config__.tag)


def schema_text(spec: JsonSchema) -> str:
    """As JSON. Raises InvalidRequest."""
    try:
        return json.dumps(spec.schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"json_schema is no JSON: {error}") from error


def check_form(spec: Spec) -> None:
    """Raises InvalidRequest for what is none, TooLarge for what is beyond a limit."""
    match spec:
        case JsonObject():
            pass
        case JsonSchema():
            written = schema_text(spec)
            _small(spec, written, MOST_SCHEMA)
            _few(spec, "references", written.count('"$ref"'), MOST_RULES)
        case Expression(pattern):
            _small(spec, pattern)
        case Lark(grammar):
            _small(spec, grammar)
            _few(spec, "lines", grammar.count("\n"), MOST_RULES)
        case OneOf(choices):
            if not choices:
                raise InvalidRequest("choice needs at least one text")
            _few(spec, "texts", len(choices), MOST_CHOICES)
            _few(spec, "characters", sum(map(len, choices)), MOST_SOURCE)


def check_repeats(spec: Spec, most: int) -> None:
    """Raises TooLarge where the form, once it is checked, says of something that it may stand there
    more often."""
    match spec:
        case JsonSchema():
            source = schema_text(spec)
        case Expression(source) | Lark(source):
            pass
        case _:
            return
    counts = [int(found) for each in _COUNTS for found in each.findall(source)]
    _few(spec, "repetitions of a part", max(counts, default=0), most)


def _small(spec: Spec, source: str, most: int = MOST_SOURCE) -> None:
    _few(spec, "characters", len(source), most)
    depth = deepest = 0
    for each in source:  # those in quotes count as well: it is a bound
        depth += (each in "([{") - (each in ")]}")
        deepest = max(deepest, depth)
    _few(spec, "brackets in each other", deepest, MOST_DEPTH)


def _few(spec: Spec, what: str, count: int, most: int) -> None:
    if count > most:
        raise TooLarge(f"{name_of(spec)} has {count} {what}; at most {most} are taken")
