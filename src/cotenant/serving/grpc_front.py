"""The gRPC front end: inference, health and reflection on our own HTTP/2 server.

An inference is submitted when its message is complete and answered from the node's callback. A
client that cancels, and a deadline that passes, withdraw the request from the node.
"""

from __future__ import annotations

from typing import Any

from cotenant.domain.port import NodePort, Refused
from cotenant.domain.request import Refusal
from cotenant.serving import protos
from cotenant.serving.grpc_admin import Admin
from cotenant.serving.grpc_calls import Call, Route, StreamCall, UnaryCall
from cotenant.serving.grpc_health import Health
from cotenant.serving.grpc_reflection import Reflection
from cotenant.serving.grpc_wire import (
    Code,
    Head,
    Status,
    head_problem,
    read_head,
    refusal_status,
    status_block,
)
from cotenant.serving.grpc_work import Asking, Inference
from cotenant.serving.http2 import Server
from cotenant.serving.http2_headers import Headers
from cotenant.serving.http2_sending import Receiver, Stream
from cotenant.serving.intake import Intake, authorised
from cotenant.serving.listening import bind
from cotenant.serving.overdue import Overdue

ADMIN_BYTES = 64 * 1024
"""Of a message that is no inference."""

_OPEN_METHODS = frozenset({"ServerLive", "ServerReady"})

_STOPPING = refusal_status(Refused(Refusal.SHUTTING_DOWN, 0, ""))
_NO_TOKEN = Status(
    Code.UNAUTHENTICATED,
    "this node needs a token; send the metadata authorization: Bearer TOKEN",
)


class GrpcFront:
    """The gRPC server. Start and stop it on the node's loop.

    ``token``: if set, every method but ServerLive, ServerReady and Health/Check needs it in the
    metadata, as ``authorization: Bearer TOKEN``.
    """

    def __init__(
        self, node: NodePort, intake: Intake, token: str | None, host: str, port: int
    ) -> None:
        self.node = node
        self.intake = intake
        self.late = Overdue(intake.limits.body_timeout_s)
        self.running: set[Call] = set()
        self._token = token.encode() if token else None
        self._host = host
        self._port = port
        self._server = Server(self, intake.budget)
        admin = Admin(node, intake.regions)
        self._health = Health(node)
        self._routes = {
            **self._inference(),
            **{
                f"/{protos.SERVICE}/{name}": Route(
                    name,
                    UnaryCall,
                    Asking,
                    protos.message_class(f"{name}Request"),
                    run,
                    ADMIN_BYTES,
                    name in _OPEN_METHODS,
                )
                for name, run in admin.methods().items()
            },
            **self._health.routes(ADMIN_BYTES),
            **Reflection().routes(ADMIN_BYTES),
        }
        self._unsupported = {
            f"/{protos.SERVICE}/{name}": why for name, why in admin.unsupported().items()
        }

    async def start(self) -> int:
        """Listen and serve; returns the port (useful where 0 was asked for).

        Raises EnvironmentProblem if the address cannot be bound.
        """
        sock = bind(self._host, self._port, "gRPC")
        port: int = sock.getsockname()[1]
        self._server.start(sock)
        return port

    async def stop(self, grace: float) -> None:
        """Take no new calls, let those in flight finish for ``grace`` seconds, then end them."""
        self._health.stop()
        await self._server.drain(grace)
        for call in tuple(self.running):
            call.finish(_STOPPING)
        await self._server.close()

    def head(self, headers: Headers) -> tuple[Head, Route | bytes]:
        """See ``http2_application.Application``: the call, and how it is served, or the headers
        with which it is refused."""
        head = read_head(headers)
        problem = head_problem(head)
        if problem is not None:
            return head, problem
        found = self._find(head)
        return head, status_block(found, first=True) if isinstance(found, Status) else found

    def open(self, stream: Stream, head: tuple[Head, Route | bytes]) -> Receiver | None:
        """See ``http2_application.Application``."""
        said, served = head
        if not isinstance(served, bytes):
            return served.kind(self, stream, said, served)
        stream.blamed = True
        stream.send(b"", b"", served)
        return None

    def _find(self, head: Head) -> Route | Status:
        route = self._routes.get(head.path)
        token = self._token
        if (
            token is not None
            and not (route is not None and route.is_open)
            and not authorised(head.authorization, token)
        ):
            return _NO_TOKEN
        if route is not None:
            return route
        why = self._unsupported.get(head.path)
        return Status(Code.UNIMPLEMENTED, why or f"there is no method {head.path[:256]}")

    def _inference(self) -> dict[str, Route]:
        limit = self.intake.limits.body_bytes
        kinds: dict[str, Any] = {"ModelInfer": UnaryCall, "ModelStreamInfer": StreamCall}
        return {
            f"/{protos.SERVICE}/{name}": Route(
                name, kind, Inference, protos.ModelInferRequest, _no_method, limit
            )
            for name, kind in kinds.items()
        }


def _no_method(_: Any) -> bytes:
    raise NotImplementedError("an inference is no method that is asked")
