"""The journal's format and its reader; ``cotenant.telemetry.journal`` is the writer.

A journal is a directory of segments. A segment is a line that names the format, then blocks::

    segment  "cotenant journal 2\\n" block*
    block    length:u32 crc32:u32 body              what was written at one go
    body     (length:u32 entry)*                    entry: MessagePack of one type below

All numbers are little-endian. Entries between two headers belong together: a ``Header`` holds
everything that a replay needs to start there, and each segment has one before its first
``Record``. After a ``Gap`` nothing can be replayed until the next ``Header``.

No clock and no thread in here: the pure layers may read journals.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final, TypeVar
from zlib import crc32

import msgspec

from cotenant.domain.actions import Action
from cotenant.domain.device import DeviceSpec
from cotenant.domain.errors import JournalError
from cotenant.domain.events import Event
from cotenant.domain.plan import Plan
from cotenant.domain.snapshot import Snapshot
from cotenant.policy import estimate, iterations, state
from cotenant.policy.memory import account
from cotenant.policy.planstate import PlannerState, Tuning
from cotenant.policy.state import DispatcherState
from cotenant.telemetry.compiled import restore_types

FORMAT = 2
SUFFIX = ".cotj"
BLOCK = struct.Struct("<II")
LENGTH = struct.Struct("<I")
DETAILED_BYTES = 8 * 2**20
"""How much of the newest segments ``recent`` gives whole; to explain that takes some 2 s."""
MAX_BLOCK = 2**30
"""A block that claims more bytes is damage, not a block cut short."""

_T = TypeVar("_T")
_NAME = b"cotenant journal "
MAGIC = _NAME + b"%d\n" % FORMAT


class _Entry(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    pass


class Header(_Entry, frozen=True, gc=False):
    """Where a replay can start. ``wall`` is seconds since the epoch at ``now`` (ns, monotonic).

    ``dispatcher`` and ``planner`` are the encoded states after everything before the header;
    ``run`` is the same for all headers of one start of the node.
    """

    format: int
    cotenant: str
    wall: float
    now: int
    devices: tuple[DeviceSpec, ...]
    dispatcher: bytes
    planner: bytes
    tuning: Tuning
    run: str = ""

    def dispatcher_state(self) -> DispatcherState:
        """The dispatcher's checkpoint; raises JournalError if this Cotenant cannot read it."""
        return self._decode(self.dispatcher, DispatcherState)

    def planner_state(self) -> PlannerState:
        """The planner's checkpoint; raises JournalError if this Cotenant cannot read it."""
        return self._decode(self.planner, PlannerState)

    def wall_at(self, now: int) -> float:
        """Seconds since the epoch at ``now`` (ns, monotonic, of the same run)."""
        return self.wall + (now - self.now) / 1e9

    def _decode(self, data: bytes, kind: type[_T]) -> _T:
        try:
            return msgspec.msgpack.decode(data, type=kind)
        except msgspec.DecodeError as exc:
            raise JournalError(
                f"the checkpoint was written by Cotenant {self.cotenant} and does not fit this one "
                f"({exc}); use the Cotenant that wrote it"
            ) from None


class Record(_Entry, frozen=True, gc=False):
    """One event and what the dispatcher decided on it at ``now`` (ns, monotonic)."""

    now: int
    event: Event
    actions: tuple[Action, ...]


class PlanRecord(_Entry, frozen=True, gc=False):
    """One run of the planner; ``plan`` is None where it kept the present one."""

    now: int
    snapshot: Snapshot
    plan: Plan | None


class Gap(_Entry, frozen=True, gc=False):
    """``records`` entries (0: unknown) were lost between two times (ns; 0: unknown)."""

    records: int
    since: int
    until: int
    reason: str


Entry = Header | Record | PlanRecord | Gap

STATE_MODULES: Final = (account, estimate, iterations, state)
"""Where the classes of a checkpoint stand that may be compiled."""

for _module in STATE_MODULES:
    restore_types(_module)
_decode = msgspec.msgpack.Decoder(Entry).decode


