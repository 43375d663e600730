"""Calls of tools: told from text however it is cut, and forced by a grammar."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cotenant.engines.llm.grammar import Grammars
from cotenant.engines.llm.text import Text
from cotenant.serving.openai_ask import Function
from cotenant.serving.openai_tools import Form, Reader, form_of, grammar
from tests.unit.llm_files import TOKENS

WEATHER = {"name": "weather", "arguments": {"city": "Bern"}}
TIME = {"name": "time", "arguments": {}}


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ tools }} <tool_call>", Form.HERMES),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", Form.MISTRAL),
        ('{{ tools }} {"name": "x", "parameters": {}}', Form.LLAMA),
        ("{{ tools }} <|python_tag|>", Form.LLAMA),
        ("{{ messages }}", None),
        ("<tool_call> {{ messages }}", None),
        ("{{ tools }} <tool_call><function=x>", None),
        ("{{ tools }} [TOOL_CALLS]x[ARGS]", None),
        ("", None),
    ],
)
def test_the_template_says_the_form(template: str, form: Form | None) -> None:
    assert form_of(template) is form


def read(form: Form, text: str, step: int, most: int | None = None) -> tuple[str, list[Any]]:
    """The text and the calls of an answer that comes ``step`` characters at a time."""
    reader = Reader(form, ["weather", "time"], most)
    said, found = "", []
    for at in range(0, len(text), step):
        more, calls = reader.feed(text[at : at + step])
        said, found = said + more, found + calls
    more, calls = reader.finish()
    assert len({c.id for c in found + calls}) == len(found + calls)
    return said + more, [
        {"name": c.name, "arguments": json.loads(c.arguments)} for c in found + calls
    ]


def tagged(*calls: dict[str, Any]) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)


def llama(name: str, **arguments: Any) -> str:
    return json.dumps({"name": name, "parameters": arguments})


@pytest.mark.parametrize("step", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("form", "text", "said", "calls"),
    [
        (Form.HERMES, "no < call\n", "no < call\n", []),
        (Form.HERMES, tagged(WEATHER), "", [WEATHER]),
        (Form.HERMES, tagged(WEATHER, TIME) + "\n", "", [WEATHER, TIME]),
        (Form.HERMES, "First. \n" + tagged(TIME) + "\nDone.", "First.\nDone.", [TIME]),
        (Form.HERMES, tagged(TIME).removesuffix("</tool_call>"), "", [TIME]),
        (Form.HERMES, "<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
        (Form.HERMES, "<tool_call>{", "<tool_call>{", []),
        (Form.HERMES, "a <tool", "a <tool", []),
        (Form.MISTRAL, json.dumps([WEATHER, TIME]), "", [WEATHER, TIME]),
        (Form.MISTRAL, "[TOOL_CALLS]" + json.dumps([TIME]), "", [TIME]),
        (Form.MISTRAL, "[TOOL_CALLS] nothing", "[TOOL_CALLS] nothing", []),
        (Form.MISTRAL, '[{"name": "else"}]', '[{"name": "else"}]', []),
        (Form.MISTRAL, "[1, 2]", "[1, 2]", []),
        (Form.LLAMA, llama("weather", city="Bern"), "", [WEATHER]),
        (Form.LLAMA, "<|python_tag|>" + llama("weather", city="Bern"), "", [WEATHER]),
        (Form.LLAMA, llama("else"), llama("else"), []),
        (Form.LLAMA, '{"a": 1}', '{"a": 1}', []),
        (Form.LLAMA, "{ not JSON", "{ not JSON", []),
        (Form.LLAMA, "text {}", "text {}", []),
    ],
)
def test_calls_are_told_however_text_is_cut(
    form: Form, text: str, said: str, calls: list[Any], step: int
) -> None:
    assert read(form, text, step) == (said, calls)


def test_text_before_a_call_does_not_wait_for_it() -> None:
    reader = Reader(Form.HERMES, ["time"])
    assert reader.feed("Let me see. ") == ("Let me see.", [])
    assert reader.feed("<tool_call>{") == ("", [])
    assert Reader(Form.LLAMA, ["time"]).feed("Well") == ("Well", [])


def test_calls_beyond_those_wanted_are_dropped() -> None:
    assert read(Form.HERMES, tagged(WEATHER, TIME), 5, most=1) == ("", [WEATHER])


def test_arguments_may_be_json_in_a_string() -> None:
    said = tagged({"name": "time", "arguments": '{"zone": 1}'})
    assert read(Form.HERMES, said, 9) == ("", [{"name": "time", "arguments": {"zone": 1}}])


# --- grammars ---------------------------------------------------------------------------------

CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string", "maxLength": 9}},
}
NONE = {"type": "object", "properties": {}, "additionalProperties": False}


@pytest.fixture(scope="module")
def text() -> Text:
    return Text.from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": TOKENS,
            "tokenizer.ggml.token_type": [1] * (len(TOKENS) - 1) + [3],
            "tokenizer.ggml.merges": ["h e", "l l"],
            "tokenizer.ggml.eos_token_id": len(TOKENS) - 1,
        }
    )


def fits(text: Text, spec: Any, said: str) -> bool:
    """Whether an answer can be this."""
    form = Grammars(text).compile(spec)
    try:
        for token in text.encode(said, special=False):
            form.advance(token)
    except ValueError:
        return False
    return bool(form.allowed()[len(TOKENS) - 1])


@pytest.mark.parametrize(
    ("form", "one", "two", "wrong"),
    [
        (
            Form.HERMES,
            tagged(WEATHER),
            tagged(WEATHER, TIME),
            tagged({"name": "weather", "arguments": {"town": "Bern"}}),
        ),
        (
            Form.MISTRAL,
            json.dumps([WEATHER]),
            json.dumps([WEATHER, TIME]),
            json.dumps([{"name": "weather", "arguments": {}}]),
        ),
        (Form.LLAMA, llama("weather", city="Bern"), None, llama("weather", city=3)),
    ],
)
def test_grammars_allow_calls_and_nothing_else(
    text: Text, form: Form, one: str, two: str | None, wrong: str
) -> None:
    functions = [Function("weather", None, CITY), Function("time", None, NONE)]
    single, several = (grammar(form, functions, several) for several in (False, True))
    assert fits(text, single, one)
    assert fits(text, several, one)
    if two is not None:
        assert fits(text, several, two)
        assert not fits(text, single, two)
    for said in (wrong, "Well.", one.replace("weather", "else"), ""):
        assert not fits(text, several, said)


def test_what_is_allowed_is_read_as_calls() -> None:
    for form, said in (
        (Form.HERMES, tagged(WEATHER)),
        (Form.MISTRAL, json.dumps([WEATHER])),
        (Form.LLAMA, llama("weather", city="Bern")),
    ):
        assert read(form, said, 4) == ("", [WEATHER])
