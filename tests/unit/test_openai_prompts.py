"""Prompts as clients write them, by a model's language."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cotenant.engines.llm.language import LlmLanguage
from cotenant.serving import openai_calls, openai_prompts
from cotenant.serving.openai_ask import Chat, Completion, Detokenize, Tokenize, Unfit
from cotenant.serving.openai_prompts import Model
from tests.contract.fake_language import options_of, prompt_of
from tests.unit.llm_files import TOKENS, write

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|end|>{% endif %}"
)
BEGIN = TOKENS.index("ll")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path: Path = tmp_path_factory.mktemp("model") / "model.gguf"
    language = LlmLanguage(write(path, text=True, template=TEMPLATE))
    return Model("says", 64, language, 2**20)


def tokens(model: Model, **given: Any) -> Any:
    return json.loads(openai_prompts.tokenize(Tokenize(model="says", **given), model))


def asked(kind: type[Any], **given: Any) -> Any:
    return msgspec.convert({"model": "says", **given}, kind)


def test_text_there_and_back(model: Model) -> None:
    found = tokens(model, prompt="hello, wörld", return_token_strs=True)
    assert found["count"] == len(found["tokens"])
    assert found["token_strs"][0] == "he"
    back = openai_prompts.detokenize(Detokenize(model="says", tokens=found["tokens"]), model)
    assert json.loads(back) == {"prompt": "hello, wörld"}


def test_what_goes_before_a_prompt_can_be_left_out(model: Model) -> None:
    class Begins(LlmLanguage):
        def __init__(self) -> None:
            pass

        def encode(self, text: str, special: bool, most: int) -> list[int]:
            return [BEGIN, *model.language.encode(text, special, most)]

    other = model._replace(language=Begins())
    assert tokens(other, prompt="he")["tokens"] == [BEGIN, TOKENS.index("he")]
    assert tokens(other, prompt="he", add_special_tokens=False)["tokens"] == [TOKENS.index("he")]


def test_a_conversation_ends_where_the_answer_begins(model: Model) -> None:
    say = asked(Chat, messages=[{"role": "user", "content": "hello"}])
    (call,) = openai_calls.chat(say, model).calls
    assert prompt_of(call)[-1] == len(TOKENS) - 1
    say.add_generation_prompt = False
    (other,) = openai_calls.chat(say, model).calls
    assert prompt_of(call)[:-1] == prompt_of(other)


@pytest.mark.parametrize(
    ("arguments", "written"), [('{"a": 1}', '{"a": 1}'), ('{"a":', '"{\\"a\\":"'), (None, "{}")]
)
def test_arguments_of_earlier_calls(model: Model, arguments: str | None, written: str) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    (made,) = openai_calls.chat(asked(Chat, messages=messages), model).calls
    assert model.language.decode(prompt_of(made)) == "<assistant>" + written


def test_the_longest_answer_fills_the_context(model: Model) -> None:
    plan = openai_calls.completion(asked(Completion, prompt="x" * 60), model)
    assert options_of(plan.calls[0]).max_tokens == 4
    long = model._replace(context=10**6)
    plan = openai_calls.completion(asked(Completion, prompt="x" * 60), long)
    assert 4 < options_of(plan.calls[0]).max_tokens < 10**6


@pytest.mark.parametrize("length", [64, 65, 10**6])
def test_a_prompt_that_leaves_no_room_is_refused(model: Model, length: int) -> None:
    with pytest.raises(Unfit) as raised:
        openai_calls.completion(asked(Completion, prompt="x" * length), model)
    assert raised.value.code == "context_length_exceeded"
