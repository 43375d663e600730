"""OpenAI's API over the node: ``/v1/...``, ``/tokenize`` and ``/detokenize``.

A request becomes one call to the node for each answer to each prompt, some of them at a time. They
stand together: what goes wrong with one ends all, and so does the client when it hangs up. Prompts
are made in threads of their own, few, and few may wait for one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from cotenant.domain.errors import CotenantError, NotFound, NotReady, TooLarge
from cotenant.domain.port import NodePort, Refused
from cotenant.domain.request import Refusal
from cotenant.domain.units import MS
from cotenant.engines.llm.contract import TILES
from cotenant.serving import openai_calls, openai_prompts
from cotenant.serving.bodies import (
    JSON_TYPE,
    STOPPING,
    Answer,
    BodyReader,
    Hangup,
    HangupWatch,
    Head,
    Header,
    Receive,
    Scope,
    Send,
    SlowBody,
    answer_unread,
    parse_head,
    respond,
)
from cotenant.serving.calls import together
from cotenant.serving.intake import BodyRefused, Intake, authorised
from cotenant.serving.long_lists import PIECE_BYTES
from cotenant.serving.openai_ask import (
    Chat,
    Completion,
    Detokenize,
    Embedding,
    Tokenize,
    Unfit,
    parse,
)
from cotenant.serving.openai_calls import Plan
from cotenant.serving.openai_prompts import Model
from cotenant.serving.openai_say import Answer as Said
from cotenant.serving.openai_say import Piece, error_body, piece_of
from cotenant.serving.refusals import HTTP_STATUS, as_refused, error_status, refusal_headers
from cotenant.serving.rest_generate import Events

log = logging.getLogger("cotenant.serving")

MOST_AT_ONCE: Final = 16
"""Calls of one request that the node has at a time."""
MOST_WAITING: Final = 64
"""Prompts that are made or wait for it."""
_WRITING: Final = ThreadPoolExecutor(2, "cotenant-prompts")
_BUSY: Final = Refused(Refusal.QUEUE_FULL, 100 * MS, "too many prompts wait to be tokenized")

T = TypeVar("T")


class _Route(NamedTuple):
    """What a POST asks for, and what is made of it."""

    kind: type[Any]
    make: Callable[[Any, Model], Plan | bytes]


_POSTS: Final = {
    "/v1/completions": _Route(Completion, openai_calls.completion),
    "/v1/chat/completions": _Route(Chat, openai_calls.chat),
    "/v1/embeddings": _Route(Embedding, openai_calls.embedding),
    "/tokenize": _Route(Tokenize, openai_prompts.tokenize),
    "/detokenize": _Route(Detokenize, openai_prompts.detokenize),
}
_MODELS: Final = "/v1/models"


def is_openai(path: str) -> bool:
    """Whether a path is answered here."""
    return path.startswith("/v1/") or path in ("/v1", "/tokenize", "/detokenize")


class OpenAI:
    """An ASGI application for the paths of ``is_openai``."""

    def __init__(
        self, node: NodePort, intake: Intake, bodies: BodyReader, token: bytes | None
    ) -> None:
        self._node = node
        self._bodies = bodies
        self._budget = intake.budget
        self._limits = intake.limits
        self._token = token
        self._since = int(time.time())
        self._waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head, path = parse_head(scope["headers"]), scope["path"]
        refused = self._refused(scope, head)
        if refused is not None:
            await answer_unread(send, receive, refused)
        elif path in _POSTS:
            await self._post(_POSTS[path], head, receive, send)
        else:
            try:
                body = self._models(path)
            except Exception as exc:
                await respond(send, *failure(exc))
            else:
                await respond(send, 200, body)

    def _refused(self, scope: Scope, head: Head) -> Answer | None:
        """What is refused before its body is looked at."""
        path, method = scope["path"], scope["method"]
        if self._token is not None and not authorised(head.authorization, self._token):
            said = "this node needs a token; send it as the API key (Authorization: Bearer TOKEN)"
            return _error(401, said, code="invalid_api_key", headers=_BEARER)
        if path in _POSTS:
            wanted = "POST"
        elif path == _MODELS or path.startswith(_MODELS + "/"):
            wanted = "GET"
        else:
            return _error(
                404, f"there is no {path[:64]} here; see docs/openai.md", code="not_found"
            )
        if method != wanted:
            allow = (b"allow", wanted.encode())
            return _error(405, f"{path[:64]} needs the method {wanted}", headers=(allow,))
        if method == "POST" and scope["http_version"] == "1.0":
            return _error(505, "this needs HTTP/1.1")
        return None

    # models

    def _models(self, path: str) -> bytes:
        if path == _MODELS:
            names = {entry.name: None for entry in self._node.index() if entry.state == "READY"}
            found = [card for name in names if (card := self._card(name)) is not None]
            return msgspec.json.encode({"object": "list", "data": found})
        name = path[len(_MODELS) + 1 :]
        return msgspec.json.encode(self._card_of(name, self._context(name)))

    def _card(self, name: str) -> dict[str, Any] | None:
        """Of a model in the index; None if it is no language model, or gone by now."""
        try:
            context = self._node.metadata(name).context
        except (NotFound, NotReady):
            return None
        return self._card_of(name, context) if context else None

    def _card_of(self, name: str, context: int) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._since,
            "owned_by": "cotenant",
            "max_model_len": context,
        }

    def _context(self, name: str) -> int:
        """The most tokens of a language model. Raises Unfit, NotFound, NotReady."""
        context = self._node.metadata(name).context
        if not context:
            raise Unfit(
                f"model {name!r} is no language model; ask it at /v2/models/{name}/infer", "model"
            )
        return context

    def _sees(self, name: str) -> bool:
        """Whether a model's engine takes images. Raises NotFound, NotReady."""
        return any(tensor.name == TILES for tensor in self._node.metadata(name).inputs)

    # requests

    async def _post(self, route: _Route, head: Head, receive: Receive, send: Send) -> None:
        try:
            found = await self._read(head, receive, send)
            if found is not None:
                await self._answer(route, *found, receive, send)
        except Hangup:
            log.debug("the client of an OpenAI request went away")

    async def _read(self, head: Head, receive: Receive, send: Send) -> tuple[bytes, int] | None:
        """A body, and what is to be given back to the budget; None if it was refused. Raises
        Hangup."""
        most = min(self._limits.json_bytes, self._limits.body_bytes)
        try:
            return await self._bodies.read(receive, head, most)
        except asyncio.CancelledError:  # only the HTTP server's stop cancels a request
            await respond(send, *refusal(STOPPING))
            return None
        except SlowBody:
            said = f"the body did not arrive within {self._limits.body_timeout_s:g} s"
            refused = _error(408, said)
        except BodyRefused as exc:
            refused = refusal(exc.refused)
        except TooLarge:
            refused = _error(413, f"the body is larger than {most} bytes")
        except CotenantError as exc:
            refused = failure(exc)
        await answer_unread(send, receive, refused)
        return None

    async def _answer(
        self, route: _Route, body: bytes, held: int, receive: Receive, send: Send
    ) -> None:
        """Answer when all is there, or with an event for each chunk. What goes wrong before the
        first of them is answered with a status, and later as an event."""
        events = Events(send)
        answer: Answer | None = None
        try:
            async with HangupWatch(receive):
                try:
                    made = await self._make(route, body)
                finally:
                    self._budget.release(held)
                del body
                if isinstance(made, Plan) and made.stream:
                    await self._stream(made, events)
                else:
                    whole = made if isinstance(made, bytes) else await self._whole(made)
                    answer = 200, whole, (JSON_TYPE,)
        except Hangup:
            raise
        except asyncio.CancelledError:
            answer = refusal(STOPPING)
        except Exception as exc:
            answer = failure(exc)
        await events.end(answer)

    async def _make(self, route: _Route, body: bytes) -> Plan | bytes:
        """Understand a request. Raises as ``failure`` says."""
        if len(body) > PIECE_BYTES:
            asked = await self._written(parse, body, route.kind)
        else:
            asked = parse(body, route.kind)
        context = self._context(asked.model)
        language = await self._node.language(asked.model)
        sees = self._sees(asked.model) and language.sees
        model = Model(asked.model, context, language, self._limits.json_bytes, sees)
        try:
            return await self._written(route.make, asked, model)
        except RecursionError:
            raise Unfit("what the request holds is nested too deeply") from None

    async def _written(self, work: Callable[..., T], *args: Any) -> T:
        """Do it in a thread. Raises _Refusal."""
        if self._waiting >= MOST_WAITING:
            raise _Refusal(_BUSY)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(_WRITING, work, *args)
        finally:
            self._waiting -= 1

    async def _whole(self, plan: Plan) -> bytes:
        async with aclosing(self._pieces(plan)) as pieces:
            async for index, piece, over in pieces:
                plan.answer.add(index, piece, over)
        return plan.answer.whole()

    async def _stream(self, plan: Plan, events: Events) -> None:
        said = plan.answer
        assert isinstance(said, Said)
        async with aclosing(self._pieces(plan)) as pieces:
            async for index, piece, over in pieces:
                for chunk in said.chunks(index, piece, over):
                    await events.say(chunk)
        for chunk in (*said.last(), b"[DONE]"):
            await events.say(chunk)

    async def _pieces(self, plan: Plan) -> AsyncGenerator[tuple[int, Piece, bool]]:
        """Which of the calls says what, and whether that is its last. Raises _Refusal."""
        async with aclosing(together(self._node, plan.calls, MOST_AT_ONCE)) as outcomes:
            async for index, outcome in outcomes:
                if isinstance(outcome, Refused):
                    raise _Refusal(outcome)
                try:
                    piece = piece_of(outcome)
                finally:
                    outcome.release()
                yield index, piece, not outcome.more


# --- what goes wrong --------------------------------------------------------------------------

_BEARER: Final = ((b"www-authenticate", b"Bearer"),)


class _Refusal(Exception):
    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.message)
        self.refused = refused


def _error(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Sequence[Header] = (),
) -> Answer:
    return status, error_body(status, message, param, code), (JSON_TYPE, *headers)


def refusal(refused: Refused) -> Answer:
    """What to answer with an expected refusal; its code is its reason."""
    status = HTTP_STATUS[refused.refusal]
    code = "rate_limit_exceeded" if status == 429 else refused.refusal.name.lower()
    return _error(status, refused.message, code=code, headers=refusal_headers(refused))


def failure(exc: Exception) -> Answer:
    """What to answer where this was raised."""
    refused = exc.refused if isinstance(exc, _Refusal) else as_refused(exc)
    if refused is not None:
        return refusal(refused)
    if isinstance(exc, Unfit):
        return _error(400, str(exc), exc.param, exc.code)
    if isinstance(exc, NotFound):
        return _error(404, str(exc), "model", "model_not_found")
    if isinstance(exc, CotenantError):
        return _error(error_status(exc), str(exc))
    log.error("an OpenAI request failed inside the server", exc_info=exc)
    return _error(500, "the server failed; its log says how")
