"""Chat templates: prompts as models expect them, and no template that hangs, escapes or bursts."""

from __future__ import annotations

from typing import Any

import pytest

from cotenant.domain.errors import InvalidRequest, ModelError
from cotenant.engines.llm import chat
from cotenant.engines.llm.chat import Chat

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": " How? "},
]
HEADERS = """{{ bos_token }}{% for m in messages %}
    {%- set body = '<|head|>' + m['role'] + '<|/head|>\n\n' + m['content'] | trim + eos_token %}
    {{- body }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"""
INST = """{%- if messages[0].role == 'system' -%}
    {%- set system = messages[0].content %}{% set rest = messages[1:] -%}
{%- else -%}{% set system = '' %}{% set rest = messages %}{%- endif -%}
{{ bos_token }}
{%- for m in rest %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if m.role == 'user' %}
        {%- set first = system ~ '\n\n' if loop.last and system else '' %}
        {{- '[INST] ' ~ first ~ m.content ~ ' [/INST]' }}
    {%- else %}{% generation %}{{ ' ' ~ m.content ~ eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}"""
TURNS = """{{ bos_token }}{% set ns = namespace(first='') %}{% for m in messages %}
{%- if m.role == 'system' %}{% set ns.first = m.content %}{% continue %}{% endif %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<turn>' + role + '\n' + ns.first + (m.content | trim) + '</turn>\n' }}{% set ns.first = '' %}
{%- endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"""


def test_without_a_template_it_is_chatml() -> None:
    said = Chat("").render(TALK[:2])
    expected = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert said == expected + "<|im_start|>assistant\n"
    assert Chat("").render(TALK[:2], add_generation_prompt=False) == expected


def test_templates_in_the_style_of_models_are_rendered() -> None:
    said = Chat(HEADERS, "<b>", "<e>").render(TALK[1:])
    assert said == (
        "<b><|head|>user<|/head|>\n\nHi<e><|head|>assistant<|/head|>\n\nHello<e>"
        "<|head|>user<|/head|>\n\nHow?<e><|head|>assistant<|/head|>\n\n"
    )
    said = Chat(INST, "<s>", "</s>").render(TALK)
    assert said == "<s>[INST] Hi [/INST] Hello</s>[INST] Be kind.\n\n How?  [/INST]"
    said = Chat(TURNS).render(TALK[:2])
    assert said == "<turn>user\nBe kind.Hi</turn>\n<turn>model\n"


def test_a_template_says_what_it_does_not_take() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        Chat(INST).render([TALK[1], TALK[1]])
    with pytest.raises(InvalidRequest):
        Chat("{{ messages[5].role.name }}").render(TALK)


def test_tools_json_dates_and_more_are_there() -> None:
    tools = [{"name": "<f>", "é": 1}]
    assert Chat("{{ tools | tojson }}").render([], tools) == '[{"name": "<f>", "é": 1}]'
    assert Chat("{{ tools[0] | tojson(indent=1) }}").render([], tools).count("\n") == 3
    assert len(Chat("{{ strftime_now('%Y-%m-%d') }}").render([])) == 10
    assert Chat("{{ thinking }}").render([], thinking=True) == "True"
    assert Chat("{{ documents is none }}").render([]) == "True"
    assert Chat("{{ ['a', 'b'] | join('-') }}{{ '-'.join(['a', 'b']) }}").render([]) == "a-ba-b"
    assert Chat("{{ 'aXb'.split('X')[-1] * 3 + 'c' }}").render([]) == "bbbc"
    assert Chat("{{ tools | map(attribute='a') | list }}").render([], [{"a": 1}]) == "[1]"
    assert Chat("{{ tools | map('upper') | join }}").render([], ["a", "b"]) == "AB"
    assert Chat("{% set x %}a{{ 1 }}b{% endset %}{{ x | upper }}").render([]) == "A1B"
    assert Chat("{{ 2 ** 3 + 4 * 1.5 }} {{ 7 % 4 }}").render([]) == "14.0 3"


