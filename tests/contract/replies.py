"""Answers as a client over HTTP reads them: whole, or event by event."""

from __future__ import annotations

import http.client
import json
from typing import Any


class Reply:
    """An answer to a request: POST with a ``body``, else GET."""

    def __init__(self, served: Any, path: str, body: Any = None, **headers: str) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
        data = json.dumps(body) if isinstance(body, dict) else body
        self.connection.request("POST" if data else "GET", path, data, headers)
        self.answer = self.connection.getresponse()
        self.status = self.answer.status
        self.kind = self.answer.getheader("content-type")

    def whole(self) -> None:
        """Wait for all of it."""
        assert self.answer.read()
        self.connection.close()

    @property
    def json(self) -> Any:
        """All of it."""
        found = json.loads(self.answer.read())
        self.connection.close()
        return found

    def event(self) -> Any:
        """What the next event says, "[DONE]" or None at the end."""
        line = self.answer.readline()
        if not line:
            self.connection.close()
            return None
        assert line.startswith(b"data: ")
        assert self.answer.readline() == b"\n"
        return "[DONE]" if line == b"data: [DONE]\n" else json.loads(line[6:])

    @property
    def events(self) -> list[Any]:
        """What all that are left say."""
        return list(iter(self.event, None))
