"""Who may see the pages: signed in where the node has a token, and never from another site.

A browser shows the token once, in the body of a form, and gets a cookie with a random number that
means nothing elsewhere. Numbers live in memory: a node that starts again knows none of them.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from cotenant.domain.config import is_loopback
from cotenant.serving.intake import authorised

LASTS_S: Final = 12 * 3600.0
MOST_SESSIONS: Final = 64
MOST_FAILURES: Final = 10
FAILURES_S: Final = 60.0


class TooMany(Exception):
    """Too many wrong tokens; nobody can sign in for a while."""


class Door:
    """See the module's text. ``host``: the address that the node was told to listen on."""

    def __init__(
        self, token: str | None, host: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._token = token.encode() if token else None
        self._host = host.strip("[]").lower()
        self._clock = clock
        self._sessions: dict[str, float] = {}
        self._failures: deque[float] = deque(maxlen=MOST_FAILURES)
        # Cookies do not know ports: nodes beside this one have other names for theirs.
        self._cookie = f"cotenant-{secrets.token_hex(4)}"

    @property
    def locked(self) -> bool:
        """Whether one has to sign in."""
        return self._token is not None

    def wrong(self, request: Request) -> str | None:
        """Why a request is not answered at all, if it may come from a page of another site."""
        host = request.headers.get("host", "")
        if not self.locked and not self._is_ours(host):
            return (
                "this node has no token, so it answers under names of this machine alone; use"
                " localhost, or set node.token_file"
            )
        origin = request.headers.get("origin")
        reads = request.method in ("GET", "HEAD")
        if (origin is None and not reads) or (origin is not None and not _same(origin, host)):
            return "this request comes from a page of another site"
        site = request.headers.get("sec-fetch-site", "none")
        visits = reads and request.headers.get("sec-fetch-mode") == "navigate"
        if site not in ("none", "same-origin") and not visits:
            return "this request comes from a page of another site"
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        bare = f"[{name}]:0" if ":" in name else f"{name}:0"
        return bool(name) and (name == self._host or (is_loopback(bare) and _is_address(name)))

    def is_open_to(self, request: Request) -> bool:
        """Whether who asks may see the pages."""
        if self._token is None:
            return True
        given = request.headers.get("authorization", "").encode("latin-1")
        if given and authorised(given, self._token):
            return True
        until = self._sessions.get(request.cookies.get(self._cookie, ""), 0.0)
        return self._clock() < until

    def sign_in(self, given: str, response: Response) -> bool:
        """Whether a token is right; then the response carries a session. Raises TooMany."""
        now = self._clock()
        full = len(self._failures) == MOST_FAILURES
        if full and now - self._failures[0] < FAILURES_S:
            raise TooMany
        if self._token is None or not hmac.compare_digest(given.strip().encode(), self._token):
            self._failures.append(now)
            return False
        session = secrets.token_urlsafe(32)
        self._sessions = {s: until for s, until in self._sessions.items() if now < until}
        while len(self._sessions) >= MOST_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        self._sessions[session] = now + LASTS_S
        response.set_cookie(
            self._cookie, session, max_age=int(LASTS_S), httponly=True, samesite="strict"
        )
        return True

    def sign_out(self, request: Request, response: Response) -> None:
        """End a session."""
        self._sessions.pop(request.cookies.get(self._cookie, ""), None)
        response.delete_cookie(self._cookie, httponly=True, samesite="strict")


def _same(origin: str, host: str) -> bool:
    """Whether an origin is the host that was asked; a proxy may have taken TLS off."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()


def _is_address(name: str) -> bool:
    """Of loopback, a name that no name server can be asked for: ``127.evil.example`` is none."""
    return name in ("localhost", "::1") or all(part.isdigit() for part in name.split("."))
