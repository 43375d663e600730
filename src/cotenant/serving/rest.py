"""The REST front end: the inference routes by themselves, Starlette for the rest.

The inference route carries the load, so it pays for no framework: what arrives in one piece is
answered by callbacks (``App.whole``), the rest as raw ASGI. It answers exactly once, releases
the node's result once its bytes are copied out, and withdraws the request if the client hangs
up while it waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from functools import lru_cache

import msgspec

from cotenant.domain.errors import CotenantError, TooLarge
from cotenant.domain.port import DATATYPES, InferCall, NodePort, Outcome, Refused
from cotenant.serving import generate, oip
from cotenant.serving.bodies import (
    JSON_TYPE,
    STOPPING,
    WHOLE_ANSWER,
    Answer,
    BodyReader,
    Exchange,
    Hangup,
    HangupWatch,
    Head,
    Header,
    Receive,
    Scope,
    Send,
    SlowBody,
    WholeAnswer,
    failure_answer,
    parse_head,
    refusal_answer,
    respond,
    respond_unread,
)
from cotenant.serving.calls import VARIANT, infer
from cotenant.serving.intake import BodyRefused, Intake, authorised
from cotenant.serving.long_lists import PIECE_BYTES
from cotenant.serving.overdue import Overdue
from cotenant.serving.refusals import HTTP_STATUS, as_refused, error_status, refusal_headers
from cotenant.serving.rest_admin import build_admin
from cotenant.serving.rest_generate import Generation
from cotenant.serving.rest_openai import OpenAI, is_openai
from cotenant.serving.tensors import Limits
from cotenant.serving.web.app import Web

log = logging.getLogger("cotenant.serving")

JSON_AT_ONCE = PIECE_BYTES
"""JSON decoded on the loop; more is decoded in a thread."""
JSON_SMALL = 4096
"""JSON in which there are too few elements to look at the model's shapes first."""
JSON_BESIDE_BYTES = 512 * 1024
JSON_ELEMENT_BYTES = 64
"""What JSON may take beside its tensors' elements, and for each of those, with all the blanks
around it; a request whose JSON is longer than so the model's inputs call for is refused."""

_PREFIX = "/v2/models/"
_SUFFIX = "/infer"
_OPEN_PATHS = frozenset({"/health", "/v2/health/live", "/v2/health/ready"})
_BINARY_TYPE = (b"content-type", b"application/octet-stream")

# A hang-up is looked for only once a request has waited this long. Starting a task for each
# request costs more than the answer to most of them; withdrawing younger ones gains nothing.
_HANGUP_DELAY_S = 0.05


