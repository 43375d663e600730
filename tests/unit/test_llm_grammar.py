"""Structured output: whatever is drawn under the mask is of the form, and no form is a bomb."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from cotenant.domain.errors import InvalidRequest, ModelError, TooLarge
from cotenant.engines.llm.asking import Expression, JsonObject, JsonSchema, Lark, OneOf, Spec
from cotenant.engines.llm.grammar import Grammar, Grammars
from cotenant.engines.llm.text import Text
from tests.unit.test_llm_text import BYTES, PIECES

MADE = Grammars(BYTES)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "more": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "count", "tags", "more"],
    "additionalProperties": False,
}


def walk(text: Text, grammar: Grammar, seed: int, most: int = 400) -> str | None:
    """A random answer; None if it did not end."""
    random = np.random.default_rng(seed)
    tokens: list[int] = []
    for _ in range(most):
        allowed = np.flatnonzero(grammar.allowed())
        ends = [token for token in allowed if token in text.ends]
        token = ends[0] if ends and random.random() < 0.5 else int(random.choice(allowed))
        grammar.advance(token)
        if token in text.ends:
            return text.decode(tokens, continued=True)
        tokens.append(token)
    return None


@pytest.mark.parametrize("text", [BYTES, PIECES])
def test_random_answers_are_json_of_the_schema(text: Text) -> None:
    made = Grammars(text)
    ended = 0
    for seed in range(15):
        said = walk(text, made.compile(JsonSchema(SCHEMA)), seed)
        if said is not None:
            found = json.loads(said)
            assert list(found) == ["name", "count", "tags", "more"]
            assert len(found["name"]) <= 5
            assert 0 <= found["count"] <= 999
            assert set(found["tags"]) <= {"a", "b"}
            ended += 1
    assert ended


@pytest.mark.parametrize("seed", range(5))
def test_random_answers_match(seed: int) -> None:
    said = walk(BYTES, MADE.compile(Expression("[ab]{2,5}é?(x|yz)")), seed)
    assert said is not None
    assert re.fullmatch("[ab]{2,5}é?(x|yz)", said)
    choices = ("yes", "no\n", "a.b|c", "été", '"', "\\")
    assert walk(BYTES, MADE.compile(OneOf(choices)), seed) in choices
    said = walk(BYTES, MADE.compile(Lark('start: "<" start ">" | "x"')), seed)
    assert said is None or re.fullmatch("<*x>*", said)


def test_only_the_end_is_allowed_where_it_must_stop() -> None:
    grammar = MADE.compile(OneOf(("a",)))
    grammar.advance(ord("a"))
    assert grammar.finished
    assert set(np.flatnonzero(grammar.allowed())) == BYTES.ends
    grammar.advance(min(BYTES.ends))
    assert grammar.finished


def test_a_copy_goes_its_own_way_and_what_is_not_allowed_changes_nothing() -> None:
    grammar = MADE.compile(OneOf(("ab", "ac")))
    grammar.advance(ord("a"))
    other = grammar.copy()
    other.advance(ord("b"))
    assert other.finished
    assert not grammar.finished
    with pytest.raises(ValueError, match="not allowed"):
        grammar.advance(ord("x"))
    grammar.advance(ord("c"))
    assert grammar.finished


def test_any_object() -> None:
    grammar = MADE.compile(JsonObject())
    for token in BYTES.encode('{"a": [1, null]}', special=False):
        grammar.advance(token)
    assert grammar.allowed()[min(BYTES.ends)]


def test_the_whole_vocabulary_is_masked() -> None:
    allowed = MADE.compile(JsonObject()).allowed()
    assert allowed.shape == (BYTES.vocabulary,)
    assert allowed.dtype == np.bool_


def test_a_model_without_an_end_has_no_grammars() -> None:
    text = Text.from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.tokens": ["a"],
            "tokenizer.ggml.merges": [],
        }
    )
    with pytest.raises(ModelError):
        Grammars(text)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def chain(length: int) -> dict[str, Any]:
    each = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": each | {f"d{length}": {"type": "null"}}}


@pytest.mark.parametrize(
    "spec",
    [
        JsonSchema({"type": "nope"}),
        JsonSchema({"allOf": [{"type": "string"}, {"type": "integer"}]}),
        JsonSchema({"$ref": "#/nowhere"}),
        JsonSchema({"type": "string", "pattern": "("}),
        JsonSchema({"a": {1, 2}}),
        Expression("("),
        Expression("[^\\x00-\\U0010FFFF]"),
        Lark("no grammar"),
        Lark('start: "a" missing'),
        Lark("start: start"),
        OneOf(()),
        OneOf(("a\ud800",)),
        Lark('start: "\ud800"'),
    ],
)
def test_what_is_no_form_or_allows_nothing_is_refused(spec: Spec) -> None:
    with pytest.raises(InvalidRequest):
        MADE.compile(spec)


@pytest.mark.parametrize(
    "spec",
    [
        JsonSchema({"enum": ["x" * 100] * 100_000}),
        JsonSchema(nested(10_000)),
        JsonSchema(nested(500)),
        JsonSchema(chain(5000)),
        Expression("(" * 50_000 + ")" * 50_000),
        Lark("start: " + "(" * 50_000 + '"a"' + ")" * 50_000),
        Lark("start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(9999)) + 'r9999: "a"'),
        OneOf(("a",) * 100_000),
        OneOf(("a" * 10_000_000,)),
    ],
)
def test_bombs_are_refused(spec: Spec) -> None:
    with pytest.raises((InvalidRequest, TooLarge)):
        MADE.compile(spec)


@pytest.mark.parametrize(
    "spec",
    [
        JsonSchema(chain(900)),
        JsonSchema(nested(25)),
        JsonSchema({"enum": [f"x{i}" for i in range(7000)]}),
        JsonSchema({"properties": {f"x{i}": {"type": "null"} for i in range(2000)}}),
        JsonSchema({"$ref": "#"}),
        JsonSchema({"$defs": {"t": {"anyOf": [{"$ref": "#/$defs/t"}] * 9}}, "$ref": "#/$defs/t"}),
        JsonSchema({"allOf": [{"anyOf": [{"minLength": i}, {"maxLength": i}]} for i in range(25)]}),
        JsonSchema({"type": "array", "minItems": 10**9, "items": {"type": "null"}}),
        JsonSchema({"type": "string", "minLength": 10**9}),
        JsonSchema({"type": "string", "pattern": "^(a|aa|aaa|b+)*(x{1000}){1000}$"}),
        Expression("((((a{999}){999}){999}){999})"),
        Expression("(.*a.{200}){50}.*b.{500}"),
        Expression("(a|b|ab)*c{100000}"),
        Expression("(a?){5000}a{5000}"),
        Lark('start: start start | "a" | start start start'),
        Lark('start: ("a"?){100000}'),
        Lark('start: "a"{1,1000000000}'),
        Lark("start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(900)) + 'r900: "a"'),
        Lark("start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(60)) + 'r60: "a"'),
        Lark("start: " + "|".join(['"a"'] * 4000)),
        Lark("start: /" + "a" * 16_000 + "/"),
        Lark("start: " + '("a"|' * 50 + '"b"' + ")*" * 50),
    ],
)
def test_what_may_be_a_bomb_is_refused_or_answered(spec: Spec) -> None:
    try:
        grammar = MADE.compile(spec)
        for _ in range(50):
            allowed = np.flatnonzero(grammar.allowed())
            grammar.advance(int(allowed[0]))
            if grammar.finished:
                break
    except (InvalidRequest, TooLarge):
        pass  # either will do
