"""A model's language without the model: its tokenizer and its chat template. Front ends write
prompts with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cotenant.domain.errors import InvalidRequest, ModelError
from cotenant.domain.port import Picture
from cotenant.engines.llm.chat import Chat
from cotenant.engines.llm.checkpoint import Checkpoint, GgufCheckpoint, vision_of
from cotenant.engines.llm.gguf import Gguf
from cotenant.engines.llm.text import Text
from cotenant.engines.llm.vision import Vision


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
        self._images: _Images | None = None
        if path.suffix == ".gguf":
            self._text = Text.from_gguf(Gguf(path).keys)
        else:
            self._text = Text.from_folder(path.parent)
            vision = vision_of(path.parent)
            if vision is not None:
                self._images = _Images(path.parent, vision, self._text)
        text = self._text
        named = [_named(text, text.begin), _named(text, text.end)]
        self._chat = Chat(text.template, *named)

    @property
    def vocabulary(self) -> int:
        return self._text.vocabulary

    @property
    def template(self) -> str:
        return self._text.template

    @property
    def sees(self) -> bool:
        return self._images is not None

    def picture(self, data: bytes) -> Picture:
        if self._images is None:
            raise InvalidRequest("this model reads text alone")
        return self._images.opened(data)

    def encode(self, text: str, special: bool, most: int) -> list[int]:
        return self._text.encode(text, special=special, most=most)

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        most: int,
        pictures: Sequence[Picture] = (),
        **names: Any,
    ) -> list[int]:
        images, chat = self._images, self._chat
        if images is not None and chat.lists:
            messages = [_in_parts(message) for message in messages]
        text = chat.render(messages, tools, **names)
        if images is not None:
            text = images.expanded(text, pictures)
        tokens = self._text.encode(text, special=True, begin=False, most=most)
        if images is not None:
            images.check(tokens, pictures)
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        return self._text.decode(tokens)

    def piece(self, token: int) -> bytes:
        return self._text.piece(token)


def _named(text: Text, token: int | None) -> str:
    return "" if token is None else text.piece(token).decode("utf-8", "replace")


def _in_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Templates of models that see look for parts, also where there is only text."""
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


class _Images:
    """How a model is told of images."""

    def __init__(self, folder: Path, vision: Vision, text: Text) -> None:
        from cotenant.engines.llm import pictures  # Pillow, which models of text do not need

        self._module = pictures
        self._vision = vision
        self._cutting = pictures.read_cutting(folder, vision)
        self._token = text.piece(vision.token).decode("utf-8", "replace")
        if not self._token:
            raise ModelError(f"image_token_id {vision.token} is no token of the tokenizer")

    def opened(self, data: bytes) -> Picture:
        return self._module.Opened(data, self._cutting, self._vision)

    def expanded(self, text: str, pictures: Sequence[Picture]) -> str:
        """A prompt with what stands for each image in the place of one image token."""
        parts = text.split(self._token)
        if len(parts) != len(pictures) + 1:
            raise InvalidRequest(
                f"the prompt has {self._token} {len(parts) - 1} times for {len(pictures)} images;"
                " do not write it into messages"
            )
        found = parts[:1]
        for picture, part in zip(pictures, parts[1:], strict=True):
            assert isinstance(picture, self._module.Opened)
            found += [self._module.layout(picture.grid, self._token, self._vision.rows), part]
        return "".join(found)

    def check(self, tokens: Sequence[int], pictures: Sequence[Picture]) -> None:
        wanted = sum(picture.tokens for picture in pictures)
        if tokens.count(self._vision.token) != wanted:
            raise InvalidRequest(
                f"the tokenizer makes {tokens.count(self._vision.token)} image tokens of {wanted}"
            )
