"""Which refusal or error becomes which HTTP status, and how a client learns when to retry."""

from __future__ import annotations

from cotenant.domain.errors import (
    Conflict,
    CotenantError,
    InvalidRequest,
    ModelError,
    NotFound,
    NotReady,
    TooLarge,
)
from cotenant.domain.port import Refused
from cotenant.domain.request import Refusal
from cotenant.domain.units import MS, S

HTTP_STATUS: dict[Refusal, int] = {
    Refusal.OVERLOADED: 429,
    Refusal.QUEUE_FULL: 429,
    Refusal.RESERVED: 429,
    Refusal.MEMORY: 429,
    Refusal.UNREAD: 429,
    Refusal.UNAVAILABLE: 503,
    Refusal.SHUTTING_DOWN: 503,
    Refusal.WORKER_LOST: 503,
    Refusal.EXPIRED: 504,
    Refusal.DEADLINE: 422,
    Refusal.FAILED: 400,
    Refusal.CANCELLED: 499,
}
"""429 and 503 invite a retry, later; 499 (the client closed the request) is seen by nobody."""

AWAY = 1 * S
"""When to come back (ns) to what has gone, where nobody knows when, or if, it will be there again:
a node that stops, a model that is unloaded."""

_ERROR_STATUS: tuple[tuple[type[CotenantError], int], ...] = (
    (Conflict, 409),
    (InvalidRequest, 400),
    (NotFound, 404),
    (TooLarge, 413),
    (ModelError, 400),
)


def as_refused(error: Exception) -> Refused | None:
    """The refusal that an error amounts to: what is being loaded can be had later."""
    if isinstance(error, NotReady):
        return Refused(Refusal.UNAVAILABLE, AWAY, str(error))
    return None


def error_status(error: CotenantError) -> int:
    """HTTP status of an error that the node or a codec raised on purpose."""
    for kind, status in _ERROR_STATUS:
        if isinstance(error, kind):
            return status
    return 500


def retry_after_ms(refused: Refused) -> int:
    """Whole milliseconds, rounded up, after which to try again what may then be possible."""
    return -(-(refused.retry_after or AWAY) // MS)


def refusal_headers(refused: Refused) -> list[tuple[bytes, bytes]]:
    """HTTP headers that go with a refusal: its reason and, for 429 and 503, when to retry.

    ``Retry-After`` can only say whole seconds; ``Cotenant-Retry-After-Ms`` says it precisely.
    """
    headers = [(b"cotenant-refusal", refused.refusal.name.encode())]
    if HTTP_STATUS[refused.refusal] in (429, 503):
        wait = retry_after_ms(refused)
        headers.append((b"retry-after", b"%d" % -(-wait * MS // S)))
        headers.append((b"cotenant-retry-after-ms", b"%d" % wait))
    return headers
