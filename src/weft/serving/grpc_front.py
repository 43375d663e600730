"""The gRPC front end: ``inference.GRPCInferenceService`` on grpc.aio.

Every call goes through one wrapper: check the token, parse, run, and turn errors and refusals
into a status. A client that cancels (or whose deadline passes) cancels the coroutine and so
withdraws its request from the node.

On a stream, requests run side by side and their answers go out **in the order of the
requests**; one that fails is answered by an ``error_message`` and the stream goes on. At most
``STREAM_WINDOW`` requests of one stream are under way, then its reading pauses.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from weft.domain.errors import (
    EnvironmentProblem,
    InvalidRequest,
    ModelError,
    NotFound,
    TooLarge,
    WeftError,
)
from weft.domain.port import NodePort, Refused
from weft.domain.request import Refusal
from weft.serving import grpc_codec, protos
from weft.serving.calls import infer
from weft.serving.grpc_admin import Admin
from weft.serving.refusals import retry_after_ms
from weft.serving.regions import Regions
from weft.serving.tensors import Limits

log = logging.getLogger("weft.serving")

STREAM_WINDOW = 64

_Code = grpc.StatusCode

STATUS: dict[Refusal, grpc.StatusCode] = {
    Refusal.OVERLOADED: _Code.RESOURCE_EXHAUSTED,
    Refusal.QUEUE_FULL: _Code.RESOURCE_EXHAUSTED,
    Refusal.RESERVED: _Code.RESOURCE_EXHAUSTED,
    Refusal.MEMORY: _Code.RESOURCE_EXHAUSTED,
    Refusal.UNAVAILABLE: _Code.UNAVAILABLE,
    Refusal.SHUTTING_DOWN: _Code.UNAVAILABLE,
    Refusal.WORKER_LOST: _Code.UNAVAILABLE,
    Refusal.EXPIRED: _Code.DEADLINE_EXCEEDED,
    Refusal.DEADLINE: _Code.INVALID_ARGUMENT,
    Refusal.FAILED: _Code.INVALID_ARGUMENT,
    Refusal.CANCELLED: _Code.CANCELLED,
}
"""RESOURCE_EXHAUSTED and UNAVAILABLE invite a retry, later."""

_ERROR_STATUS: tuple[tuple[type[WeftError], grpc.StatusCode], ...] = (
    (InvalidRequest, _Code.INVALID_ARGUMENT),
    (TooLarge, _Code.INVALID_ARGUMENT),
    (NotFound, _Code.NOT_FOUND),
    (ModelError, _Code.FAILED_PRECONDITION),
)

_OPEN_METHODS = frozenset({"ServerLive", "ServerReady"})
_DETAILS_CHARS = 1024  # statuses travel as HTTP/2 headers, whose size clients bound

Metadata = tuple[tuple[str, str], ...]
Parse = Callable[[bytes], Any]


class RefusedCall(Exception):
    """A refusal on its way to the wrapper that turns it into a status."""

    def __init__(self, refused: Refused) -> None:
        self.refused = refused
        super().__init__(refused.message)


class Unsupported(Exception):
    """A method of the service that this server does not offer."""


class GrpcFront:
    """The gRPC server. Start and stop it on the node's loop.

    ``token``: if set, every method but ServerLive and ServerReady needs it in the metadata,
    as ``authorization: Bearer TOKEN``.
    """

    def __init__(self, node: NodePort, limits: Limits, regions: Regions, token: str | None) -> None:
        self._node = node
        self._limits = limits
        self._regions = regions
        self._token = token.encode() if token else None
        self._server: grpc.aio.Server | None = None

    async def start(self, address: str) -> int:
        """Listen on ``host:port``; returns the port. Raises EnvironmentProblem if it is taken."""
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),  # else a second server would take half of the calls
                ("grpc.max_receive_message_length", self._limits.body_bytes),
                ("grpc.max_send_message_length", -1),
            ]
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(protos.SERVICE, self._handlers()),)
        )
        try:
            port: int = server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if not port:
            raise EnvironmentProblem(
                f"cannot listen for gRPC on {address};"
                " stop the program that holds the port or choose another"
            )
        await server.start()
        self._server = server
        return port

    async def stop(self, grace: float) -> None:
        """Take no new calls, let those in flight finish for ``grace`` seconds, then end them."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace)

    def _handlers(self) -> dict[str, Any]:
        admin = Admin(self._node, self._regions)
        handlers = {
            method: grpc.unary_unary_rpc_method_handler(
                self._unary(method, protos.message_class(f"{method}Request").FromString, run)
            )
            for method, run in admin.methods().items()
        }
        for method, why in admin.unsupported().items():
            handlers[method] = grpc.unary_unary_rpc_method_handler(
                self._unary(method, None, _unsupported(why))
            )
        handlers["ModelInfer"] = grpc.unary_unary_rpc_method_handler(
            self._unary("ModelInfer", grpc_codec.parse, self._infer)
        )
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._stream)
        return handlers

    def _unary(
        self, method: str, parse: Parse | None, run: Callable[[Any], Awaitable[bytes]]
    ) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def handle(data: bytes, context: Any) -> bytes:
            if method not in _OPEN_METHODS:
                await self._authorise(context)
            try:
                return await run(_parse(parse, data))
            except Exception as exc:
                code, details, metadata = _status(exc, method)
            await context.abort(code, details, metadata)
            raise AssertionError("abort returned")

        return handle

    async def _authorise(self, context: Any) -> None:
        if self._token is None:
            return
        for key, value in context.invocation_metadata() or ():
            if key == "authorization" and isinstance(value, str):
                scheme, _, given = value.partition(" ")
                right = hmac.compare_digest(given.strip().encode(), self._token)
                if right and scheme.lower() == "bearer":
                    return
        await context.abort(
            _Code.UNAUTHENTICATED,
            "this node needs a token; send the metadata authorization: Bearer TOKEN",
        )

    async def _infer(self, message: grpc_codec.InferMessage) -> bytes:
        """Run one ModelInferRequest; returns the serialised answer, raises RefusedCall."""
        request = grpc_codec.decode(message, self._limits, self._regions)
        result = await infer(self._node, request.call)
        if isinstance(result, Refused):
            raise RefusedCall(result)
        try:
            return grpc_codec.encode(result, request, self._regions)
        finally:
            result.release()

    async def _stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        await self._authorise(context)
        # The window is the queue: its answers wait there in the order of their requests.
        answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(STREAM_WINDOW)
        running: set[asyncio.Task[bytes]] = set()

        async def read() -> None:
            try:
                async for data in requests:
                    task = asyncio.create_task(self._stream_one(data))
                    running.add(task)
                    task.add_done_callback(running.discard)
                    await answers.put(task)
            except Exception as exc:
                log.debug("a request stream broke off: %s", type(exc).__name__)
            await answers.put(None)  # not when cancelled: nobody takes answers then

        reader = asyncio.create_task(read())
        try:
            while (task := await answers.get()) is not None:
                yield await task
        finally:
            reader.cancel()
            for task in tuple(running):
                task.cancel()

    async def _stream_one(self, data: bytes) -> bytes:
        message = None
        try:
            request = _parse(grpc_codec.parse, data)
            message = request.message
            return grpc_codec.stream_answer(await self._infer(request))
        except Exception as exc:
            _, details, metadata = _status(exc, "ModelStreamInfer")
            return grpc_codec.stream_error(details, message, dict(metadata))


