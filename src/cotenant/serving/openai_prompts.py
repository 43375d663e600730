"""Prompts as clients of OpenAI's API write them, to tokens; and the routes that tell tokens.

What users write in messages may be read as special tokens: a chat template is read so as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from cotenant.domain.errors import TooLarge
from cotenant.domain.port import Language
from cotenant.serving.openai_ask import (
    Completion,
    Conversation,
    Detokenize,
    Function,
    Message,
    Part,
    Tokenize,
    Unfit,
)
from cotenant.serving.openai_images import MOST_IMAGES, Image, opened
from cotenant.serving.openai_settings import MOST_TOOLS, few, most_tokens, within
from cotenant.serving.tensors import shown

MOST_TOKENIZED: Final = 1 << 17
"""Tokens that ``/tokenize`` gives."""
_ROLES: Final = {"developer": "system"}
_KNOWN: Final = frozenset(("system", "user", "assistant", "tool"))
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_RESERVED: Final = frozenset(
    ("messages", "tools", "add_generation_prompt", "most", "pictures", "self")
)
_TEXT_ALONE: Final = "this model reads text alone"

T = TypeVar("T")


class Model(NamedTuple):
    """What prompts are for: a model's name, the most tokens it takes, and its language. ``most``:
    bytes of an answer that is given at once. ``sees``: whether it takes images."""

    name: str
    context: int
    language: Language
    most: int
    sees: bool = False


class Prompt(NamedTuple):
    """Of a conversation: its tokens, and the images that some of them stand for."""

    tokens: list[int]
    images: Sequence[Image] = ()


def tokenize(asked: Tokenize, model: Model) -> bytes:
    """The answer. Raises Unfit."""
    language = model.language
    if (asked.prompt is None) == (asked.messages is None):
        raise Unfit("give either prompt or messages", "prompt")
    if asked.prompt is not None:
        text = asked.prompt
        tokens = _fitting("prompt", lambda: language.encode(text, True, MOST_TOKENIZED))
        if asked.add_special_tokens is False:
            before = language.encode("", True, MOST_TOKENIZED)
            if tokens[: len(before)] == before:
                tokens = tokens[len(before) :]
    else:
        tokens = prompt_of(asked, functions_of(asked), model, MOST_TOKENIZED).tokens
    said = {"tokens": tokens, "count": len(tokens), "max_model_len": model.context}
    if asked.return_token_strs:
        said["token_strs"] = [language.piece(t).decode("utf-8", "replace") for t in tokens]
    return msgspec.json.encode(said)


def detokenize(asked: Detokenize, model: Model) -> bytes:
    """The answer. Raises Unfit."""
    few("tokens", len(asked.tokens), MOST_TOKENIZED)
    _check_tokens("tokens", asked.tokens, model)
    return msgspec.json.encode({"prompt": model.language.decode(asked.tokens)})


def prompts_of(
    name: str, given: str | list[str | int | list[int]], most: int, model: Model
) -> list[list[int]]:
    """The tokens of each prompt."""
    if given and isinstance(given, list) and isinstance(given[0], int):
        given = [given]  # type: ignore[list-item]  # each entry is looked at below
    entries: Sequence[Any] = [given] if isinstance(given, str) else given
    few(name, len(entries), most, "texts")
    if not entries:
        raise Unfit(f"{name} is empty; give at least one text", name)
    found = []
    for entry in entries:
        if isinstance(entry, str):
            tokens = _fitting(name, _encoding(model, entry))
        elif isinstance(entry, list):
            tokens = entry
            most_tokens(1, name, len(tokens), model.context)
            if not all(isinstance(token, int) for token in tokens):
                raise Unfit(f"{name} holds texts beside tokens; give one kind", name)
            _check_tokens(name, tokens, model)
        else:
            raise Unfit(f"{name} holds tokens beside texts; give one kind", name)
        if not tokens:
            raise Unfit(f"{name} is empty; a prompt has at least one token", name)
        found.append(tokens)
    return found


def _encoding(model: Model, text: str) -> Callable[[], list[int]]:
    return lambda: model.language.encode(text, True, model.context)


def _fitting(name: str, encode: Callable[[], T]) -> T:
    """What is too long is said as clients of this API expect it."""
    try:
        return encode()
    except TooLarge as exc:
        raise Unfit(f"{name}: {exc}", name, "context_length_exceeded") from None


def _check_tokens(name: str, tokens: Sequence[int], model: Model) -> None:
    if tokens:
        within(name, min(tokens), 0, model.language.vocabulary - 1)
        within(name, max(tokens), 0, model.language.vocabulary - 1)


def echoes(asked: Completion, prompts: list[list[int]], model: Model) -> list[str]:
    if asked.logprobs is not None:
        raise Unfit("echo with logprobs is not supported; leave out one of them", "echo")
    if isinstance(asked.prompt, str):
        return [asked.prompt]
    texts = asked.prompt if isinstance(asked.prompt[0], str | list) else [asked.prompt]
    return [
        text if isinstance(text, str) else model.language.decode(tokens)
        for text, tokens in zip(texts, prompts, strict=True)
    ]


def prompt_of(
    asked: Conversation, functions: Sequence[Function], model: Model, most: int | None = None
) -> Prompt:
    """Of a conversation. Raises Unfit."""
    names = asked.chat_template_kwargs or {}
    if _RESERVED & names.keys():
        raise Unfit("chat_template_kwargs may not replace what the request has", "messages")
    if not asked.messages:
        raise Unfit("messages is empty; give at least one message", "messages")
    images: list[Image] = []
    messages = [
        _message(message, _Seen(f"messages[{number}]", model, images))
        for number, message in enumerate(asked.messages)
    ]
    room = most or model.context
    wanted = sum(image.picture.tokens for image in images)
    if wanted > room:
        raise Unfit(
            f"messages: the images are {wanted} tokens; at most {room} are allowed here",
            "messages",
            "context_length_exceeded",
        )
    if images:
        names = names | {"pictures": [image.picture for image in images]}
    given = [{"type": "function", "function": msgspec.to_builtins(f)} for f in functions]
    ends = asked.add_generation_prompt is not False
    tokens = _fitting(
        "messages",
        lambda: model.language.prompt(
            messages, given or None, room, add_generation_prompt=ends, **names
        ),
    )
    if not tokens:
        raise Unfit("messages: the model's chat template makes nothing of them", "messages")
    return Prompt(tokens, images)


def _message(message: Message, seen: _Seen) -> Mapping[str, Any]:
    """As chat templates know it."""
    role = _ROLES.get(message.role, message.role)
    if role not in _KNOWN:
        raise Unfit(
            f"messages: {shown(role)} is no role; use system, developer, user, assistant or tool",
            "messages",
        )
    if message.audio is not None or message.function_call is not None:
        raise Unfit("messages: audio and function_call are not supported", "messages")
    if message.content is None and not message.tool_calls:
        raise Unfit("messages: content is missing", "messages")
    found: dict[str, Any] = {"role": role, "content": _content(message, seen)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            found[name] = getattr(message, name)
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id or "",
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments or "{}"),
                },
            }
            for call in message.tool_calls
        ]
    return found


def _content(message: Message, seen: _Seen) -> str | list[dict[str, str]]:
    if not isinstance(message.content, list):
        return message.content or ""
    parts = []
    takes = "this model takes text and image_url" if seen.model.sees else _TEXT_ALONE
    for number, part in enumerate(message.content):
        if part.type == "image_url" and seen.model.sees:
            seen.add(part, f"{seen.where}.content[{number}].image_url")
            parts.append({"type": "image"})
            continue
        if part.type != "text" or part.text is None:
            raise Unfit(
                f"messages: a content part of type {shown(part.type)} is not supported; {takes}",
                "messages",
            )
        parts.append({"type": "text", "text": part.text})
    return parts


class _Seen(NamedTuple):
    """What a message is read for: ``where`` in the request it is, and the ``images`` so far."""

    where: str
    model: Model
    images: list[Image]

    def add(self, part: Part, where: str) -> None:
        """An image. Raises Unfit."""
        few("messages", len(self.images) + 1, MOST_IMAGES, "images")
        self.images.append(opened(part, where, self.model.language))


def _arguments(text: str) -> Any:
    """Templates write arguments themselves; what is no object stays as it is."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return text


def functions_of(asked: Conversation) -> list[Function]:
    few("tools", len(asked.tools or ()), MOST_TOOLS)
    found: dict[str, Function] = {}
    for tool in asked.tools or ():
        function = tool.function
        if tool.type != "function" or function is None:
            raise Unfit(f"tools: type {shown(tool.type)} is not supported; use function", "tools")
        if not _NAME.fullmatch(function.name) or function.name in found:
            raise Unfit(
                f"tools: {shown(function.name)}: a name is of 1 to 64 letters, digits, dots,"
                " dashes and underscores, and given once",
                "tools",
            )
        if function.parameters is None:
            function.parameters = {"type": "object", "properties": {}}
        found[function.name] = function
    return list(found.values())
