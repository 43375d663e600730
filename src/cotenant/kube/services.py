"""The kubelet's protocols: registration, preparing and unpreparing of claims, health of devices.

``pluginregistration`` v1, ``dra`` v1, ``dra-health`` v1alpha1 and v1 (``kubelet_protos``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import grpc

from cotenant.domain.errors import CotenantError
from cotenant.kube import kubelet_protos
from cotenant.kube.health import Board, DeviceHealth
from cotenant.kube.kubelet_protos import HEALTH, PLUGIN, REGISTRATION, SERVICES
from cotenant.kube.names import DRIVER
from cotenant.kube.preparing import ClaimRef, Preparer

log = logging.getLogger("cotenant.kube")

_MOST_S: Final = 30.0
_MARGIN_S: Final = 2.0
"""Of the kubelet's deadline, for the answer: without one it cannot say what was wrong."""
_CLAIMS: Final = 32
_STREAMS: Final = 4
_LOOK_S: Final = 0.5
_AGAIN_S: Final = 10.0
"""Health is told again after so long: the kubelet forgets it after 30 s."""

_message = kubelet_protos.message_class


class Services:
    """Answers the kubelet. ``endpoint`` is where claims are served, ``pool`` the node's name in the
    cluster; ``changed`` is called after claims came or went."""

    def __init__(self, endpoint: Path, pool: str, changed: Callable[[], None]) -> None:
        self._endpoint = endpoint
        self._pool = pool
        self._changed = changed
        self._preparer: Preparer | None = None
        self._workers: ThreadPoolExecutor | None = None
        self._streams = threading.Semaphore(_STREAMS)
        self._leaving = threading.Event()
        self.board = Board()
        self.refused = ""
        """Why the kubelet did not take the driver."""

    def open(self, preparer: Preparer) -> None:
        """From now on calls are answered, with ``preparer``."""
        self._leaving.clear()
        self._preparer = preparer
        self._workers = ThreadPoolExecutor(_CLAIMS, thread_name_prefix="claim")

    def leave(self) -> None:
        """End the streams, which go on for ever otherwise."""
        self._leaving.set()

    def close(self) -> None:
        """Wait for what still runs. No effect if it is not open."""
        if self._workers is not None:
            self._workers.shutdown()
            self._workers = None

    def for_registration(self) -> list[Any]:
        """The handlers for the registration socket."""
        calls = {
            "GetInfo": _unary(self._get_info, REGISTRATION, "InfoRequest"),
            "NotifyRegistrationStatus": _unary(
                self._registered, REGISTRATION, "RegistrationStatus"
            ),
        }
        return [grpc.method_handlers_generic_handler(REGISTRATION, calls)]

    def for_claims(self) -> list[Any]:
        """The handlers for the service's socket."""
        calls = {
            name: _unary(call, PLUGIN, f"{name}Request")
            for name, call in (
                ("NodePrepareResources", self._prepare),
                ("NodeUnprepareResources", self._unprepare),
            )
        }
        plugin = grpc.method_handlers_generic_handler(PLUGIN, calls)
        return [plugin, *(self._health(service) for service in HEALTH)]

    # -- registration

    def _get_info(self, _asked: Any, _context: Any) -> Any:
        return _message(REGISTRATION, "PluginInfo")(
            type="DRAPlugin",
            name=DRIVER,
            endpoint=str(self._endpoint),
            supported_versions=SERVICES,
        )

    def _registered(self, asked: Any, _context: Any) -> Any:
        self.refused = "" if asked.plugin_registered else asked.error or "no reason"
        if self.refused:
            log.error("the kubelet does not take this driver: %s", self.refused)
        else:
            log.info("the kubelet has registered driver %s", DRIVER)
        return _message(REGISTRATION, "RegistrationStatusResponse")()

    # -- claims

    def _prepare(self, asked: Any, context: Any) -> Any:
        deadline = _deadline(context)
        kind = _message(PLUGIN, "NodePrepareResourceResponse")

        def one(ref: ClaimRef) -> Any:
            said = kind()
            for device in self._open_preparer().prepare(ref, deadline):
                said.devices.add(
                    request_names=[device.request],
                    pool_name=self._pool,
                    device_name=device.device,
                    cdi_device_ids=device.cdi,
                    share_id=device.share_id or None,
                )
            return said

        answer = _message(PLUGIN, "NodePrepareResourcesResponse")()
        self._each(asked.claims, one, kind, answer)
        return answer

    def _unprepare(self, asked: Any, context: Any) -> Any:
        deadline = _deadline(context)
        kind = _message(PLUGIN, "NodeUnprepareResourceResponse")

        def one(ref: ClaimRef) -> Any:
            self._open_preparer().unprepare(ref, deadline)
            return kind()

        answer = _message(PLUGIN, "NodeUnprepareResourcesResponse")()
        self._each(asked.claims, one, kind, answer)
        return answer

    def _each(self, asked: Any, one: Callable[[ClaimRef], Any], kind: Any, answer: Any) -> None:
        """Every claim by itself and at the same time: none waits for another's readiness."""
        assert self._workers is not None
        refs = [ClaimRef(claim.uid, claim.namespace, claim.name) for claim in asked]
        for ref, said in zip(refs, self._workers.map(_safe(one, kind), refs), strict=True):
            answer.claims[ref.uid].CopyFrom(said)
        self._changed()

    def _open_preparer(self) -> Preparer:
        assert self._preparer is not None
        return self._preparer

    # -- health

    def _health(self, service: str) -> Any:
        def written(devices: tuple[DeviceHealth, ...]) -> bytes:
            answer = _message(service, "NodeWatchResourcesResponse")()
            now = int(time.time())
            for told in devices:
                each = answer.devices.add(
                    health=told.health, message=told.message, last_updated_time=now
                )
                each.device.pool_name, each.device.device_name = told.pool, told.device
            return bytes(answer.SerializeToString())

        handler = grpc.unary_stream_rpc_method_handler(
            self._watch,
            request_deserializer=_message(service, "NodeWatchResourcesRequest").FromString,
            response_serializer=written,
        )
        return grpc.method_handlers_generic_handler(service, {"NodeWatchResources": handler})

    def _watch(self, _asked: Any, context: Any) -> Iterator[tuple[DeviceHealth, ...]]:
        """What is judged: at once if anything is, at every change, and from time to time."""
        if not self._streams.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"there are {_STREAMS} already")
        try:
            seen, told = 0, time.monotonic()
            while context.is_active() and not self._leaving.is_set():
                version, devices = self.board.look(seen, _LOOK_S)
                if version != seen or time.monotonic() - told >= _AGAIN_S:
                    seen, told = version, time.monotonic()
                    yield devices
        finally:
            self._streams.release()


def _safe(one: Callable[[ClaimRef], Any], kind: Any) -> Callable[[ClaimRef], Any]:
    """Answers with the reason where ``one`` raises."""

    def answered(ref: ClaimRef) -> Any:
        try:
            return one(ref)
        except CotenantError as exc:
            log.warning("claim %s/%s: %s", ref.namespace, ref.name, exc)
            return kind(error=str(exc))
        except Exception:
            log.exception("claim %s/%s: a bug of the driver", ref.namespace, ref.name)
            return kind(error="the driver failed; its log says how")

    return answered


def _deadline(context: Any) -> float:
    left = context.time_remaining()
    longest = _MOST_S if left is None else min(_MOST_S, left - _MARGIN_S)
    return time.monotonic() + max(0.0, longest)


def _unary(answer: Callable[[Any, Any], Any], service: str, asked: str) -> Any:
    return grpc.unary_unary_rpc_method_handler(
        answer,
        request_deserializer=_message(service, asked).FromString,
        response_serializer=lambda said: said.SerializeToString(),
    )
