"""REST routes other than inference: health, metadata, statistics, repository, shared memory."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cotenant.domain.errors import CotenantError, InvalidRequest
from cotenant.domain.port import ModelMeta, NodePort, Refused
from cotenant.domain.units import S
from cotenant.serving.admin import (
    EXTENSIONS,
    NO_CUDA_MEMORY,
    SERVER_NAME,
    Statistics,
    check_load_parameters,
    model_config,
    server_version,
    statistics,
)
from cotenant.serving.bodies import (
    BodyReader,
    Hangup,
    SlowBody,
    error_body,
    parse_head,
)
from cotenant.serving.intake import BodyRefused, Intake
from cotenant.serving.refusals import AWAY, HTTP_STATUS, as_refused, error_status, refusal_headers

log = logging.getLogger("cotenant.serving")

_ADMIN_BODY_BYTES = 2**20

T = TypeVar("T", bound=msgspec.Struct)

Handler = Callable[[Request], Awaitable[Response]]


class _RegisterBody(msgspec.Struct):
    key: str
    byte_size: int
    offset: int | None = None


class _ParametersBody(msgspec.Struct):
    parameters: dict[str, Any] | None = None


class _IndexBody(msgspec.Struct):
    ready: bool | None = None


def build_admin(
    node: NodePort, intake: Intake, bodies: BodyReader, more: Sequence[BaseRoute] = ()
) -> Starlette:
    """The Starlette application that holds every route but inference; ``more``: others' routes."""
    admin = _Admin(node, intake, bodies)
    model = "/v2/models/{model}"
    version = model + "/versions/{version}"
    shared = "/v2/systemsharedmemory"
    post = ["POST"]
    routes = [
        Route("/health", admin.ready),  # as programs know it that speak OpenAI's API
        Route("/v2/health/live", admin.live),
        Route("/v2/health/ready", admin.ready),
        Route("/v2", admin.server),
        Route("/v2/models/stats", admin.stats),
        Route("/v2/repository/index", admin.index, methods=["POST", "GET"]),
        Route("/v2/repository/models/{model}/load", admin.load, methods=post),
        Route("/v2/repository/models/{model}/unload", admin.unload, methods=post),
        Route(shared + "/status", admin.region_status),
        Route(shared + "/region/{region}/status", admin.region_status),
        Route(shared + "/region/{region}/register", admin.region_register, methods=post),
        Route(shared + "/region/{region}/unregister", admin.region_unregister, methods=post),
        Route(shared + "/unregister", admin.region_unregister, methods=post),
        Route("/v2/cudasharedmemory/{rest:path}", _unsupported(NO_CUDA_MEMORY), methods=_BOTH),
        Route("/v2/trace/setting", _unsupported(_NO_TRACE), methods=_BOTH),
        Route(model + "/trace/setting", _unsupported(_NO_TRACE), methods=_BOTH),
        Route("/v2/logging", _unsupported(_NO_LOGGING), methods=_BOTH),
        Route("/metrics", admin.metrics),
    ]
    for prefix in (version, model):
        routes += [
            Route(prefix, admin.model),
            Route(prefix + "/ready", admin.model_ready),
            Route(prefix + "/stats", admin.stats),
            Route(prefix + "/config", admin.config),
            Route(prefix + "/infer", _infer_needs_post, methods=["GET", "PUT", "DELETE"]),
        ]
    return Starlette(
        routes=[*routes, *more],
        exception_handlers={
            CotenantError: _cotenant_error,
            BodyRefused: _body_refused,
            SlowBody: _slow_body,
            Hangup: _hangup,
            HTTPException: _http_error,
            Exception: _server_error,
        },
    )


