"""Attacks over HTTP/1 on what serves models, for a node that serves ``small``.

``ATTACKS`` maps a name to ``function(port, seconds)``. ``idle connections`` and ``slow heads`` need
many connections, so they open up to ``CONNECTIONS`` and keep them.
"""

from __future__ import annotations

import gzip
import json

from tests.attack.http1_connection import Attack, crowds, get, line, post, streams

_PATH = b"/v2/models/small/infer"
_LINE = line(_PATH)
_BODY = json.dumps(
    {"inputs": [{"name": "x", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}]}
).encode()
_CHUNKED = _LINE + b"Transfer-Encoding: chunked\r\n\r\n"
_LAST_CHUNK = _CHUNKED + b"%x\r\n%b\r\n0\r\n" % (len(_BODY), _BODY)


def _infer(body: bytes, more: bytes = b"") -> bytes:
    return post(_PATH, body, more)


def _numbers(count: int) -> bytes:
    start = b'{"inputs":[{"name":"x","shape":[1,%d],"datatype":"FP32","data":[' % count
    return start + b"1," * (count - 1) + b"1]}]}"


ATTACKS: dict[str, Attack] = {
    "trailers": streams(_LAST_CHUNK, b"".join(b"X%d: vvvvvvvvvv\r\n" % n for n in range(20000))),
    "one endless trailer": streams(_LAST_CHUNK + b"X: ", b"v" * 10**6),
    "chunk extensions": streams(_CHUNKED + b"1;", b"v" * 10**6),
    "chunks with extensions": streams(_CHUNKED, (b"1;" + b"v" * 100 + b"\r\nx\r\n") * 5000),
    "chunks of one byte": streams(_CHUNKED, b"1\r\nx\r\n" * 50000),
    "chunks of six bytes": streams(_CHUNKED, b"6\r\nxxxxxx\r\n" * 30000),
    "a body that nobody asked for": streams(
        get(b"/v2", b"Transfer-Encoding: chunked\r\n"),
        b"10000\r\n" + b"x" * 65536 + b"\r\n",
    ),
    "pipelined inferences": streams(b"", _infer(_BODY) * 500),
    "pipelined inferences, unread": streams(b"", _infer(_BODY) * 500, read=False),
    "pipelined GETs": streams(b"", get(b"/v2") * 5000),
    "pipelined GETs, unread": streams(b"", get(b"/metrics") * 5000, read=False),
    "pipelined 404s": streams(b"", get(b"/x") * 5000),
    "pipelined indexes": streams(b"", get(b"/v2/repository/index") * 5000),
    "pipelined statistics": streams(b"", get(b"/v2/models/stats") * 5000),
    "pipelined loads of nothing": streams(b"", post(b"/v2/repository/models/x/load", b"") * 3000),
    "pipelined loads": streams(b"", post(b"/v2/repository/models/small/load", b"") * 3000),
    "refused inferences": streams(b"", _infer(b"{") * 3000),
    "inferences of nothing": streams(b"", _infer(_BODY).replace(b"/small/", b"/nobody/") * 500),
    "empty lines": streams(b"", b"\r\n" * 100000),
    "numbers": streams(b"", _infer(_numbers(4 * 10**6))),
    "numbers that just fit on the loop": streams(b"", _infer(_numbers(32000))),
    "nested lists": streams(b"", _infer(b'{"inputs":' + b"[" * 60000)),
    "many inputs": streams(
        b"",
        _infer(b'{"inputs":[' + b'{"name":"x","datatype":"FP32","shape":[1]},' * 1400 + b"{}]}"),
    ),
    "a gzip bomb of blanks": streams(
        b"", _infer(gzip.compress(b" " * (64 * 2**20 - 10)), b"Content-Encoding: gzip\r\n")
    ),
    "a gzip bomb of numbers": streams(
        b"", _infer(gzip.compress(_numbers(4 * 10**6)), b"Content-Encoding: gzip\r\n")
    ),
    "a gzip bomb beside JSON": streams(
        b"",
        _infer(
            gzip.compress(_BODY + bytes(63 * 2**20)),
            b"Content-Encoding: gzip\r\nInference-Header-Content-Length: %d\r\n" % len(_BODY),
        ),
    ),
    "idle connections": crowds(b""),
    "connections idle after a request": crowds(_infer(_BODY)),
    "slow heads": crowds(_LINE, b"X: a\r\n"),
    "slow bodies": crowds(_LINE + b"Content-Length: 100000\r\n\r\n", b" "),
    "one slow head": streams(_LINE, b"X: a\r\n", pause_s=0.2),
    "one slow body": streams(_LINE + b"Content-Length: 100000\r\n\r\n", b" ", pause_s=0.2),
    "endless heads": streams(_LINE, b"X: a\r\n" * 20000),
    "one endless header": streams(_LINE + b"X: ", b"a" * 10**6),
    "an endless URL": streams(b"GET /", b"a" * 10**6),
    "no HTTP": streams(b"", bytes(range(256)) * 400),
}
