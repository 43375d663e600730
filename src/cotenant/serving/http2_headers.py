"""Header blocks that a client sends: decompressed (HPACK, RFC 7541, by the ``hpack`` library) and
held to the rules for requests (RFC 9113, section 8)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from hpack import Decoder, HPACKError
from hpack.table import HeaderTable

from cotenant.serving.http2_frames import ErrorCode, Fault

Headers = list[tuple[bytes, bytes]]
Head = TypeVar("Head")

_NAME = re.compile(rb"[!-9;-@\[-~]+")
"""What may name a field: visible, no upper case, no colon."""
_BAD_VALUE = re.compile(rb"[\0\r\n]|\A[ \t]|[ \t]\Z")
_PSEUDO = frozenset((b":method", b":scheme", b":path", b":authority"))
_NEEDED = (b":method", b":scheme", b":path")
_OF_CONNECTIONS = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
)
_BYTES_PER_UNIT = 32
"""A unit of work (``http2_credit``) decompresses about so much."""


class Block(NamedTuple, Generic[Head]):
    """What a block says."""

    head: Head | None
    """None unless the headers are those of a proper request."""
    length: int
    """The body's length in bytes, -1 if it is not stated."""
    trails: bool
    """Whether these may be trailers: no pseudo-headers, nothing malformed."""


class HeaderReader(Generic[Head]):
    """Reads one connection's header blocks, and ``parse`` makes of the headers what is wanted.

    A client that repeats itself sends the same bytes again and again once its table has settled.
    What a block meant that did not alter the table is remembered until one does. ``charge`` is
    told of the work that other blocks make, before it is done.
    """

    _MOST = 32
    _LONGEST = 1024

    def __init__(
        self, list_bytes: int, parse: Callable[[Headers], Head], charge: Callable[[int], None]
    ) -> None:
        self._decoder = Decoder(list_bytes)
        self._table = self._decoder.header_table = _CountingTable()
        self._parse = parse
        self._charge = charge
        self._known: dict[bytes, Block[Head]] = {}

    def read(self, block: bytes) -> Block[Head]:
        """What the headers of a block mean; raises Fault."""
        known = self._known.get(block)
        if known is not None:
            return known
        self._charge(len(block) // _BYTES_PER_UNIT)
        added = self._table.added
        try:
            found = self._decoder.decode(block, raw=True)
        except (HPACKError, IndexError) as exc:  # IndexError where a block ends within a literal
            raise Fault(ErrorCode.COMPRESSION_ERROR, f"bad header block: {exc}") from None
        # A few bytes may stand for many headers of the table.
        self._charge(sum(len(value) + 32 for _, value in found) // _BYTES_PER_UNIT)
        said = self._understand([(bytes(name), bytes(value)) for name, value in found])
        resized = b"\x20" <= block[:1] < b"\x40"
        if resized or self._table.added != added:
            self._known.clear()
        elif len(block) <= self._LONGEST:
            if len(self._known) == self._MOST:
                self._known.clear()
            self._known[block] = said
        return said

    def _understand(self, headers: Headers) -> Block[Head]:
        if not _well_formed(headers):
            return Block(None, -1, trails=False)
        lengths = {value for name, value in headers if name == b"content-length"}
        pseudo = [name for name, _ in headers if name[:1] == b":"]
        proper = (
            len(set(pseudo)) == len(pseudo)
            and all(name in pseudo for name in _NEEDED)
            and (b":path", b"") not in headers
            and len(lengths) <= 1
            and all(value.isdigit() and len(value) < 19 for value in lengths)
        )
        if not proper:
            return Block(None, -1, trails=not pseudo)
        length = int(lengths.pop()) if lengths else -1
        return Block(self._parse(headers), length, trails=False)


def _well_formed(headers: Headers) -> bool:
    """Names and values of permitted characters, pseudo-headers that are known and come first, and
    nothing that is about a connection of HTTP/1.1."""
    regular = False
    for name, value in headers:
        if name[:1] == b":":
            if regular or name not in _PSEUDO:
                return False
        else:
            regular = True
            if not _NAME.fullmatch(name) or name in _OF_CONNECTIONS:
                return False
            if name == b"te" and value != b"trailers":
                return False
        if _BAD_VALUE.search(value):
            return False
    return True


class _CountingTable(HeaderTable):
    """A table that counts what is added to it."""

    added = 0

    def add(self, name: bytes, value: bytes) -> None:
        self.added += 1
        super().add(name, value)