class _Admin:
    def __init__(self, node: NodePort, intake: Intake, bodies: BodyReader) -> None:
        self._node = node
        self._budget = intake.budget
        self._regions = intake.regions
        self._bodies = bodies

    async def live(self, _: Request) -> Response:
        return Response()

    async def ready(self, _: Request) -> Response:
        if self._node.is_ready():
            return Response()
        return _later("the node is not ready: models are loading, or it is shutting down")

    async def server(self, _: Request) -> Response:
        return _json(
            {"name": SERVER_NAME, "version": server_version(), "extensions": list(EXTENSIONS)}
        )

    async def model(self, request: Request) -> Response:
        return _json(self._metadata(request))

    async def model_ready(self, request: Request) -> Response:
        name, version = _model(request)
        if self._node.model_ready(name, version):
            return Response()
        return _later(f"model {name} {version}".rstrip() + " is not ready")

    async def config(self, request: Request) -> Response:
        return _json(model_config(self._metadata(request)))

    async def stats(self, request: Request) -> Response:
        found = statistics(self._node, *_model(request))
        return _json({"model_stats": [_stats_json(one) for one in found]})

    async def index(self, request: Request) -> Response:
        asked = await self._read(request, _IndexBody)
        entries = self._node.index()
        return _json([e for e in entries if e.state == "READY" or not asked.ready])

    async def load(self, request: Request) -> Response:
        body = await self._read(request, _ParametersBody)
        check_load_parameters(list(body.parameters or ()))
        await self._node.load(request.path_params["model"])
        return Response()

    async def unload(self, request: Request) -> Response:
        await self._read(request, _ParametersBody)
        await self._node.unload(request.path_params["model"])
        return Response()

    async def region_status(self, request: Request) -> Response:
        return _json(self._regions.status(request.path_params.get("region", "")))

    async def region_register(self, request: Request) -> Response:
        body = await self._read(request, _RegisterBody)
        name = request.path_params["region"]
        self._regions.register(name, body.key, body.offset or 0, body.byte_size)
        return Response()

    async def region_unregister(self, request: Request) -> Response:
        self._regions.unregister(request.path_params.get("region", ""))
        return Response()

    async def metrics(self, _: Request) -> Response:
        text = "text/plain; version=0.0.4; charset=utf-8"
        return Response(self._node.metrics(), media_type=text)

    def _metadata(self, request: Request) -> ModelMeta:
        return self._node.metadata(*_model(request))

    async def _read(self, request: Request, kind: type[T]) -> T:
        """The JSON body as ``kind``, its defaults for an empty one; raises InvalidRequest."""
        head = parse_head(request.scope["headers"])
        body, held = await self._bodies.read(request.receive, head, _ADMIN_BODY_BYTES)
        self._budget.release(held)
        try:
            return msgspec.json.decode(body.strip() or b"{}", type=kind)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
            raise InvalidRequest(f"the body does not fit this request: {exc}") from None


_BOTH = ["GET", "POST"]
_NO_TRACE = "trace settings are not supported; see the node's journal"
_NO_LOGGING = "log settings cannot be changed over the network; see the node's configuration"


def _unsupported(message: str) -> Handler:
    async def handler(_: Request) -> Response:
        return _error(501, message)

    return handler


async def _infer_needs_post(_: Request) -> Response:
    return _error(405, "inference needs the method POST", {"allow": "POST"})


def _model(request: Request) -> tuple[str, str]:
    params = request.path_params
    return params.get("model", ""), params.get("version", "")


def _stats_json(stats: Statistics) -> dict[str, Any]:
    durations = {k: {"count": c, "ns": ns} for k, (c, ns) in stats.durations.items()}
    return {
        "name": stats.name,
        "version": stats.version,
        "last_inference": stats.last_inference_ms,
        "inference_count": stats.inference_count,
        "execution_count": stats.execution_count,
        "inference_stats": durations,
        "batch_stats": [],
    }


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return Response(error_body(message), status, headers, "application/json")


def _later(message: str) -> Response:
    return _error(503, message, {"retry-after": str(-(-AWAY // S))})


def _cotenant_error(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, CotenantError)
    refused = as_refused(exc)
    return _error(error_status(exc), str(exc)) if refused is None else _refusal(refused)


def _body_refused(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, BodyRefused)
    return _refusal(exc.refused)


def _refusal(refused: Refused) -> Response:
    headers = {k.decode(): v.decode() for k, v in refusal_headers(refused)}
    return _error(HTTP_STATUS[refused.refusal], refused.message, headers)


def _slow_body(_: Request, __: Exception) -> Response:
    return _error(408, "the body did not arrive in time; send it faster", {"connection": "close"})


def _hangup(_: Request, __: Exception) -> Response:
    return Response(status_code=499)


def _http_error(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    message = str(exc.detail)
    if exc.status_code == 404:
        message = "no such route; models are at /v2/models/MODEL"
    return _error(exc.status_code, message, dict(exc.headers or {}))


def _server_error(_: Request, __: Exception) -> Response:
    return _error(500, "the server failed; its log says how")