class App:
    """The ASGI application. Build it with ``build_app``."""

    def __init__(
        self,
        node: NodePort,
        intake: Intake,
        token: str | None,
        open_metrics: bool = False,
        web: Web | None = None,
    ) -> None:
        self._node = node
        self._limits = intake.limits
        self._budget = intake.budget
        self._regions = intake.regions
        self._token = token.encode() if token else None
        self._open_paths = _OPEN_PATHS | {"/metrics"} if open_metrics else _OPEN_PATHS
        self._bodies = BodyReader(intake.limits, intake.budget)
        self._waiting = Overdue(_HANGUP_DELAY_S)
        self._web = web
        self._admin = build_admin(node, intake, self._bodies, web.routes() if web else ())
        self._openai = OpenAI(node, intake, self._bodies, self._token)
        generation = Generation(node, intake.limits)
        self._generation = {"/generate": generation.at_once, "/generate_stream": generation.stream}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._admin(scope, receive, send)
            return
        path: str = scope["path"]
        if is_openai(path):
            await self._openai(scope, receive, send)
            return
        head = parse_head(scope["headers"])
        if (
            self._token is not None
            and path not in self._open_paths
            and not (self._web is not None and self._web.owns(path))
            and not authorised(head.authorization, self._token)
        ):
            await respond_unread(
                send,
                receive,
                401,
                "this node needs a token; send the header Authorization: Bearer TOKEN",
                [(b"www-authenticate", b"Bearer")],
            )
            return
        if scope["method"] == "POST":
            target = _target(path)
            if target is not None:
                await self._infer(head, target, receive, send, scope["extensions"][WHOLE_ANSWER])
                return
            for suffix, answer in self._generation.items():
                target = _target(path, suffix)
                if target is not None and scope["http_version"] == "1.0":
                    await respond_unread(send, receive, 505, "this needs HTTP/1.1")
                    return
                if target is not None:
                    await self._generate(head, target, receive, send, answer)
                    return
        try:
            await self._admin(scope, receive, send)
        except Exception:  # answered with 500 by now; Starlette passes it on to be logged
            log.exception("%s %s failed inside the server", scope["method"], path)

    async def _infer(
        self, head: Head, target: tuple[str, str], receive: Receive, send: Send, whole: WholeAnswer
    ) -> None:
        """Receive, decode, execute, answer: one inference request."""
        found = await self._read(head, target, receive, send)
        if found is None:
            return
        body, held = found
        try:
            status, answer, headers = await self._answer(body, head, target, receive)
            if not whole(status, answer, headers):
                await respond(send, status, answer, headers)
        except Hangup:
            log.debug("the client of a request for %s went away", target[0])
        finally:
            self._budget.release(held)

    async def _generate(
        self,
        head: Head,
        target: tuple[str, str],
        receive: Receive,
        send: Send,
        answer: Callable[[InferCall, Receive, Send], Awaitable[None]],
    ) -> None:
        """Receive and decode a request to the generate extension, and have it answered."""
        found = await self._read(head, target, receive, send)
        if found is None:
            return
        body, held = found
        try:
            meta, limits = self._node.metadata(*target), self._limits_of(target, len(body))
            asked = body, meta, target[1], limits
            if len(body) > JSON_AT_ONCE:
                call = await asyncio.to_thread(generate.decode, *asked)
            else:
                call = generate.decode(*asked)
        except Exception as exc:
            await respond(send, *failure_answer(exc, target[0]))
            return
        finally:
            self._budget.release(held)
        try:
            await answer(call, receive, send)
        except Hangup:
            log.debug("the client of a request for %s went away", target[0])

    async def _read(
        self, head: Head, target: tuple[str, str], receive: Receive, send: Send
    ) -> tuple[bytes, int] | None:
        """A body, and what is to be given back to the budget; None if it was refused."""
        try:
            return await self._bodies.read(receive, head, self._body_room(head, target))
        except Hangup:
            pass
        except asyncio.CancelledError:
            # Only the HTTP server's stop cancels a request.
            await respond(send, *refusal_answer(STOPPING))
        except SlowBody:
            seconds = self._limits.body_timeout_s
            await respond_unread(
                send, receive, 408, f"the body did not arrive within {seconds:g} s; send it faster"
            )
        except BodyRefused as exc:
            await self._refuse_unread(send, receive, exc.refused)
        except CotenantError as exc:
            refused = as_refused(exc)
            if refused is not None:
                await self._refuse_unread(send, receive, refused)
            else:
                await respond_unread(send, receive, error_status(exc), str(exc))
        return None

    @staticmethod
    async def _refuse_unread(send: Send, receive: Receive, refused: Refused) -> None:
        status = HTTP_STATUS[refused.refusal]
        await respond_unread(send, receive, status, refused.message, refusal_headers(refused))

    async def _answer(
        self, body: bytes, head: Head, target: tuple[str, str], receive: Receive
    ) -> Answer:
        """What to answer; raises Hangup if there is nobody to answer."""
        try:
            request = await self._decode(body, head, target)
            return self._said(await self._execute(request.call, receive), request)
        except Hangup:
            raise
        except asyncio.CancelledError:
            return refusal_answer(STOPPING)
        except Exception as exc:
            return failure_answer(exc, target[0])

    async def _decode(self, body: bytes, head: Head, target: tuple[str, str]) -> oip.Decoded:
        """The request; long JSON elsewhere than on the loop, if the model has use for so much."""
        size = oip.json_length(head.json_length, len(body))
        limits = self._limits_of(target, size)
        if size > JSON_AT_ONCE:
            most = self._json_room(limits.json_elements)
            if size > most:
                raise TooLarge(
                    f"the request's JSON is {size} bytes; at most {most} are accepted for this"
                    " model. Send large tensors as binary data (binary_data_size)"
                )
            return await asyncio.to_thread(
                oip.decode, body, head.json_length, *target, limits, self._regions
            )
        return oip.decode(body, head.json_length, *target, limits, self._regions)

    def _limits_of(self, target: tuple[str, str], size: int) -> Limits:
        """The limits of a request with so many bytes: of a small one the model's do not matter."""
        if size <= JSON_SMALL:
            return self._limits
        most = self._node.most_elements(*target)
        return msgspec.structs.replace(self._limits, json_elements=most)

    def _body_room(self, head: Head, target: tuple[str, str]) -> int:
        """The most bytes of a body: no more than the model has use for."""
        most = self._node.most_elements(*target)
        room = self._json_room(most)
        if head.json_length is None:
            return min(room, self._limits.body_bytes)
        if most is None:
            return self._limits.body_bytes
        return min(room + most * max(DATATYPES.values()), self._limits.body_bytes)

    def _json_room(self, most: int | None) -> int:
        limit = self._limits.json_bytes
        return limit if most is None else min(limit, JSON_BESIDE_BYTES + JSON_ELEMENT_BYTES * most)

    def _said(self, outcome: Outcome, request: oip.Decoded) -> Answer:
        if isinstance(outcome, Refused):
            return refusal_answer(outcome)
        try:
            answer, json_length = oip.encode(outcome, request, self._regions)
        finally:
            outcome.release()
        headers: tuple[Header, ...] = (JSON_TYPE,)
        if json_length is not None:
            headers = _BINARY_TYPE, (b"inference-header-content-length", b"%d" % json_length)
        if outcome.variant:
            headers += ((VARIANT.encode(), outcome.variant.encode()),)
        return 200, answer, headers

    def whole(
        self, method: bytes, url: bytes, headers: Iterable[Header], body: bytes, exchange: Exchange
    ) -> bool:
        """Execute and answer an inference request that is here entirely, without a task of its
        own. False leaves it to ASGI: other routes, and whatever is to be refused before it is
        looked into or has to be unpacked first."""
        target = _plain_target(url) if method == b"POST" else None
        if target is None:
            return False
        head = parse_head(headers)
        if (
            (head.encoding and head.encoding != b"identity")
            or (self._token is not None and not authorised(head.authorization, self._token))
            or len(body) > self._limits.body_bytes
            or _is_long(head, len(body))
        ):
            return False
        try:
            self._budget.hold(len(body))
        except BodyRefused:
            return False
        self._start(body, head, target, exchange)
        return True

    def _start(self, body: bytes, head: Head, target: tuple[str, str], exchange: Exchange) -> None:
        """Decode and submit; answer now if that fails, else when there is an outcome."""
        size = len(body)

        def answer(status: int, said: bytes, extra: tuple[Header, ...]) -> None:
            self._budget.release(size)
            exchange.answer(status, said, extra)

        def done(outcome: Outcome) -> None:
            try:
                reply = self._said(outcome, request)
            except Exception as exc:
                reply = failure_answer(exc, target[0])
            answer(*reply)

        try:
            limits = self._limits_of(target, size)
            request = oip.decode(body, head.json_length, *target, limits, self._regions)
            withdraw = self._node.submit(request.call, done)
        except Exception as exc:
            answer(*failure_answer(exc, target[0]))
            return
        if isinstance(withdraw, Refused):
            answer(*refusal_answer(withdraw))
            return

        def gone() -> None:
            self._budget.release(size)
            withdraw()

        exchange.withdraw = gone

    async def _execute(self, call: InferCall, receive: Receive) -> Outcome:
        """Run a call; raises Hangup if the client goes away meanwhile."""
        watch = HangupWatch(receive)
        self._waiting.enter(watch, watch.start)
        try:
            return await infer(self._node, call)
        except asyncio.CancelledError:
            watch.check()
            raise
        finally:
            self._waiting.leave(watch)
            watch.stop()


