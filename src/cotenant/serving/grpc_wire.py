"""gRPC in terms of HTTP/2: what a call's headers say, its messages, and its status.

After the project's protocol description, ``doc/PROTOCOL-HTTP2.md`` in grpc/grpc.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from urllib.parse import quote_from_bytes

import numpy as np

from cotenant.domain.errors import CotenantError, InvalidRequest, ModelError, NotFound, TooLarge
from cotenant.domain.port import Refused
from cotenant.domain.request import Refusal
from cotenant.serving.http2_frames import header_block
from cotenant.serving.http2_headers import Headers
from cotenant.serving.intake import ENCODINGS, BodyRefused, Share, inflate
from cotenant.serving.refusals import as_refused, retry_after_ms
from cotenant.serving.tensors import shown

Metadata = tuple[tuple[str, str], ...]

_PREFIX = struct.Struct(">BI")
_DETAILS_BYTES = 1024  # statuses travel as headers, in up to three times the size; clients bound it
_OVERHEAD_BYTES = 256
"""What a message costs in memory beside its bytes."""
_SMALL_BYTES = 64 * 1024
_LARGEST = 2**32 - 1
_NOTHING = memoryview(b"")
_UNITS_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_MESSAGE_SAFE = bytes(c for c in range(0x20, 0x7F) if c != ord("%"))


class Code(enum.IntEnum):
    """gRPC's status codes."""

    OK = 0
    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


REFUSAL_CODE: dict[Refusal, Code] = {
    Refusal.OVERLOADED: Code.RESOURCE_EXHAUSTED,
    Refusal.QUEUE_FULL: Code.RESOURCE_EXHAUSTED,
    Refusal.RESERVED: Code.RESOURCE_EXHAUSTED,
    Refusal.MEMORY: Code.RESOURCE_EXHAUSTED,
    Refusal.UNREAD: Code.RESOURCE_EXHAUSTED,
    Refusal.UNAVAILABLE: Code.UNAVAILABLE,
    Refusal.SHUTTING_DOWN: Code.UNAVAILABLE,
    Refusal.WORKER_LOST: Code.UNAVAILABLE,
    Refusal.EXPIRED: Code.DEADLINE_EXCEEDED,
    Refusal.DEADLINE: Code.INVALID_ARGUMENT,
    Refusal.FAILED: Code.INVALID_ARGUMENT,
    Refusal.CANCELLED: Code.CANCELLED,
}
"""RESOURCE_EXHAUSTED and UNAVAILABLE invite a retry, later."""

_ERROR_CODE: tuple[tuple[type[CotenantError], Code], ...] = (
    (InvalidRequest, Code.INVALID_ARGUMENT),
    (TooLarge, Code.INVALID_ARGUMENT),
    (NotFound, Code.NOT_FOUND),
    (ModelError, Code.FAILED_PRECONDITION),
)


class Status(NamedTuple):
    """How a call ends."""

    code: Code
    details: str = ""
    metadata: Metadata = ()


class Damaged(Exception):
    """What came is not what gRPC sends; the call ends with ``status``."""

    def __init__(self, code: Code, details: str) -> None:
        self.status = Status(code, details)
        super().__init__(details)


def status_of(exc: Exception) -> Status | None:
    """The status that tells a client about ``exc``; None for what is a fault of ours."""
    if isinstance(exc, Damaged):
        return exc.status
    refused = exc.refused if isinstance(exc, BodyRefused) else as_refused(exc)
    if refused is not None:
        return refusal_status(refused)
    if isinstance(exc, CotenantError):
        code = next((c for kind, c in _ERROR_CODE if isinstance(exc, kind)), Code.INTERNAL)
        return Status(code, _clean(str(exc)))
    return None


def refusal_status(refused: Refused) -> Status:
    """The status of a refusal, with its reason and, where it may pass, the time to retry."""
    code = REFUSAL_CODE[refused.refusal]
    metadata = [("cotenant-refusal", refused.refusal.name)]
    if code in (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE):
        metadata.append(("retry-after-ms", str(retry_after_ms(refused))))
    return Status(code, _clean(refused.message), tuple(metadata))


def _clean(details: str) -> str:
    """Text that fits the headers and can be encoded, whatever names it quotes."""
    return details.encode(errors="replace")[:_DETAILS_BYTES].decode(errors="ignore")


class Head(NamedTuple):
    """What a call's headers say."""

    path: str
    encoding: str
    """Of compressed messages; empty if none are announced."""
    timeout_s: float | None
    authorization: bytes
    content_type: bytes
    method: bytes


def read_head(headers: Headers) -> Head:
    """Pick our headers out of a request's."""
    found = dict(headers)
    encoding = found.get(b"grpc-encoding", b"").decode("latin-1")
    return Head(
        path=found.get(b":path", b"").decode("latin-1"),
        encoding="" if encoding == "identity" else encoding,
        timeout_s=_timeout_s(found.get(b"grpc-timeout", b"").decode("latin-1")),
        authorization=found.get(b"authorization", b""),
        content_type=found.get(b"content-type", b""),
        method=found.get(b":method", b""),
    )


def _timeout_s(text: str) -> float | None:
    """``grpc-timeout``: at most 8 digits and a unit. One that is neither is no time-out."""
    digits, unit = text[:-1], text[-1:]
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 8 and unit in _UNITS_S):
        return None
    return int(digits) * _UNITS_S[unit]


class Message(NamedTuple):
    """One message as it came."""

    data: bytes | memoryview
    packed: bool
    """Whether it is compressed."""
    held: int
    """Bytes of the budget that it took."""


