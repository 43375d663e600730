"""The node's side of the launch gate: one control page for each job (docs/gate.md).

The laws:

* The node writes the head and nothing else. What it reads of seats was written by the job, and
  is checked: a seat that makes no sense is one that is not attached.
* The node never touches the file's memory. It reads and writes with system calls, because a job
  that truncates the file would otherwise end the node. Its mapping serves to name the futex.
* What is evicted is ordered seat by seat, with a number that the seat repeats when it is done.
  Opening the gate takes the order back.
* Channels are *held* behind a closed gate only: what of the job is on the device is stopped in its
  middle. Opening the gate lets it go on.
* ``close_gate`` returns at once; the gate is *drained* when nobody is inside a call and all that
  was put on the streams was reached, of every process that is attached.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from cotenant.domain.errors import DeviceError
from cotenant.domain.units import MS, US, S

PAGE_MAGIC = int.from_bytes(b"COTTGATE", "little")
SEAT_MAGIC = int.from_bytes(b"COTTSEAT", "little")
VERSION = 3
VARIABLE = "COTENANT_GATE"
DRIVER_VARIABLE = "COTENANT_GATE_DRIVER"
MEMORY_VARIABLE = "COTENANT_GATE_MEMORY"
SEATS = 64
SLOTS = 256
ROWS = 1024
HEAD_BYTES = 4096
SEAT_BYTES = 40960
SLOTS_AT = 4096
ROWS_AT = 8192
PAGE_BYTES = HEAD_BYTES + SEATS * SEAT_BYTES

HEAD = struct.Struct(f"<QIIIIQQQQQQII{SEATS}Q")
SEAT = struct.Struct("<QIIQQQQQQQQQQqIIIIqqqqqqqqqQQQIIIIIIII")
SLOT = struct.Struct("<IIII")
ROW = struct.Struct("<QQQII")
GATE_AT = 16
HOLD_AT = 20
BEAT_AT = 24
QUOTA_AT = 56
COMMAND_AT = 80

HOST_MARKS, ORPHANED, FAULTED = 1, 2, 4
"""Flags of a seat. ``ORPHANED``: its process took the node for dead, if only for a while."""
LEFT, DISABLED, PREEMPTED = range(3)
"""How channels are held: they are not; the driver disables them; their groups are not scheduled any
more, then preempted (native/page.h)."""
SLICE_US = 500
"""The time slice of channels that may be held, so that models have some of the device until they
are. Reports differ whether drivers heed it."""
HERE, CLOSING, MOVING, AWAY, RETURNING = range(5)
"""States of a seat's memory."""
REASONS = (
    "",
    "small",
    "plain",
    "pooled",
    "own",
    "managed",
    "array",
    "exported",
    "imported",
    "registered",
)
"""Why an allocation cannot be evicted, by number (native/page.h); the first: it can."""
_UNIT = 1 << 20
_MOST_BYTES = 1 << 50
_FUTEX_WAKE = 1
_FUTEX = {"x86_64": 202, "aarch64": 98}
_READS = 4
_LOOK_NS = MS // 2
_FIRST_LOOK_NS = 20 * US
"""The second look at a drain comes so soon, each further one after twice the time."""


@dataclass(frozen=True)
class Memory:
    """What one process has on devices, in bytes. ``held`` is all that counts for the quota."""

    held: int
    claimed: int
    """Being asked of the driver now; not in ``held`` yet."""
    freeing: int
    """Being freed by the driver; no longer in ``held``."""
    evictable: int
    evicted: int
    small: int
    """In allocations below 2 MB, which stay."""
    pinned: int
    """In larger ones that cannot be evicted, for the reasons that their rows give."""
    unlisted: int
    """Of those, in allocations for which the table has no row."""
    imported: int
    """Other processes' memory; not in ``held``."""
    refusals: int
    """Allocations refused because of the quota."""
    moved: int
    """By the last order, ..."""
    moved_ns: int
    """... which took so long."""
    answered: int
    """Number of the last order that was carried out or refused."""
    state: int
    error: int
    """Of the driver, at the last move; 0: none. Callers may be waiting for it to go away."""

    @property
    def resident(self) -> int:
        """On the device now."""
        return max(0, self.held - self.evicted)


