"""What may be asked of a language model beside the prompt, as it comes by the engine's input
``options``: one JSON object, an ``Options``. Front ends write it and a worker reads it.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

MOST_TOKENS: Final = 256
"""Of an answer, where nobody says."""


class JsonObject(msgspec.Struct, frozen=True, tag="json_object"):
    """Any JSON object."""


class JsonSchema(msgspec.Struct, frozen=True, tag="json_schema"):
    """JSON as a schema says."""

    schema: dict[str, Any]


class Expression(msgspec.Struct, frozen=True, tag="regex"):
    """What a regular expression (in Rust's syntax) matches as a whole."""

    pattern: str


class Lark(msgspec.Struct, frozen=True, tag="lark"):
    """What a grammar in Lark's syntax makes of its rule ``start``."""

    grammar: str


class OneOf(msgspec.Struct, frozen=True, tag="choice"):
    """One of several texts."""

    choices: tuple[str, ...]


Spec = JsonObject | JsonSchema | Expression | Lark | OneOf
"""The form of an answer."""


class Options(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """``max_tokens``: so many may be said. What chooses them is that of ``sampler.Sampling``.
    ``stop``: strings that end the answer and are not part of it. ``ignore_eos``: tokens that end
    answers do not end this one. ``grammar``: the form of the answer. ``embed``: no answer is
    wanted, but what the model makes of the prompt. ``salt``: only prompts with the same one share
    what was computed of them."""

    max_tokens: int = MOST_TOKENS
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    grammar: Spec | None = None
    embed: bool = False
    salt: str = ""


class Chosen(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """A token that was said. ``logprob`` and ``top``, (token, logprob) with the likeliest first,
    are the model's own; None and empty where they were not asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Details(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a piece of an answer is beside its text, as it comes by the output ``details``: one JSON
    object, where the request had ``options``. ``cached``: tokens of the prompt that did not have
    to be computed. ``embedding``: the mean of what the last layer makes of the prompt's tokens,
    of length 1."""

    said: tuple[Chosen, ...] = ()
    cached: int = 0
    embedding: tuple[float, ...] = ()
