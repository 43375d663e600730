"""Memory of a job that can leave the device and come back to the same addresses.

``Held`` does it in the job itself, by the driver's functions for virtual memory: a reservation
stays, what is mapped to it is released and later made anew. ``Plain`` is memory as any job takes
it; if it moves, somebody else moves it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from driver import DriverError, Pinned, constant, cu
from kernels import Kernels
from record import S


class Mapped:
    """A range of addresses, and the device memory behind it."""

    def __init__(self, size: int) -> None:
        from cuda.bindings import driver

        self.size = size
        self._property = driver.CUmemAllocationProp()
        self._property.type = constant("CUmemAllocationType", "CU_MEM_ALLOCATION_TYPE_PINNED")
        where = constant("CUmemLocationType", "CU_MEM_LOCATION_TYPE_DEVICE")
        self._property.location.type = where
        self._property.location.id = 0
        self._access = driver.CUmemAccessDesc()
        self._access.location.type = where
        self._access.location.id = 0
        flags = "CU_MEM_ACCESS_FLAGS_PROT_READWRITE"
        self._access.flags = constant("CUmemAccess_flags", flags)
        self.at = int(cu("cuMemAddressReserve", size, 0, 0, 0))
        self._handle: Any = None

    @property
    def there(self) -> bool:
        """Whether there is memory behind it."""
        return self._handle is not None

    def fetch(self) -> dict[str, int]:
        """Put memory behind it; ns of each step."""
        began = time.monotonic_ns()
        handle = cu("cuMemCreate", self.size, self._property, 0)
        created = time.monotonic_ns()
        try:
            cu("cuMemMap", self.at, self.size, 0, handle, 0)
            mapped = time.monotonic_ns()
            cu("cuMemSetAccess", self.at, self.size, [self._access], 1)
        except DriverError:
            cu("cuMemRelease", handle)
            raise
        self._handle = handle
        over = time.monotonic_ns()
        return {
            "create": created - began,
            "map": mapped - created,
            "set_access": over - mapped,
            "in": over - began,
        }

    def leave(self) -> dict[str, int]:
        """Give the memory back; ns of each step. The addresses stay."""
        began = time.monotonic_ns()
        cu("cuMemUnmap", self.at, self.size)
        unmapped = time.monotonic_ns()
        cu("cuMemRelease", self._handle)
        self._handle = None
        over = time.monotonic_ns()
        return {"unmap": unmapped - began, "release": over - unmapped, "out": over - began}

    def close(self) -> None:
        """Once."""
        if self.there:
            self.leave()
        cu("cuMemAddressFree", self.at, self.size)


@dataclass
class Piece:
    """A part of what is held, and where its contents are kept meanwhile."""

    memory: Mapped
    host: Pinned


class Held:
    """What a job holds, in pieces of one size; each has its place in the host's pinned memory."""

    def __init__(self, kernels: Kernels, stream: Any) -> None:
        self._kernels = kernels
        self._stream = stream
        self._pieces: list[Piece] = []

    def take(self, size: int, piece: int, seed: int, seconds: float) -> dict[str, Any]:
        """As much of ``size`` as can be had and pinned within the time."""
        end, why = time.monotonic() + seconds, ""
        pinning = 0
        while len(self._pieces) * piece < size and not why:
            began = time.monotonic_ns()
            try:
                host = Pinned(piece)
                pinning += time.monotonic_ns() - began
                memory = Mapped(piece)
                memory.fetch()
            except (DriverError, OSError) as error:
                if not self._pieces:
                    raise
                why = str(error)
                break
            self._pieces.append(Piece(memory, host))
            self._kernels.fill(memory.at, piece, seed + len(self._pieces), self._stream)
            if time.monotonic() > end:
                why = "no time for more"
        held = len(self._pieces) * piece
        return {"bytes": held, "pieces": len(self._pieces), "pin_s": pinning / S, "why": why}

    def evict(self) -> dict[str, Any]:
        """Copy to the host and give back; seconds of each."""
        began = time.monotonic_ns()
        for piece in self._pieces:
            copy = (piece.host.at, piece.memory.at, piece.memory.size)
            cu("cuMemcpyDtoHAsync", *copy, self._stream)
        cu("cuStreamSynchronize", self._stream)
        copied = time.monotonic_ns()
        for piece in self._pieces:
            piece.memory.leave()
        over = time.monotonic_ns()
        return {"copy_s": (copied - began) / S, "map_s": (over - copied) / S}

    def restore(self) -> dict[str, Any]:
        """Have memory at the same addresses and copy back; seconds of each."""
        began = time.monotonic_ns()
        for piece in self._pieces:
            piece.memory.fetch()
        mapped = time.monotonic_ns()
        for piece in self._pieces:
            copy = (piece.memory.at, piece.host.at, piece.memory.size)
            cu("cuMemcpyHtoDAsync", *copy, self._stream)
        cu("cuStreamSynchronize", self._stream)
        over = time.monotonic_ns()
        return {"copy_s": (over - mapped) / S, "map_s": (mapped - began) / S}

    def sums(self) -> list[int]:
        """Of each piece, in order."""
        return [
            self._kernels.checksum(piece.memory.at, piece.memory.size, self._stream)
            for piece in self._pieces
        ]


class Plain:
    """What a job holds that does nothing to have it moved."""

    def __init__(self, kernels: Kernels, stream: Any) -> None:
        self._kernels = kernels
        self._stream = stream
        self._pieces: list[tuple[int, int]] = []

    def take(self, size: int, piece: int, seed: int, seconds: float) -> dict[str, Any]:
        """As much of ``size`` as can be had within the time."""
        end, why = time.monotonic() + seconds, ""
        while len(self._pieces) * piece < size and not why:
            try:
                at = int(cu("cuMemAlloc", piece))
            except DriverError as error:
                if not self._pieces:
                    raise
                why = str(error)
                break
            self._pieces.append((at, piece))
            self._kernels.fill(at, piece, seed + len(self._pieces), self._stream)
            if time.monotonic() > end:
                why = "no time for more"
        held = len(self._pieces) * piece
        return {"bytes": held, "pieces": len(self._pieces), "why": why}

    def sums(self) -> list[int]:
        """Of each piece, in order."""
        return [self._kernels.checksum(at, size, self._stream) for at, size in self._pieces]
