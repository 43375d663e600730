"""Structured output: which tokens may come next, so that an answer is of a form.

The work is llguidance's (https://github.com/guidance-ai/llguidance). Forms come from clients. So
they are small, shallow and compiled within ``LIMITS``; what is beyond is refused.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from cotenant.domain.errors import InvalidRequest, ModelError
from cotenant.engines.llm.asking import Expression, JsonObject, JsonSchema, Lark, OneOf, Spec
from cotenant.engines.llm.forms import check_form, name_of, schema_text
from cotenant.engines.llm.text import Text

LIMITS: Final = LLParserLimits(
    max_items_in_row=1000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=25_000,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
"""About 20 ms to begin with and 10 ms a token, by what llguidance says of its speed."""


class Grammar:
    """Where an answer stands in its form."""

    def __init__(self, matcher: LLMatcher, vocabulary: int, ends: frozenset[int]) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._ends = ends
        self._over = False

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens of the vocabulary may be next; those that end an answer if it may end here.
        Raises InvalidRequest if that takes more than ``LIMITS``; the answer must end then."""
        if self.finished:
            only = np.zeros(self._vocabulary, np.bool_)
            only[list(self._ends)] = True
            return only
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(mask, count=self._vocabulary, bitorder="little").astype(np.bool_)

    def advance(self, token: int) -> None:
        """A token was said. Raises ValueError, and stays where it is, if it may not be, and
        InvalidRequest as ``allowed`` does."""
        if token in self._ends and self._matcher.is_accepting():
            self._over = True
            return
        known = 0 <= token < self._vocabulary and not self.finished
        if not known or not self._matcher.validate_tokens([token]):
            self._check()
            raise ValueError(f"token {token} is not allowed here")
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InvalidRequest(f"the grammar is too complex: {self._matcher.get_error()}")

    def copy(self) -> Grammar:
        """Another one that stands at the same place."""
        other = Grammar(self._matcher.deep_copy(), self._vocabulary, self._ends)
        other._over = self._over
        return other

    @property
    def finished(self) -> bool:
        """Whether nothing may come but the end, or it has come."""
        self._check()
        return self._over or self._matcher.is_stopped()


class Grammars:
    """Makes grammars for the tokens of one model. Raises ModelError if none of them is an end."""

    def __init__(self, text: Text) -> None:
        if not text.ends:
            raise ModelError("the model has no token that ends an answer; eos_token_id must be set")
        self._vocabulary, self._ends = text.vocabulary, text.ends
        wrapper = TokenizerWrapper(_Words(text))
        self._tokenizer = LLTokenizer(wrapper, eos_token=sorted(text.ends))

    def compile(self, spec: Spec) -> Grammar:
        """A grammar at its beginning. Raises InvalidRequest for what is none or allows nothing,
        TooLarge for what is beyond a limit."""
        try:
            source = _source(spec)
            matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=LIMITS)
        except ValueError as error:
            raise InvalidRequest(f"{name_of(spec)}: {error}") from error
        if matcher.is_error():
            raise InvalidRequest(f"{name_of(spec)}: {matcher.get_error()}")
        grammar = Grammar(matcher, self._vocabulary, self._ends)
        if not grammar.allowed().any():
            raise InvalidRequest(f"{name_of(spec)}: no text is of this form")
        return grammar


class _Words:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self.eos_token_id = min(text.ends)
        self.bos_token_id = text.begin
        self.special_token_ids = sorted(text.special | text.ends)
        self.tokens = [text.piece(token) for token in range(text.vocabulary)]
        self._bytes = {each[0]: i for i, each in enumerate(self.tokens) if len(each) == 1}

    def __call__(self, said: bytes | str) -> list[int]:
        """The tokens of something in the middle of a text. A tokenizer that begins each text with
        a space puts it before the mark, with which no other character is joined."""
        text = said.decode("utf-8", "replace") if isinstance(said, bytes) else said
        whole = text.encode()
        tokens = self._text.encode("\x02" + text, special=False, begin=False)
        rest = b"".join(self.tokens[token] for token in tokens)
        for at, token in enumerate(tokens):
            if rest == whole:
                return tokens[at:]
            rest = rest[len(self.tokens[token]) :]
        return [self._bytes[byte] for byte in whole if byte in self._bytes]


def _source(spec: Spec) -> str:
    """In llguidance's own form, once it is seen to be small enough."""
    check_form(spec)
    match spec:
        case JsonObject():
            return LLMatcher.grammar_from_json_schema({"type": "object"})
        case JsonSchema():
            return LLMatcher.grammar_from_json_schema(schema_text(spec))
        case Expression(pattern):
            return LLMatcher.grammar_from_regex(pattern)
        case Lark(grammar):
            return LLMatcher.grammar_from_lark(grammar)
        case OneOf(choices):
            return LLMatcher.grammar_from_regex("|".join(map(_quoted, choices)))


def _quoted(text: str) -> str:
    """An expression for just this text."""
    return "".join(
        each if each.isascii() and each.isalnum() else f"\\x{{{ord(each):x}}}" for each in text
    )
