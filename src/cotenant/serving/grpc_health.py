"""``grpc.health.v1.Health``: what Kubernetes' gRPC probes and load balancers ask.

The service ``""`` (and that of inference) is the node, any other name a model.
"""

from __future__ import annotations

import asyncio
from typing import Any

from cotenant.domain.port import NodePort
from cotenant.serving import protos
from cotenant.serving.grpc_calls import Route, UnaryCall
from cotenant.serving.grpc_wire import Code, Damaged, Status, framed
from cotenant.serving.grpc_work import Asking, Work

WATCHERS = 1024
"""Calls of Watch at one time."""
_LOOK_S = 1.0
_SERVING, _NOT_SERVING, _UNKNOWN = 1, 2, 3
_PACKAGE = protos.HEALTH.rpartition(".")[0]
_REQUEST = protos.message_class("HealthCheckRequest", _PACKAGE)
_ANSWER = protos.message_class("HealthCheckResponse", _PACKAGE)


class Health:
    """Answers Check, and tells those who Watch of changes, looking once a second for all."""

    def __init__(self, node: NodePort) -> None:
        self._node = node
        self._watching: dict[WatchCall, tuple[str, int]] = {}
        """Calls, what each watches, and what it was told last."""
        self._timer: asyncio.TimerHandle | None = None

    def routes(self, limit: int) -> dict[str, Route]:
        """Path → how it is served."""
        check = Route("Check", UnaryCall, Asking, _REQUEST, self._check, limit, is_open=True)
        watch = Route("Watch", self._watch, Asking, _REQUEST, self._begin, limit)
        return {f"/{protos.HEALTH}/{route.method}": route for route in (check, watch)}

    def state(self, service: str) -> int:
        """SERVING, NOT_SERVING or SERVICE_UNKNOWN."""
        node = self._node
        if service in ("", protos.SERVICE):
            return _SERVING if node.is_ready() else _NOT_SERVING
        if node.model_ready(service):
            return _SERVING
        known = any(entry.name == service for entry in node.index())
        return _NOT_SERVING if known else _UNKNOWN

    def follow(self, call: WatchCall, service: str) -> None:
        """Tell ``call`` how ``service`` is, now and whenever that changes; raises Damaged."""
        if len(self._watching) >= WATCHERS:
            raise Damaged(Code.RESOURCE_EXHAUSTED, f"{WATCHERS} calls of Watch are open already")
        state = self.state(service)
        self._watching[call] = service, state
        call.tell(state)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def leave(self, call: WatchCall) -> None:
        """It watches no more."""
        self._watching.pop(call, None)

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        states: dict[str, int] = {}
        for call, (service, told) in tuple(self._watching.items()):
            state = states.get(service)
            if state is None:
                state = states[service] = self.state(service)
            if state != told and call in self._watching:
                self._watching[call] = service, state
                call.tell(state)
        if self._watching:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def _check(self, request: Any) -> bytes:
        state = self.state(request.service)
        if state == _UNKNOWN:
            raise Damaged(Code.NOT_FOUND, "no such service; name a model, or nothing for the node")
        return _answer(state)

    def _begin(self, request: Any) -> bytes:
        name: str = request.service
        return name.encode()

    def _watch(self, *call: Any) -> WatchCall:
        return WatchCall(self, *call)


class WatchCall(UnaryCall):
    """A call of Watch: one message, and answers until its client has enough."""

    __slots__ = ("_health",)

    def __init__(self, health: Health, *call: Any) -> None:
        self._health = health
        super().__init__(*call)

    def done(self, _: Work, said: bytes | Status) -> None:
        """See ``Call``: the request was read, and names a service."""
        self._work = None
        try:
            if isinstance(said, Status):
                self.finish(said)
            else:
                self._health.follow(self, said.decode())
        except Damaged as exc:
            self.finish(exc.status)

    def tell(self, state: int) -> None:
        """Say how the service is."""
        self.say(framed(_answer(state)))

    def withdraw(self) -> None:
        """See ``Call``."""
        super().withdraw()
        self._health.leave(self)


def _answer(state: int) -> bytes:
    data: bytes = _ANSWER(status=state).SerializeToString()
    return data