@dataclass(frozen=True)
class Channels:
    """What one process says of its channels. Errors are the kernel driver's status, or the system's
    error above 16 bits; 0: none."""

    groups: int
    """Channel groups that are known."""
    done: int
    """Number of the last order to hold or release that was answered."""
    error: int
    """Why that could not be done."""
    slice_error: int
    """Why their time slice is what it was."""


@dataclass(frozen=True)
class Allocation:
    """A row of a process's table."""

    at: int
    bytes: int
    last_launch: int | None
    """Number of the last launch that could touch it; None: there was none since it was made."""
    evicted: bool
    reason: str
    """Why it cannot be evicted; empty if it can."""

    @property
    def evictable(self) -> bool:
        """Whether it could be evicted now."""
        return not self.reason and not self.evicted


@dataclass(frozen=True)
class Evicted:
    """What came of an order to evict or restore, over all processes that got it."""

    moved: int
    took_ns: int
    """Of the slowest."""
    errors: tuple[int, ...]
    """The driver's numbers, of processes that failed."""


@dataclass(frozen=True)
class Seat:
    """What one process of the job says of itself. Times in ns; counters since it attached."""

    pid: int
    entered: int
    left: int
    launches: int
    copies: int
    blocks: int
    blocked_ns: int
    throttled_ns: int
    overruns: int
    uncounted: int
    in_flight_ns: int
    waiting: int
    flags: int
    capturing: int
    outstanding: int
    """Streams that have not reached all that was put on them."""
    memory: Memory
    channels: Channels
    index: int
    """Of the seat in the page."""

    @property
    def drained(self) -> bool:
        """Nobody inside a call, nothing on a stream."""
        return self.entered == self.left and not self.outstanding


_COUNTERS = [
    field.name for field in fields(Seat) if field.name not in ("memory", "channels", "index")
]


