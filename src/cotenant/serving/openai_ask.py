"""What clients of OpenAI's API may ask, as types.

A field that is not named here is ignored. One that would change an answer and is not supported is
refused, unless it says what happens anyway (``_NEUTRAL``).
"""

from __future__ import annotations

import re
from typing import Any, Final, TypeVar

import msgspec

from cotenant.domain.errors import InvalidRequest

T = TypeVar("T")


class Unfit(InvalidRequest):
    """A request does not fit. ``param``: the field that does not; ``code``: a word for programs."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


# --- types ------------------------------------------------------------------------------------


class StreamOptions(msgspec.Struct):
    """``include_usage``: a last chunk tells how many tokens there were."""

    include_usage: bool | None = None


class SchemaFormat(msgspec.Struct):
    """Of a ``response_format``."""

    name: str | None = None
    schema: dict[str, Any] | None = None


class ResponseFormat(msgspec.Struct):
    """``type`` is text, json_object or json_schema."""

    type: str
    json_schema: SchemaFormat | None = None


class StructuredOutputs(msgspec.Struct):
    """One of these; vLLM's field."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Unsupported(msgspec.Struct, kw_only=True):
    """What is refused, but for its ``_NEUTRAL`` values."""

    allowed_token_ids: Any = None
    audio: Any = None
    bad_words: Any = None
    chat_template: Any = None
    continue_final_message: Any = None
    documents: Any = None
    function_call: Any = None
    functions: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    include_stop_str_in_output: Any = None
    min_tokens: Any = None
    modalities: Any = None
    prompt_logprobs: Any = None
    skip_special_tokens: Any = None
    stop_token_ids: Any = None
    suffix: Any = None
    truncate_prompt_tokens: Any = None
    use_beam_search: Any = None
    web_search_options: Any = None


_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "bad_words": ([],),
    "continue_final_message": (False,),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "suffix": ("",),
    "use_beam_search": (False,),
}
_INSTEAD: Final = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "guided_choice": "use structured_outputs",
    "guided_grammar": "use structured_outputs",
    "guided_json": "use response_format or structured_outputs",
    "guided_regex": "use structured_outputs",
}


class Asked(Unsupported, kw_only=True):
    """What completions and chats have in common."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    best_of: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    cache_salt: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None


class Completion(Asked, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None


class ImageUrl(msgspec.Struct):
    """Where an image is: a data URL."""

    url: str


class Part(msgspec.Struct):
    """Of a message's content."""

    type: str
    text: str | None = None
    image_url: ImageUrl | None = None


class CalledFunction(msgspec.Struct):
    """``arguments`` is JSON, as text."""

    name: str
    arguments: str | None = None


class ToolCall(msgspec.Struct):
    """That a model called a tool."""

    function: CalledFunction
    id: str | None = None
    type: str | None = None


class Message(msgspec.Struct):
    """Of a conversation."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    audio: Any = None
    function_call: Any = None


class Function(msgspec.Struct, omit_defaults=True):
    """What a tool is called with."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct):
    """``type`` is function."""

    type: str
    function: Function | None = None


class Named(msgspec.Struct):
    """A tool by its name."""

    name: str


class NamedTool(msgspec.Struct):
    """The tool to call."""

    type: str
    function: Named | None = None


class Chat(Asked, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: list[Message]
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    echo: bool | None = None
    tool_choice: str | NamedTool | None = None
    parallel_tool_calls: bool | None = None


class Embedding(msgspec.Struct, kw_only=True):
    """``POST /v1/embeddings``."""

    model: str
    input: str | list[str | int | list[int]]
    encoding_format: str | None = None
    dimensions: int | None = None
    truncate_prompt_tokens: Any = None


class Tokenize(msgspec.Struct, kw_only=True):
    """``POST /tokenize``: of ``prompt`` or of ``messages``."""

    model: str
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


Conversation = Chat | Tokenize
"""What a chat template makes a prompt of."""


class Detokenize(msgspec.Struct, kw_only=True):
    """``POST /detokenize``."""

    model: str
    tokens: list[int]


_PATH = re.compile(r" - at `\$\.(.+?)`")


def parse(body: bytes, kind: type[T]) -> T:
    """A request. Raises Unfit."""
    try:
        asked = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as exc:
        found = _PATH.search(str(exc)) or re.search(r"required field `(.+?)`", str(exc))
        raise Unfit(str(exc), found and found[1]) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise Unfit(f"the body is not valid JSON: {exc}") from None
    except RecursionError:
        raise Unfit("the body's JSON is nested too deeply") from None
    if isinstance(asked, Unsupported):
        _check(asked)
    return asked


def _check(asked: Unsupported) -> None:
    for name in Unsupported.__struct_fields__:
        value = getattr(asked, name)
        if value is not None and value not in _NEUTRAL.get(name, ()):
            why = _INSTEAD.get(name, "leave it out")
            raise Unfit(f"{name} is not supported; {why}", name, "unsupported_parameter")
    if isinstance(asked, Asked):
        if asked.best_of not in (None, asked.n or 1):
            raise Unfit("best_of is supported only where it is n", "best_of")
        if isinstance(asked, Chat) and asked.echo:
            raise Unfit("echo is not supported in chats; leave it out", "echo")
