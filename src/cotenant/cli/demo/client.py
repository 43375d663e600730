"""A chat with a node over OpenAI's API: the conversation, the request, the stream of its answer."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Final, NamedTuple

from cotenant.domain.errors import CotenantError, EnvironmentProblem, TooLarge

SILENCE_S: Final = 120.0
"""Without a byte for so long the node is given up."""
ANSWER_TOKENS: Final = 256
"""The most of an answer."""
_SAMPLING: Final = {"temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.1}
"""What the makers of SmolLM2 advise; and a model so small repeats itself without the last."""

Message = dict[str, str]


class Declined(CotenantError):
    """The node did not answer a question. ``retry_s``: when it may, where it said so."""

    def __init__(self, status: int, message: str, retry_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_s = retry_s

    @property
    def words(self) -> str:
        """For people."""
        if self.status == 429:
            said = f"the node has too much to do now ({self})"
        elif self.status == 503:
            said = f"the model cannot answer now ({self})"
        else:
            return f"the node did not answer: {self}; /help says what else can be done"
        return said + (f"; ask again in {_soon(self.retry_s)}" if self.retry_s else "; ask again")


class Lost(EnvironmentProblem):
    """The connection broke."""


class Piece(NamedTuple):
    """What a stream goes on with. ``tokens``: of the whole answer, once it is over."""

    text: str = ""
    tokens: int | None = None


# --- pure -------------------------------------------------------------------------------------


def events(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The data of server-sent events, in lines as they come (HTML, section 9.2)."""
    data: list[bytes] = []
    for each in lines:
        text = each.rstrip(b"\r\n")
        field, _, value = text.partition(b":")
        if not text:
            if data:
                yield b"\n".join(data)
            data = []
        elif field == b"data":
            data.append(value.removeprefix(b" "))


def pieces(data: Iterable[bytes]) -> Iterator[Piece]:
    """The answer in the events of a chat. Raises Declined, and Lost if it does not end."""
    for event in data:
        if event == b"[DONE]":
            return
        chunk = json.loads(event)
        if "error" in chunk:
            raise Declined(0, str(chunk["error"].get("message")))
        text = "".join(c["delta"].get("content") or "" for c in chunk.get("choices") or ())
        usage = chunk.get("usage")
        if text or usage:
            yield Piece(text, usage["completion_tokens"] if usage else None)
    raise Lost("the answer broke off")


def declined(status: int, headers: Any, body: bytes) -> Declined:
    """What an answer without status 200 says."""
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = body[:200].decode(errors="replace") or f"HTTP status {status}"
    retry = None
    for name, unit in (("Cotenant-Retry-After-Ms", 1000.0), ("Retry-After", 1.0)):
        with contextlib.suppress(ValueError):
            retry = retry or float(headers.get(name) or 0) / unit or None
    return Declined(status, message, retry)


def _soon(seconds: float) -> str:
    return f"{math.ceil(1000 * seconds)} ms" if seconds < 1 else f"{math.ceil(seconds)} s"


class Conversation:
    """What was said so far, oldest first."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def ask(self, question: str) -> None:
        """Add a question."""
        self.messages.append({"role": "user", "content": question})

    def answered(self, answer: str) -> None:
        """The answer to the last question, or what there is of it. One that has none was not
        asked."""
        if answer:
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.messages.pop()

    def fit(self, count: Callable[[list[Message]], tuple[int, int]]) -> int:
        """Drop the oldest questions, with their answers, until there is room for an answer; how
        many tokens it may have.

        ``count``: tokens of messages, and of the model's context. Raises TooLarge where the last
        question alone is too long.
        """
        while True:
            used, context = count(self.messages)
            room = min(ANSWER_TOKENS, context // 2)
            if used + room <= context:
                return room
            if len(self.messages) < 3:
                raise TooLarge(
                    f"that has {used} tokens with what stands around it, and this model takes"
                    f" {context - room}; say it in fewer words"
                )
            del self.messages[:2]


# --- over HTTP --------------------------------------------------------------------------------


class ChatClient:
    """Asks one model of a node on this machine."""

    def __init__(self, port: int, model: str) -> None:
        self._port = port
        self._model = model

    def count(self, messages: list[Message]) -> tuple[int, int]:
        """Tokens of a conversation, and of the model's context. Raises Declined, Lost."""
        with self._post("/tokenize", {"messages": messages}) as answer:
            found = json.loads(answer.read())
        return int(found["count"]), int(found["max_model_len"])

    def answer(self, messages: list[Message], most: int) -> Generator[Piece, None, None]:
        """The answer as it comes, of at most ``most`` tokens; who closes this withdraws it.
        Raises Declined, Lost."""
        asked = {
            "messages": messages,
            "max_tokens": most,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with self._post("/v1/chat/completions", asked | _SAMPLING) as answer:
            yield from pieces(events(answer))

    @contextlib.contextmanager
    def _post(self, path: str, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=SILENCE_S)
        with contextlib.closing(connection):
            try:
                connection.request("POST", path, json.dumps(body | {"model": self._model}))
                with connection.getresponse() as answer:
                    if answer.status != 200:
                        raise declined(answer.status, answer.headers, answer.read())
                    yield answer
            except (OSError, http.client.HTTPException) as error:
                raise Lost(f"the node does not answer: {error or type(error).__name__}") from None