def test_parts_are_joined_where_a_template_takes_only_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}]
    assert "user\na\nb<|im_end|>" in Chat("").render(messages)
    chat = Chat(
        "{% for m in messages %}{% for p in m['content'] %}{{ p.text }},{% endfor %}{% endfor %}"
    )
    assert chat.lists
    assert chat.render(messages) == "a,b,"
    with pytest.raises(InvalidRequest):
        Chat("").render([{"role": "user", "content": [{"type": "image_url"}]}])


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ x", "{% include 'x' %}{% nope %}", "(" * 2**21]
)
def test_what_is_no_template_is_said(template: str) -> None:
    with pytest.raises(ModelError):
        Chat(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ ('' | attr('__class__')).__mro__ }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_nothing_leaves_the_sandbox(template: str) -> None:
    with pytest.raises((InvalidRequest, ModelError)):
        Chat(template).render(TALK)


NEST = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TWICE = "{% set n = namespace(x=START) %}{% for i in range(60) %}{% set n.x = NEXT %}{% endfor %}"


def twice(start: str, step: str, after: str = "{{ n.x }}") -> str:
    return TWICE.replace("START", start).replace("NEXT", step) + after


@pytest.mark.parametrize(
    "template",
    [
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x' * 10**9 }}",
        "{{ 10**9 * 'x' }}",
        "{{ [1] * 10**10 }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        twice("3", "n.x * n.x"),
        twice("'x'", "n.x ~ n.x"),
        twice("'x'", "n.x + n.x"),
        twice("'x'", "[n.x, n.x] | join"),
        twice("'xx'", "n.x | replace('x', n.x)"),
        twice("'xx'", "n.x.replace('x', n.x)"),
        twice("'xx'", "n.x.join([n.x, n.x])"),
        twice("1", "namespace(x=n, y=n)"),
        "{{ 'x' | center(10**10) }}",
        "{{ 'x'.center(10**10) }}",
        "{{ 'x'.ljust(10**10) }}",
        "{{ 'x' | indent(10**10) }}",
        "{{ 'x\n' * 1000 | indent(10**7) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%10000000000d' | format(1) }}",
        "{{ '{:10000000000d}'.format(1) }}",
        "{{ (1).to_bytes(10**10) }}",
        "{{ {}.fromkeys(range(99999), 1) }}",
        "{{ lipsum(n=100000) }}",
        "{{ [1] | batch(10**10, 1) | list }}",
        "{{ 1.5 | round(10**9, 'ceil') }}",
        "{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
        "{% set a %}{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}{% endset %}",
        "{{ range(10**10) | list }}",
        "{% set b = 'x' * 10**6 %}{{ range(99999) | map('replace', 0, b) | list }}",
        "{% set b = 'x' * 10**6 %}{% for i in range(99999) | map('replace', 1, b) %}"
        "{{ loop.length }}{% endfor %}",
        "{% macro f() %}{% for i in range(99999) %}{{ 'x' * 10**6 }}{% endfor %}{% endmacro %}"
        "{% set b = f() %}",
        "{{ [1] | tojson(indent=10**10) }}",
    ],
)
def test_what_makes_too_much_is_ended(template: str) -> None:
    with pytest.raises((InvalidRequest, ModelError)):
        Chat(template).render(TALK)


@pytest.mark.parametrize(
    "template",
    [
        NEST,
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}",
        twice("'x'", "[n.x, n.x]", "{{ n.x }}"),
        twice("'x'", "[n.x, n.x]", "{{ n.x | tojson }}"),
        twice("'x'", "(n.x, n.x)", "{{ n.x == 1 }}"),
        twice("'x'", "{'a': n.x, 'b': n.x}"),
    ],
)
def test_what_would_never_end_is_ended(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MOST_SECONDS", 0.3)
    with pytest.raises(InvalidRequest):
        Chat(template).render(TALK)


def test_messages_too_large_are_refused() -> None:
    deep: Any = "x"
    for _ in range(60):
        deep = [deep, deep]
    with pytest.raises(InvalidRequest):
        Chat("{{ messages }}").render([{"role": "user", "content": "x", "more": deep}])
