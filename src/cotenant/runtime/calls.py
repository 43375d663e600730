"""From an inference call to a request in tensor memory, and back to a result.

Every input is checked against the model before anything is queued, so that a batch can only
fail on what the model itself refuses.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from functools import partial

import msgspec
import numpy as np

from cotenant.domain.errors import InvalidRequest, TooLarge
from cotenant.domain.port import (
    InferCall,
    InferResult,
    OnOutcome,
    Outcome,
    Refused,
    TensorIn,
    TensorMeta,
    TensorOut,
)
from cotenant.engines.base import NUMPY, EngineMeta
from cotenant.engines.llm.asking import MOST_TOKENS
from cotenant.runtime.arena import Arena
from cotenant.runtime.messages import LEFT_OUT, LENGTH, Item, Outputs, Place
from cotenant.runtime.results import Kept, Key

ALIGN = 64
Placed = tuple[Arena, int, Item]
"""Where a request lies in tensor memory: the arena, the block in it, and what a worker is told."""
PIECE_BYTES = 512
"""What a piece of an answer takes beside its bytes."""
BYTES_OF_A_TOKEN = 3
"""Of a prompt that comes as text: rather too few than too many."""
UNKNOWN_OUTPUT = 64 * 1024
"""Bytes reserved for an output whose size is not known from the model, until one was seen."""


class Pending:
    """A request that was accepted and not answered yet. ``done`` is called from the loop, when
    what is going on has been seen to: the next batch comes before the last one's answers."""

    __slots__ = ("arena", "block", "done", "id", "item", "key", "meta", "service", "unread",
                 "variant", "version", "wanted", "worker")  # fmt: skip

    def __init__(
        self,
        number: int,
        call: InferCall,
        version: str,
        meta: EngineMeta,
        placed: Placed,
        done: OnOutcome,
    ) -> None:
        self.id = number
        self.service = call.model
        self.version = version
        self.meta = meta
        self.arena, self.block, self.item = placed
        self.key: Key | None = None
        """By which its result is kept, if it is."""
        self.worker = ""
        """Where it stays between its turns."""
        self.variant = ""
        """What gives the answer, where the model has several variants."""
        self.unread = 0
        """Bytes of pieces that were sent and not released."""
        self.wanted = call.outputs
        """Outputs that were asked for; empty: all."""
        self.done = done

    def withdraw(self) -> None:
        """Nobody waits for it any more: nothing of theirs is kept until the batch is done."""
        self.done = _give_back

    def free(self) -> None:
        """Give the tensor memory back (once)."""
        if self.block >= 0:
            self.arena.free(self.block)
            self.block = -1

    def answer_kept(self, kept: tuple[Kept, ...]) -> None:
        """Say what the same request was answered with before."""
        self.free()
        tensors = [TensorOut(t.name, t.datatype, t.shape, memoryview(t.data)) for t in kept]
        self._say(self._result(self._asked_for(tensors), _nothing))

    def all_tensors(self, outputs: Outputs) -> list[TensorOut]:
        """What came out, asked for or not."""
        spilled = iter(outputs.spilled)
        return [
            TensorOut(
                meta.name,
                meta.datatype,
                place.shape,
                self.arena.memory[place.offset : place.offset + place.nbytes]
                if place.offset >= 0
                else memoryview(next(spilled)),
            )
            for meta, place in zip(self.meta.outputs, outputs.places, strict=True)
        ]

    def answer(self, outputs: Outputs) -> None:
        """Say what came out; the result's ``release`` frees the memory."""
        tensors = self._tensors(outputs) if outputs.places else []
        self._say(self._result(tensors, self.free))

    def emit(self, outputs: Outputs) -> None:
        """Say a piece of the answer."""
        tensors, size = self._tensors(outputs), PIECE_BYTES
        size += sum(tensor.data.nbytes for tensor in tensors)
        self.unread += size
        release = partial(self._read, size)
        self._say(self._result(tensors, release, more=True))

    def _result(
        self, tensors: list[TensorOut], release: Callable[[], None], more: bool = False
    ) -> InferResult:
        return InferResult(self.service, self.version, tensors, release, more, self.variant)

    def _read(self, size: int) -> None:
        self.unread -= size

    def give_up(self, refused: Refused) -> None:
        """Say that nothing follows the pieces so far; the request itself is still to end."""
        asyncio.get_running_loop().call_soon(self._end, refused)

    def _end(self, refused: Refused) -> None:
        done, self.done = self.done, _give_back
        done(refused)

    def _tensors(self, outputs: Outputs) -> list[TensorOut]:
        """What was asked for of what came out."""
        return self._asked_for(self.all_tensors(outputs))

    def _asked_for(self, tensors: list[TensorOut]) -> list[TensorOut]:
        wanted = self.wanted
        if wanted:
            tensors = [tensor for tensor in tensors if tensor.name in wanted]
            tensors.sort(key=lambda t: wanted.index(t.name))
        return tensors

    def refuse(self, refused: Refused) -> None:
        """Say that there will be no result."""
        self.free()
        self._say(refused)

    def _say(self, outcome: Outcome) -> None:
        asyncio.get_running_loop().call_soon(self._deliver, outcome)

    def _deliver(self, outcome: Outcome) -> None:
        self.done(outcome)


