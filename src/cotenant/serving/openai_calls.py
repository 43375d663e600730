"""From what clients of OpenAI's API ask to calls of a node, by a model's language.

All of it may take seconds (tokenizers, templates): it is done in threads.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from cotenant.domain.port import InferCall, TensorIn
from cotenant.engines.llm.asking import Options, Spec
from cotenant.serving import openai_tools as tools
from cotenant.serving.openai_ask import (
    Chat,
    Completion,
    Embedding,
    Function,
    Unfit,
)
from cotenant.serving.openai_images import tiles_of
from cotenant.serving.openai_prompts import Model, echoes, functions_of, prompt_of, prompts_of
from cotenant.serving.openai_say import Answer, ChatAnswer, Choice, EmbeddingAnswer, Words
from cotenant.serving.openai_settings import (
    MOST_ANSWERS,
    MOST_CHOICES,
    MOST_INPUTS,
    MOST_LOGPROBS,
    MOST_PROMPTS,
    most_tokens,
    settings,
    within,
)
from cotenant.serving.tensors import join_bytes


class Plan(NamedTuple):
    """Calls to the node, and what becomes of their answers. ``stream``: told as they come."""

    calls: list[InferCall]
    answer: Answer | EmbeddingAnswer
    stream: bool = False


def completion(asked: Completion, model: Model) -> Plan:
    """Raises Unfit."""
    prompts = prompts_of("prompt", asked.prompt, MOST_PROMPTS, model)
    before = echoes(asked, prompts, model) if asked.echo else [""] * len(prompts)
    if asked.logprobs is not None:
        within("logprobs", asked.logprobs, 0, MOST_LOGPROBS)
    how = settings(asked, model.language.vocabulary) | {"logprobs": asked.logprobs}
    n = _count(asked.n, len(prompts))
    calls = []
    for prompt in prompts:
        most = most_tokens(asked.max_tokens, "max_tokens", len(prompt), model.context)
        calls += _calls(model, prompt, how | {"max_tokens": most}, n)
    told = asked.logprobs is not None
    choices = [
        Choice(Words(model.language, len(echo)) if told else None, echo=echo)
        for echo in before
        for _ in range(n)
    ]
    answer = Answer(model.name, [len(p) for p in prompts], choices, _usage(asked), model.most)
    return Plan(calls, answer, bool(asked.stream))


def chat(asked: Chat, model: Model) -> Plan:
    """Raises Unfit."""
    functions = functions_of(asked)
    choice = _tool_choice(asked, functions)
    form = _form(model) if choice != "none" else None
    how = settings(asked, model.language.vocabulary)
    several = asked.parallel_tool_calls is not False
    if form is not None:
        how["grammar"] = _tool_grammar(form, functions, choice, several, how["grammar"])
    how["logprobs"] = _top(asked)
    prompt, images = prompt_of(asked, functions if choice != "none" else [], model)
    given, name = asked.max_tokens, "max_tokens"
    if asked.max_completion_tokens is not None:
        given, name = asked.max_completion_tokens, "max_completion_tokens"
    how["max_tokens"] = most_tokens(given, name, len(prompt), model.context)
    n = _count(asked.n, 1)
    names = [function.name for function in functions]
    one = None if several and choice in ("auto", "required") else 1
    choices = [
        Choice(
            Words(model.language) if asked.logprobs else None,
            tools.Reader(form, names, one) if form else None,
        )
        for _ in range(n)
    ]
    answer = ChatAnswer(model.name, [len(prompt)], choices, _usage(asked), model.most)
    calls = _calls(model, prompt, how, n, tiles_of(images))
    return Plan(calls, answer, bool(asked.stream))


def embedding(asked: Embedding, model: Model) -> Plan:
    """Raises Unfit."""
    for name in ("dimensions", "truncate_prompt_tokens"):
        if getattr(asked, name) is not None:
            raise Unfit(f"{name} is not supported; leave it out", name, "unsupported_parameter")
    if asked.encoding_format not in (None, "float", "base64"):
        raise Unfit("encoding_format is float or base64", "encoding_format")
    prompts = prompts_of("input", asked.input, MOST_INPUTS, model)
    calls = []
    for prompt in prompts:
        most_tokens(1, "input", len(prompt), model.context)
        calls += _calls(model, prompt, {"embed": True, "max_tokens": 1}, 1)
    packed = asked.encoding_format == "base64"
    return Plan(calls, EmbeddingAnswer(model.name, [len(p) for p in prompts], packed, model.most))


# --- tools ------------------------------------------------------------------------------------


def _tool_choice(asked: Chat, functions: Sequence[Function]) -> str:
    """auto, none, required, or "=" and the name of a function."""
    choice = asked.tool_choice
    if not functions:
        if choice not in (None, "none", "auto"):
            raise Unfit("tool_choice needs tools", "tool_choice")
        return "none"
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        if choice not in ("auto", "none", "required"):
            raise Unfit("tool_choice is auto, none, required or a function", "tool_choice")
        return choice
    if choice.type != "function" or choice.function is None:
        raise Unfit("tool_choice: only a function can be named", "tool_choice")
    if all(function.name != choice.function.name for function in functions):
        raise Unfit("tool_choice names a function that is not among tools", "tool_choice")
    return "=" + choice.function.name


def _form(model: Model) -> tools.Form:
    form = tools.form_of(model.language.template)
    if form is None:
        raise Unfit(
            f"tools: the chat template of model {model.name!r} has none, or its calls are of a form"
            " that is not known here; leave tools out, or give tool_choice: none",
            "tools",
            "unsupported_parameter",
        )
    return form


def _tool_grammar(
    form: tools.Form,
    functions: Sequence[Function],
    choice: str,
    several: bool,
    wanted: Spec | None,
) -> Spec | None:
    if wanted is not None:
        raise Unfit("a form of the answer and tools exclude each other", "response_format")
    if choice == "auto":
        return None
    if choice == "required":
        return tools.grammar(form, functions, several)
    return tools.grammar(form, [f for f in functions if f.name == choice[1:]], several=False)


# --- calls ------------------------------------------------------------------------------------


def _top(asked: Chat) -> int | None:
    top = asked.top_logprobs or 0
    within("top_logprobs", top, 0, MOST_LOGPROBS)
    if top and not asked.logprobs:
        raise Unfit("top_logprobs needs logprobs: true", "top_logprobs")
    return top if asked.logprobs else None


def _usage(asked: Completion | Chat) -> bool:
    options = asked.stream_options
    if options is not None and not asked.stream:
        raise Unfit("stream_options needs stream: true", "stream_options")
    return bool(options and options.include_usage)


def _count(n: int | None, prompts: int) -> int:
    n = 1 if n is None else n
    within("n", n, 1, MOST_CHOICES)
    if n * prompts > MOST_ANSWERS:
        raise Unfit(f"{prompts} prompts with n = {n}: at most {MOST_ANSWERS} answers", "n")
    return n


def _calls(
    model: Model,
    prompt: Sequence[int],
    how: dict[str, Any],
    n: int,
    tiles: TensorIn | None = None,
) -> list[InferCall]:
    """One for each answer, with the seeds one after the other."""
    tokens = array("q", prompt).tobytes()
    text = join_bytes([b""])
    calls = []
    for number in range(n):
        seed = how.get("seed", 0) + number
        options = join_bytes([msgspec.json.encode(Options(**how | {"seed": seed}))])
        inputs = [
            TensorIn("text_input", "BYTES", (1,), len(text), text),
            TensorIn("prompt_tokens", "INT64", (len(prompt),), len(tokens), tokens),
            TensorIn("options", "BYTES", (1,), len(options), options),
        ]
        if tiles is not None:
            inputs.append(tiles)
        calls.append(InferCall(model.name, inputs, pieces=True))
    return calls
