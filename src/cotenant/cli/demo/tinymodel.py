"""The model of ``cotenant demo``: matrix products of fixed random weights, written as ONNX without
the package ``onnx``, which a plain installation does not have.

An ONNX file is one message of Protocol Buffers; the numbers of fields are those of ``onnx.proto``
(ONNX, opset 17). Only what this model needs of it is written.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Final

import numpy as np

from cotenant.engines.base import Array

NAME: Final = "tiny"
WIDTH: Final = 64
HIDDEN: Final = 512
TARGET_S: Final = 0.004
"""An execution takes about so long on one core of this machine."""
_PROBE: Final = 20
_MOST: Final = 400
_FLOAT: Final = 1
_VARINT, _BYTES = 0, 2


def write(path: Path) -> None:
    """Write a model whose execution takes about ``TARGET_S``; that is tried."""
    path.write_bytes(document(_PROBE))
    layers = round(_PROBE * TARGET_S / max(1e-6, _took(path)))
    path.write_bytes(document(min(_MOST, max(1, layers))))


def _took(path: Path) -> float:
    from cotenant.engines.onnx import OnnxEngine

    engine, times = OnnxEngine(path, (1,)), []
    for _ in range(12):
        began = time.perf_counter()
        engine.run(1, {"x": np.ones((1, WIDTH), np.float32)})
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def document(layers: int) -> bytes:
    """The file: ``x`` (n, 64) in, ``y`` (n, 64) out, FP32; all layers share two matrices."""
    random = np.random.default_rng(1)
    up = random.standard_normal((WIDTH, HIDDEN)).astype(np.float32) / 8
    down = random.standard_normal((HIDDEN, WIDTH)).astype(np.float32) / 23
    nodes, last = [], "x"
    for layer in range(layers):
        names = f"u{layer}", f"t{layer}", f"d{layer}"
        nodes.append(_node("MatMul", (last, "up"), names[0]))
        nodes.append(_node("Tanh", (names[0],), names[1]))
        nodes.append(_node("MatMul", (names[1], "down"), names[2]))
        last = names[2]
    nodes.append(_node("Identity", (last,), "y"))
    graph = b"".join(
        [
            *(_field(1, node) for node in nodes),
            _field(2, b"tiny"),
            _field(5, _tensor("up", up)),
            _field(5, _tensor("down", down)),
            _field(11, _value("x")),
            _field(12, _value("y")),
        ]
    )
    opset = _field(1, b"") + _number(2, 17)
    return _number(1, 8) + _field(2, b"cotenant") + _field(7, graph) + _field(8, opset)


def _node(kind: str, inputs: tuple[str, ...], output: str) -> bytes:
    """NodeProto."""
    names = b"".join(_field(1, name.encode()) for name in inputs)
    return names + _field(2, output.encode()) + _field(4, kind.encode())


def _tensor(name: str, values: Array) -> bytes:
    """TensorProto: its dimensions, type, name and raw data."""
    shape = b"".join(_number(1, length) for length in values.shape)
    data = values.astype("<f4").tobytes()
    return shape + _number(2, _FLOAT) + _field(8, name.encode()) + _field(9, data)


def _value(name: str) -> bytes:
    """ValueInfoProto of a matrix whose rows are free: the type of its elements, its shape."""
    rows, columns = _field(2, b"n"), _number(1, WIDTH)
    shape = _field(1, rows) + _field(1, columns)
    kind = _field(1, _number(1, _FLOAT) + _field(2, shape))
    return _field(1, name.encode()) + _field(2, kind)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3 | _VARINT) + _varint(value)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def request(port: int) -> bytes:
    """The bytes of one HTTP request of one row."""
    row = ",".join(["0.5"] * WIDTH)
    tensor = f'{{"name":"x","datatype":"FP32","shape":[1,{WIDTH}],"data":[{row}]}}'
    body = f'{{"inputs":[{tensor}]}}'
    return (
        f"POST /v2/models/{NAME}/infer HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()
