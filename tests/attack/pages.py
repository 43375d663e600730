"""Attacks over HTTP/1 on the dashboard's pages, for a node that serves ``small``.

``ATTACKS`` maps a name to ``function(port, seconds)``.
"""

from __future__ import annotations

from urllib.parse import quote_from_bytes

from tests.attack.http1_connection import Attack, crowds, get, line, post, streams

_TRY = b"/dashboard/services/small/try"
_FORM = b"Content-Type: application/x-www-form-urlencoded\r\n"
_ORIGIN = b"Origin: http://127.0.0.1\r\n"
_MOST = 2**20
"""Bytes of a form that are taken."""


def _form(path: bytes, body: bytes) -> bytes:
    return post(path, body, _FORM + _ORIGIN)


def _try(given: bytes) -> bytes:
    return _form(_TRY, b"input=" + quote_from_bytes(given).encode())


ATTACKS: dict[str, Attack] = {
    "pages": streams(b"", get(b"/") * 500),
    "pages, unread": streams(b"", get(b"/") * 500, read=False),
    "pages of nobody": streams(b"", get(b"/dashboard/jobs/" + b"%41" * 500) * 500),
    "pages of a model": streams(b"", get(b"/dashboard/services/small") * 500),
    "files": streams(b"", get(b"/dashboard/static/uplot.min.js") * 500),
    "streams of events": streams(b"", get(b"/dashboard/events")),
    "crowds of viewers": crowds(get(b"/dashboard/events")),
    "viewers that do not read": crowds(get(b"/dashboard/events") + get(b"/") * 50),
    "decisions": streams(b"", get(b"/dashboard/decisions") * 50),
    "studies": streams(b"", _form(b"/dashboard/what-if", b"policy=static&span=60") * 50),
    "studies of nothing": streams(b"", _form(b"/dashboard/what-if", b"policy=x&span=y") * 500),
    "forms of a model": streams(b"", _try(b'{"x": [[0.5]]}') * 200),
    "forms of nested lists": streams(b"", _try(b'{"x": ' + b"[" * 60000)),
    "forms of numbers": streams(b"", _try(b'{"x": [' + b"1," * 100000 + b"1]}")),
    "forms of many fields": streams(b"", _form(_TRY, b"a=b&" * (_MOST // 4)) * 4),
    "forms of per cents": streams(b"", _form(_TRY, b"input=" + b"%" * (_MOST - 6)) * 4),
    "forms that are too large": streams(b"", _form(_TRY, b"x" * (_MOST + 1)) * 4),
    "slow forms": crowds(line(_TRY) + _FORM + _ORIGIN + b"Content-Length: 1000\r\n\r\n", b"x"),
    "logins": streams(b"", _form(b"/dashboard/login", b"token=" + b"x" * 1000) * 500),
    "forms from elsewhere": streams(b"", post(_TRY, b"x" * _MOST, _FORM) * 4),
    "logins from elsewhere": streams(
        b"", post(b"/dashboard/login", b"token=x", _FORM + b"Origin: http://elsewhere\r\n") * 500
    ),
    "other hosts": streams(b"", get(b"/").replace(b"127.0.0.1", b"elsewhere") * 500),
}