def build_app(
    node: NodePort,
    intake: Intake,
    token: str | None,
    open_metrics: bool = False,
    web: Web | None = None,
) -> App:
    """The REST application over ``node``.

    ``token``: if set, every route but health needs it as a bearer token, and ``/metrics`` unless
    there are ``open_metrics``. ``web``: pages for people, which see to who may have them.
    """
    return App(node, intake, token, open_metrics, web)


def _is_long(head: Head, total: int) -> bool:
    """Whether there may be too much JSON to decode on the loop."""
    stated = head.json_length
    if total <= JSON_AT_ONCE or stated is None:
        return total > JSON_AT_ONCE
    return len(stated) > len(str(JSON_AT_ONCE)) or int(stated.isdigit() and stated) > JSON_AT_ONCE


@lru_cache(maxsize=128)
def _plain_target(url: bytes) -> tuple[str, str] | None:
    """As ``_target``, of a URL as it was sent; None too if it has a query or escapes."""
    if not url.isascii() or b"?" in url or b"%" in url:
        return None
    return _target(url.decode())


def _target(path: str, suffix: str = _SUFFIX) -> tuple[str, str] | None:
    """Model and version (empty if not named) of an inference path, None for other paths."""
    if not (path.startswith(_PREFIX) and path.endswith(suffix)):
        return None
    parts = path[len(_PREFIX) : -len(suffix)].split("/")
    if len(parts) == 1 and parts[0]:
        return parts[0], ""
    if len(parts) == 3 and parts[1] == "versions" and parts[0] and parts[2]:
        return parts[0], parts[2]
    return None
