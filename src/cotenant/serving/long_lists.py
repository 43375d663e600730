"""Long JSON lists of numbers, in pieces: to decode one at once would hold every thread of the node
for as long, some 40 ns an element. The bytes are those that ``json_to_bytes`` gives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec

from cotenant.domain.errors import InvalidRequest
from cotenant.serving.tensors import depth_of, json_to_bytes, shown

PIECE_BYTES = 64 * 1024

_entries = msgspec.json.Decoder(list[msgspec.Raw])


def long_to_bytes(name: str, datatype: str, shape: Sequence[int], raw: memoryview) -> bytes:
    """Bytes of a tensor; raises InvalidRequest as ``json_to_bytes`` does."""
    count, commas = math.prod(shape), bytes(raw).count(b",")
    if count and commas != count - 1:
        raise InvalidRequest(
            f"tensor {shown(name)}: data holds {commas + 1} elements, but the shape {list(shape)}"
            f" means {count}"
        )
    depth = depth_of(raw, len(shape))
    pieces = _nested(name, shape, depth, raw) if depth > 1 else _flat(name, raw)
    return b"".join(
        json_to_bytes(name, datatype, part, math.prod(part), piece) for part, piece in pieces
    )


def _flat(name: str, raw: memoryview | msgspec.Raw) -> Iterator[tuple[Sequence[int], bytes]]:
    """A list of numbers, cut at commas: lists of their own and how many elements each has."""
    text = bytes(raw).strip(b" \t\r\n")
    if text[:1] != b"[" or text[-1:] != b"]":
        raise InvalidRequest(f"tensor {shown(name)}: data must be a list of numbers")
    at, end = 1, len(text) - 1
    while at <= end:
        cut = text.find(b",", min(at + PIECE_BYTES, end), end)
        cut = end if cut < 0 else cut
        piece = text[at:cut]
        at = cut + 1
        # An empty piece stands beside a comma too many, and must not pass for an empty list.
        count = piece.count(b",") + (1 if piece.strip() or len(text) > 2 else 0)
        yield (count,), b"[%b]" % piece


def _nested(
    name: str, shape: Sequence[int], depth: int, raw: memoryview | msgspec.Raw
) -> Iterator[tuple[Sequence[int], bytes]]:
    """A list of lists, cut between its entries, and those that are too long within them."""
    try:
        entries = _entries.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise InvalidRequest(
            f"tensor {shown(name)}: data must be a list of numbers, flat or nested ({exc})"
        ) from None
    if len(entries) != shape[0]:
        raise InvalidRequest(
            f"tensor {shown(name)}: a list of data holds {len(entries)} elements, but the shape"
            f" means {shape[0]}"
        )
    group: list[msgspec.Raw] = []
    held = 0
    for entry in entries:
        size = len(memoryview(entry))
        if size > PIECE_BYTES:
            if group:
                yield (len(group), *shape[1:]), b"[%b]" % b",".join(map(memoryview, group))
                group, held = [], 0
            inner = shape[1:]
            yield from (
                _nested(name, inner, depth - 1, entry) if depth > 2 else _row(name, inner, entry)
            )
            continue
        group.append(entry)
        held += size
        if held > PIECE_BYTES:
            yield (len(group), *shape[1:]), b"[%b]" % b",".join(map(memoryview, group))
            group, held = [], 0
    if group:
        yield (len(group), *shape[1:]), b"[%b]" % b",".join(map(memoryview, group))


def _row(
    name: str, shape: Sequence[int], raw: msgspec.Raw
) -> Iterator[tuple[Sequence[int], bytes]]:
    count = bytes(raw).count(b",") + 1
    if len(shape) != 1 or count != shape[0]:
        raise InvalidRequest(
            f"tensor {shown(name)}: a list of data holds {count} elements, but the shape means"
            f" {list(shape)}"
        )
    return _flat(name, raw)
