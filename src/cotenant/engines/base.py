"""The contract between a worker and an engine. To add one, see docs/howto-device.md.

An ``Engine`` answers a request in one execution. A ``TurnEngine`` answers it in as many turns as it
takes, and keeps what it needs of the request between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt

from cotenant.domain.config import ModelSettings
from cotenant.domain.device import CPU, CUDA, CUDA_SUBSETS
from cotenant.domain.errors import ModelError
from cotenant.domain.port import Language, TensorMeta
from cotenant.engines.placement import Executed
from cotenant.policy.memory.account import PoolUse

Array = npt.NDArray[Any]
USUAL: Final = ModelSettings()
BOUND_FROM: Final = 256 << 10
"""Bytes of outputs together from which to have them written where they are wanted costs less than
the copy that it saves."""

NUMPY: dict[str, npt.DTypeLike] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BYTES": np.object_,
}
"""Open Inference Protocol datatypes as NumPy types. BF16 has none, so no engine takes it. Elements
of BYTES are ``str``: what is not UTF-8 is refused before it is queued."""


class EngineMeta(msgspec.Struct, frozen=True):
    """What a loaded model takes and gives. ``batchable``: axis 0 is a batch axis, so rows of
    several requests may be joined along it (shapes here include that axis, as -1). An engine says
    so where axis 0 of every tensor is free; ``engines.joining`` judges whether it is true.
    ``turns``: its engine is a ``TurnEngine``; then requests share turns, whatever their shapes.
    ``context``: of a language model, the most tokens of prompt and answer together; ``room``: those
    of all requests that it can hold at one time, in ``pool`` bytes (see ``Pooled``),
    blocks of ``block``."""

    platform: str
    inputs: tuple[TensorMeta, ...]
    outputs: tuple[TensorMeta, ...]
    batchable: bool
    turns: bool = False
    context: int = 0
    room: int = 0
    pool: int = 0
    block: int = 1

    @property
    def shared(self) -> bool:
        """Whether several requests may be executed together."""
        return self.batchable or self.turns


class Engine(Protocol):
    """A loaded model, ready on each of the unit counts it was opened for."""

    @property
    def meta(self) -> EngineMeta:
        """Inputs, outputs, platform."""

    @property
    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """By tensor, the model's own names of its axes; "" for those that have none."""

    def run(self, units: int, inputs: dict[str, Array]) -> list[Array]:
        """Execute on ``units`` compute units; outputs in the order of ``meta.outputs``.

        Raises ModelError with the engine's own words if the model refuses the input.
        """


class Room(Protocol):
    """Memory for the outputs of an execution, where whoever asked will look for them."""

    def take(self, outputs: Sequence[tuple[tuple[int, ...], npt.DTypeLike]]) -> list[Array] | None:
        """An array for each of these shapes and types, in the order of ``meta.outputs``; None if
        they do not fit. They are what ``run_into`` is to return, if it writes to them."""


@runtime_checkable
class InPlace(Protocol):
    """An engine that can write outputs where they are wanted, without a copy."""

    def run_into(self, units: int, inputs: dict[str, Array], room: Room) -> list[Array]:
        """As ``Engine.run``. Outputs are in ``room`` where their shapes are known before and that
        pays; otherwise they are the engine's own."""


@runtime_checkable
class Noted(Protocol):
    """An engine that has something to say of how it executes here."""

    @property
    def notes(self) -> Sequence[str]:
        """What the model's owner should know, once it was tried."""


@runtime_checkable
class Tells(Protocol):
    """An engine that can say which operators it executes where."""

    def executed(self) -> tuple[Executed, ...]:
        """Those of the model as it was rewritten; some engines know once it was tried."""


@runtime_checkable
class Placeable(Protocol):
    """An engine to which not only the number of its units matters, but which they are."""

    def place(self, units: Sequence[int]) -> None:
        """Execute on these units of the device from now on: on as many of them as ``run`` says,
        the first ones. Before the first call any will do."""

    def settle(self) -> None:
        """It serves from now on: what makes an execution take longer, for the sake of later ones,
        is no longer to be done."""


class Turn(NamedTuple):
    """What became of a request in a turn: what it emitted, in the order of ``meta.outputs`` (None:
    nothing), of so many tokens (``said``), and whether it is finished. With an ``error`` it is,
    without an answer."""

    outputs: list[Array] | None
    finished: bool
    error: str = ""
    said: int = 0


class Turns(NamedTuple):
    """A turn of several requests, in their order. ``work``: see ``events.BatchDone``."""

    turns: list[Turn]
    work: tuple[int, int] = (0, 0)


