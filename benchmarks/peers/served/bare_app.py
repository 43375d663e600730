"""The floor to compare with: a raw ASGI application under uvicorn, ONNX Runtime in process.

It speaks just enough of the Open Inference Protocol v2 to answer the benchmark's requests and
does nothing a server should: no checks, no metrics, no limits. Read from the environment:
``PEERS_MODEL`` (path), ``PEERS_BATCH`` (largest batch, 1 for none) and ``PEERS_THREADS`` (model
calls at a time; 0 calls the model on the event loop).
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from onnx_session import open_session

Floats = npt.NDArray[np.float32]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

BATCH = int(os.environ["PEERS_BATCH"])
THREADS = int(os.environ["PEERS_THREADS"])
SESSION = open_session(os.environ["PEERS_MODEL"])
POOL = ThreadPoolExecutor(max(1, THREADS))


def run_model(x: Floats) -> Floats:
    answer: Floats = SESSION.run(None, {"x": x})[0]
    return answer


class GreedyBatcher:
    """Whenever a thread is free it takes what is waiting, up to `BATCH` rows, and never waits."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Floats, asyncio.Future[Floats]]] = deque()
        self._running = 0

    async def infer(self, x: Floats) -> Floats:
        future: asyncio.Future[Floats] = asyncio.get_running_loop().create_future()
        self._waiting.append((x, future))
        self._start_next()
        return await future

    def _start_next(self) -> None:
        while self._waiting and self._running < THREADS:
            taken = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            batch = np.concatenate([x for x, _ in taken]) if len(taken) > 1 else taken[0][0]
            self._running += 1
            run = asyncio.get_running_loop().run_in_executor(POOL, run_model, batch)
            run.add_done_callback(lambda done, taken=taken: self._finish(taken, done))

    def _finish(
        self, taken: list[tuple[Floats, asyncio.Future[Floats]]], done: asyncio.Future[Floats]
    ) -> None:
        self._running -= 1
        self._start_next()
        for index, (_, future) in enumerate(taken):
            if not future.done():
                future.set_result(done.result()[index : index + 1])


BATCHER = GreedyBatcher()


async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await _lifespan(receive, send)
    elif scope["method"] == "GET":
        await _reply(send, b"{}")
    else:
        x = _read_tensor(scope, await _read_body(receive))
        y = await BATCHER.infer(x) if THREADS else run_model(x)
        output = {"name": "y", "datatype": "FP32", "shape": y.shape, "data": y.ravel()}
        document = {"outputs": [output]}
        await _reply(send, orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY))


def _read_tensor(scope: dict[str, Any], body: bytes) -> Floats:
    size = next((v for k, v in scope["headers"] if k == b"inference-header-content-length"), None)
    if size is None:
        tensor = orjson.loads(body)["inputs"][0]
        return np.asarray(tensor["data"], dtype=np.float32).reshape(tensor["shape"])
    shape = orjson.loads(body[: int(size)])["inputs"][0]["shape"]
    return np.frombuffer(body, dtype=np.float32, offset=int(size)).reshape(shape)


async def _read_body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _reply(send: Send, body: bytes) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
