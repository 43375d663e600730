"""Tensors on their way through a node: clients' shared memory over both protocols."""

from __future__ import annotations

import asyncio
import os
import secrets
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from cotenant.serving.grpc_front import GrpcFront
from cotenant.serving.intake import Intake
from cotenant.serving.tensors import Limits

if TYPE_CHECKING:
    from tests.live.conftest import Box, Boxes

WIDTH = 1_200_000
SIZE = 4 * WIDTH
PROTOCOLS = {"http": tritonclient.http, "grpc": tritonclient.grpc}


class Region:
    """A client's shared memory of two tensors: what it asks, and where it wants the answer."""

    def __init__(self) -> None:
        self.key = f"/datapath-{secrets.token_hex(6)}"
        self._path = Path("/dev/shm") / self.key[1:]
        self.x = np.random.default_rng(1).standard_normal((1, WIDTH)).astype(np.float32)
        self._path.write_bytes(self.x.tobytes() + bytes(SIZE))

    def answer(self) -> Any:
        return np.fromfile(self._path, np.float32, WIDTH, offset=SIZE)

    def remove(self) -> None:
        self._path.unlink()


class Watch:
    """System calls that the node makes on regions: (name, bytes, the address in the process)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, int, int]] = []
        for name in ("preadv", "pwritev"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, real: Callable[..., int]) -> Callable[..., int]:
        def call(fd: int, buffers: list[memoryview], offset: int) -> int:
            done = real(fd, buffers, offset)
            address = np.frombuffer(buffers[0], np.uint8).ctypes.data
            self.calls.append((name, done, address))
            return done

        return call


def ask(library: Any, address: str, region: Region, times: int) -> None:
    """Requests whose tensors lie in the region."""
    client = library.InferenceServerClient(address)
    try:
        client.register_system_shared_memory("r", region.key, 2 * SIZE)
        given = library.InferInput("x", [1, WIDTH], "FP32")
        given.set_shared_memory("r", SIZE)
        wanted = library.InferRequestedOutput("y")
        wanted.set_shared_memory("r", SIZE, offset=SIZE)
        for _ in range(times):
            client.infer("wide", [given], outputs=[wanted])
        client.unregister_system_shared_memory("r")
    finally:
        client.close()


@pytest.fixture
def box(boxes: Boxes) -> Box:
    box = boxes()
    box.model("scale", "wide", width=WIDTH)
    return box.configure([{"name": "wide"}])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_clients_region_is_read_once_and_written_once(
    box: Box, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    region, times = Region(), 3

    async def live() -> tuple[list[tuple[str, int, int]], int, tuple[int, int]]:
        async with box.here() as node:
            grpc = GrpcFront(node, Intake(Limits()), None, "127.0.0.1", 0)
            ports = {"grpc": await grpc.start(), "http": box.port}
            try:
                async with asyncio.timeout(60):
                    while not node.is_ready():
                        await asyncio.sleep(0.02)
                    arena = node.models.services["wide"].arena
                    begin = np.frombuffer(arena.memory, np.uint8).ctypes.data
                    watch = Watch(monkeypatch)
                    asked = (PROTOCOLS[protocol], f"127.0.0.1:{ports[protocol]}", region)
                    await asyncio.to_thread(ask, *asked, 1)  # imports and buffers are made
                    watch.calls.clear()
                    tracemalloc.start()
                    await asyncio.to_thread(ask, *asked, times)
                    most = tracemalloc.get_traced_memory()[1]
                    return watch.calls, most, (begin, begin + arena.size)
            finally:
                tracemalloc.stop()
                await grpc.stop(5.0)

    try:
        calls, most, (begin, end) = asyncio.run(live())
        assert np.array_equal(region.answer(), 2 * region.x[0])
    finally:
        region.remove()
    assert [(name, size) for name, size, _ in calls] == [
        ("preadv", SIZE),
        ("pwritev", SIZE),
    ] * times
    assert all(begin <= address <= end - SIZE for _, _, address in calls), "straight from and to it"
    assert most < SIZE, "nor was a tensor copied anywhere else in the node's process"