def _parse(parse: Parse | None, data: bytes) -> Any:
    """``data`` as a message. Parsed here, so that damage is the client's error and not ours."""
    if parse is None:
        return None
    try:
        return parse(data)
    except DecodeError as exc:
        raise InvalidRequest(f"the message cannot be read: {exc}") from None


def _status(exc: Exception, method: str) -> tuple[grpc.StatusCode, str, Metadata]:
    """Status, details and trailing metadata that tell the client about ``exc``."""
    details, metadata = str(exc)[:_DETAILS_CHARS], []
    if isinstance(exc, RefusedCall):
        refused = exc.refused
        code = STATUS[refused.refusal]
        metadata.append(("weft-refusal", refused.refusal.name))
        if refused.retry_after > 0 and code in (_Code.RESOURCE_EXHAUSTED, _Code.UNAVAILABLE):
            metadata.append(("retry-after-ms", str(retry_after_ms(refused))))
    elif isinstance(exc, Unsupported):
        code = _Code.UNIMPLEMENTED
    else:
        code = next((c for kind, c in _ERROR_STATUS if isinstance(exc, kind)), _Code.INTERNAL)
        if code is _Code.INTERNAL and not isinstance(exc, WeftError):
            log.error("%s failed inside the server", method, exc_info=exc)
            details = "the server failed; its log says how"
    return code, details, tuple(metadata)


def _unsupported(why: str) -> Callable[[Any], Awaitable[bytes]]:
    async def run(_: Any) -> bytes:
        raise Unsupported(why)

    return run
