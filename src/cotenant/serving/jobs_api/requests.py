"""What requests to the jobs API hold, and what errors become there."""

from __future__ import annotations

import math
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from cotenant.domain.errors import (
    CotenantError,
    EnvironmentProblem,
    InvalidRequest,
    NotReady,
    TooLarge,
)
from cotenant.domain.submission import Submission
from cotenant.domain.units import S
from cotenant.serving.bodies import (
    BodyReader,
    Header,
    Receive,
    Scope,
    Send,
    SlowBody,
    answer_unread,
    parse_head,
)
from cotenant.serving.intake import Budget
from cotenant.serving.refusals import AWAY, error_status

JSON_BYTES: Final = 2 * 2**20
"""Of a submission; its command and environment may have half of it."""
UNREAD_BYTES: Final = 64 * 1024
"""Where a body may have more than this, an error answers it before it is read."""
CHECKPOINT_S: Final = 60.0
MOST_CHECKPOINT_S: Final = 300.0
HEADERS: Final = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


class Busy(CotenantError):
    """A bound on how much may be under way is reached; it passes."""


class Unread(Response):
    """An answer to a request whose body was not read, and the end of its connection."""

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        own: list[Header] = [(k, v) for k, v in self.raw_headers if k != b"content-length"]
        await answer_unread(send, receive, (self.status_code, bytes(self.body), tuple(own)))


def answer(value: object, status: int = 200) -> Response:
    """A value as JSON."""
    body = msgspec.json.encode(value)
    return Response(body, status, HEADERS, media_type="application/json")


def failed(
    request: Request, error: Exception, status: int = 0, headers: dict[str, str] | None = None
) -> Response:
    """``{"error": {"kind": …, "message": …}}`` with the status that fits."""
    kind, said, more = type(error).__name__, str(error), dict(headers or {})
    if isinstance(error, Busy | NotReady):
        kind = NotReady.__name__
        status = 429 if isinstance(error, Busy) else 503
        more["retry-after"] = str(-(-AWAY // S))
    elif isinstance(error, SlowBody):
        kind, said, status = InvalidRequest.__name__, "the body did not arrive in time", 408
    elif isinstance(error, EnvironmentProblem):
        status = status or 503
    elif isinstance(error, CotenantError):
        status = status or error_status(error)
    body = msgspec.json.encode({"error": {"kind": kind, "message": said}})
    length = parse_head(request.scope["headers"]).content_length
    unread = request.method == "PUT" or length > UNREAD_BYTES
    make = Unread if unread else Response
    return make(body, status or 500, {**HEADERS, **more}, "application/json")


async def submission(request: Request, bodies: BodyReader, budget: Budget) -> Submission:
    """The body of ``POST jobs``; raises InvalidRequest, TooLarge, SlowBody, Hangup."""
    try:
        return msgspec.json.decode(await _read(request, bodies, budget), type=Submission)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the job cannot be submitted: {error}") from None


class _Within(msgspec.Struct, forbid_unknown_fields=True):
    within_s: float = CHECKPOINT_S


async def checkpoint_within(request: Request, bodies: BodyReader, budget: Budget) -> float:
    """How long a checkpoint may take, of a body that may be empty; raises as ``submission``."""
    body = await _read(request, bodies, budget)
    try:
        within_s = msgspec.json.decode(body.strip() or b"{}", type=_Within).within_s
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest(f'the body is empty, or {{"within_s": 60}}: {error}') from None
    if not 0 < within_s <= MOST_CHECKPOINT_S:
        raise InvalidRequest(f"within_s is above 0 and at most {MOST_CHECKPOINT_S:g} seconds")
    return within_s


def seconds(request: Request, name: str, most: float) -> float:
    """A number of seconds in the query, 0 if it is not there; more than ``most`` is ``most``."""
    text = request.query_params.get(name, "0")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise InvalidRequest(f"{name}={text[:64]!r} is no number of seconds")
    return min(value, most)


async def _read(request: Request, bodies: BodyReader, budget: Budget) -> bytes:
    head = parse_head(request.scope["headers"])
    try:
        body, held = await bodies.read(request.receive, head, JSON_BYTES)
    except TooLarge:
        raise TooLarge(f"at most {JSON_BYTES} bytes are accepted in this body") from None
    budget.release(held)
    return body
