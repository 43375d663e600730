"""Answers in the words of OpenAI's API: what a model said so far, as chunks or as a whole."""

from __future__ import annotations

import base64
import codecs
import secrets
import struct
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from cotenant.domain.errors import ModelError, TooLarge
from cotenant.domain.port import InferResult, Language
from cotenant.engines.llm.asking import Chosen, Details
from cotenant.serving.openai_tools import Call, Reader
from cotenant.serving.tensors import split_bytes

LEAST_LOGPROB = -9999.0
"""Said in place of minus infinity, which JSON does not have."""


class Piece(NamedTuple):
    """What a model's answer goes on with; ``size`` in bytes."""

    text: str
    tokens: int
    reason: str
    details: Details
    size: int


def piece_of(result: InferResult) -> Piece:
    """A result of the language engine, which can be released then. Raises ModelError."""
    outputs = {output.name: output.data for output in result.outputs}
    size = sum(data.nbytes for data in outputs.values())
    if not outputs:
        return Piece("", 0, "", Details(), 0)
    try:
        text, reason, details = (
            str(split_bytes(name, outputs[name], 1)[0], "utf-8")
            for name in ("text_output", "finish_reason", "details")
        )
        told = msgspec.json.decode(details, type=Details) if details else Details()
        return Piece(text, outputs["tokens"].nbytes // 8, reason, told, size)
    except (KeyError, ValueError) as exc:
        raise ModelError(f"model {result.model!r} does not answer as language models do") from exc


class Token(NamedTuple):
    """A token that was said; ``top``: what else it might have been, likeliest first. ``offset``:
    where in the answer's text it begins, in characters."""

    text: str
    raw: bytes
    logprob: float
    top: tuple[tuple[str, bytes, float], ...]
    offset: int


class Words:
    """Tells what the tokens of an answer are. Those that are no text, such as the one that ends an
    answer, are left out."""

    def __init__(self, language: Language, offset: int = 0) -> None:
        self._language = language
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = offset

    def read(self, said: Sequence[Chosen]) -> list[Token]:
        """Of one piece after the other."""
        found = []
        for each in said:
            text, raw = self._word(each.token)
            if raw.strip() and not self._language.decode([each.token]):
                continue
            top = tuple((*self._word(token), _finite(logprob)) for token, logprob in each.top)
            found.append(Token(text, raw, _finite(each.logprob), top, self._offset))
            self._offset += len(self._utf8.decode(raw))
        return found

    def _word(self, token: int) -> tuple[str, bytes]:
        raw = self._language.piece(token)
        return raw.decode("utf-8", "replace"), raw


def _finite(logprob: float | None) -> float:
    return LEAST_LOGPROB if logprob is None else max(logprob, LEAST_LOGPROB)


class Said(msgspec.Struct):
    """A part of an answer, or all of it. ``reason``: why it is over, if it is."""

    text: str = ""
    calls: list[Call] = []
    tokens: list[Token] = []
    reason: str = ""


class Choice:
    """One answer as it comes. ``words``: if its tokens are to be told; ``reader``: if it may call
    tools; ``echo``: text that goes before it. ``said``: what was kept of it."""

    def __init__(
        self, words: Words | None = None, reader: Reader | None = None, echo: str = ""
    ) -> None:
        self.said = Said()
        self.begun = False
        self.calls = 0
        self.count = 0
        self.cached = 0
        self._words = words
        self._reader = reader
        self._echo = echo

    def take(self, piece: Piece, over: bool) -> Said:
        """What is new with a piece; ``over``: it is the last one."""
        new = Said(piece.text)
        if self._reader is not None:
            new.text, new.calls = self._reader.feed(piece.text)
            if over:
                rest, more = self._reader.finish()
                new.text, new.calls = new.text + rest, new.calls + more
        if self._words is not None:
            new.tokens = self._words.read(piece.details.said)
        if not self.begun:
            new.text = self._echo + new.text
        self.begun = True
        self.calls += len(new.calls)
        self.count += piece.tokens
        self.cached = max(self.cached, piece.details.cached)
        if over:
            new.reason = piece.reason or "stop"
            if self.calls and new.reason == "stop":
                new.reason = "tool_calls"
        return new

    def keep(self, new: Said) -> None:
        """To tell it all at once."""
        self.said.text += new.text
        self.said.calls += new.calls
        self.said.tokens += new.tokens
        self.said.reason = new.reason


class Answer:
    """What is answered to a request: ``choices`` to each of the prompts in turn, equally many.
    ``prompts``: how many tokens they have. All of it is bounded by ``most`` bytes."""

    prefix = "cmpl-"
    kind = part_kind = "text_completion"

    def __init__(
        self, model: str, prompts: Sequence[int], choices: list[Choice], usage: bool, most: int
    ) -> None:
        self._head = {
            "id": self.prefix + secrets.token_hex(16),
            "created": int(time.time()),
            "model": model,
        }
        self._prompts = prompts
        self._choices = choices
        self._wants_usage = usage
        self._room = most

    def add(self, index: int, piece: Piece, over: bool) -> None:
        """A piece of a choice, for ``whole``. Raises TooLarge."""
        self._room -= piece.size
        if self._room < 0:
            raise TooLarge("the answer is too long to be given at once; ask with stream: true")
        choice = self._choices[index]
        choice.keep(choice.take(piece, over))

    def whole(self) -> bytes:
        """All choices."""
        choices = [
            {"index": index, **self._whole(choice.said), "finish_reason": choice.said.reason}
            for index, choice in enumerate(self._choices)
        ]
        body = self._head | {"object": self.kind, "choices": choices, "usage": self._usage()}
        return msgspec.json.encode(body)

    def chunks(self, index: int, piece: Piece, over: bool) -> list[bytes]:
        """What a stream goes on with."""
        choice = self._choices[index]
        first = not choice.begun
        new = choice.take(piece, over)
        parts = self._parts(new, first, choice.calls - len(new.calls))
        return [
            self._chunk([{"index": index, **part, "finish_reason": reason}])
            for part, reason in parts
        ]

    def last(self) -> list[bytes]:
        """What a stream ends with, if all went well."""
        return [self._chunk([], self._usage())] if self._wants_usage else []

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        body = self._head | {"object": self.part_kind, "choices": choices}
        return msgspec.json.encode(body | {"usage": usage} if self._wants_usage else body)

    def _usage(self) -> dict[str, Any]:
        each = len(self._choices) // max(len(self._prompts), 1)
        prompt = sum(self._prompts)
        said = sum(choice.count for choice in self._choices)
        cached = sum(choice.cached for choice in self._choices[:: each or 1])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": said,
            "total_tokens": prompt + said,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _whole(self, said: Said) -> dict[str, Any]:
        return {"text": said.text, "logprobs": _listed(said.tokens)}

    def _parts(self, new: Said, first: bool, calls: int) -> list[tuple[dict[str, Any], str | None]]:
        """A choice of each chunk, and its reason to be over; ``calls`` came before."""
        del first, calls
        part = self._whole(new)
        return [(part, new.reason or None)] if new.text or new.tokens or new.reason else []


class ChatAnswer(Answer):
    """To a conversation."""

    prefix = "chatcmpl-"
    kind = "chat.completion"
    part_kind = "chat.completion.chunk"

    def _whole(self, said: Said) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if said.calls and not said.text else said.text,
            "refusal": None,
            "annotations": [],
        }
        if said.calls:
            message["tool_calls"] = [_call(call) for call in said.calls]
        return {"message": message, "logprobs": _content(said.tokens)}

    def _parts(self, new: Said, first: bool, calls: int) -> list[tuple[dict[str, Any], str | None]]:
        deltas: list[dict[str, Any]] = []
        if first:
            deltas.append({"role": "assistant", "content": ""})
        if new.text or new.tokens:
            deltas.append({"content": new.text})
        for number, call in enumerate(new.calls, calls):
            begun = {"index": number, **_call(call._replace(arguments=""))}
            rest = {"index": number, "function": {"arguments": call.arguments}}
            deltas += [{"tool_calls": [begun]}, {"tool_calls": [rest]}]
        told = _content(new.tokens)
        parts: list[tuple[dict[str, Any], str | None]] = []
        for delta in deltas:
            here = told if "content" in delta and "role" not in delta else None
            parts.append(({"delta": delta, "logprobs": here}, None))
        if new.reason:
            parts.append(({"delta": {}, "logprobs": None}, new.reason))
        return parts


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _content(tokens: Sequence[Token]) -> dict[str, Any] | None:
    """Log probabilities as chats have them."""
    if not tokens:
        return None

    def one(text: str, raw: bytes, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    content = [
        one(t.text, t.raw, t.logprob) | {"top_logprobs": [one(*each) for each in t.top]}
        for t in tokens
    ]
    return {"content": content, "refusal": None}


def _listed(tokens: Sequence[Token]) -> dict[str, Any] | None:
    """Log probabilities as completions have them."""
    if not tokens:
        return None
    return {
        "tokens": [t.text for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [{text: logprob for text, _, logprob in reversed(t.top)} for t in tokens],
        "text_offset": [t.offset for t in tokens],
    }


class EmbeddingAnswer:
    """What a model makes of each of several texts; ``packed``: as FP32 in Base64."""

    def __init__(self, model: str, prompts: Sequence[int], packed: bool, most: int) -> None:
        self._model = model
        self._prompts = prompts
        self._packed = packed
        self._room = most
        self._found: list[str | tuple[float, ...]] = [()] * len(prompts)

    def add(self, index: int, piece: Piece, over: bool) -> None:
        """The answer to one. Raises ModelError, TooLarge."""
        self._room -= piece.size
        if self._room < 0:
            raise TooLarge("the answer is too long to be given at once; ask for fewer at a time")
        values = piece.details.embedding
        if values:
            packed = base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
            self._found[index] = packed if self._packed else values
        elif over and not self._found[index]:
            raise ModelError(f"model {self._model!r} gave no embedding")

    def whole(self) -> bytes:
        """All of them."""
        count = sum(self._prompts)
        data = [
            {"object": "embedding", "index": index, "embedding": found}
            for index, found in enumerate(self._found)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return msgspec.json.encode(
            {"object": "list", "data": data, "model": self._model, "usage": usage}
        )


# --- errors -----------------------------------------------------------------------------------

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> bytes:
    """An error."""
    kind = _TYPES.get(status, "server_error" if status >= 499 else "invalid_request_error")
    error = {"message": message, "type": kind, "param": param, "code": code}
    return msgspec.json.encode({"error": error})
