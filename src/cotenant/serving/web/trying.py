"""A request to a service from its page: the same JSON, checks and answers as over the API."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from functools import partial
from typing import Final, TypeVar

import msgspec

from cotenant.domain.errors import CotenantError, InvalidRequest, ModelError
from cotenant.domain.port import NodePort, Refused
from cotenant.serving import generate, oip
from cotenant.serving.calls import infer, pieces
from cotenant.serving.intake import Intake
from cotenant.serving.refusals import HTTP_STATUS, as_refused, error_status
from cotenant.serving.regions import Regions
from cotenant.serving.tensors import Limits
from cotenant.serving.web.shown import number

T = TypeVar("T")

MOST_SHOWN: Final = 64 * 1024
WITHIN_S: Final = 60.0
_AT_ONCE: Final = 16 * 1024


class Tried(msgspec.Struct, frozen=True):
    """What was sent, and what came: a status as over HTTP, ms, and a text."""

    given: str
    status: int
    took_ms: float
    text: str

    @property
    def headline(self) -> str:
        """Status and time in a line."""
        return f"status {self.status}, {number(self.took_ms)} ms"


async def attempt(node: NodePort, intake: Intake, name: str, given: str) -> Tried:
    """Send a request as its author wrote it; raises NotFound for a model that is not there."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(WITHIN_S):
            status, text = await _answer(node, intake.limits, name, given.encode())
    except TimeoutError:
        status, text = 504, f"there was no answer within {WITHIN_S:g} s; the request was withdrawn"
    except CotenantError as error:
        refused = as_refused(error)
        status = HTTP_STATUS[refused.refusal] if refused else error_status(error)
        text = str(error)
    took = (time.monotonic() - began) * 1000
    if len(text) > MOST_SHOWN:
        text = f"{text[:MOST_SHOWN]}\n… {len(text) - MOST_SHOWN} more characters"
    return Tried(given, status, took, text)


async def _answer(node: NodePort, limits: Limits, name: str, body: bytes) -> tuple[int, str]:
    meta = node.metadata(name)
    limits = msgspec.structs.replace(limits, json_elements=node.most_elements(name))
    if not meta.pieces:
        return await _whole(node, limits, name, body)
    call = await aside(len(body), partial(generate.decode, body, meta, "", limits))
    said = generate.Answer(call.id, MOST_SHOWN)
    async with aclosing(pieces(node, call)) as outcomes:
        async for outcome in outcomes:
            if isinstance(outcome, Refused):
                return HTTP_STATUS[outcome.refusal], outcome.message
            try:
                said.add(outcome)
            finally:
                outcome.release()
    if not said.pieces:
        raise ModelError(f"model {name!r} gave no answer")
    return 200, _pretty(said.body())


async def _whole(node: NodePort, limits: Limits, name: str, body: bytes) -> tuple[int, str]:
    regions = Regions(0)  # a page has no shared memory
    request = await aside(len(body), partial(oip.decode, body, None, name, "", limits, regions))
    outcome = await infer(node, request.call)
    if isinstance(outcome, Refused):
        return HTTP_STATUS[outcome.refusal], outcome.message
    try:
        answer, json_length = oip.encode(outcome, request, regions)
    finally:
        outcome.release()
    if json_length is not None:
        raise InvalidRequest("outputs as binary data cannot be shown; leave binary_data out")
    return 200, _pretty(answer) if len(answer) <= MOST_SHOWN else answer.decode()


async def aside(size: int, decode: Callable[[], T]) -> T:
    """Decode here what is short, and what is long in a thread."""
    return await asyncio.to_thread(decode) if size > _AT_ONCE else decode()


def _pretty(answer: bytes) -> str:
    return msgspec.json.format(answer, indent=1).decode()
