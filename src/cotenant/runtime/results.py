"""Results that are kept: who asks a service the same again has the answer at once.

Only of services whose owner says so (``cache``): a model that draws lots, say, gives another answer
each time. The least recently used goes first. What it all takes is told the dispatcher, which may
want some of it back: results are what others can have first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from cotenant.domain import events as e
from cotenant.domain.port import TensorOut
from cotenant.policy.memory.budgets import RESULTS

ENTRY_BYTES: Final = 512
"""What a result takes beside its tensors."""
TELL: Final = 64
"""What a cache has is told again when it has changed by 1/TELL of its limit."""

Key = tuple[int, bytes]
"""Which model files it is of, and a digest of what was asked."""


class Kept(msgspec.Struct, frozen=True):
    """An output of a result: as ``TensorOut``, its bytes a copy."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


class _Cache:
    """Of one service."""

    def __init__(self) -> None:
        self.entries: OrderedDict[Key, tuple[Kept, ...]] = OrderedDict()
        self.limit = 0
        self.most = -1
        """What the dispatcher allows; -1: the limit."""
        self.size = self.told = self.lookups = self.hits = 0
        self.files = 0
        """Counts which files the model has: results of others are not found any more."""

    def shrink(self) -> None:
        """Let go of the oldest until the rest is small enough."""
        allowed = self.limit if self.most < 0 else min(self.most, self.limit)
        while self.entries and self.size > allowed:
            self.size -= _size(self.entries.popitem(last=False)[1])


class Results:
    """See the module's text. All on the loop."""

    def __init__(self, feed: Callable[[e.Event], None]) -> None:
        self._feed = feed
        self._caches: dict[str, _Cache] = {}

    def key(self, service: str, limit: int, asked: Sequence[bytes | memoryview]) -> Key:
        """Of a request with these bytes to a service whose results may take ``limit`` bytes."""
        cache = self._caches.setdefault(service, _Cache())
        cache.limit = limit
        digest = hashlib.blake2b(digest_size=16)
        for part in asked:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return cache.files, digest.digest()

    def find(self, service: str, key: Key) -> tuple[Kept, ...] | None:
        """What the same request was answered with."""
        cache = self._caches[service]
        cache.lookups += 1
        found = cache.entries.get(key)
        if found is not None:
            cache.hits += 1
            cache.entries.move_to_end(key)
        return found

    def keep(self, service: str, key: Key, outputs: Iterable[TensorOut]) -> None:
        """A request was answered with all these outputs."""
        cache = self._caches.get(service)
        if cache is None or key in cache.entries or key[0] != cache.files:
            return
        entry = tuple(Kept(t.name, t.datatype, t.shape, bytes(t.data)) for t in outputs)
        cache.entries[key] = entry
        cache.size += _size(entry)
        cache.shrink()
        self._tell(service, cache)

    def resize(self, holder: str, size: int) -> None:
        """A cache may have so many bytes; -1: all up to its limit."""
        service = holder.removesuffix(RESULTS)
        cache = self._caches.get(service)
        if cache is not None and service != holder:
            cache.most = size
            cache.shrink()
            self._tell(service, cache, at_once=size >= 0)

    def forget(self, service: str) -> None:
        """A service has other files from now on, or is gone."""
        cache = self._caches.get(service)
        if cache is not None:
            cache.files += 1
            cache.entries.clear()
            cache.size = 0
            self._tell(service, cache, at_once=True)

    def counts(self) -> dict[str, tuple[int, int, int]]:
        """Of each cache: lookups, hits, and bytes that it has."""
        return {name: (c.lookups, c.hits, c.size) for name, c in self._caches.items()}

    def _tell(self, service: str, cache: _Cache, at_once: bool = False) -> None:
        changed = abs(cache.size - cache.told)
        if changed and (at_once or changed * TELL >= cache.limit):
            cache.told = cache.size
            self._feed(e.Held(service + RESULTS, cache.size, cache.size, cache.size, cache.size))


def _size(entry: tuple[Kept, ...]) -> int:
    return ENTRY_BYTES + sum(len(tensor.data) for tensor in entry)
