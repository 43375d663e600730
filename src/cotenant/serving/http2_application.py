"""What an HTTP/2 connection is given: what it serves, and what it shares with others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cotenant.serving.http2_headers import Head, Headers
from cotenant.serving.http2_sending import Receiver, Stream
from cotenant.serving.intake import Share
from cotenant.serving.overdue import Overdue

if TYPE_CHECKING:
    from cotenant.serving.http2_connection import Connection


class Application(Protocol[Head]):
    """What a server serves."""

    def head(self, headers: Headers) -> Head:
        """What a request's headers say. May be remembered for equal headers."""

    def open(self, stream: Stream, head: Head) -> Receiver | None:
        """Take up a request; None if it was answered at once."""


class Host(Protocol[Head]):
    """What a connection needs of its server."""

    app: Application[Head]
    incomplete: Overdue
    unread: Overdue

    def share(self) -> Share:
        """A share of the memory for bodies."""

    def admit(self, connection: Connection[Head]) -> None:
        """Serve one more connection; another may have to give way."""

    def answered(self, connection: Connection[Head]) -> None:
        """A request was answered to some use."""

    def discard(self, connection: Connection[Head]) -> None:
        """A connection is gone."""
