"""What the fields of a request to OpenAI's API mean to a model, within stated limits."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from cotenant.engines.llm.asking import Expression, JsonObject, JsonSchema, Lark, OneOf, Spec
from cotenant.serving.openai_ask import Asked, ResponseFormat, StructuredOutputs, Unfit
from cotenant.serving.tensors import shown

MOST_CHOICES: Final = 16
"""Answers to one prompt."""
MOST_PROMPTS: Final = 64
"""Prompts of a completion."""
MOST_INPUTS: Final = 256
"""Texts to embed at once."""
MOST_ANSWERS: Final = 64
"""Answers to all prompts of a request."""
MOST_STOPS: Final = 16
MOST_STOP: Final = 1024
"""Stop strings, and characters of each."""
MOST_BIASES: Final = 1024
MOST_TOOLS: Final = 128
MOST_LOGPROBS: Final = 20
DEFAULT_TOKENS: Final = 1024
"""The most tokens of an answer, where nobody says and the model has as many."""

_RANGES: Final = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 10.0),
}


def settings(asked: Asked, vocabulary: int) -> dict[str, Any]:
    """Fields of ``asking.Options``: all but how long an answer may be. Raises Unfit."""
    found: dict[str, Any] = {"temperature": 1.0}
    for name, (low, high) in _RANGES.items():
        value = getattr(asked, name)
        if value is not None:
            within(name, value, low, high)
            found[name] = value
    if asked.top_k is not None:
        within("top_k", asked.top_k, -1, 2**31)
        found["top_k"] = max(asked.top_k, 0)
    seed = secrets.randbits(48) if asked.seed is None else asked.seed
    within("seed", seed, -(2**63), 2**63 - 1)
    return found | {
        "seed": seed,
        "stop": _stops(asked.stop),
        "logit_bias": _biases(asked.logit_bias or {}, vocabulary),
        "ignore_eos": bool(asked.ignore_eos),
        "salt": _text("cache_salt", asked.cache_salt or "", MOST_STOP),
        "grammar": form(asked),
    }


def within(name: str, value: float, low: float, high: float) -> None:
    """Raises Unfit for what is not from ``low`` to ``high``."""
    if not low <= value <= high:
        said = str(value) if abs(value) < 2**63 else "beyond all numbers"
        raise Unfit(f"{name} is {said}; it must be from {low} to {high}", name)


def most_tokens(given: int | None, name: str, prompt: int, context: int) -> int:
    """How many tokens an answer may have. Raises Unfit."""
    if given is not None and given < 1:
        raise Unfit(f"{name} must be at least 1", name)
    most = min(context - prompt, DEFAULT_TOKENS) if given is None else given
    if prompt + max(most, 1) > context:
        most = min(most, 2**63)
        raise Unfit(
            f"the prompt has {prompt} tokens, and the answer may have {max(most, 1)}; this model"
            f" takes at most {context} together. Make the prompt shorter, or {name} smaller",
            name if given is not None else "prompt",
            "context_length_exceeded",
        )
    return most


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    few("stop", len(stops), MOST_STOPS)
    return tuple(_text("stop", each, MOST_STOP) for each in stops if each)


def _text(name: str, text: str, most: int) -> str:
    few(name, len(text), most, "characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unfit(f"{name} is not valid Unicode", name) from None
    return text


def few(name: str, count: int, most: int, what: str = "entries") -> None:
    """Raises Unfit for more than ``most``."""
    if count > most:
        raise Unfit(f"{name} has {count} {what}; at most {most} are taken", name)


def _biases(given: dict[str, float], vocabulary: int) -> dict[int, float]:
    few("logit_bias", len(given), MOST_BIASES)
    found = {}
    for token, bias in given.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise Unfit(f"logit_bias: {shown(token)} is no token", "logit_bias")
        within("logit_bias", int(token), 0, vocabulary - 1)
        within("logit_bias", bias, -100, 100)
        found[int(token)] = bias
    return found


def form(asked: Asked) -> Spec | None:
    """The form of the answer, if one is asked for. Raises Unfit."""
    found = [*_response_form(asked.response_format), *_structured_form(asked.structured_outputs)]
    if len(found) > 1:
        raise Unfit("give the form of the answer once", "structured_outputs")
    return found[0] if found else None


def _response_form(given: ResponseFormat | None) -> Iterable[Spec]:
    match given.type if given else "text":
        case "text":
            pass
        case "json_object":
            yield JsonObject()
        case "json_schema":
            schema = given.json_schema if given else None
            if schema is None:
                raise Unfit("response_format: json_schema is missing", "response_format")
            yield JsonObject() if schema.schema is None else JsonSchema(schema.schema)
        case other:
            raise Unfit(
                f"response_format: {shown(other)} is none; use text, json_object or json_schema",
                "response_format",
            )


def _structured_form(given: StructuredOutputs | None) -> Iterable[Spec]:
    if given is None:
        return
    if given.json_object:
        yield JsonObject()
    if given.json is not None:
        schema = given.json
        if isinstance(schema, str):
            try:
                schema = msgspec.json.decode(schema, type=dict[str, Any])
            except (msgspec.MsgspecError, RecursionError, UnicodeError):
                raise Unfit("structured_outputs: json is no schema", "structured_outputs") from None
        yield JsonSchema(schema)
    if given.regex is not None:
        yield Expression(given.regex)
    if given.choice is not None:
        yield OneOf(tuple(given.choice))
    if given.grammar is not None:
        yield Lark(given.grammar)
