"""A node with a language model that says what a test wrote for it."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from cotenant.domain.errors import InvalidRequest, NotFound, TooLarge
from cotenant.domain.port import (
    IndexEntry,
    InferCall,
    InferResult,
    Language,
    ModelMeta,
    OnOutcome,
    Refused,
    TensorMeta,
    TensorOut,
    Withdraw,
)
from cotenant.engines.llm.asking import Chosen, Details, Options
from cotenant.serving.tensors import join_bytes, split_bytes
from tests.contract.fake_node import FakeNode

CONTEXT = 64
END = 256
"""The token that ends an answer; all others are bytes."""


class Bytes:
    """A ``Language`` whose tokens are bytes. A conversation is its roles and contents."""

    def __init__(self) -> None:
        self.template = ""
        self.vocabulary = 257
        self.free = threading.Event()
        self.free.set()
        self.asked: list[tuple[Sequence[Mapping[str, Any]], Any, dict[str, Any]]] = []

    def encode(self, text: str, special: bool, most: int) -> list[int]:
        self.free.wait(20)
        tokens = list(text.encode())
        if len(tokens) > most:
            raise TooLarge(f"the text has {len(tokens)} tokens; at most {most} are allowed here")
        return tokens

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        most: int,
        **names: Any,
    ) -> list[int]:
        self.asked.append((messages, tools, names))
        if messages[0]["role"] == "tool":
            raise InvalidRequest("the model's chat template: a tool does not begin")
        said = (m["content"] if isinstance(m["content"], str) else "|" for m in messages)
        return self.encode("/".join(said), True, most)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t < END).decode("utf-8", "replace")

    def piece(self, token: int) -> bytes:
        return b"<|end|>" if token == END else bytes([token])


class End(NamedTuple):
    """What an answer ends with, if it is not ``stop``."""

    text: str
    reason: str


class SpeakingNode(FakeNode):
    """Beside the others the language model ``says``. Each call says the next of ``scripts``, or
    ``script``: pieces of text, where "" waits for ``gate``, and a refusal ends it. Of a long piece
    only the first tokens are told."""

    def __init__(self) -> None:
        super().__init__()
        self.words = Bytes()
        self.scripts: list[list[str | End | Refused]] = []
        self.cached = 0

    def model_ready(self, name: str, version: str = "") -> bool:
        return name == "says" or super().model_ready(name, version)

    def metadata(self, name: str, version: str = "") -> ModelMeta:
        if name != "says":
            return super().metadata(name, version)
        one = TensorMeta("text_input", "BYTES", (1,))
        return ModelMeta(name, ("1",), "llm", (one,), (one,), pieces=True, context=CONTEXT)

    async def language(self, name: str, version: str = "") -> Language:
        if name != "says":
            raise NotFound(name)
        return self.words

    def index(self) -> list[IndexEntry]:
        return [*super().index(), IndexEntry("says", "1", "READY", "")]

    def submit(self, call: InferCall, done: OnOutcome) -> Withdraw | Refused:
        if call.model != "says" or self.refuse or self.fail:
            return super().submit(call, done)
        self.calls.append(call)
        script = self.scripts.pop(0) if self.scripts else list(self.script)
        task = asyncio.create_task(self._speak(call, script, done))

        def withdraw() -> None:
            task.cancel()
            self.withdrawn.release()

        return withdraw

    async def _speak(self, call: InferCall, script: Sequence[Any], done: OnOutcome) -> None:
        options = options_of(call)
        for number, said in enumerate(script):
            await asyncio.sleep(0)
            if said == "":
                self.waiting.release()
                await self.gate.wait()
                continue
            if isinstance(said, Refused):
                done(said)
                continue
            self.unreleased += 1
            over = number + 1 == len(script)
            outputs = _piece(said, options, over, self.cached)
            done(InferResult(call.model, "1", outputs, self._release, more=not over))


def _piece(said: str | End, options: Options, over: bool, cached: int) -> list[TensorOut]:
    text = said.text if isinstance(said, End) else said
    reason = said.reason if isinstance(said, End) else "stop" * over
    tokens = [*text.encode()[:4096], *([END] if over and reason == "stop" else [])]
    top = tuple((t, -float(t)) for t in range(97, 97 + (options.logprobs or 0)))
    chosen = [Chosen(t, None if options.logprobs is None else -0.5, top) for t in tokens]
    details = Details(
        said=tuple(chosen), cached=cached, embedding=(0.6, 0.8) if options.embed else ()
    )
    packed = memoryview(struct.pack(f"<{len(tokens)}q", *tokens))
    return [
        _strings("text_output", text),
        TensorOut("tokens", "INT64", (len(tokens),), packed),
        _strings("finish_reason", reason),
        _strings("details", msgspec.json.encode(details).decode()),
    ]


def _strings(name: str, text: str) -> TensorOut:
    return TensorOut(name, "BYTES", (1,), memoryview(join_bytes([text.encode()])))


def options_of(call: InferCall) -> Options:
    """What a call asks for beside its prompt."""
    (written,) = split_bytes("options", memoryview(bytes(call.inputs[2].data or b"")), 1)
    return msgspec.json.decode(written, type=Options)


def prompt_of(call: InferCall) -> list[int]:
    """The tokens of a call's prompt."""
    data = bytes(call.inputs[1].data or b"")
    return list(struct.unpack(f"<{len(data) // 8}q", data))


def tool(name: str = "weather", **parameters: Any) -> dict[str, Any]:
    """A tool as requests have it."""
    schema = {"type": "object", "properties": parameters}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def call_text(name: str = "weather", **arguments: Any) -> str:
    """A call as models of Hermes' form write it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
