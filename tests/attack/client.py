"""The client that behaves: some requests a second over gRPC and REST, each on a connection of its
kind's usual sort (one channel that reconnects; a new connection for every request).

``python -m tests.attack.client GRPC_PORT HTTP_PORT RATE`` prints a line for each request when it
is over: protocol, when it was due (monotonic seconds), seconds until the answer, and ``ok`` or why
not.
"""

from __future__ import annotations

import asyncio
import sys
import time

import grpc
import numpy as np

from tests.attack.wire import inference

PATIENCE_S = 10.0
_TENSOR = np.zeros((1, 64)).tolist()
_JSON = f'{{"inputs":[{{"name":"x","shape":[1,64],"datatype":"FP32","data":{_TENSOR}}}]}}'.encode()
_HTTP = (
    b"POST /v2/models/small/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_JSON), _JSON)
)


def report(protocol: str, due: float, said: str) -> None:
    print(protocol, f"{due:.4f}", f"{time.monotonic() - due:.5f}", said, flush=True)


async def over_grpc(call: grpc.aio.UnaryUnaryMultiCallable, due: float) -> None:
    try:
        await call(inference()[5:], timeout=PATIENCE_S)
        report("grpc", due, "ok")
    except grpc.aio.AioRpcError as exc:
        report("grpc", due, exc.code().name)


async def over_http(port: int, due: float) -> None:
    try:
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(_HTTP)
            answer = await reader.read(-1)
            writer.close()
        report("http", due, "ok" if answer[9:12] == b"200" else f"status-{answer[9:12]!r}")
    except (OSError, TimeoutError) as exc:
        report("http", due, type(exc).__name__)


async def main(grpc_port: int, http_port: int, rate: float) -> None:
    """Until the process is ended."""
    backoff = [(f"grpc.{which}_reconnect_backoff_ms", 100) for which in ("initial", "min", "max")]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}", options=backoff) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        tasks: set[asyncio.Task[None]] = set()
        due = time.monotonic()
        while True:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            for work in (over_grpc(call, due), over_http(http_port, due)):
                task = asyncio.create_task(work)
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            due += 1 / rate


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
