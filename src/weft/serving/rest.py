"""The REST front end: the inference route as raw ASGI in front, Starlette for the rest.

The inference route carries the load, so it pays for no framework. It answers exactly once,
releases the node's result once its bytes are copied out, and withdraws the request if the
client hangs up while it waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from weft.domain.errors import WeftError
from weft.domain.port import InferCall, InferResult, NodePort, Refused
from weft.domain.request import Refusal
from weft.serving import oip
from weft.serving.bodies import (
    JSON_TYPE,
    WHOLE_ANSWER,
    Answer,
    BodyReader,
    BodyRefused,
    Hangup,
    Head,
    Receive,
    Scope,
    Send,
    SlowBody,
    WholeAnswer,
    authorised,
    error_answer,
    parse_head,
    refusal_answer,
    respond,
    respond_unread,
)
from weft.serving.overdue import Overdue
from weft.serving.refusals import HTTP_STATUS, error_status, refusal_headers
from weft.serving.regions import Regions
from weft.serving.rest_admin import build_admin
from weft.serving.tensors import Limits

log = logging.getLogger("weft.serving")

_PREFIX = "/v2/models/"
_SUFFIX = "/infer"
_OPEN_PATHS = frozenset({"/v2/health/live", "/v2/health/ready"})
_BINARY_TYPE = (b"content-type", b"application/octet-stream")
_STOPPING = Refused(Refusal.SHUTTING_DOWN, 0, "")

# A hang-up is looked for only once a request has waited this long. Starting a task for each
# request costs more than the answer to most of them; withdrawing younger ones gains nothing.
_HANGUP_DELAY_S = 0.05


class App:
    """The ASGI application. Build it with ``build_app``."""

    def __init__(self, node: NodePort, limits: Limits, token: str | None, regions: Regions) -> None:
        self._node = node
        self._limits = limits
        self._token = token.encode() if token else None
        self._regions = regions
        self._bodies = BodyReader(limits)
        self._waiting = Overdue(_HANGUP_DELAY_S)
        self._admin = build_admin(node, regions, self._bodies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._admin(scope, receive, send)
            return
        path: str = scope["path"]
        head = parse_head(scope["headers"])
        if (
            self._token is not None
            and path not in _OPEN_PATHS
            and not authorised(head, self._token)
        ):
            await respond_unread(
                send,
                receive,
                401,
                "this node needs a token; send the header Authorization: Bearer TOKEN",
                [(b"www-authenticate", b"Bearer")],
            )
            return
        target = _target(path) if scope["method"] == "POST" else None
        if target is not None:
            await self._infer(head, target, receive, send, scope["extensions"][WHOLE_ANSWER])
            return
        try:
            await self._admin(scope, receive, send)
        except Exception:  # answered with 500 by now; Starlette passes it on to be logged
            log.exception("%s %s failed inside the server", scope["method"], path)

    async def _infer(
        self, head: Head, target: tuple[str, str], receive: Receive, send: Send, whole: WholeAnswer
    ) -> None:
        """Receive, decode, execute, answer: one inference request."""
        try:
            body, held = await self._bodies.read(receive, head)
        except Hangup:
            return
        except asyncio.CancelledError:
            # Only the HTTP server's stop cancels a request.
            await respond(send, *refusal_answer(_STOPPING))
        except SlowBody:
            seconds = self._limits.body_timeout_s
            await respond_unread(
                send, receive, 408, f"the body did not arrive within {seconds:g} s; send it faster"
            )
        except BodyRefused as exc:
            refused = exc.refused
            await respond_unread(
                send,
                receive,
                HTTP_STATUS[refused.refusal],
                refused.message,
                refusal_headers(refused),
            )
        except WeftError as exc:
            await respond_unread(send, receive, error_status(exc), str(exc))
        else:
            try:
                status, answer, headers = await self._answer(body, head, target, receive)
                if not whole(status, answer, headers):
                    await respond(send, status, answer, headers)
            except Hangup:
                log.debug("the client of a request for %s went away", target[0])
            finally:
                self._bodies.release(held)

    async def _answer(
        self, body: bytes, head: Head, target: tuple[str, str], receive: Receive
    ) -> Answer:
        """What to answer; raises Hangup if there is nobody to answer."""
        try:
            request = oip.decode(body, head.json_length, *target, self._limits, self._regions)
            result = await self._execute(request.call, receive)
            if isinstance(result, Refused):
                return refusal_answer(result)
            try:
                answer, json_length = oip.encode(result, request, self._regions)
            finally:
                result.release()
        except Hangup:
            raise
        except WeftError as exc:
            return error_answer(error_status(exc), str(exc))
        except asyncio.CancelledError:
            return refusal_answer(_STOPPING)
        except Exception:
            log.exception("inference on %s failed inside the server", target[0])
            return error_answer(500, "the server failed; its log says how")
        if json_length is None:
            return 200, answer, (JSON_TYPE,)
        length = (b"inference-header-content-length", b"%d" % json_length)
        return 200, answer, (_BINARY_TYPE, length)

    async def _execute(self, call: InferCall, receive: Receive) -> InferResult | Refused:
        """Run a call; raises Hangup if the client goes away meanwhile."""
        task = asyncio.current_task()
        assert task is not None
        watch = _HangupWatch(task, receive)
        self._waiting.enter(task, watch.start)
        try:
            return await self._node.infer(call)
        except asyncio.CancelledError:
            if watch.fired and task.uncancel() == 0:
                raise Hangup from None
            raise
        finally:
            self._waiting.leave(task)
            watch.stop()


class _HangupWatch:
    """Cancels a request's task when its client disconnects."""

    def __init__(self, request: asyncio.Task[object], receive: Receive) -> None:
        self.fired = False
        self._request = request
        self._receive = receive
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        with contextlib.suppress(Exception):  # a broken connection is a hang-up too
            while (await self._receive())["type"] != "http.disconnect":
                pass
        self.fired = True
        self._request.cancel()


def build_app(
    node: NodePort, limits: Limits, token: str | None, regions: Regions | None = None
) -> App:
    """The REST application over ``node``.

    ``token``: if set, every route but health needs it as a bearer token. ``regions``: the
    shared-memory registry, to share it with gRPC; one of its own otherwise.
    """
    return App(node, limits, token, Regions(limits.regions) if regions is None else regions)


def _target(path: str) -> tuple[str, str] | None:
    """Model and version (empty if not named) of an inference path, None for other paths."""
    if not (path.startswith(_PREFIX) and path.endswith(_SUFFIX)):
        return None
    parts = path[len(_PREFIX) : -len(_SUFFIX)].split("/")
    if len(parts) == 1 and parts[0]:
        return parts[0], ""
    if len(parts) == 3 and parts[1] == "versions" and parts[0] and parts[2]:
        return parts[0], parts[2]
    return None
