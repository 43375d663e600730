"""What Python's gRPC costs by itself: a raw handler with ONNX Runtime in process.

As ``bare_app`` it does nothing a server should: it takes the tensor from the end of the message,
where the benchmark puts it, and answers with just enough of a ``ModelInferResponse``. Arguments:
gRPC port, HTTP port (answers any request with 200, for the benchmark to see that it is up); the
model's path is read from the environment, ``PEERS_MODEL``.
"""

from __future__ import annotations

import asyncio
import os
import sys

import grpc
import numpy as np
import uvloop

from onnx_session import open_session

SESSION = open_session(os.environ["PEERS_MODEL"])
SHAPE = (1, *SESSION.get_inputs()[0].shape[1:])
NBYTES = 4 * int(np.prod(SHAPE))
RAW_OUTPUT_CONTENTS = b"\x32"  # field 6, length-delimited
READY = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


async def infer(message: bytes, _: grpc.aio.ServicerContext) -> bytes:
    x = np.frombuffer(message, np.float32, offset=len(message) - NBYTES).reshape(SHAPE)
    y = SESSION.run(None, {"x": x})[0].tobytes()
    return RAW_OUTPUT_CONTENTS + bytes([len(y)]) + y


class AnyMethod(grpc.GenericRpcHandler):
    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(infer)


async def ready(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(READY)
    writer.close()


async def main(grpc_port: int, http_port: int) -> None:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((AnyMethod(),))
    server.add_insecure_port(f"127.0.0.1:{grpc_port}")
    await server.start()
    await asyncio.start_server(ready, "127.0.0.1", http_port)
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2])))