@runtime_checkable
class TurnEngine(Protocol):
    """A loaded model whose requests live through several turns. A key stands for a request; what
    is finished is forgotten by itself."""

    @property
    def meta(self) -> EngineMeta:
        """As an ``Engine``'s, with ``turns``."""

    def begin(self, key: int, inputs: dict[str, Array], due: int = 0, pace: int = 0) -> None:
        """Take a request up. ``inputs`` are views that are valid until this returns. Its first
        piece is wanted at ``due``, each further one ``pace`` later (ns): an engine that cannot do
        all at once does first what is wanted first.

        Raises ModelError if the model refuses the input; then nothing is kept.
        """

    def turn(self, units: int, keys: Sequence[int], budget: int) -> Turns:
        """One turn of these requests on ``units`` compute units. It should take no longer than
        ``budget`` ns (0: any time), where the engine can do less in one.

        Raises ModelError if all of them are to fail.
        """

    def forget(self, keys: Sequence[int]) -> None:
        """Nobody waits for these any more. Unknown ones are passed over."""


@runtime_checkable
class Pooled(Protocol):
    """A turn engine whose requests share a pool of memory that can be made smaller and larger."""

    def resize(self, size: int) -> None:
        """Have at most so many bytes, as soon as that can be; what is given is the system's."""

    def pool_use(self) -> PoolUse:
        """What it has and wants."""


def size_of(meta: EngineMeta, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How large one row of a request is, in elements: of each input with free axes the product of
    those (the batch axis aside), added up; 1 where all is fixed. Time grows with it."""
    first = 1 if meta.batchable else 0
    total = 0
    for tensor in meta.inputs:
        if -1 in tensor.shape[first:]:
            given = shapes[tensor.name]
            pairs = zip(given[first:], tensor.shape[first:], strict=True)
            total += prod(have for have, want in pairs if want == -1)
    return max(1, total)


def nearest(known: Iterable[int], units: int) -> int:
    """Of the unit counts that a model was opened for the one to execute on ``units`` with. Fewer
    threads than cores are slower but right; more would fight for them."""
    counts = sorted(known)
    return max((n for n in counts if n <= units), default=counts[0])


def first_line(error: Exception) -> str:
    """What an engine's error says, without its details."""
    text = str(error).strip()
    return text.splitlines()[0][:500] if text else type(error).__name__


FAILURES = (ModelError, ValueError, MemoryError)
"""What a model may raise on an input; anything else is a bug and ends the worker."""


class Target(NamedTuple):
    """What a model executes on: ``processor`` as in ``domain.device.PROCESSOR``. ``partitions``:
    the units of those that there are for services now; others may come."""

    processor: str = CPU
    partitions: tuple[tuple[int, ...], ...] = ()

    @property
    def on_cpu(self) -> bool:
        """Whether that is the CPU."""
        return self.processor == CPU

    @property
    def on_cuda(self) -> bool:
        """Whether that is an NVIDIA GPU, or subsets of one."""
        return self.processor.startswith((CUDA, CUDA_SUBSETS))


ON_CPU: Final = Target()


class Opening(NamedTuple):
    """A model to be opened: its file, for each of these unit counts, a language model with at most
    ``kv`` bytes of keys and values."""

    path: Path
    units: Sequence[int]
    settings: ModelSettings = USUAL
    kv: int = 2**30
    target: Target = ON_CPU


class Candidate(msgspec.Struct, frozen=True, array_like=True):
    """An engine by name, as one that could open a model. ``refusal``: why it cannot, "" if it can
    as far as that is known before it is tried."""

    name: str
    refusal: str = ""


class EngineKind(Protocol):
    """An engine as one that could be opened: what an entry point of the group ``cotenant.engines``
    names (``engines.registry``). To import it is cheap: libraries are imported when it opens."""

    @property
    def name(self) -> str:
        """As ``engine`` of ``model.yaml`` says it. Kinds for different processors may share one."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """How model files end that it opens, by preference."""

    @property
    def rank(self) -> int:
        """Of several that can open a model the lowest does."""

    @property
    def drafts(self) -> bool:
        """Whether it takes a draft model."""

    def refuses(self, opening: Opening) -> str:
        """Why it cannot open this, and what would help; "" if it can, as far as that is known
        before."""

    def open(self, opening: Opening) -> Engine | TurnEngine:
        """Load the model; raises ModelError."""


@runtime_checkable
class Speaking(Protocol):
    """A kind of engine for language models."""

    def language(self, path: Path) -> Language:
        """The language of the model at ``path``; raises ModelError."""
