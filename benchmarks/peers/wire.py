"""Requests as bytes: Open Inference Protocol v2 over REST (JSON, binary, base64) and gRPC.

The gRPC message is written by hand because the load generator only posts bytes: five bytes of
framing, then a ``ModelInferRequest``. Field numbers are those of the protocol's ``.proto``.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from model import Floats, Model

GRPC_METHOD = "/inference.GRPCInferenceService/ModelInfer"


@dataclass(frozen=True)
class Payload:
    """One request: where it is posted, its body and headers; `grpc` means HTTP/2 framing."""

    path: str
    body: bytes
    headers: tuple[tuple[str, str], ...]
    grpc: bool = False


def rest_json(model: Model, path: str | None = None) -> Payload:
    """The tensor as JSON numbers."""
    tensor = _tensor(model) | {"data": [round(float(v), 6) for v in model.input.ravel()]}
    return _post_json(model, {"inputs": [tensor]}, path)


def rest_base64(model: Model, path: str | None = None) -> Payload:
    """The tensor's bytes as base64 in JSON, for servers without the binary extension."""
    text = base64.b64encode(model.input.tobytes()).decode()
    tensor = {
        "name": "x",
        "datatype": "BYTES",
        "shape": [1, 1],
        "parameters": {"content_type": "base64"},
        "data": [text],
    }
    return _post_json(model, {"inputs": [tensor]}, path)


def rest_binary(model: Model) -> Payload:
    """The binary tensor extension: a JSON header, then the tensor's bytes; a JSON answer."""
    raw = model.input.tobytes()
    tensor = _tensor(model) | {"parameters": {"binary_data_size": len(raw)}}
    header = json.dumps({"inputs": [tensor]}, separators=(",", ":")).encode()
    headers = (
        ("Content-Type", "application/octet-stream"),
        ("Inference-Header-Content-Length", str(len(header))),
    )
    return Payload(_infer_path(model), header + raw, headers)


def multipart(model: Model, path: str) -> Payload:
    """The tensor's bytes as a file upload named ``x``, for servers whose protocol is the user's."""
    boundary = "cotenant-peers"
    head = (
        f"--{boundary}\r\n"
        'Content-Disposition: form-data; name="x"; filename="x.bin"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    body = head.encode() + model.input.tobytes() + f"\r\n--{boundary}--\r\n".encode()
    return Payload(path, body, (("Content-Type", f"multipart/form-data; boundary={boundary}"),))


def grpc_raw(model: Model) -> Payload:
    """``ModelInfer`` with the tensor in ``raw_input_contents``."""
    shape = b"".join(_varint(size) for size in model.input.shape)
    tensor = _field(1, b"x") + _field(2, b"FP32") + _field(3, shape)
    message = _field(1, model.name.encode()) + _field(5, tensor) + _field(7, model.input.tobytes())
    framed = struct.pack(">BI", 0, len(message)) + message
    headers = (("content-type", "application/grpc"), ("te", "trailers"))
    return Payload(GRPC_METHOD, framed, headers, grpc=True)


def read_json(reply: bytes) -> Floats:
    """The first output of a REST answer, flat."""
    return np.asarray(json.loads(reply)["outputs"][0]["data"], dtype=np.float32).ravel()


def read_grpc(reply: bytes) -> Floats:
    """The first output of a ``ModelInferResponse``, raw or as ``fp32_contents``, flat."""
    for number, value in _fields(reply):
        if number == 6:
            return np.frombuffer(value, dtype="<f4")
    for number, output in _fields(reply):
        for inner, contents in _fields(output) if number == 5 else ():
            for leaf, values in _fields(contents) if inner == 5 else ():
                if leaf == 6:
                    return np.frombuffer(values, dtype="<f4")
    return np.empty(0, dtype=np.float32)


def _post_json(model: Model, document: object, path: str | None) -> Payload:
    body = json.dumps(document, separators=(",", ":")).encode()
    return Payload(path or _infer_path(model), body, (("Content-Type", "application/json"),))


def _infer_path(model: Model) -> str:
    return f"/v2/models/{model.name}/infer"


def _tensor(model: Model) -> dict[str, object]:
    return {"name": "x", "datatype": "FP32", "shape": list(model.input.shape)}


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Length-delimited fields of a message; fields of other wire types are passed over."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        if key & 7 == 2:
            size, at = _read_varint(message, at)
            yield key >> 3, message[at : at + size]
            at += size
        elif key & 7 == 0:
            _, at = _read_varint(message, at)
        else:
            at += 8 if key & 7 == 1 else 4


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
