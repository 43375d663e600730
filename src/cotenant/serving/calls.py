"""What an inference request means, whichever protocol it came by.

Both codecs decode to ``Decoded`` by these rules: priorities and time-outs, names given once,
inputs and outputs in shared memory, and what is not supported.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from functools import partial
from typing import Final, NoReturn, Protocol

import msgspec

from cotenant.domain.errors import InvalidRequest
from cotenant.domain.port import (
    InferCall,
    InferResult,
    NodePort,
    Outcome,
    Refused,
    TensorIn,
    TensorOut,
    Withdraw,
)
from cotenant.serving.tensors import Limits, check_bytes, check_size, shown

VARIANT: Final = "cotenant-variant"
"""Header and parameter of answers: which variant of the model gave them, where it has several."""
_MAX_TIMEOUT_US = 2**63 // 1000


class RegionIO(Protocol):
    """Clients' shared-memory regions, as the codecs need them (see ``serving.regions``)."""

    def reader(self, region: str, offset: int, nbytes: int) -> Callable[[memoryview], None]:
        """A function that fills a buffer of ``nbytes`` from the region; raises NotFound,
        InvalidRequest."""

    def check(self, region: str, offset: int, nbytes: int) -> None:
        """Whether these bytes lie inside the region; raises NotFound, InvalidRequest."""

    def write(self, region: str, offset: int, data: memoryview) -> None:
        """Write an output into the region; raises NotFound, InvalidRequest."""


class Wanted(msgspec.Struct):
    """How one output was asked for. ``region`` empty: in the answer, else in shared memory."""

    name: str
    binary: bool = False
    region: str = ""
    offset: int = 0
    nbytes: int = 0


class Decoded(msgspec.Struct):
    """A request: the call for the node, and how its answer is to be written.

    ``wanted`` maps output names to what was asked; empty means all outputs, each in binary
    form if ``binary``. ``empty_final``: an answer in pieces ends with an empty one, where nothing
    else says that it ends.
    """

    call: InferCall
    wanted: dict[str, Wanted]
    binary: bool
    empty_final: bool = False


async def infer(node: NodePort, call: InferCall) -> Outcome:
    """Have the node run a call. Cancelling this withdraws the request."""
    future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    def done(outcome: Outcome) -> None:
        if not future.done():
            future.set_result(outcome)
        elif isinstance(outcome, InferResult):  # cancelled in this very turn of the loop
            outcome.release()

    withdraw = node.submit(call, done)
    if isinstance(withdraw, Refused):
        return withdraw
    try:
        return await future
    except asyncio.CancelledError:
        withdraw()
        if not future.cancelled() and isinstance(outcome := future.result(), InferResult):
            outcome.release()
        raise


async def pieces(node: NodePort, call: InferCall) -> AsyncGenerator[Outcome]:
    """Have the node run a call, and take its outcomes as they come: the last has no ``more`` or is
    a refusal. Close this (``aclosing``) to withdraw the request before."""
    waiting: deque[Outcome] = deque()
    wake = asyncio.Event()
    ended = False

    def done(outcome: Outcome) -> None:
        nonlocal ended
        ended = isinstance(outcome, Refused) or not outcome.more
        waiting.append(outcome)
        wake.set()

    withdraw = node.submit(call, done)
    if isinstance(withdraw, Refused):
        yield withdraw
        return
    try:
        while waiting or not ended:
            if not waiting:
                wake.clear()
                await wake.wait()
            yield waiting.popleft()
    finally:
        if not ended:
            withdraw()
        for outcome in waiting:
            if isinstance(outcome, InferResult):
                outcome.release()


async def together(
    node: NodePort, calls: Sequence[InferCall], most: int
) -> AsyncGenerator[tuple[int, Outcome]]:
    """As ``pieces``, of several calls, at most so many at a time: outcomes as they come, each with
    the place of its call."""
    todo = deque(enumerate(calls))
    running: dict[int, Withdraw] = {}
    waiting: deque[tuple[int, Outcome]] = deque()
    wake = asyncio.Event()

    def done(index: int, outcome: Outcome) -> None:
        if isinstance(outcome, Refused) or not outcome.more:
            del running[index]
        waiting.append((index, outcome))
        wake.set()

    try:
        while todo or running or waiting:
            while todo and len(running) < most:
                index, call = todo.popleft()
                withdraw = node.submit(call, partial(done, index))
                if isinstance(withdraw, Refused):
                    waiting.append((index, withdraw))
                    break
                running[index] = withdraw
            if not waiting:
                wake.clear()
                await wake.wait()
            yield waiting.popleft()
    finally:
        for withdraw in running.values():
            withdraw()
        for _, outcome in waiting:
            if isinstance(outcome, InferResult):
                outcome.release()


