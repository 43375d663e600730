"""Tensor memory shared between the node and a service's workers: one anonymous file, mapped
by both, from which the node alone allocates (buddy system; Knowlton, CACM 1965).

The file has no name, so nothing is left behind however the processes end. Pages cost nothing
until they are written.
"""

from __future__ import annotations

import mmap
import os

SMALLEST = 4096
"""Block granularity in bytes: one page, so that no two tensors share a cache line."""


class ArenaFull(Exception):
    """No block of the size asked for is free now."""


class Arena:
    """``size`` bytes (rounded up to a power of two) of shared memory, and who has which part.

    ``fd`` may be passed to a child process, which maps it with ``map_arena``.
    """

    def __init__(self, name: str, size: int) -> None:
        self.size = 1 << max(SMALLEST, size - 1).bit_length()
        self.fd = os.memfd_create(f"cotenant-{name}", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size)
        self.memory = memoryview(mmap.mmap(self.fd, self.size))
        self._orders = (self.size // SMALLEST).bit_length()
        # Dicts as ordered sets: the block freed last is taken first, its pages are still in cache.
        self._free: list[dict[int, None]] = [{} for _ in range(self._orders)]
        self._free[-1][0] = None
        self._taken: dict[int, int] = {}

    @property
    def used(self) -> int:
        """Bytes in blocks that are taken."""
        return sum(SMALLEST << order for order in self._taken.values())

    def alloc(self, nbytes: int) -> int:
        """Offset of a free block of at least ``nbytes``; raises ArenaFull."""
        order = max(0, (max(1, nbytes) - 1) // SMALLEST).bit_length()
        for found in range(order, self._orders):
            if self._free[found]:
                offset, _ = self._free[found].popitem()
                for half in range(found - 1, order - 1, -1):
                    self._free[half][offset + (SMALLEST << half)] = None
                self._taken[offset] = order
                return offset
        raise ArenaFull(f"no {nbytes} bytes free in tensor memory of {self.size}")

    def free(self, offset: int) -> None:
        """Give a block back; merges it with its buddy where that is free too."""
        order = self._taken.pop(offset)
        while order < self._orders - 1:
            buddy = offset ^ (SMALLEST << order)
            if buddy not in self._free[order]:
                break
            del self._free[order][buddy]
            offset = min(offset, buddy)
            order += 1
        self._free[order][offset] = None

    def close(self) -> None:
        """Release the memory. Views that still exist keep the mapping alive until they go."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def map_arena(fd: int) -> memoryview:
    """Map the arena behind an inherited descriptor; its size is the file's."""
    return memoryview(mmap.mmap(fd, os.fstat(fd).st_size))