def _nothing() -> None:
    """There is nothing to release."""


def _give_back(outcome: Outcome) -> None:
    if isinstance(outcome, InferResult):
        outcome.release()


class OutputSizes:
    """How many bytes a row's outputs take: from the model, or from what was seen."""

    def __init__(self, meta: EngineMeta) -> None:
        self._per_row = 0
        for tensor in meta.outputs:
            shape = tensor.shape[1:] if meta.batchable else tensor.shape
            size = NUMPY_SIZE.get(tensor.datatype, 0)
            known = size and all(d >= 0 for d in shape)
            self._per_row += (math.prod(shape) * size if known else UNKNOWN_OUTPUT) + ALIGN

    def expect(self, rows: int) -> int:
        """Bytes to reserve for ``rows`` rows."""
        return self._per_row * rows

    def learn(self, rows: int, outputs: Outputs) -> None:
        """Reserve more next time if something had to be spilled."""
        if outputs.spilled:
            total = sum(place.nbytes + ALIGN for place in outputs.places)
            self._per_row = max(self._per_row, -(-total // rows))


NUMPY_SIZE = {name: np.dtype(t).itemsize for name, t in NUMPY.items() if name != "BYTES"}


def rows_of(meta: EngineMeta, max_batch: int, call: InferCall) -> int:
    """Check a call against the model; returns its rows along the batch axis (1 without one).

    Raises InvalidRequest naming the tensor and what would be right.
    """
    given = {tensor.name: tensor for tensor in call.inputs}
    rows = -1
    for want in meta.inputs:
        have = given.pop(want.name, None)
        if have is None and want.optional:
            continue
        if have is None:
            raise _wrong_names(meta, given, want.name)
        _check_input(have, want)
        if meta.batchable:
            if rows not in (-1, have.shape[0]):
                raise InvalidRequest(
                    f"input {want.name!r} has {have.shape[0]} rows, another input {rows}; all "
                    "inputs must have equal first dimensions"
                )
            rows = have.shape[0]
    if given:
        raise _wrong_names(meta, given)
    for name in call.outputs:
        if all(name != output.name for output in meta.outputs):
            known_outputs = ", ".join(repr(o.name) for o in meta.outputs)
            raise InvalidRequest(f"output {name!r}: the model's outputs are {known_outputs}")
    if not meta.batchable:
        return 1
    if not 1 <= rows <= max_batch:
        raise InvalidRequest(
            f"batch of {rows} rows: this service takes 1 to {max_batch} rows a request"
        )
    return rows


def most_elements(meta: EngineMeta, max_batch: int) -> int | None:
    """The most elements of a request's inputs; None where they have no bound."""
    total = 0
    for tensor in meta.inputs:
        shape = (max_batch, *tensor.shape[1:]) if meta.batchable else tensor.shape
        if tensor.datatype == "BYTES" or any(dim < 0 for dim in shape):
            return None
        total += math.prod(shape)
    return total


def _check_input(have: TensorIn, want: TensorMeta) -> None:
    if have.datatype != want.datatype:
        raise InvalidRequest(
            f"input {want.name!r} has the datatype {have.datatype}, the model takes {want.datatype}"
        )
    fits = len(have.shape) == len(want.shape)
    for given, wanted in zip(have.shape, want.shape, strict=False):
        fits = fits and given >= 0 and wanted in (-1, given)
    if not fits:
        raise InvalidRequest(
            f"input {want.name!r} has the shape {list(have.shape)}, the model takes "
            f"{list(want.shape)} (-1: any length)"
        )
    size = NUMPY_SIZE.get(want.datatype)
    if size is not None and have.nbytes != math.prod(have.shape) * size:
        raise InvalidRequest(
            f"input {want.name!r} has {have.nbytes} bytes; shape {list(have.shape)} of "
            f"{want.datatype} needs {math.prod(have.shape) * size}"
        )


def _wrong_names(
    meta: EngineMeta, given: Iterable[str], missing: str | None = None
) -> InvalidRequest:
    """Of what was given, what the model does not know; else what is missing."""
    names = ", ".join(repr(t.name) for t in meta.inputs)
    for name in given:
        if all(name != tensor.name for tensor in meta.inputs):
            said = f"input {name!r}: the model has no such input"
            return InvalidRequest(f"{said}; the model's inputs are {names}")
    return InvalidRequest(f"input {missing!r} is missing; the model's inputs are {names}")


def signature(meta: EngineMeta, call: InferCall) -> str:
    """What must be equal for two requests to share a batch, or to be alike in what they cost; ""
    where it always is."""
    if meta.turns:
        return ""
    first = 1 if meta.batchable else 0
    for tensor in meta.inputs:
        if -1 in tensor.shape[first:]:
            shapes = {tensor.name: tensor.shape for tensor in call.inputs}
            return ";".join(",".join(map(str, shapes[t.name][first:])) for t in meta.inputs)
    return ""


def generation(meta: EngineMeta, call: InferCall) -> tuple[int, int]:
    """Of a request to a language model: about how many tokens its prompt has, and how many it may
    say at most; else zeros."""
    if not meta.context:
        return 0, 0
    given = {tensor.name: tensor for tensor in call.inputs if tensor.data is not None}
    prompt = 0
    if "prompt_tokens" in given:
        prompt = math.prod(given["prompt_tokens"].shape)
    elif "text_input" in given:
        prompt = given["text_input"].nbytes // BYTES_OF_A_TOKEN
    most = MOST_TOKENS
    if "options" in given:
        most = _max_tokens(given["options"])
    elif "max_tokens" in given:
        most = int.from_bytes(bytes(given["max_tokens"].data or b""), "little", signed=True)
    most = min(max(1, most), meta.context)
    return min(max(1, prompt), meta.context), most


class _Asked(msgspec.Struct):
    max_tokens: int = MOST_TOKENS
    embed: bool = False


def _max_tokens(options: TensorIn) -> int:
    """Of options as JSON; what is wrong with them the model says."""
    try:
        asked = msgspec.json.decode(bytes(options.data or b"")[LENGTH.size :], type=_Asked)
    except (msgspec.MsgspecError, RecursionError):
        return 1
    return 1 if asked.embed else asked.max_tokens


def place(
    meta: EngineMeta, call: InferCall, rows: int, arena: Arena, out_bytes: int, refuse_nan: bool
) -> Placed:
    """Copy a call's inputs into tensor memory. Raises ArenaFull, TooLarge for what never fits, or
    InvalidRequest for what only shows in the bytes; nothing is kept then."""
    given = {tensor.name: tensor for tensor in call.inputs}
    total = sum([_aligned(tensor.nbytes) for tensor in call.inputs])
    if total + out_bytes > arena.size:
        raise TooLarge(
            f"the request's tensors need {total + out_bytes} bytes, tensor memory is {arena.size}; "
            "send fewer rows, or raise limits.arena"
        )
    block = arena.alloc(total + out_bytes)
    try:
        offset, places = block, []
        for want in meta.inputs:
            tensor = given.get(want.name)
            if tensor is None:
                places.append(LEFT_OUT)
                continue
            target = arena.memory[offset : offset + tensor.nbytes]
            _fill(target, tensor)
            _check_content(target, tensor, refuse_nan)
            places.append(Place(tensor.shape, offset, tensor.nbytes))
            offset += _aligned(tensor.nbytes)
    except BaseException:
        arena.free(block)
        raise
    return arena, block, Item(rows, tuple(places), offset, out_bytes)


def _fill(target: memoryview, tensor: TensorIn) -> None:
    if tensor.read_into is not None:
        tensor.read_into(target)
    elif tensor.data is None or len(tensor.data) != tensor.nbytes:
        raise InvalidRequest(f"input {tensor.name!r}: its data do not have {tensor.nbytes} bytes")
    else:
        target[:] = tensor.data


def _check_content(data: memoryview, tensor: TensorIn, refuse_nan: bool) -> None:
    if tensor.datatype == "BYTES":
        _check_strings(data, tensor)
    elif refuse_nan and tensor.datatype.startswith("FP"):
        values = np.frombuffer(data, dtype=NUMPY[tensor.datatype])
        if not np.isfinite(values).all():
            raise InvalidRequest(
                f"input {tensor.name!r} holds NaN or infinity, which this service refuses"
            )


def _check_strings(data: memoryview, tensor: TensorIn) -> None:
    """Length prefixes must fit the buffer and the shape exactly, and elements be text.

    Checked in our copy, before the request shares a batch: an engine takes strings, and bytes
    that are none could only reach it altered.
    """
    count, position = 0, 0
    try:
        while position + LENGTH.size <= len(data):
            start = position + LENGTH.size
            position = start + LENGTH.unpack_from(data, position)[0]
            str(data[start:position], "utf-8")
            count += 1
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"input {tensor.name!r}: element {count} is not UTF-8 text, which the model takes"
            f" ({error.reason} at byte {error.start})"
        ) from None
    if position != len(data) or count != math.prod(tensor.shape):
        raise InvalidRequest(
            f"input {tensor.name!r}: shape {list(tensor.shape)} needs {math.prod(tensor.shape)} "
            "length-prefixed elements that fill the data exactly"
        )


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
