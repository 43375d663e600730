"""What is promised to claims, on the disk before it is done: a file a claim.

A claim is entered as ``preparing`` before the node is asked for anything, and as ``prepared``
once its CDI spec is there. So whatever the driver did for a claim, a file names it.

A file has two lines: the entry as JSON, and its CRC-32. One that cannot be read is moved aside, not
dropped: its name still says which claim has something reserved.
"""

from __future__ import annotations

import logging
import threading
import zlib
from pathlib import Path
from typing import Final

import msgspec

from cotenant.domain.reservation import Reservation
from cotenant.kube import files

log = logging.getLogger("cotenant.kube")

PREPARING: Final = "preparing"
PREPARED: Final = "prepared"
_KEPT, _DAMAGED = ".json", ".damaged"


class Allocated(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device of the pool that a request was allocated. ``share_id`` is "" if it got the whole."""

    request: str
    device: str
    share_id: str = ""


class Promise(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is reserved at the node, and for which results of the allocation."""

    reservation: Reservation
    results: tuple[Allocated, ...]


class Edits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a container needs that uses a request: see ``ReservationStatus``. ``ids`` are the
    reservations that its processes are adopted by."""

    ids: tuple[str, ...]
    env: dict[str, str] = {}
    prepend: dict[str, str] = {}
    mounts: tuple[str, ...] = ()


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A claim. ``edits`` by request, and ``boot``, the boot in which they were true, are there once
    it is prepared."""

    uid: str
    namespace: str
    name: str
    pool: str
    promises: tuple[Promise, ...]
    state: str = PREPARING
    edits: dict[str, Edits] = {}
    boot: str = ""

    @property
    def ids(self) -> tuple[str, ...]:
        """Its reservations."""
        return tuple(promise.reservation.id for promise in self.promises)

    @property
    def prepared(self) -> bool:
        """Whether its pods may start."""
        return self.state == PREPARED


class Checkpoint:
    """The entries, in memory and in ``folder``. For several threads, each with a claim of its own.

    ``lost`` are claims whose file was damaged: something may be reserved for them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self.lost: set[str] = set()

    def open(self) -> None:
        """Read everything. Raises EnvironmentProblem if the folder cannot be used."""
        files.make_folder(self._folder, 0o700)
        files.clean(self._folder)
        try:
            found = sorted(self._folder.iterdir())
            contents = {path: path.read_bytes() for path in found if path.suffix == _KEPT}
        except OSError as exc:
            raise files.problem(self._folder, exc) from None
        self._entries = {}
        self.lost = {path.stem for path in found if path.suffix == _DAMAGED}
        for path, content in contents.items():
            try:
                self._entries[path.stem] = _read(path.stem, content)
            except (ValueError, msgspec.DecodeError) as exc:
                self._put_aside(path, str(exc))

    def get(self, uid: str) -> Entry | None:
        """A claim's entry, if it has one."""
        return self._entries.get(uid)

    def entries(self) -> list[Entry]:
        """All of them as they are now."""
        with self._lock:
            return list(self._entries.values())

    def save(self, entry: Entry) -> None:
        """Write an entry in place of the claim's last one. Raises EnvironmentProblem; the last one
        then holds."""
        line = msgspec.json.encode(entry)
        files.write(self._folder / f"{entry.uid}{_KEPT}", b"%s\n%08x\n" % (line, zlib.crc32(line)))
        with self._lock:
            self._entries[entry.uid] = entry

    def drop(self, uid: str) -> None:
        """Forget a claim, and what was damaged of it. Raises EnvironmentProblem."""
        files.remove(self._folder / f"{uid}{_KEPT}")
        with self._lock:
            self._entries.pop(uid, None)
        if uid in self.lost:
            files.remove(self._folder / f"{uid}{_DAMAGED}")
            self.lost.discard(uid)

    def _put_aside(self, path: Path, why: str) -> None:
        aside = path.with_suffix(_DAMAGED)
        try:
            path.replace(aside)
        except OSError as exc:
            raise files.problem(path, exc) from None
        self.lost.add(path.stem)
        log.error(
            "the record of claim %s is damaged (%s) and now lies in %s; what is reserved for it"
            " stays until the claim is unprepared",
            path.stem,
            why,
            aside,
        )


def _read(uid: str, content: bytes) -> Entry:
    """Raises ValueError, msgspec.DecodeError."""
    line, _, rest = content.partition(b"\n")
    if rest.strip() != b"%08x" % zlib.crc32(line):
        raise ValueError("its checksum is wrong")
    entry = msgspec.json.decode(line, type=Entry)
    if entry.uid != uid or entry.state not in (PREPARING, PREPARED):
        raise ValueError("it is not what its name says")
    return entry