class ControlPage:
    """A file for one job; ``env`` names it to the job's processes.

    ``bound_ns``: how much work the job may have on the device at a time, as estimated.
    ``patience_ns``: how long without ``beat`` until the job takes the node for dead.
    ``large_bytes``: copies and memsets from this size on are gated. ``pool_bytes``: pinned host
    memory that each process may take for what is evicted; 0: nothing can be. ``channels``: how
    channels are held; where they may be, a time slice of ``SLICE_US`` is asked for them. The file
    should lie in a ``tmpfs``, which devices can write to. Not safe for several threads, but for
    ``beat``.
    """

    def __init__(
        self,
        path: Path,
        bound_ns: int = 2 * MS,
        patience_ns: int = 2 * S,
        large_bytes: int = 1 << 20,
        pool_bytes: int = 8 << 30,
        channels: int = LEFT,
    ) -> None:
        self.path = path
        self.channels = channels
        self._settings = (patience_ns, bound_ns, large_bytes)
        self._more = (pool_bytes, channels, SLICE_US if channels else 0)
        self._order = self._restoring = 0
        self._asked: dict[int, list[tuple[int, int]]] = {}
        self._ordered: dict[int, tuple[int, int]] = {}  # seat -> its process, MiB to be away
        self._word = 0
        self._hold = 0
        self._fd = -1
        self._map: mmap.mmap | None = None
        self._address = 0

    def open(self) -> None:
        """Make the file, its gate open; raises DeviceError if that cannot be."""
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._fd = os.open(self.path, flags, 0o600)
            os.posix_fallocate(self._fd, 0, PAGE_BYTES)  # a hole would be a job's SIGBUS
            first = (PAGE_MAGIC, VERSION, SEATS, 0, 0, time.monotonic_ns(), *self._settings)
            head = (*first, 0, *self._more, *([0] * SEATS))
            os.pwrite(self._fd, HEAD.pack(*head), 0)
            self._map = mmap.mmap(self._fd, HEAD_BYTES)
        except OSError as error:
            if self._fd >= 0:
                self.path.unlink(missing_ok=True)
            self.close()
            raise DeviceError(f"control page {self.path}: {error.strerror or error}") from error
        self._locate()

    def adopt(self) -> None:
        """Take over the file of a node that is gone, with its processes and their settings. Raises
        DeviceError if there is none, or it is not of this version."""
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            head = HEAD.unpack(os.pread(self._fd, HEAD.size, 0).ljust(HEAD.size, b"\0"))
            if head[:3] != (PAGE_MAGIC, VERSION, SEATS) or self.lost:
                raise DeviceError(f"control page {self.path} is not what it was")
            self._map = mmap.mmap(self._fd, HEAD_BYTES)
        except (OSError, DeviceError) as error:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            raise DeviceError(f"control page {self.path}: {error}") from error
        self._word, self._hold, self.channels = head[3], head[4], head[11]
        # Numbers of orders go on, so that no answer to an old one passes for that to a new one.
        self._order = max(command >> 32 for command in head[-SEATS:])
        self._locate()

    def _locate(self) -> None:
        assert self._map is not None
        pointer = ctypes.c_char.from_buffer(self._map)
        self._address = ctypes.addressof(pointer)
        del pointer

    def close(self, keep: bool = False) -> None:
        """Open the gate for whoever still runs, and remove the file, unless it is to be kept for a
        node that takes it over."""
        if self._fd < 0:
            return
        if self._map is not None:
            self.open_gate()
            self._map.close()
            self._map = None
        if not keep and not self.lost:
            self.path.unlink(missing_ok=True)
        fd, self._fd = self._fd, -1
        os.close(fd)

    def env(self, driver: Path | None = None) -> dict[str, str]:
        """Variables for the job's processes, besides those that preload the shim. ``driver``: the
        real libcuda.so.1, where it is known."""
        found = {VARIABLE: str(self.path)}
        return found if driver is None else {**found, DRIVER_VARIABLE: str(driver)}

    # --- the gate ---------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether the gate was closed last."""
        return bool(self._word & 1)

    def close_gate(self) -> None:
        """From now on nobody of the job gets in. Beats, so that it is seen to be meant."""
        self.beat()
        if not self.closed:
            self._turn()

    def open_gate(self) -> None:
        """Let in whoever waits, each process once what it has evicted is back; what is held goes
        on."""
        if self._ordered:
            self.restore()
        self.release()
        if self.closed:
            self._turn()

    def beat(self) -> None:
        """The node lives; to be called several times within ``patience_ns``."""
        os.pwrite(self._fd, struct.pack("<Q", time.monotonic_ns()), BEAT_AT)

    def wait_drained(self, timeout_ns: int) -> bool:
        """Whether the gate drained within this time; beats meanwhile. Blocks."""
        return self._wait(self.drained, timeout_ns)

    def _wait(self, true: Callable[[], bool], timeout_ns: int) -> bool:
        end = time.monotonic_ns() + timeout_ns
        rest = _FIRST_LOOK_NS
        while not true():
            if time.monotonic_ns() >= end:
                return False
            self.beat()
            time.sleep(rest / S)
            rest = min(2 * rest, _LOOK_NS)
        return True

    def drained(self) -> bool:
        """Whether, the gate being closed, all processes are out of it.

        Seats are read twice: nobody was inside at the first reading and nobody came since, so no
        stream got work between them that the second would miss.
        """
        return not self._undrained()

    def _undrained(self) -> list[Seat]:
        first = {seat.pid: seat for seat in self.seats()}
        return [
            seat
            for seat in self.seats()
            if not seat.drained or seat.pid not in first or first[seat.pid].entered != seat.entered
        ]

    def _turn(self, by: int = 1) -> None:
        self._word = (self._word + by) & 0xFFFFFFFF
        os.pwrite(self._fd, struct.pack("<I", self._word), GATE_AT)
        self._wake()

    def _wake(self) -> None:
        number = _FUTEX.get(platform.machine())
        if number is None:
            raise DeviceError(f"the launch gate does not know how to wake on {platform.machine()}")
        libc = ctypes.CDLL(None, use_errno=True)
        # Where the file was cut short this fails, and those who wait look again by themselves.
        libc.syscall(
            ctypes.c_long(number),
            ctypes.c_void_p(self._address + GATE_AT),
            ctypes.c_int(_FUTEX_WAKE),
            ctypes.c_int(0x7FFFFFFF),
            None,
            None,
            ctypes.c_int(0),
        )

    # --- channels ---------------------------------------------------------------------------

    @property
    def holds(self) -> bool:
        """Whether channels were ordered off last."""
        return bool(self._hold & 1)

    def hold(self) -> None:
        """Order that the job's channels leave the device, kernels that run included. Raises
        DeviceError where the gate is open, or channels are not to be touched."""
        if not self.closed or not self.channels:
            why = "behind an open gate; close it first" if self.channels else "which it leaves"
            raise DeviceError(f"control page {self.path}: hold channels {why}")
        if not self.holds:
            self._order_hold()

    def release(self) -> None:
        """Order that they go on: what was stopped runs to its end, though the gate be closed."""
        if self.holds:
            self._order_hold()

    def _order_hold(self) -> None:
        self._hold = (self._hold + 1) & 0xFFFFFFFF
        os.pwrite(self._fd, struct.pack("<I", self._hold), HOLD_AT)
        self._turn(2)  # whoever waits looks again

    def wait_held(self, timeout_ns: int) -> bool:
        """Whether within this time nothing of the job was on the device any more, drained or held;
        False at once where a process says that it cannot. Blocks, beats."""

        def decided() -> bool:
            left = self._on_device()
            return not left or any(seat.channels.done == self._hold for seat in left)

        self._wait(decided, timeout_ns)
        return not self._on_device()

    def _on_device(self) -> list[Seat]:
        """Processes that have something on the device, or may have."""
        held = {self._hold} if self.holds else set()
        return [
            seat
            for seat in self._undrained()
            if seat.channels.done not in held or seat.channels.error
        ]

    # --- memory -----------------------------------------------------------------------------

    def set_quota(self, quota_bytes: int) -> None:
        """The job's processes may hold this much together, on all devices; 0: no limit. What they
        hold already stays."""
        if quota_bytes < 0:
            raise ValueError(f"a quota of {quota_bytes} bytes; 0 is no limit")
        os.pwrite(self._fd, struct.pack("<Q", quota_bytes), QUOTA_AT)

    def allocations(self, pid: int) -> list[Allocation]:
        """What the process has that is not small; at most ``ROWS``, see ``Memory.unlisted``."""
        for seat in self.seats():
            if seat.pid == pid:
                return self._rows(seat)
        return []

    def evict(self, wanted_bytes: int) -> int:
        """Order that so much more leaves the device, and return the order's number. The gate must
        be closed, and should be drained: nothing moves before.

        Processes with the most to give come first. What was ordered to be away stays away.
        """
        if not self.closed:
            raise DeviceError(
                f"control page {self.path}: evict behind an open gate; close it first"
            )
        left = -(-wanted_bytes // _UNIT)
        orders = {}
        for seat in sorted(self.seats(), key=lambda seat: -seat.memory.evictable):
            share = min(left, -(-seat.memory.evictable // _UNIT))
            if share > 0:
                orders[seat.index] = (seat.pid, share + seat.memory.evicted // _UNIT)
                left -= share
        return self._give(orders)

    def restore(self) -> int:
        """Order that all comes back, and return the order's number. Opening does it by itself."""
        seats = self.seats()
        pids = {seat.index: seat.pid for seat in seats}
        # Those that are at it since an earlier order answer to this one, too.
        at_it = [seat.index for seat in seats if seat.memory.evicted]
        orders = {index: (pids.get(index, 0), 0) for index in (*self._ordered, *at_it)}
        number = self._restoring = self._give(orders)
        self._ordered = {}
        return number

    def returned(self) -> Evicted | None:
        """What came of the last order to restore, also of that by an opened gate, once it was
        carried out. Said once."""
        found = self.answer(self._restoring) if self._restoring else None
        if found is not None:
            self._restoring = 0
        return found

    def answer(self, number: int) -> Evicted | None:
        """What came of the order, if all processes that got it have answered or are gone. Only of
        the last order: an earlier one was superseded, and nothing is known of it."""
        seats = {(seat.index, seat.pid): seat.memory for seat in self.seats()}
        asked = [seats[key] for key in self._asked.get(number, ()) if key in seats]
        if any(memory.answered != number for memory in asked):
            return None
        return Evicted(
            sum(memory.moved for memory in asked),
            max((memory.moved_ns for memory in asked), default=0),
            tuple(memory.error for memory in asked if memory.error),
        )

    def wait_evicted(self, number: int, timeout_ns: int) -> Evicted | None:
        """What came of the order; None if there is no answer within this time. Blocks, beats."""
        end = time.monotonic_ns() + timeout_ns
        while (found := self.answer(number)) is None and time.monotonic_ns() < end:
            self.beat()
            self._wake()
            time.sleep(_LOOK_NS / S)
        return found

    wait_restored = wait_evicted

    def _give(self, orders: dict[int, tuple[int, int]]) -> int:
        self._order = (self._order + 1) & 0xFFFFFFFF or 1
        for index, (_, units) in orders.items():
            command = struct.pack("<Q", self._order << 32 | units)
            os.pwrite(self._fd, command, COMMAND_AT + 8 * index)
        self._asked = {self._order: [(index, pid) for index, (pid, _) in orders.items()]}
        self._ordered.update(orders)
        self._wake()
        return self._order

    def _rows(self, seat: Seat) -> list[Allocation]:
        at = HEAD_BYTES + seat.index * SEAT_BYTES + ROWS_AT
        data = os.pread(self._fd, ROWS * ROW.size, at)
        found = []
        for address, size, born, reason, state in ROW.iter_unpack(data[: len(data) // 32 * 32]):
            if state not in (1, 2) or reason >= len(REASONS) or size > _MOST_BYTES:
                continue
            last = seat.launches if seat.launches > born else None
            found.append(Allocation(address, size, last, state == 2, REASONS[reason]))
        return found

    # --- the job ----------------------------------------------------------------------------

    @property
    def lost(self) -> bool:
        """Whether the file is no longer at its path, or no longer what it was: processes that come
        later do not attach."""
        try:
            ours, there = os.fstat(self._fd), self.path.stat()
        except OSError:
            return True
        same = (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)
        return not same or ours.st_size != PAGE_BYTES

    def seats(self) -> list[Seat]:
        """The processes that are attached and alive; what makes no sense is left out."""
        found = (self._seat(index) for index in range(SEATS))
        return [seat for seat in found if seat is not None]

    def attached(self, pid: int) -> bool:
        """Whether the process is behind the gate: it says so and has the file mapped. A program
        that replaced itself by one without the shim has not."""
        return any(seat.pid == pid for seat in self.seats()) and self._mapped_by(pid)

    def _seat(self, index: int) -> Seat | None:
        """None if nobody sits there, or it makes no sense."""
        at = HEAD_BYTES + index * SEAT_BYTES
        for _ in range(_READS):  # one may fall between two numbers that change together
            data = os.pread(self._fd, ROWS_AT, at)
            if len(data) != ROWS_AT:
                return None
            magic, pid, attached, started, entered, left, *rest = SEAT.unpack_from(data)
            if left <= entered:
                break
        *counters, slots = rest[:12]
        if magic != SEAT_MAGIC or attached != 1 or not 0 < pid < 1 << 31 or slots > SLOTS:
            return None
        if left > entered or _started(pid) != started:
            return None
        memory = _memory(rest[12:-4])
        if memory is None:
            return None
        channels = Channels(*rest[-4:])
        outstanding = 0
        for number in range(slots):
            done, put, loose, _ = SLOT.unpack_from(data, SLOTS_AT + number * SLOT.size)
            outstanding += done != put or loose > 0
        values: list[int] = [pid, entered, left, *counters, outstanding]
        counted = dict(zip(_COUNTERS, values, strict=True))
        return Seat(**counted, memory=memory, channels=channels, index=index)

    def _mapped_by(self, pid: int) -> bool:
        ours = os.fstat(self._fd)
        device = f"{os.major(ours.st_dev):02x}:{os.minor(ours.st_dev):02x}"
        try:
            lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
        except OSError:
            return False
        return any(line.split()[3:5] == [device, str(ours.st_ino)] for line in lines)


def _memory(values: list[int]) -> Memory | None:
    """None if it cannot be. Sums are not compared: they are read while they change."""
    *numbers, state, error, rows = values
    sizes = numbers[:9]
    if state > RETURNING or rows > ROWS or not all(-_MOST_BYTES < n < _MOST_BYTES for n in sizes):
        return None
    return Memory(*numbers, state=state, error=error)  # type: ignore[misc]


def _started(pid: int) -> int:
    """When the process started, in ticks since boot; -1 if there is none, or only its remains."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return -1
    fields = text[text.rindex(")") + 2 :].split()
    return -1 if fields[0] in "ZX" else int(fields[19])
