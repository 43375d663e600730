"""Clients' POSIX shared-memory regions, read and written by system calls, never mapped.

A client owns its region and can truncate it at any moment; a mapping would then end this
process with SIGBUS. ``preadv`` and ``pwritev`` report the same thing as a short count. The
price is the one copy into our own memory that has to be made anyway.

Keys name files directly under ``/dev/shm``. Names that this node or the C library use for
themselves are refused, so that no client can read another's tensors through us.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

import msgspec

from cotenant.domain.errors import InvalidRequest, NotFound, TooLarge
from cotenant.serving.tensors import shown

RESERVED_PREFIXES = ("cotenant", "sem.")
"""Keys that no client may register: the node's own memory, and POSIX semaphores."""


class RegionInfo(msgspec.Struct, frozen=True):
    """A registered region as clients see it; ``offset`` and ``byte_size`` in bytes."""

    name: str
    key: str
    offset: int
    byte_size: int


class _File:
    """An open file, closed with its last user: a request in flight may outlive the region."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def __del__(self) -> None:
        os.close(self.fd)


class Regions:
    """The registry. All methods are synchronous and cheap, except for the copies themselves."""

    def __init__(self, limit: int = 64, directory: str = "/dev/shm") -> None:
        self._limit = limit
        self._directory = directory
        self._regions: dict[str, tuple[RegionInfo, _File]] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Open the region ``key``; raises InvalidRequest, NotFound, TooLarge."""
        if not name:
            raise InvalidRequest("a shared-memory region needs a name")
        if name in self._regions:
            raise InvalidRequest(
                f"shared memory region {shown(name)} is already registered; unregister it first"
            )
        if len(self._regions) >= self._limit:
            raise TooLarge(
                f"{self._limit} shared memory regions are registered, the most possible;"
                " unregister one first"
            )
        if offset < 0 or byte_size <= 0:
            raise InvalidRequest(
                f"shared memory region {shown(name)}: offset must be 0 or more and byte_size"
                f" above 0, got {offset} and {byte_size}"
            )
        file = _open(self._directory, name, key)
        if offset + byte_size > file.size():
            raise InvalidRequest(
                f"shared memory region {shown(name)}: offset {offset} and byte_size {byte_size}"
                f" go beyond the file's {file.size()} bytes"
            )
        self._regions[name] = (RegionInfo(name, key, offset, byte_size), file)

    def unregister(self, name: str) -> None:
        """Forget a region (``""`` all of them); no error if there is none of that name."""
        if name:
            self._regions.pop(name, None)
        else:
            self._regions.clear()

    def status(self, name: str = "") -> list[RegionInfo]:
        """One region, or all in the order they were registered; raises NotFound."""
        if name:
            return [self._find(name)[0]]
        return [info for info, _ in self._regions.values()]

    def check(self, region: str, offset: int, nbytes: int) -> None:
        """Whether these bytes lie inside the region; raises NotFound, InvalidRequest."""
        self._locate(region, offset, nbytes)

    def reader(self, region: str, offset: int, nbytes: int) -> Callable[[memoryview], None]:
        """A function that fills a writable buffer of ``nbytes`` from the region.

        It raises InvalidRequest if the client has shortened the file meanwhile. It stays
        usable after the region was unregistered.
        """
        file, start = self._locate(region, offset, nbytes)

        def read_into(buffer: memoryview) -> None:
            if buffer.nbytes != nbytes:
                raise ValueError(f"buffer of {buffer.nbytes} bytes for {nbytes}")
            if not nbytes:
                return
            pos, flat = 0, buffer.cast("B")
            while pos < nbytes:
                got = os.preadv(file.fd, [flat[pos:]], start + pos)
                if got == 0:
                    raise _shortened(region)
                pos += got

        return read_into

    def write(self, region: str, offset: int, data: memoryview) -> None:
        """Write ``data`` at ``offset`` of the region; raises NotFound, InvalidRequest."""
        file, start = self._locate(region, offset, data.nbytes)
        if start + data.nbytes > file.size():  # a write would make the file grow again
            raise _shortened(region)
        if not data.nbytes:
            return
        pos, flat = 0, data.cast("B")
        try:
            while pos < len(flat):
                pos += os.pwritev(file.fd, [flat[pos:]], start + pos)
        except OSError as exc:
            raise InvalidRequest(
                f"shared memory region {shown(region)} cannot be written: {exc.strerror};"
                " the node needs write access to the file for outputs"
            ) from None

    def _find(self, name: str) -> tuple[RegionInfo, _File]:
        try:
            return self._regions[name]
        except KeyError:
            raise NotFound(
                f"no shared memory region {shown(name)} is registered; register it first"
            ) from None

    def _locate(self, region: str, offset: int, nbytes: int) -> tuple[_File, int]:
        info, file = self._find(region)
        if offset < 0 or nbytes < 0 or offset + nbytes > info.byte_size:
            raise InvalidRequest(
                f"shared memory region {shown(region)} has {info.byte_size} bytes; offset"
                f" {offset} and {nbytes} bytes do not lie inside"
            )
        return file, info.offset + offset


def _open(directory: str, name: str, key: str) -> _File:
    leaf = key.removeprefix("/")
    if not leaf or "/" in leaf or "\0" in leaf or leaf in (".", "..") or len(leaf) > 255:
        raise InvalidRequest(
            f"shared memory region {shown(name)}: key {shown(key)} must be a POSIX shared memory"
            " name, such as /input_data"
        )
    if leaf.startswith(RESERVED_PREFIXES):
        raise InvalidRequest(
            f"shared memory region {shown(name)}: key {shown(key)} is reserved; choose a name"
            f" that does not begin with {' or '.join(RESERVED_PREFIXES)}"
        )
    path = f"{directory}/{leaf}"
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        try:
            file = _File(os.open(path, os.O_RDWR | flags))
        except PermissionError:  # inputs can still be read
            file = _File(os.open(path, os.O_RDONLY | flags))
    except FileNotFoundError:
        raise NotFound(
            f"shared memory region {shown(name)}: no shared memory has the key {shown(key)};"
            " create it before registering (client and node must share /dev/shm)"
        ) from None
    except (OSError, UnicodeEncodeError) as exc:
        reason = "a symbolic link" if getattr(exc, "errno", 0) == errno.ELOOP else str(exc)
        raise InvalidRequest(
            f"shared memory region {shown(name)}: key {shown(key)} cannot be opened: {reason}"
        ) from None
    if not stat.S_ISREG(os.fstat(file.fd).st_mode):
        raise InvalidRequest(
            f"shared memory region {shown(name)}: key {shown(key)} is not shared memory"
        )
    return file


def _shortened(region: str) -> InvalidRequest:
    return InvalidRequest(
        f"shared memory region {shown(region)} has become shorter than it was registered;"
        " register it again with its present size"
    )