def priority_class(priority: int) -> int:
    """Our class (0 high, 1 normal, 2 low) of the protocol's ``priority`` parameter.

    There 0 means the default and 1 the highest, larger being lower: 0 is normal, 1 high,
    2 normal, 3 and above low. Raises InvalidRequest for a negative one.
    """
    if priority < 0:
        raise InvalidRequest(
            f"priority is {priority}; use 0 (default), 1 (high), 2 (normal) or 3 (low)"
        )
    return (1, 0, 1)[priority] if priority < 3 else 2


def timeout_ns(timeout_us: int) -> int:
    """Nanoseconds of the ``timeout`` parameter (microseconds, 0 none); raises InvalidRequest."""
    if not 0 <= timeout_us < _MAX_TIMEOUT_US:
        raise InvalidRequest(f"timeout is {timeout_us}; give microseconds from now, or 0 for none")
    return timeout_us * 1000


def refuse_sequence() -> NoReturn:
    """Sequences need state between requests, which no model here keeps."""
    raise InvalidRequest(
        "sequence parameters (sequence_id, sequence_start, sequence_end) are not supported;"
        " leave them out: every request stands alone"
    )


def refuse_classification(name: str) -> NoReturn:
    """The classification extension is not implemented."""
    raise InvalidRequest(
        f"output {shown(name)}: the classification extension is not supported;"
        " leave the parameter out and rank the scores in the client"
    )


def check_count(inputs: int, outputs: int, limits: Limits) -> None:
    """Refuse a request with no inputs, or with more tensors than the limit."""
    if not inputs:
        raise InvalidRequest("the request has no inputs; give every input the model declares")
    if inputs > limits.tensors or outputs > limits.tensors:
        raise InvalidRequest(
            f"{inputs} inputs and {outputs} outputs; at most {limits.tensors} of each are possible"
        )


def check_unique(kind: str, names: Iterable[str]) -> None:
    """Refuse a name that occurs twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InvalidRequest(f"{kind} {shown(name)} is given twice; give each {kind} once")
        seen.add(name)


def region_input(
    name: str,
    datatype: str,
    shape: tuple[int, ...],
    count: int,
    source: tuple[str, int, int | None],
    regions: RegionIO,
) -> TensorIn:
    """An input that lies in shared memory at ``source``: (region, offset, size in bytes)."""
    region, offset, nbytes = source
    if nbytes is None:
        raise InvalidRequest(
            f"tensor {shown(name)}: shared_memory_byte_size is missing beside shared_memory_region"
        )
    check_size(name, datatype, count, nbytes)
    read = regions.reader(region, offset, nbytes)
    if datatype != "BYTES":
        return TensorIn(name, datatype, shape, nbytes, read_into=read)

    def read_and_check(buffer: memoryview) -> None:
        # Checked in our copy: the client can rewrite its own memory at any moment.
        read(buffer)
        check_bytes(name, buffer, count)

    return TensorIn(name, datatype, shape, nbytes, read_into=read_and_check)


def write_region(output: TensorOut, want: Wanted, regions: RegionIO) -> int:
    """Write an output to the shared memory it was asked into; returns its size in bytes."""
    nbytes = output.data.nbytes
    if nbytes > want.nbytes:
        raise InvalidRequest(
            f"output {shown(output.name)} is {nbytes} bytes; the {want.nbytes} bytes given in"
            f" shared memory region {shown(want.region)} are too few"
        )
    regions.write(want.region, want.offset, output.data)
    return nbytes


def want_region(
    want: Wanted, region: str, offset: int, nbytes: int | None, regions: RegionIO
) -> None:
    """Note that an output goes to shared memory, after checking that the place exists."""
    if nbytes is None:
        raise InvalidRequest(
            f"output {shown(want.name)}: shared_memory_byte_size is missing beside"
            " shared_memory_region"
        )
    regions.check(region, offset, nbytes)
    want.region, want.offset, want.nbytes = region, offset, nbytes
