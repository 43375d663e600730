"""A model's language without the model: its tokenizer and its chat template. Front ends write
prompts with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cotenant.domain.errors import ModelError
from cotenant.engines.llm.chat import Chat
from cotenant.engines.llm.checkpoint import Checkpoint, GgufCheckpoint
from cotenant.engines.llm.gguf import Gguf
from cotenant.engines.llm.text import Text


def text_of(checkpoint: Checkpoint, path: Path) -> Text:
    """The tokenizer of an open checkpoint. Raises ModelError, also where it has more tokens than
    the model."""
    if isinstance(checkpoint, GgufCheckpoint):
        text = Text.from_gguf(checkpoint.file.keys)
    else:
        text = Text.from_folder(path.parent)
    known = checkpoint.decoder.vocab
    if text.vocabulary > known:
        raise ModelError(f"the tokenizer has {text.vocabulary} tokens, the model {known}")
    return text


class LlmLanguage:
    """A ``domain.port.Language``, of the model at ``path``. Its methods can be called from any
    thread. Raises ModelError."""

    def __init__(self, path: Path) -> None:
        if path.suffix == ".gguf":
            self._text = Text.from_gguf(Gguf(path).keys)
        else:
            self._text = Text.from_folder(path.parent)
        text = self._text
        named = [_named(text, text.begin), _named(text, text.end)]
        self._chat = Chat(text.template, *named)

    @property
    def vocabulary(self) -> int:
        return self._text.vocabulary

    @property
    def template(self) -> str:
        return self._text.template

    def encode(self, text: str, special: bool, most: int) -> list[int]:
        return self._text.encode(text, special=special, most=most)

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        most: int,
        **names: Any,
    ) -> list[int]:
        return self._text.encode(
            self._chat.render(messages, tools, **names), special=True, begin=False, most=most
        )

    def decode(self, tokens: Sequence[int]) -> str:
        return self._text.decode(tokens)

    def piece(self, token: int) -> bytes:
        return self._text.piece(token)


def _named(text: Text, token: int | None) -> str:
    return "" if token is None else text.piece(token).decode("utf-8", "replace")
