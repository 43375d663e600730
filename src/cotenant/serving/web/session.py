"""Who may see the pages: signed in where there are tokens, and never from another site.

A browser shows a token once, in the body of a form, and gets a cookie with a random number that
means nothing elsewhere. Numbers live in memory: a node that starts again knows none of them. One
counts as long as its token does, and under the host alone that it was made for.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from cotenant.domain.address import is_loopback
from cotenant.serving.failures import Failures
from cotenant.serving.web.visitors import Keys, Visitor

LASTS_S: Final = 12 * 3600.0
MOST_SESSIONS: Final = 64


class TooMany(Exception):
    """Too many wrong tokens; nobody can sign in for a while."""


class _Session(NamedTuple):
    visitor: Visitor
    host: str
    until: float


class Door:
    """See the module's text. ``keys`` None: nobody has to sign in. ``host``: the address that the
    node was told to listen on; ``tls``: whether it is asked over TLS."""

    def __init__(
        self,
        keys: Keys | None,
        host: str,
        tls: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = keys
        self._host = host.strip("[]").lower()
        self._tls = tls
        self._clock = clock
        self._sessions: dict[str, _Session] = {}
        self._failures = Failures(clock)
        # Cookies do not know ports: nodes beside this one have other names for theirs.
        self._cookie = f"cotenant-{secrets.token_hex(4)}"

    @property
    def locked(self) -> bool:
        """Whether one has to sign in."""
        return self._keys is not None

    @property
    def label(self) -> str:
        """What the form asks for."""
        return self._keys.label if self._keys else ""

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
        if (origin is None and not reads) or (
            origin is not None and not _same(origin, host, self._tls)
        ):
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
        return bool(name) and (name == self._host or is_loopback(bare))

    def visitor(self, request: Request) -> Visitor | None:
        """Who asks; None for who may not see the pages."""
        if self._keys is None:
            return Visitor()
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and (found := self._keys.visitor(given.strip())):
            return found
        number = request.cookies.get(self._cookie, "")
        session = self._sessions.get(number)
        if session is None or session.host != request.headers.get("host", ""):
            return None
        now = self._keys.again(session.visitor) if self._clock() < session.until else None
        if now is None:
            del self._sessions[number]
        return now

    def sign_in(self, given: str, request: Request, response: Response) -> bool:
        """Whether a token is right; then the response carries a session. Raises TooMany: for a
        right one only if it could be guessed, else who has none could keep all out."""
        keys, many = self._keys, self._failures.too_many
        visitor = keys.visitor(given.strip()) if keys and not (many and keys.chosen) else None
        if visitor is None and many:
            raise TooMany
        if visitor is None:
            self._failures.note()
            return False
        now, number = self._clock(), secrets.token_urlsafe(32)
        self._sessions = {s: one for s, one in self._sessions.items() if now < one.until}
        while len(self._sessions) >= MOST_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        host = request.headers.get("host", "")
        self._sessions[number] = _Session(visitor, host, now + LASTS_S)
        response.set_cookie(
            self._cookie,
            number,
            max_age=int(LASTS_S),
            secure=self._tls,
            httponly=True,
            samesite="strict",
        )
        return True

    def sign_out(self, request: Request, response: Response) -> None:
        """End a session."""
        self._sessions.pop(request.cookies.get(self._cookie, ""), None)
        response.delete_cookie(self._cookie, secure=self._tls, httponly=True, samesite="strict")


def _same(origin: str, host: str, tls: bool) -> bool:
    """Whether an origin is the host that was asked; without ``tls`` a proxy may have taken it
    off."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    schemes = ("https",) if tls else ("http", "https")
    return parts.scheme in schemes and parts.netloc.lower() == host.lower()