def read(
    path: str | Path, kinds: Collection[type[Entry]] = (Header, Record, PlanRecord, Gap)
) -> Iterator[Entry]:
    """Entries of a segment, or of all segments of a directory, oldest first.

    ``kinds`` leaves out all others without decoding them. The end of a segment that was being
    written when the node was killed is reported as a ``Gap``. Raises JournalError naming file
    and offset for damage, another format, or a path that holds no journal; everything before
    the damage has been yielded by then.
    """
    tags = frozenset(kind.__name__.encode() for kind in kinds)
    path = Path(path)
    if not path.is_dir():
        yield from _read_segment(path, tags)
        return
    found = segments(path)
    if not found:
        raise JournalError(f"{path}: no journal segments (*{SUFFIX}) in this directory")
    for segment in found:
        # The node may delete its oldest segments while they are read.
        if segment.exists():
            yield from _read_segment(segment, tags)


def recent(directory: Path, detailed_bytes: int = DETAILED_BYTES) -> Iterator[Entry]:
    """The newest segments whole, at least so many bytes of them; of older ones only the plans.

    Raises JournalError as ``read`` does.
    """
    found = segments(directory) if directory.is_dir() else []
    if not found:
        raise JournalError(
            f"{directory}: no journal here; give its directory with --journal,"
            " or the node's with --state-dir"
        )
    detailed, size = len(found), 0
    while detailed > 0 and size < detailed_bytes:
        detailed -= 1
        size += _size_of(found[detailed])
    for path in found[:detailed]:
        if path.exists():  # the node may delete its oldest meanwhile
            yield from read(path, kinds=(Header, PlanRecord, Gap))
    for path in found[detailed:]:
        yield from read(path)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def segments(directory: Path) -> list[Path]:
    """The segments of a journal, oldest first; empty if there is none."""
    return sorted(directory.glob(f"*{SUFFIX}"))


def block(entries: list[Entry]) -> bytes:
    """The entries as one block."""
    body = b"".join(LENGTH.pack(len(e)) + e for e in map(msgspec.msgpack.encode, entries))
    return BLOCK.pack(len(body), crc32(body)) + body


def _read_segment(path: Path, tags: frozenset[bytes]) -> Iterator[Entry]:
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise JournalError(f"{path}: cannot be read: {exc.strerror}") from None
    _check_format(path, data)
    view, offset = memoryview(data), len(MAGIC)
    while offset < len(data):
        start = offset + BLOCK.size
        # Some file systems leave zeros at the end after a power failure.
        if start > len(data) or not any(view[offset:]):
            break
        length, crc = BLOCK.unpack_from(data, offset)
        body = view[start : start + length]
        if len(body) < length <= MAX_BLOCK:
            yield from _entries(path, body, start, tags, torn=True)
            break
        if length == 0 or length > MAX_BLOCK or crc32(body) != crc:
            raise JournalError(
                f"{path}: damaged at offset {offset}: the checksum of a block is wrong;"
                " what comes before it is readable"
            )
        yield from _entries(path, body, start, tags, torn=False)
        offset = start + length
    if offset != len(data):
        at = min(offset, len(data))
        yield Gap(0, 0, 0, f"{path.name} ends in the middle of a record, at offset {at}")


def _entries(
    path: Path, body: memoryview, base: int, tags: frozenset[bytes], torn: bool
) -> Iterator[Entry]:
    """Entries of one block; of a torn one as many as are whole."""
    at = 0
    while at + LENGTH.size <= len(body):
        (length,) = LENGTH.unpack_from(body, at)
        start, end = at + LENGTH.size, at + LENGTH.size + length
        if end > len(body):
            break
        entry = body[start:end]
        try:
            if _tag(entry) in tags:
                yield _decode(entry)
        except (msgspec.DecodeError, IndexError) as exc:
            if torn:
                return
            raise JournalError(
                f"{path}: the record at offset {base + at} is none that this Cotenant knows: {exc}"
            ) from None
        at = end
    if at != len(body) and not torn:
        raise JournalError(f"{path}: damaged at offset {base + at}: a record is cut short")


def _tag(entry: memoryview) -> bytes:
    """The type's name, which follows a one-byte array header and a one-byte length."""
    return bytes(entry[2 : 2 + (entry[1] & 0x1F)])


def _check_format(path: Path, data: bytes) -> None:
    if data.startswith(MAGIC) or MAGIC.startswith(data):
        return
    line = data[:64].split(b"\n")[0]
    found = line.removeprefix(_NAME)
    if line != found and found.isdigit():
        raise JournalError(
            f"{path}: journal format {int(found)}, this Cotenant reads {FORMAT};"
            " use the Cotenant that wrote it"
        )
    raise JournalError(f"{path}: damaged at offset 0, or not a journal of Cotenant")
