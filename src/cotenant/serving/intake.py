"""What requests may take, whichever protocol they come by: memory, decompression, a token."""

from __future__ import annotations

import asyncio
import hmac
import mmap
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from cotenant.domain.errors import InvalidRequest
from cotenant.domain.port import Refused
from cotenant.domain.request import Refusal
from cotenant.domain.units import MS
from cotenant.serving.regions import Regions
from cotenant.serving.tensors import Limits, shown

T = TypeVar("T")

ENCODINGS = ("gzip", "deflate")

_AT_ONCE_BYTES = 256 * 1024
_STEP_BYTES = 2**20
_UNPACKING = 2
_BUSY_RETRY_NS = 100 * MS
_THREAD = ThreadPoolExecutor(1, "cotenant-inflate")


class BodyRefused(Exception):
    """Bodies being received hold all the memory set aside for them."""

    def __init__(self) -> None:
        self.refused = Refused(
            Refusal.MEMORY, _BUSY_RETRY_NS, "too many request bodies are held at this moment"
        )
        super().__init__(self.refused.message)


class Intake:
    """What the front ends of one node share: limits, the memory budget of all request bodies,
    and clients' shared memory."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.budget = Budget(limits.buffered_bytes)
        self.regions = Regions(limits.regions)


class Budget:
    """The memory of all bodies held at one time, so that many large uploads cannot exhaust it
    together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0

    @property
    def held(self) -> int:
        """Bytes taken and not given back."""
        return self._held

    def hold(self, nbytes: int) -> None:
        """Take ``nbytes``; raises BodyRefused if not so much is left."""
        if self._held + nbytes > self._limit:
            raise BodyRefused
        self._held += nbytes

    def release(self, nbytes: int) -> None:
        """Give back what ``hold`` took."""
        self._held -= nbytes


class Share:
    """What one connection holds of a budget, which it gets a fair part of: no more than is left.

    Alone it may have half of the budget, beside another as greedy one a third, beside seven a
    ninth; and there is always as much left for one more (dynamic thresholds: Choudhury and Hahne,
    IEEE/ACM Transactions on Networking 6(2), 1998).
    """

    __slots__ = ("_budget", "_held", "unpacking")

    def __init__(self, budget: Budget) -> None:
        self.unpacking = asyncio.Semaphore(_UNPACKING)
        """To be held while a body is decompressed: with all at a time each would take longer, and
        all their memory at once."""
        self._budget = budget
        self._held = 0

    def hold(self, nbytes: int) -> None:
        """Take ``nbytes``; raises BodyRefused if not so much is left, or not for this one."""
        budget, held = self._budget, self._held + nbytes
        if budget._held + nbytes + held > budget._limit:
            raise BodyRefused
        budget._held += nbytes
        self._held = held

    def release(self, nbytes: int) -> None:
        """Give back what ``hold`` took."""
        self._held -= nbytes
        self._budget._held -= nbytes


def authorised(authorization: bytes, token: bytes) -> bool:
    """Whether an Authorization header carries this bearer token; compared in constant time."""
    scheme, _, given = authorization.partition(b" ")
    return hmac.compare_digest(given.strip(), token) and scheme.lower() == b"bearer"


async def inflate(
    body: bytes | memoryview, named: tuple[str, str], limit: int, hold: Callable[[int], None]
) -> bytes | None:
    """Decompress at most ``limit`` bytes; None if there are more.

    ``named`` is the encoding and the header that named it. ``hold`` is called with the size of
    each piece before the next is made; what it raises ends it. Raises InvalidRequest.
    """
    encoding, header = named
    if encoding not in ENCODINGS:
        raise InvalidRequest(
            f"{header} {shown(encoding)} is not supported; use gzip, deflate or none"
        )
    inflater = zlib.decompressobj(wbits=31 if encoding == "gzip" else 15)
    rest = bytes(body) if len(body) <= _AT_ONCE_BYTES else body
    try:
        # The first piece here, all others in a thread: more would hold the loop for too long.
        first = inflater.decompress(rest[:_AT_ONCE_BYTES], min(limit + 1, _AT_ONCE_BYTES))
        hold(len(first))
        rest = rest[_AT_ONCE_BYTES:]
        if inflater.eof or not (inflater.unconsumed_tail or rest):
            data: bytes | None = first if len(first) <= limit else None
        else:
            # Pages that are not written to take no memory, so the size needs not be known.
            with mmap.mmap(-1, limit + 1) as memory:
                memory.write(first)
                del first  # else many that wait for their turn keep it as well
                data, rest = await _inflate_more(inflater, memory, rest, limit, hold)
    except zlib.error as exc:
        raise InvalidRequest(f"the body is not {encoding} data as {header} says: {exc}") from None
    if data is None:
        return None
    if not inflater.eof or inflater.unused_data or rest:
        what = "is followed by other bytes" if inflater.eof else "is cut short"
        raise InvalidRequest(
            f"the body's {encoding} data {what}; send one complete {encoding} stream"
        )
    return data


async def _inflate_more(
    inflater: Any,
    memory: mmap.mmap,
    rest: bytes | memoryview,
    limit: int,
    hold: Callable[[int], None],
) -> tuple[bytes | None, bytes | memoryview]:
    """All of a body whose beginning is in ``memory``, and what is left of the compressed bytes.

    Its pieces are put into memory that goes back to the kernel as a whole: kept one by one until
    they can be joined, those of some bodies at a time leave the heap in shreds.
    """

    def more(data: bytes, size: int) -> int:
        return memory.write(inflater.decompress(data, size))

    while not inflater.eof and (inflater.unconsumed_tail or rest):
        tail = inflater.unconsumed_tail
        if not tail:
            tail, rest = bytes(rest[:_STEP_BYTES]), rest[_STEP_BYTES:]
        step = min(limit + 1 - memory.tell(), _STEP_BYTES)
        if step <= 0:
            return None, rest
        hold(await _in_thread(more, tail, step))
    size = memory.tell()
    if size > limit:
        return None, rest
    return await _in_thread(memory.__getitem__, slice(size)), rest


async def _in_thread(work: Callable[..., T], *args: Any) -> T:
    """Do it in the one thread that decompresses, bodies by turns. What is cancelled while the
    thread is at it waits for that: it writes into memory that is given back next."""
    work_there = _THREAD.submit(work, *args)
    done = asyncio.wrap_future(work_there)
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        if not work_there.cancel():
            await asyncio.wait([done])
        raise
