"""The jobs API: routes below ``/api/v1/``, each behind a scope, and the pages beside them.

Only a bearer token counts here. Cookies do not, and no header invites pages of other origins: what
a browser sends by itself does nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cotenant.domain.errors import (
    CotenantError,
    EnvironmentProblem,
    Forbidden,
    InvalidRequest,
    NotFound,
    TooLarge,
)
from cotenant.domain.port import NodePort, find_job
from cotenant.domain.submission import is_sha256
from cotenant.domain.tokens import Scope as Right
from cotenant.domain.tokens import Token
from cotenant.serving.bodies import (
    BodyReader,
    Hangup,
    HangupWatch,
    Receive,
    Scope,
    Send,
    SlowBody,
    parse_head,
)
from cotenant.serving.failures import FAILURES_S, Failures
from cotenant.serving.intake import BodyRefused, Intake
from cotenant.serving.jobs_api.following import MOST_WAIT_S, Following
from cotenant.serving.jobs_api.requests import (
    HEADERS,
    Busy,
    answer,
    checkpoint_within,
    failed,
    seconds,
    submission,
)
from cotenant.serving.jobs_api.submitting import Submitting
from cotenant.serving.jobs_api.uploads import Uploads
from cotenant.serving.tokenfile import Keyring
from cotenant.serving.web.app import Web

log = logging.getLogger("cotenant.serving")

PREFIX: Final = "/api/v1/"
MOST_UPLOADS: Final = 4
"""Archives that are taken in at one time."""
PIECE_WITHIN_S: Final = 30.0
UPLOAD_WITHIN_S: Final = 3600.0
SWEEP_S: Final = 600.0

Handler = Callable[[Request, Token], Awaitable[Response]]


class JobsApp:
    """The ASGI application of the jobs listener. ``close`` it before its server stops."""

    def __init__(
        self,
        node: NodePort,
        intake: Intake,
        keys: Keyring,
        uploads: Uploads,
        submitting: Submitting,
        web: Web | None = None,
    ) -> None:
        self._node = node
        self._budget = intake.budget
        self._bodies = BodyReader(intake.limits, intake.budget)
        self._keys = keys
        self._uploads = uploads
        self._submitting = submitting
        self._following = Following(node)
        self._failures = Failures()
        self._receiving = 0
        self._app = Starlette(
            routes=[*self._routes(), *(web.routes() if web else ())],
            exception_handlers={HTTPException: _no_route, Exception: _server_error},
        )
        self._app.router.redirect_slashes = False  # it would go by the Host that was sent
        self._sweep()

    def _routes(self) -> Iterable[BaseRoute]:
        job = "jobs/{ref}"
        table: dict[str, dict[str, tuple[Right, Handler]]] = {
            "status": {"GET": (Right.READ, self._status)},
            "jobs": {"GET": (Right.READ, self._jobs), "POST": (Right.SUBMIT, self._submit)},
            job: {"GET": (Right.READ, self._job)},
            f"{job}/log": {"GET": (Right.READ, self._log)},
            f"{job}/hold": {"POST": (Right.CONTROL, self._order(self._node.hold_job))},
            f"{job}/resume": {"POST": (Right.CONTROL, self._order(self._node.resume_job))},
            f"{job}/cancel": {"POST": (Right.CONTROL, self._order(self._node.cancel_job))},
            f"{job}/checkpoint": {"POST": (Right.CONTROL, self._checkpoint)},
            "files/{sha256}": {
                "GET": (Right.SUBMIT, self._file),
                "PUT": (Right.SUBMIT, self._upload),
            },
        }
        for path, methods in table.items():
            yield Route(PREFIX + path, self._guarded(methods), methods=list(methods))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except Exception:  # answered with 500 by now; Starlette passes it on to be logged
            log.exception("%s %s failed inside the server", scope.get("method"), scope.get("path"))

    def whole(self, *_: object, **__: object) -> bool:
        """Never: nothing here is asked often enough to be worth it."""
        return False

    def close(self) -> None:
        """Answer who waits, and look after nothing any more."""
        self._following.close()
        self._timer.cancel()

    def _sweep(self) -> None:
        self._uploads.forget_old()
        self._timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    # --- who may what -----------------------------------------------------------------------

    def _guarded(
        self, methods: dict[str, tuple[Right, Handler]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            right, handler = methods["GET" if request.method == "HEAD" else request.method]
            token = self._token(request)
            if isinstance(token, Response):
                return token
            if right not in token.scopes:
                said = f"the token {token.name!r} lacks the scope {right.value}"
                return failed(request, Forbidden(said), 403)
            try:
                return await handler(request, token)
            except BodyRefused as error:
                return failed(request, Busy(error.refused.message))
            except Hangup:
                return Response(status_code=499)
            except (CotenantError, SlowBody) as error:
                return failed(request, error)

        return handle

    def _token(self, request: Request) -> Token | Response:
        """The token of a request, or what to answer."""
        scheme, _, text = request.headers.get("authorization", "").partition(" ")
        bearer = scheme.lower() == "bearer"
        found = self._keys.find(text.strip()) if bearer else None
        if found is not None:
            return found
        if not self._keys.usable:
            why = "the node's token file cannot be used; its log says why"
            return failed(request, EnvironmentProblem(why))
        if bearer and self._failures.too_many:
            why = "too many wrong tokens were sent; try again later"
            return failed(request, Forbidden(why), 429, {"retry-after": f"{FAILURES_S:.0f}"})
        if bearer:
            self._failures.note()
            if self._failures.too_many:
                log.warning("many wrong tokens are sent to the jobs API")
        why = "this token is unknown, or has expired" if bearer else "a token is needed"
        said = f"{why}; send the header Authorization: Bearer TOKEN"
        return failed(request, Forbidden(said), 401, {"www-authenticate": "Bearer"})

    # --- looking ----------------------------------------------------------------------------

    async def _status(self, _: Request, __: Token) -> Response:
        return answer(self._node.status())

    async def _jobs(self, _: Request, __: Token) -> Response:
        return answer(self._node.jobs())

    async def _job(self, request: Request, _: Token) -> Response:
        return answer(find_job(self._node.jobs(), request.path_params["ref"]))

    async def _log(self, request: Request, _: Token) -> Response:
        ref, place = request.path_params["ref"], request.query_params.get("offset", "0")
        wait_s = seconds(request, "wait", MOST_WAIT_S)
        try:
            async with HangupWatch(request.receive):
                piece, job = await self._following.piece(ref, place, wait_s)
        except OSError as error:
            raise EnvironmentProblem(f"the log cannot be read: {error.strerror}") from None
        headers = {**HEADERS, "cotenant-next-offset": piece.next, "cotenant-job-state": job.state}
        if piece.gap:
            headers["cotenant-log-gap"] = "1"
        return Response(piece.data, 200, headers, "application/octet-stream")

    # --- changing ---------------------------------------------------------------------------

    async def _submit(self, request: Request, token: Token) -> Response:
        wanted = await submission(request, self._bodies, self._budget)
        id = await self._submitting.submit(wanted)
        log.info("job submitted over the jobs API", extra={"job": id, "token": token.name})
        response = answer({"id": id}, 201)
        response.headers["location"] = f"{PREFIX}jobs/{id}"
        return response

    def _order(self, do: Callable[[str], str]) -> Handler:
        async def handle(request: Request, token: Token) -> Response:
            id = do(request.path_params["ref"])
            what = request.url.path.rpartition("/")[2]
            log.info("%s over the jobs API", what, extra={"job": id, "token": token.name})
            return answer({"id": id})

        return handle

    async def _checkpoint(self, request: Request, _: Token) -> Response:
        within_s = await checkpoint_within(request, self._bodies, self._budget)
        path = await self._node.checkpoint_job(request.path_params["ref"], within_s)
        return answer({"checkpoint": path})

    # --- files ------------------------------------------------------------------------------

    async def _file(self, request: Request, _: Token) -> Response:
        sha256 = _sha256(request)
        return answer({"sha256": sha256, "bytes": self._uploads.size(sha256)})

    async def _upload(self, request: Request, token: Token) -> Response:
        sha256 = _sha256(request)
        if parse_head(request.scope["headers"]).content_length > self._uploads.most:
            raise TooLarge(f"an archive may have {self._uploads.most} bytes at most")
        if self._receiving >= MOST_UPLOADS:
            raise Busy(f"{MOST_UPLOADS} archives are being received, as many as may at a time")
        self._receiving += 1
        try:
            async with asyncio.timeout(UPLOAD_WITHIN_S):
                size = await self._uploads.receive(sha256, _pieces(request))
        except TimeoutError:
            raise SlowBody from None
        finally:
            self._receiving -= 1
        extra = {"sha256": sha256, "bytes": size, "token": token.name}
        log.info("archive received over the jobs API", extra=extra)
        return answer({"sha256": sha256, "bytes": size}, 201)


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    """A body as it comes; raises Hangup, and SlowBody if nothing does."""
    more = True
    while more:
        try:
            message = await asyncio.wait_for(request.receive(), PIECE_WITHIN_S)
        except TimeoutError:
            raise SlowBody from None
        if message["type"] == "http.disconnect":
            raise Hangup
        more = message.get("more_body", False)
        yield message.get("body", b"")


def _sha256(request: Request) -> str:
    text: str = request.path_params["sha256"]
    if not is_sha256(text):
        raise InvalidRequest("files are named by their SHA-256, in lower-case hexadecimal")
    return text


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        said = InvalidRequest(f"{request.method} is not possible here; {allowed} is")
        return failed(request, said, 405, {"allow": allowed})
    return failed(request, NotFound(f"there is no such route; the API is below {PREFIX}"), 404)


async def _server_error(request: Request, _: Exception) -> Response:
    return failed(request, CotenantError("the server failed; its log says how"))