class Assembler:
    """Puts a stream's messages together from the pieces of its body.

    A message's memory is taken from the budget as its bytes arrive; whoever gets the message gives
    it back.
    """

    __slots__ = (
        "_data",
        "_encoding",
        "_filled",
        "_held",
        "_limit",
        "_packed",
        "_prefix",
        "_share",
    )

    def __init__(self, limit: int, share: Share, encoding: str) -> None:
        self._limit = limit
        self._share = share
        self._encoding = encoding
        self._prefix = b""
        self._data: memoryview | None = None
        self._filled = 0
        self._held = 0
        self._packed = False

    @property
    def midway(self) -> bool:
        """Whether a message has begun and is not complete."""
        return self._data is not None or bool(self._prefix)

    def feed(self, pieces: Sequence[memoryview]) -> Iterator[Message]:
        """The messages that ``pieces`` complete. Raises Damaged, BodyRefused."""
        for piece in pieces[self.fill(pieces) :]:
            rest = piece
            while rest:
                message, rest = self.next(rest)
                if message is not None:
                    yield message

    def fill(self, pieces: Sequence[memoryview]) -> int:
        """Copy those pieces, the first so many, that a message under way is longer than. Raises
        BodyRefused."""
        data, at = self._data, self._filled
        if data is None:
            return 0
        count, end = 0, at
        for piece in pieces:
            if end + len(piece) >= len(data):
                break
            end += len(piece)
            count += 1
        self._hold(end - at)
        for piece in pieces[:count]:
            stop = at + len(piece)
            data[at:stop] = piece
            at = stop
        self._filled = at
        return count

    def next(self, piece: memoryview) -> tuple[Message | None, memoryview]:
        """The first message that ``piece`` completes, if any, and what comes after it. Raises
        Damaged, BodyRefused."""
        if self._data is None:
            missing = 5 - len(self._prefix)
            self._prefix += piece[:missing]
            piece = piece[missing:]
            if len(self._prefix) < 5:
                return None, piece
            flags, size = _PREFIX.unpack(self._prefix)
            self._prefix = b""
            self._check(flags, size)
            if size <= len(piece) and size <= _SMALL_BYTES:
                self._hold(_OVERHEAD_BYTES + size)
                return self._message(bytes(piece[:size])), piece[size:]
            self._hold(_OVERHEAD_BYTES)
            self._data, self._filled = np.empty(size, np.uint8).data, 0
        data, at = self._data, self._filled
        stop = at + len(piece)
        if stop < len(data):
            self._hold(len(piece))
            data[at:stop] = piece
            self._filled = stop
            return None, _NOTHING
        missing = len(data) - at
        self._hold(missing)
        data[at:] = piece[:missing]
        self._data = None
        return self._message(data), piece[missing:]

    def drop(self) -> None:
        """Give back what a message took that will not be completed."""
        self._share.release(self._held)
        self._held = 0
        self._data = None

    def _hold(self, nbytes: int) -> None:
        self._share.hold(nbytes)
        self._held += nbytes

    def _message(self, data: bytes | memoryview) -> Message:
        held, self._held = self._held, 0
        return Message(data, self._packed, held)

    def _check(self, flags: int, size: int) -> None:
        if flags > 1:
            raise Damaged(Code.INTERNAL, f"a message begins with the flags {flags}; use 0 or 1")
        if flags and not self._encoding:
            raise Damaged(Code.INTERNAL, "a message is compressed, but no grpc-encoding was given")
        if size > self._limit:
            raise Damaged(
                Code.RESOURCE_EXHAUSTED,
                f"a message of {size} bytes; at most {self._limit} are accepted",
            )
        self._packed = bool(flags)


async def unpack(message: Message, encoding: str, limit: int, hold: Callable[[int], None]) -> bytes:
    """The decompressed message of at most ``limit`` bytes, which are held one by one as they come;
    raises InvalidRequest, Damaged, and what ``hold`` does."""
    data = await inflate(message.data, (encoding, "grpc-encoding"), limit, hold)
    if data is None:
        raise Damaged(
            Code.RESOURCE_EXHAUSTED,
            f"a message is larger when decompressed; at most {limit} are accepted",
        )
    return data


HEAD_BLOCK = header_block(((b"content-type", b"application/grpc"),), status=200)
"""What comes before the first message of an answer."""


def status_block(status: Status, first: bool) -> bytes:
    """A status as trailers; ``first`` if nothing was said before them."""
    headers = [(b"grpc-status", b"%d" % status.code)]
    if status.details:
        said = quote_from_bytes(status.details.encode(), _MESSAGE_SAFE)
        headers.append((b"grpc-message", said.encode()))
    headers += ((key.encode(), value.encode()) for key, value in status.metadata)
    return (HEAD_BLOCK if first else b"") + header_block(headers)


def framed(message: bytes) -> bytes:
    """A message with its prefix, uncompressed; raises Damaged if it is too large for one."""
    if len(message) > _LARGEST:
        raise Damaged(Code.RESOURCE_EXHAUSTED, "the answer is too large for one message (4 GiB)")
    return _PREFIX.pack(0, len(message)) + message


def head_problem(head: Head) -> bytes | None:
    """The block of headers that answers what is no gRPC call we understand; None for others."""
    if head.method != b"POST" or not head.content_type.startswith(b"application/grpc"):
        return header_block(((b"accept-post", b"application/grpc"),), status=415)
    if head.encoding and head.encoding not in ENCODINGS:
        problem = f"grpc-encoding {shown(head.encoding)} is not supported; use gzip or deflate"
        accepted = (("grpc-accept-encoding", "identity,gzip,deflate"),)
        return status_block(Status(Code.UNIMPLEMENTED, problem, accepted), first=True)
    return None
