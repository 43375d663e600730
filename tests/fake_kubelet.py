"""A kubelet, as far as a DRA driver meets one: it watches the registry, asks who is there, says
whether it takes them, and calls them, over real sockets. It speaks by tables of its own making: the
field numbers below are copied from no module of ours, so a wrong one there is noticed.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import grpc

SERVICE = "/k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin/"
CALL_S = 45.0
"""How long a kubelet waits for an answer."""


class Device(NamedTuple):
    """Of an answer to NodePrepareResources."""

    requests: list[str]
    pool: str
    device: str
    cdi: list[str]
    share_id: str


class FakeKubelet:
    """Registers what is in ``registry`` from ``start`` to ``stop``; may be started again."""

    def __init__(self, registry: Path, accept: bool = True) -> None:
        self.registry = registry
        self.accept = accept
        self.registered: dict[str, tuple[str, list[str]]] = {}
        self._known: dict[Path, tuple[int, str]] = {}
        self._channels: dict[str, grpc.Channel] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        self._known.clear()
        self.registered.clear()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            there = {}
            for path in self.registry.glob("[!.]*"):
                try:
                    there[path] = path.stat().st_ino
                except OSError:
                    continue
            for path, (inode, name) in list(self._known.items()):
                if there.get(path) != inode:
                    del self._known[path]
                    self.registered.pop(name, None)
            for path, inode in there.items():
                if path not in self._known:
                    self._register(path, inode)

    def _register(self, path: Path, inode: int) -> None:
        try:
            with grpc.insecure_channel(f"unix:{path}") as channel:
                info = fields(_call(channel, "/pluginregistration.Registration/GetInfo", b"", 2.0))
                status = number(1, 1) if self.accept else text(2, "this kubelet wants none")
                notify = "/pluginregistration.Registration/NotifyRegistrationStatus"
                _call(channel, notify, status, 2.0)
        except grpc.RpcError:
            return
        name = _text(info, 2)
        self._known[path] = (inode, name)
        if self.accept and _text(info, 1) == "DRAPlugin":
            self.registered[name] = (_text(info, 3), [v.decode() for v in info.get(4, [])])

    def prepare(
        self, *claims: dict[str, Any], timeout: float = CALL_S
    ) -> dict[str, tuple[list[Device], str]]:
        """By uid, the devices and the error of each claim."""
        request = b"".join(block(1, _claim(claim)) for claim in claims)
        answer = self._service_call("NodePrepareResources", request, timeout)
        return {
            uid: (
                [_device(fields(device)) for device in fields(said).get(1, [])],
                _text(fields(said), 2),
            )
            for uid, said in _map(answer)
        }

    def unprepare(self, *claims: dict[str, Any], timeout: float = CALL_S) -> dict[str, str]:
        """By uid, the error of each claim."""
        request = b"".join(block(1, _claim(claim)) for claim in claims)
        answer = self._service_call("NodeUnprepareResources", request, timeout)
        return {uid: _text(fields(said), 1) for uid, said in _map(answer)}

    def try_prepare(self, claim: dict[str, Any]) -> tuple[list[Device], str]:
        """``prepare`` of one claim. A driver that went is an error like another: a kubelet notes
        it, and asks again later."""
        try:
            return self.prepare(claim)[claim["metadata"]["uid"]]
        except grpc.RpcError as error:
            return [], str(error)

    def try_unprepare(self, claim: dict[str, Any]) -> str:
        try:
            return self.unprepare(claim)[claim["metadata"]["uid"]]
        except grpc.RpcError as error:
            return str(error)

    def watch_health(self, service: str = "v1alpha1.DRAResourceHealth") -> Any:
        """A stream; ``health_of`` reads its messages."""
        channel = self._channel()
        return channel.unary_stream(f"/{service}/NodeWatchResources")(b"")

    def _service_call(self, method: str, request: bytes, timeout: float) -> bytes:
        return _call(self._channel(), SERVICE + method, request, timeout)

    def _channel(self) -> grpc.Channel:
        end = time.monotonic() + 40
        while "cotenant.dev" not in self.registered:
            assert time.monotonic() < end, "the driver did not register"
            time.sleep(0.02)
        endpoint = self.registered["cotenant.dev"][0]
        if endpoint not in self._channels:
            options = [("grpc.initial_reconnect_backoff_ms", 50)]
            self._channels[endpoint] = grpc.insecure_channel(f"unix:{endpoint}", options)
        return self._channels[endpoint]


def _call(channel: grpc.Channel, method: str, request: bytes, timeout: float) -> bytes:
    called = channel.unary_unary(method)
    answer: bytes = called(request, timeout=timeout, wait_for_ready=True)
    return answer


def _claim(claim: dict[str, Any]) -> bytes:
    meta = claim["metadata"]
    return text(1, meta["namespace"]) + text(2, meta["uid"]) + text(3, meta["name"])


def _device(found: dict[int, list[bytes]]) -> Device:
    return Device(
        [name.decode() for name in found.get(1, [])],
        _text(found, 2),
        _text(found, 3),
        [id.decode() for id in found.get(4, [])],
        _text(found, 5),
    )


def health_of(message: bytes) -> dict[tuple[str, str], tuple[int, str]]:
    """By pool and device: the number of its health, and the message."""
    told = {}
    for each in fields(message).get(1, []):
        found = fields(each)
        id = fields(found[1][0])
        health = int.from_bytes(found[2][0], "little") if 2 in found else 0
        told[_text(id, 1), _text(id, 2)] = (health, _text(found, 5))
    return told


def _map(message: bytes) -> list[tuple[str, bytes]]:
    entries = [fields(entry) for entry in fields(message).get(1, [])]
    return [(_text(entry, 1), entry.get(2, [b""])[0]) for entry in entries]


def _text(found: dict[int, list[bytes]], number: int) -> str:
    return found.get(number, [b""])[0].decode()


# -- protobuf's wire format


def number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def text(field: int, value: str) -> bytes:
    return block(field, value.encode()) if value else b""


def block(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def fields(message: bytes) -> dict[int, list[bytes]]:
    """By field number, what is there; numbers as eight bytes, little end first."""
    found: dict[int, list[bytes]] = {}
    at = 0
    while at < len(message):
        key, at = _read(message, at)
        if key & 7 == 2:
            size, at = _read(message, at)
            value, at = message[at : at + size], at + size
        else:
            assert key & 7 == 0, "no other type is in these messages"
            plain, at = _read(message, at)
            value = plain.to_bytes(8, "little")
        found.setdefault(key >> 3, []).append(value)
    return found


def _read(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
